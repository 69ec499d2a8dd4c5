"""ContextEncoder: token ids of chunks to features, read off the frozen base model.

Four kinds: the hidden states that enter every layer (per_layer_activations), the normed last state of the model cut
short (early_exit), several layers' states side by side (multi_layer), or the token embeddings (embed_only). The base
model lends its weights; it is not part of this module's parameters or state dict.

    encoder = ContextEncoder(base_model, kind="per_layer_activations")
    encoder = ContextEncoder(base_model, kind="per_layer_activations", layer_idx=[3, 4, 5], beside=4)
    features = encoder(ids, mask)            # [C, T], [C, T] -> [C, num_maps, T, D]
    features, mask = drop_context(features, mask)
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernet.base.targets import find_blocks

KINDS = ("per_layer_activations", "early_exit", "multi_layer", "embed_only")


class ContextEncoder(nn.Module):
    """Features of the base model, always without gradient.

    Args:
        base_model: a transformers causal LM, kept by reference: moving or saving this module does not touch it.
        kind: "per_layer_activations": the base model without its last block, as L maps: the states entering its L - 1
            blocks, embeddings first, and the state after them with the final norm applied; with a list as `layer_idx`
            only the maps of these layers. "early_exit": one map, the state after `layer_idx` blocks with the final norm
            applied. "multi_layer": one map, the states after each of the `layer_idx` numbers of blocks, 0 being the
            embeddings, at unit rms and side by side; the last one has passed the final norm. "embed_only": one map, the
            output of the embedding layer.
        layer_idx: blocks to run, 1 to L, for early_exit; an ascending list of them, from 0 on, for multi_layer; the
            layers, from 0 to L - 1, for per_layer_activations, None being all.
        beside: for per_layer_activations: the state after so many blocks stands beside every layer's own; below 0 it
            counts from L. What early layers know of a token does not yet say whom it is about.
        context_tokens: tokens of the document that the base model sees in front of each chunk (see `chunk_document`).
            A sentence that says "she" is then read by what was said before. 0: as in the published checkpoints.

    Attributes:
        settings: the four above as a dict.
        num_maps: feature maps per chunk: the number of layers, or 1.
        feature_dim: D, the base model's hidden size; with multi_layer as many times that as there are states, with
            `beside` twice that.

    The base model runs as it is: an adapter that is injected changes the features, so set none while encoding.

    Raises:
        ValueError: unknown kind, layer_idx missing, out of range or given where it means nothing, context_tokens below
            0, or a base model whose blocks cannot be found.
    """

    def __init__(
        self,
        base_model: nn.Module,
        *,
        kind: str = "per_layer_activations",
        layer_idx: int | Sequence[int] | None = None,
        beside: int | None = None,
        context_tokens: int = 0,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Unknown context encoder kind {kind!r}: choose one of {', '.join(KINDS)}.")
        # Around nn.Module's registration: a registered base model would be saved with every hypernetwork.
        self.__dict__["base_model"] = base_model
        self.__dict__["_decoder"], self._blocks_name = find_blocks(base_model)
        config = base_model.config.get_text_config()
        self.kind = kind
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        last = config.num_hidden_layers
        if kind == "early_exit":
            if type(layer_idx) is not int or not 1 <= layer_idx <= last:
                raise ValueError(f"early_exit needs layer_idx between 1 and {last}, got {layer_idx}.")
        elif kind == "multi_layer":
            wanted = f"multi_layer needs layer_idx as an ascending list of numbers from 0 to {last}, got {layer_idx}."
            if isinstance(layer_idx, str) or not isinstance(layer_idx, Sequence) or not layer_idx:
                raise ValueError(wanted)
            if any(type(i) is not int or not 0 <= i <= last for i in layer_idx) or sorted({*layer_idx}) != [*layer_idx]:
                raise ValueError(wanted)
            self.layer_idx = list(layer_idx)
        elif kind == "per_layer_activations" and layer_idx is not None:
            wanted = f"per_layer_activations needs layer_idx as an ascending list of layers from 0 to {last - 1}"
            if isinstance(layer_idx, (str, int)) or not layer_idx:
                raise ValueError(f"{wanted}, or null for all, got {layer_idx}.")
            if any(type(i) is not int or not 0 <= i < last for i in layer_idx) or sorted({*layer_idx}) != [*layer_idx]:
                raise ValueError(f"{wanted}, or null for all, got {layer_idx}.")
            self.layer_idx = list(layer_idx)
        elif layer_idx is not None:
            raise ValueError(f"{kind} takes no layer_idx, got {layer_idx}. Leave it out.")
        self._layers = [] if kind != "per_layer_activations" else self.layer_idx or list(range(last))
        self.num_maps = len(self._layers) or 1
        if beside is not None and not self._layers:
            raise ValueError(f"beside is for per_layer_activations only, got {beside} with {kind}. Leave it out.")
        if beside is not None and (type(beside) is not int or not -last <= beside < last):
            raise ValueError(f"beside should be a number of blocks from {-last} to {last - 1}, got {beside!r}.")
        self.beside = beside = None if beside is None else beside % last
        if type(context_tokens) is not int or context_tokens < 0:
            raise ValueError(f"context_tokens should be a whole number, at least 0, but is {context_tokens!r}.")
        self.context_tokens = context_tokens
        self.settings = {
            "kind": kind,
            "layer_idx": self.layer_idx,
            "beside": beside,
            "context_tokens": context_tokens,
        }
        side_by_side = len(self.layer_idx) if kind == "multi_layer" else 1 if beside is None else 2
        self.feature_dim = self.hidden_size * side_by_side

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [C, T], right-padded, and mask [C, T] (True or 1: a token) -> features [C, num_maps, T, D].

        What the mask leaves out before its last token is context: seen by the tokens behind it. Features at the padding
        are not defined.
        """
        maps: list[Tensor] = []
        self.stream(ids, mask, lambda _, features: maps.append(features))
        return torch.stack(maps, dim=1)

    @torch.no_grad()
    def stream(self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Hands each map [C, T, D] to `read(index, features)` as soon as it is computed, and keeps none; with `beside`
        the maps of the layers before that state wait for it.

        Args:
            ids, mask: as of `forward`.
            read: called for index 0 to num_maps - 1, in order, while the base model runs; what it raises ends the run.

        Raises:
            ValueError: the base model's blocks pass on something else than [C, T, D].
        """
        if self.kind == "embed_only":
            read(0, self._decoder.get_input_embeddings()(ids))
            return
        if self.kind == "early_exit":
            with self._cut_after(self.layer_idx):
                read(0, self._last_state(ids, mask))
            return
        if self.kind == "multi_layer":
            states: list[Tensor] = []
            self._states(ids, mask, self.layer_idx, lambda _, state: states.append(F.rms_norm(state, state.shape[-1:])))
            read(0, torch.cat(states, dim=-1))
            return
        if self.beside is None:
            self._states(ids, mask, self._layers, read)
            return
        after = sorted({*self._layers, self.beside})
        waiting: dict[int, Tensor] = {}
        shared: list[Tensor] = []

        def read_pair(index: int, state: Tensor) -> None:
            if after[index] == self.beside:
                shared.append(state)
            if after[index] in self._layers:
                waiting[self._layers.index(after[index])] = state
            if shared:
                for number in sorted(waiting):
                    read(number, torch.cat([waiting.pop(number), shared[0]], dim=-1))

        self._states(ids, mask, after, read_pair)

    def _states(self, ids: Tensor, mask: Tensor, after: Sequence[int], read: Callable[[int, Tensor], None]) -> None:
        """Calls read(position in `after`, state after that many blocks); the last state has passed the final norm."""

        def read_input(index: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            if states.shape != (*ids.shape, self.hidden_size):
                raise ValueError(
                    f"{type(block).__name__} takes states {list(states.shape)}, not [C, T, D={self.hidden_size}], so "
                    "there are no activations per layer to read. Set the context encoder's kind to early_exit."
                )
            read(index, states)

        with ExitStack() as undo, self._cut_after(after[-1]) as blocks:
            for index, number in enumerate(after[:-1]):
                hook = blocks[number].register_forward_pre_hook(partial(read_input, index), with_kwargs=True)
                undo.callback(hook.remove)
            read(len(after) - 1, self._last_state(ids, mask))

    def _last_state(self, ids: Tensor, mask: Tensor) -> Tensor:
        seen = mask.long().flip(1).cummax(1).values.flip(1)  # everything up to the last token of the chunk
        return self._decoder(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state

    @contextmanager
    def _cut_after(self, num_blocks: int):
        """The decoder with its first blocks only, until the context ends."""
        # Not transformers' output_hidden_states: it installs its hooks once per model, so a first call on the cut model
        # would leave the last block without them for good.
        blocks = getattr(self._decoder, self._blocks_name)
        setattr(self._decoder, self._blocks_name, blocks[:num_blocks])
        try:
            yield blocks[:num_blocks]
        finally:
            setattr(self._decoder, self._blocks_name, blocks)


def drop_context(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features [C, M, T, D] and mask [C, T] of the chunks' own tokens, moved together; as they are without context.

    Returns:
        [C, M, T', D] and [C, T'], T' the most tokens that a chunk has.
    """
    mask = mask.bool()
    if (mask[:, 1:] <= mask[:, :-1]).all():
        return features, mask
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return features.take_along_dim(order[:, None, :, None], dim=2), mask.gather(1, order)
