"""read_chunks: any number of chunks to their LoRA matrices; memory beyond these does not grow with their number.

    A, B = read_chunks(rows, context_encoder, hypernetwork, max_batch_tokens=4096)

Chunks go through the base model in batches of at most `max_batch_tokens`. Each layer's features go to the hypernetwork
as soon as the base model has computed them and are dropped again: L maps never exist together. Only A and B grow.

`read_in_passes` reads them in passes of one shape, so that what a chunk becomes depends on no other chunk, to the bit.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.functional import pad

from hypernet.base.targets import EndOfPass
from hypernet.model.context_encoder import ContextEncoder, drop_context
from hypernet.model.hypernetwork import HyperNetwork

log = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 4096
_LEAST_TOGETHER = 8  # chunks of a batch of `read_and_write`
WIDTH_STEP = 16  # tokens: `read_in_passes` pads chunks to a multiple of it

Weights = dict[str, Tensor]
"""Target name to [C, L, R, d]."""


@torch.no_grad()
def read_chunks(
    rows: Sequence[tuple[Tensor, Tensor]],
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    *,
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Weights, Weights]:
    """LoRA matrices of every chunk, without gradients.

    Args:
        rows: (ids [T], mask [T]) per chunk, right-padded, on any device.
        max_batch_tokens: most tokens read at once, context and padding included; a longer chunk is read alone. Where
            memory runs out, it is halved and the batch is read again.
        progress: called with (chunks done, chunks altogether), before the first batch and after each.

    Returns:
        A, B by target name, [C, L, R, d_in] and [C, L, R, d_out], contiguous per layer, on the hypernetwork's device.

    Raises:
        ValueError: max_batch_tokens below 1.
        MemoryError: a single chunk does not fit.
    """
    if isinstance(max_batch_tokens, bool) or not isinstance(max_batch_tokens, int) or max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens should be a whole number, at least 1, got {max_batch_tokens!r}.")
    parameter = next(hypernetwork.parameters())

    def empty(d: int, num_layers: int) -> Tensor:
        # Layers outermost in memory: A[:, layer] needs no copy to become a matrix.
        shape = (num_layers, len(rows), hypernetwork.rank, d)
        return torch.empty(shape, dtype=parameter.dtype, device=parameter.device).transpose(0, 1)

    A = {target.name: empty(target.d_in, len(target.paths)) for target in hypernetwork.targets}
    B = {target.name: empty(target.d_out, len(target.paths)) for target in hypernetwork.targets}
    lengths = [_length(mask) for _, mask in rows]
    done = 0
    if progress:
        progress(0, len(rows))
    while done < len(rows):
        count = _fitting(lengths[done:], max_batch_tokens)
        try:
            where = slice(done, done + count)
            _read_batch(rows[where], where, context_encoder, hypernetwork, A, B, max_batch_tokens)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        else:
            done += count
            if progress:
                progress(done, len(rows))
            continue
        # Out here the failed batch's tensors are gone with the exception's frames.
        tokens = count * max(lengths[done : done + count])
        if count == 1:
            raise MemoryError(
                f"Out of memory: one chunk of {tokens} tokens does not fit on {parameter.device} ({reason}). "
                "Lower max_chunk_tokens, or load the base model in bfloat16."
            )
        max_batch_tokens = max(1, tokens // 2)
        log.warning("Out of memory with %d tokens at once; going on with %d.", tokens, max_batch_tokens)
        if parameter.device.type == "cuda":
            torch.cuda.empty_cache()
    return A, B


def read_and_write(
    ids: Tensor,
    mask: Tensor,
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    *,
    keys_only: bool = False,
) -> tuple[Weights, Weights]:
    """A and B of chunks whose rows act while they are read, layer after layer; differentiable, but for what acts.

    Args:
        ids, mask: [C, T], as of the context encoder.
        keys_only: end where the layers for keys do.
    """
    lengths = [_length(row) for row in mask]
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    # Sentences are of 10 to 56 tokens: read in four batches by length, 84 of them are half of what one would pad.
    size = max(_LEAST_TOGETHER, -(-len(order) // 4))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    made = []
    for group in groups:
        width = lengths[group[-1]]
        made.append(_read_together(ids[group, :width], mask[group, :width], context_encoder, hypernetwork, keys_only))
    back = torch.tensor(order, device=ids.device).argsort()
    A, B = ({name: torch.cat([one[part][name] for one in made])[back] for name in made[0][part]} for part in (0, 1))
    return A, B


def _read_together(
    ids: Tensor, mask: Tensor, context_encoder: ContextEncoder, hypernetwork: HyperNetwork, keys_only: bool
) -> tuple[Weights, Weights]:
    layers: list[tuple[Weights, Weights]] = []
    with_gradient = torch.is_grad_enabled()
    write = _Writing(mask, hypernetwork)

    def read(index: int, features: Tensor) -> Tensor | None:
        with torch.set_grad_enabled(with_gradient):
            made, added = write(index, features)
        if made is not None:
            layers.append(made)
            if keys_only:
                raise EndOfPass
        return added

    with suppress(EndOfPass):
        context_encoder.stream(ids, mask, read)
    A, B = ({name: torch.cat([made[part][name] for made in layers], 1) for name in layers[0][part]} for part in (0, 1))
    return A, B


class _Writing:
    """Layer by layer A and B [C, l, R, d] of a recitation, and what they add to the module's output, [C, T, d_out].

    Keys add nothing and are made when all of their layers were read, of which each token is kept from one.
    """

    def __init__(self, mask: Tensor, hypernetwork: HyperNetwork) -> None:
        assert hypernetwork.recitation is not None
        self.mask, self.part, self.scaling = mask, hypernetwork.recitation, hypernetwork.scaling
        (self.target,) = hypernetwork.targets
        self._own: Tensor | None = None

    def __call__(self, index: int, features: Tensor) -> tuple[tuple[Weights, Weights] | None, Tensor | None]:
        name, d_in, d_out = self.target.name, self.target.d_in, self.target.d_out
        x = features[..., :d_in].float() * self.mask[..., None]
        num_keys = self.part.num_key_layers
        if index >= num_keys:
            read, mask = drop_context(features[:, None], self.mask)
            A, B = self.part.saying(index, read[:, 0], mask)
            return ({name: A[:, None]}, {name: B[:, None]}), self.scaling * (x @ A.detach().mT) @ B.detach()
        read, mask = drop_context(x[:, None], self.mask)
        x = read[:, 0]
        turn = torch.arange(x.shape[1] - 1, device=x.device) % num_keys == index
        self._own = torch.where(turn[:, None], x[:, 1:], 0 if self._own is None else self._own)
        if index < num_keys - 1:
            return None, None
        A = self.part.keys(self._own, mask)
        return ({name: A}, {name: A.new_zeros(*A.shape[:3], d_out)}), None


@torch.no_grad()
def read_in_passes(
    rows: Sequence[tuple[Tensor, Tensor]],
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    *,
    pass_chunks: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Weights, Weights]:
    """As `read_chunks`, and the same bits for a chunk whatever is read with it, before it or after it.

    A product of matrices rounds otherwise for another number of rows: of 300 sentences read alone and in one batch 148
    agree to the bit, the others to 3e-7. So every pass has `pass_chunks` rows padded to one of few widths, the last of
    them a filler of full width.

    Args:
        pass_chunks: rows of a pass, at least 2.
        progress: called with (chunks done, chunks altogether) after each pass.

    Raises:
        ValueError: pass_chunks below 2.
        MemoryError: as `read_chunks`.
    """
    if isinstance(pass_chunks, bool) or not isinstance(pass_chunks, int) or pass_chunks < 2:
        raise ValueError(f"pass_chunks should be a whole number, at least 2, got {pass_chunks!r}.")
    of_width: dict[int, list[int]] = {}
    for place, (_, mask) in enumerate(rows):
        of_width.setdefault(-(-_length(mask) // WIDTH_STEP) * WIDTH_STEP, []).append(place)
    A, B = read_chunks([], context_encoder, hypernetwork)
    A, B = (
        {n: part.new_empty(part.shape[1], len(rows), *part.shape[2:]).transpose(0, 1) for n, part in parts.items()}
        for parts in (A, B)
    )
    done = 0
    for width, places in of_width.items():
        read_tokens = width if hypernetwork.recitation is None else min(width, hypernetwork.recitation.max_tokens)
        filler = torch.full((width,), int(rows[places[0]][0][0])), torch.arange(width) >= width - read_tokens
        for start in range(0, len(places), pass_chunks - 1):
            chosen = places[start : start + pass_chunks - 1]
            batch = [rows[place] for place in chosen] + [filler] * (pass_chunks - len(chosen))
            read = read_chunks(batch, context_encoder, hypernetwork, max_batch_tokens=pass_chunks * width)
            for weights, parts in zip((A, B), read, strict=True):
                for name, part in parts.items():
                    weights[name][chosen] = part[: len(chosen)]
            done += len(chosen)
            if progress:
                progress(done, len(rows))
    return A, B


def _read_batch(
    rows: Sequence[tuple[Tensor, Tensor]],
    where: slice,
    context_encoder: ContextEncoder,
    hypernetwork: HyperNetwork,
    A: Weights,
    B: Weights,
    max_batch_tokens: int,
) -> None:
    """Fills A[:][where] and B[:][where] from these chunks, as many maps together as stay within the budget."""
    parameter = next(hypernetwork.parameters())
    width = max(_length(mask) for _, mask in rows)
    ids, mask = (
        torch.stack([pad(row[i][:width], (0, max(0, width - len(row[i])))) for row in rows]).to(parameter.device)
        for i in (0, 1)
    )

    # Short documents: several layers' maps make one call, which for 300 tokens takes a third less time than one each.
    per_call = max(1, max_batch_tokens // ids.numel()) if hypernetwork.num_maps > 1 else 1
    maps: list[Tensor] = []

    write = None if hypernetwork.recitation is None else _Writing(mask, hypernetwork)

    def read(index: int, features: Tensor) -> Tensor | None:
        if write is not None:
            made, added = write(index, features)
            for weights, parts in zip((A, B), made or ({}, {}), strict=True):
                for name, part in parts.items():
                    weights[name][where, index + 1 - part.shape[1] : index + 1] = part
            return added
        maps.append(features)
        if len(maps) < per_call and index + 1 < hypernetwork.num_maps:
            return None
        layers = slice(index + 1 - len(maps), index + 1) if hypernetwork.num_maps > 1 else slice(None)
        # The base model may be in half precision; the hypernetwork decides its own type.
        generated = hypernetwork(*drop_context(torch.stack(maps, dim=1).to(parameter.dtype), mask), layers=layers)
        maps.clear()
        for weights, parts in zip((A, B), generated, strict=True):
            for name, part in parts.items():
                weights[name][where, layers] = part
        return None

    context_encoder.stream(ids, mask, read)


def _length(mask: Tensor) -> int:
    """Tokens of a chunk with its context, without the padding behind it."""
    return int(mask.nonzero().max()) + 1


def _fitting(lengths: Sequence[int], max_batch_tokens: int) -> int:
    """How many of the first chunks fit into one batch, padded to the longest; at least one."""
    count, width = 0, 0
    for length in lengths:
        width = max(width, length)
        if count and width * (count + 1) > max_batch_tokens:
            break
        count += 1
    return count


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On a GPU torch has a type for it; on a CPU the allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
