"""Attention inside packed rows, block by block, so that no product is computed between questions that never meet.

A row (`hypernet.base.packed_rows`) is a prefix and segments; a segment sees the prefix and itself. With a mask over the
whole row the work grows with the square of its length; here the prefix is one causal block, and every segment
one block of its length times (prefix + its length).

    logits = packed_logits(base_model, rows, rows.target_kind >= 0)      # [number of answer tokens, V]
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hypernet.base.attention import attend
from hypernet.base.base_model import logits_at
from hypernet.base.packed_rows import PackedRows

NAME = "packed_rows"  # among transformers' attention implementations


class _Group(NamedTuple):
    """Segments of similar length, [G] of them, padded to s tokens.

    rows: the row of each, [G], or None where they see no prefix. tokens: positions in the flattened rows, [G, s].
    mask: what a token sees of (prefix, own segment), [G, 1, s, T + s] or [G, 1, s, s].
    """

    rows: Tensor | None
    tokens: Tensor
    mask: Tensor


class RowBlocks(NamedTuple):
    """How packed rows fall apart into blocks.

    num_prefix: T, tokens of the longest prefix. groups: the segments. place: where each position of the flattened rows
    stands in the concatenated outputs of prefix and groups, [N * S].
    """

    num_prefix: int
    groups: tuple[_Group, ...]
    place: Tensor

    @classmethod
    def of(cls, rows: PackedRows) -> "RowBlocks":
        """Reads the rows' segments on the host once."""
        segments, sees = rows.segments.cpu(), rows.sees_prefix.cpu()
        num_rows, width = segments.shape
        num_prefix = int((segments == 0).sum(1).max())
        prefix_mask = torch.arange(num_prefix) < (segments == 0).sum(1, keepdim=True)  # [N, T]

        key = (torch.arange(num_rows)[:, None] * (width + 2) + segments + 1).flatten()
        _, lengths = torch.unique_consecutive(key, return_counts=True)
        starts = lengths.cumsum(0) - lengths
        is_segment = segments.flatten()[starts] > 0
        starts, lengths = starts[is_segment], lengths[is_segment]
        place = torch.zeros(num_rows * width, dtype=torch.long)  # padding shows any output; nobody reads it
        in_prefix = (segments == 0).flatten()
        row, column = torch.arange(num_rows * width) // width, torch.arange(num_rows * width) % width
        place[in_prefix] = (row * num_prefix + column)[in_prefix]

        groups, offset = [], num_rows * num_prefix
        seeing = sees.flatten()[starts]
        # A reordering is several times as long as a question; together they would all be padded to its length.
        long = lengths > 2 * lengths.median() if len(lengths) else lengths > 0
        for sees_prefix in (True, False):
            for is_long in (False, True):
                chosen = (seeing == sees_prefix) & (long == is_long)
                if not chosen.any():
                    continue
                first, length = starts[chosen], lengths[chosen]
                size = int(length.max())
                step = torch.arange(size)
                valid = step < length[:, None]  # [G, s]
                tokens = torch.where(valid, first[:, None] + step, first[:, None])
                mask = (valid[:, None, :] & torch.ones(size, size, dtype=torch.bool).tril())[:, None]
                group_rows = None
                if sees_prefix and num_prefix:
                    group_rows = first // width
                    seen = prefix_mask[group_rows][:, None, None].expand(-1, 1, size, -1)
                    mask = torch.cat([seen, mask], dim=-1)
                place[tokens[valid]] = offset + valid.flatten().nonzero()[:, 0]
                offset += tokens.numel()
                groups.append(_Group(group_rows, tokens, mask))
        device = rows.segments.device
        return cls(
            num_prefix,
            tuple(_Group(*(None if t is None else t.to(device) for t in group)) for group in groups),
            place.to(device),
        )


def packed_logits(base_model: nn.Module, rows: PackedRows, where: Tensor) -> Tensor:
    """Logits of packed rows at some positions, as if every segment were a separate prompt.

    By blocks where the model's attention is plain, else with a mask over the whole rows.

    Args:
        where: which positions, [N, S] bool.

    Returns:
        [number of True, V], in the rows' order.
    """
    inputs = {"input_ids": rows.ids, "position_ids": rows.positions}
    if not supports_packed_attention(base_model):
        device = rows.ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base_model.dtype
        return logits_at(base_model, where, attention_mask=rows.attention_mask(dtype), **inputs)
    before = base_model.config._attn_implementation
    base_model.config._attn_implementation = NAME
    try:
        return logits_at(base_model, where, packed_blocks=RowBlocks.of(rows), **inputs)
    finally:
        base_model.config._attn_implementation = before


def supports_packed_attention(base_model: nn.Module) -> bool:
    """Whether plain causal attention is all this model does: no soft cap, no window, no other kind of layer.

    And whether it is torch's: a caller who asked for eager or another implementation gets that one.
    """
    config = base_model.config.get_text_config()
    if base_model.config._attn_implementation != "sdpa":
        return False
    # A checkpointed layer runs again when the attention implementation is no longer set.
    if base_model.training and any(getattr(m, "gradient_checkpointing", False) for m in base_model.modules()):
        return False
    plain = not any(
        getattr(config, key, None) for key in ("attn_logit_softcapping", "sliding_window", "attention_chunk_size")
    )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return plain and kinds == {"full_attention"} and getattr(base_model, "_supports_attention_backend", False)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_blocks: RowBlocks,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [N, H, S, D], key and value [N, H_kv, S, D] → [N, S, H, D]."""
    num_rows, num_heads, width, head_dim = query.shape
    grouped = num_heads != key.shape[1]
    T = packed_blocks.num_prefix

    def mixed(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:  # [G, s, H, D] each
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = attend(q, k, v, scale=scaling, dropout_p=dropout, enable_gqa=grouped, **how)
        return out.transpose(1, 2)

    # Tokens first: a gather then moves whole tokens.
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    outputs = []
    if T:
        outputs.append(mixed(q[:, :T], k[:, :T], v[:, :T], is_causal=True))
    q_flat, k_flat, v_flat = (tensor.reshape(num_rows * width, *tensor.shape[2:]) for tensor in (q, k, v))
    for group in packed_blocks.groups:
        own = [flat[group.tokens] for flat in (q_flat, k_flat, v_flat)]
        if group.rows is not None:
            own[1:] = [
                torch.cat([prefix[:, :T].index_select(0, group.rows), part], dim=1)
                for prefix, part in zip((k, v), own[1:], strict=True)
            ]
        outputs.append(mixed(*own, attn_mask=group.mask))
    flat = torch.cat([output.reshape(-1, num_heads, head_dim) for output in outputs])
    return flat.index_select(0, packed_blocks.place).view(num_rows, width, num_heads, head_dim), None


AttentionInterface.register(NAME, _attend)
