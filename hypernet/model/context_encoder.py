"""Context encoders: token ids of chunks to features, read off the frozen base model. A class for each kind.

    PerLayerActivations    the hidden states that enter every layer
    EarlyExit              the normed last state of the base model cut short
    EmbedOnly              the token embeddings
    Recited                what enters one module of every block, of a chunk that the base model says itself

The base model lends its weights; it is not part of these modules' parameters or state dicts.

    encoder = make_context_encoder(base_model, {"kind": "per_layer_activations", "layer_idx": [3, 4, 5]})
    encoder = PerLayerActivations(base_model, layer_idx=[3, 4, 5])     # the same
    features = encoder(ids, mask)            # [C, T], [C, T] -> [C, num_maps, T, D]
    features, mask = drop_context(features, mask)
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hypernet.base.targets import find_blocks, find_targets
from hypernet.text.chat import ChatLayout
from hypernet.text.chunking import Frame
from hypernet.text.tokens import framed_ids


class ContextEncoder(nn.Module, ABC):
    """Features of the base model, always without gradient.

    Args:
        base_model: a transformers causal LM, kept by reference: moving or saving this module does not touch it.
        context_tokens: tokens of the document that the base model sees in front of each chunk (see `chunk_document`).
            A sentence that says "she" is then read by what was said before. 0: as in the published checkpoints.

    Attributes:
        kind: the name that settings give to the class.
        settings: plain dict, from which `make_context_encoder` makes the same encoder.
        num_maps: feature maps per chunk.
        num_readings: how often a chunk is read at once, each time behind other words (`Recited`).
        unread: leading tokens of every row that no map shows.
        feature_dim: D, the width of a map.
        min_chunk_tokens: how a document is cut for it, as of `chunk_document`.

    The base model runs as it is: an adapter that is injected changes the features, so set none while encoding.

    Raises:
        ValueError: context_tokens is below 0, or the base model's blocks cannot be found.
    """

    kind: ClassVar[str]

    base_model: PreTrainedModel
    _decoder: Any

    def __init__(self, base_model: PreTrainedModel, *, context_tokens: int = 0) -> None:
        super().__init__()
        # Around nn.Module's registration: a registered base model would be saved with every hypernetwork.
        self.__dict__["base_model"] = base_model
        self.__dict__["_decoder"], self._blocks_name = find_blocks(base_model)
        config = base_model.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        if type(context_tokens) is not int or context_tokens < 0:
            raise ValueError(f"context_tokens should be a whole number, at least 0, but is {context_tokens!r}.")
        self.context_tokens = context_tokens
        self.num_maps = 1
        self.num_readings = 1
        self.unread = 0
        self.feature_dim = self.hidden_size
        self.min_chunk_tokens: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "context_tokens": self.context_tokens}

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame | None:
        """What a chunk is read in; None: the user's turn of the chat template."""
        return None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [C, T], right-padded, and mask [C, T] (True or 1: a token) -> features [C, num_maps, T, D].

        What the mask leaves out before its last token is context: seen by the tokens behind it. Features at the padding
        are not defined.
        """
        maps: list[Tensor] = []
        self.stream(ids, mask, lambda _, features: maps.append(features), readings=1)
        return F.pad(torch.stack(maps, dim=1), (0, 0, self.unread, 0))

    @torch.no_grad()
    def stream(
        self,
        ids: Tensor,
        mask: Tensor,
        read: Callable[[int, Tensor], Tensor | None],
        *,
        readings: int | None = None,
    ) -> Tensor | None:
        """Hands each map to `read(index, features)` as soon as it is computed, and keeps none.

        Args:
            ids, mask: as of `forward`.
            read: called for index 0 to num_maps - 1, in order, while the base model runs; what it raises ends the run.
                The features are [M C, T - unread, D], reading after reading. What it returns is added to the module's
                output where the features are those of one (`Recited`).
            readings: M, the first ones; None: all of them.

        Returns:
            Of `Recited` the last states, [M C, T - unread, hidden size].

        Raises:
            ValueError: the base model's blocks pass on something else than [C, T, D], or rows do not begin as the
                encoder's `frame` has it.
        """
        return self._read_maps(ids, mask, read, self.num_readings if readings is None else readings)

    @abstractmethod
    def _read_maps(
        self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], Tensor | None], readings: int
    ) -> Tensor | None: ...

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the `with` block what all chunks share is read once; the base model's weights stay as they are."""
        yield

    def num_read(self, num_tokens: int) -> int:
        """Tokens that the base model reads for a row of so many."""
        return self.num_readings * (num_tokens - self.unread)

    def _last_state(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._decoder(input_ids=ids, attention_mask=self._seen(mask), use_cache=False).last_hidden_state

    @staticmethod
    def _seen(mask: Tensor) -> Tensor:
        """[C, T]: 1 up to the last token of the chunk."""
        return mask.long().flip(1).cummax(1).values.flip(1)

    @contextmanager
    def _cut_after(self, num_blocks: int) -> Iterator[nn.ModuleList]:
        """The decoder with its first blocks only, until the context ends."""
        # Not transformers' output_hidden_states: it installs its hooks once per model, so a first call on the cut model
        # would leave the last block without them for good.
        blocks = getattr(self._decoder, self._blocks_name)
        setattr(self._decoder, self._blocks_name, blocks[:num_blocks])
        try:
            yield blocks[:num_blocks]
        finally:
            setattr(self._decoder, self._blocks_name, blocks)


class PerLayerActivations(ContextEncoder):
    """The base model without its last block, as L maps.

    These are the states entering its L - 1 blocks, embeddings first, and the state after them with the final norm
    applied. With `concat_layer` the maps of the layers before that state wait for it, and D is twice the hidden size.

    Args:
        layer_idx: the layers whose maps are read, ascending, from 0 to L - 1; None: all. The last of them has passed
            the final norm.
        concat_layer: the state after so many blocks, concatenated to every map; below 0 it counts from L. What early
            layers know of a token does not yet say whom it is about. None: none.

    Raises:
        ValueError: a layer that there is not; and as of `ContextEncoder`.
    """

    kind = "per_layer_activations"

    def __init__(
        self,
        base_model: PreTrainedModel,
        *,
        layer_idx: Sequence[int] | None = None,
        concat_layer: int | None = None,
        context_tokens: int = 0,
    ) -> None:
        super().__init__(base_model, context_tokens=context_tokens)
        last = self.num_layers
        if layer_idx is not None and not _ascends(layer_idx, last):
            raise ValueError(
                f"per_layer_activations needs layer_idx as an ascending list of layers from 0 to {last - 1}, or null "
                f"for all, got {layer_idx}."
            )
        if concat_layer is not None and (type(concat_layer) is not int or not -last <= concat_layer < last):
            raise ValueError(
                f"concat_layer should be a number of blocks from {-last} to {last - 1}, got {concat_layer!r}."
            )
        self.layer_idx = None if layer_idx is None else list(layer_idx)
        self.concat_layer = None if concat_layer is None else concat_layer % last
        self._layers = self.layer_idx or list(range(last))
        self.num_maps = len(self._layers)
        self.feature_dim = self.hidden_size * (1 if concat_layer is None else 2)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "layer_idx": self.layer_idx, "concat_layer": self.concat_layer}

    def _read_maps(
        self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], Tensor | None], readings: int
    ) -> Tensor | None:
        if self.concat_layer is None:
            self._read_states(ids, mask, self._layers, read)
            return None
        after = sorted({*self._layers, self.concat_layer})
        waiting: dict[int, Tensor] = {}
        shared: list[Tensor] = []

        def read_pair(index: int, state: Tensor) -> None:
            if after[index] == self.concat_layer:
                shared.append(state)
            if after[index] in self._layers:
                waiting[self._layers.index(after[index])] = state
            if shared:
                for number in sorted(waiting):
                    read(number, torch.cat([waiting.pop(number), shared[0]], dim=-1))

        self._read_states(ids, mask, after, read_pair)
        return None

    def _read_states(
        self, ids: Tensor, mask: Tensor, after: Sequence[int], read: Callable[[int, Tensor], Tensor | None]
    ) -> None:
        """Calls read(position in `after`, state after that many blocks); the last state has passed the final norm."""

        def read_input(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


class EarlyExit(ContextEncoder):
    """One map, the state after `layer_idx` blocks, 1 to L, with the final norm applied.

    Raises:
        ValueError: there are not so many blocks; and as of `ContextEncoder`.
    """

    kind = "early_exit"

    def __init__(self, base_model: PreTrainedModel, *, layer_idx: int | None = None, context_tokens: int = 0) -> None:
        super().__init__(base_model, context_tokens=context_tokens)
        if type(layer_idx) is not int or not 1 <= layer_idx <= self.num_layers:
            raise ValueError(f"early_exit needs layer_idx between 1 and {self.num_layers}, got {layer_idx}.")
        self.layer_idx = layer_idx

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "layer_idx": self.layer_idx}

    def _read_maps(
        self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], Tensor | None], readings: int
    ) -> Tensor | None:
        with self._cut_after(self.layer_idx):
            read(0, self._last_state(ids, mask))
        return None


class EmbedOnly(ContextEncoder):
    """One map, the output of the embedding layer."""

    kind = "embed_only"

    def _read_maps(
        self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], Tensor | None], readings: int
    ) -> Tensor | None:
        read(0, self._decoder.get_input_embeddings()(ids))
        return None


class Recited(ContextEncoder):
    """A map for every block: what enters the module, the state that enters the block, and where the next token lies.

    The last is the direction in the final states that raises the next token's logit above the others' mean: its row of
    the output embeddings times the final norm's weights, less the mean over all tokens, at length 1.

    A chunk is read as the answer to `question` and, at once, to each of `other_questions`: what enters the modules
    differs by a tenth of its energy from one question to another, and a digit that is found behind one of them alone
    may be missed behind the user's. What stands before the answer is read once for all chunks.

    Args:
        tokenizer: the base model's; None: there are no other questions, and each row brings what stands before it.
        module: the adapted module.
        question: what the chunk is the answer to. Any will do; what is asked later is another one.
        other_questions: what it is the answer to in the second reading and those after it.
        min_chunk_tokens: a document is cut into its sentences, of which shorter ones are joined.

    Raises:
        ValueError: the base model's last norm is not found, other questions are no list of texts or lack a tokenizer;
            and as of `ContextEncoder` and `find_targets`.
    """

    kind = "recited"

    def __init__(
        self,
        base_model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        module: str = "down_proj",
        question: str = "What does the text say?",
        other_questions: Sequence[str] | None = None,
        min_chunk_tokens: int = 8,
        context_tokens: int = 0,
    ) -> None:
        super().__init__(base_model, context_tokens=context_tokens)
        self.min_chunk_tokens = min_chunk_tokens
        (target,) = find_targets(base_model, [module])
        if isinstance(other_questions, str) or not all(isinstance(one, str) for one in other_questions or ()):
            raise ValueError(f"other_questions should be a list of texts, got {other_questions!r}.")
        self.module, self.question, self.other_questions = module, question, list(other_questions or ())
        self._places = list(target.modules())
        self._mean_row: Tensor | None = None  # of the output embeddings: over 49,152 of them .1 s, so once
        self.num_maps = len(self._places)
        self.feature_dim = target.d_in + 2 * target.d_out
        if not hasattr(getattr(self._decoder, "norm", None), "weight"):
            raise ValueError(f"{type(base_model).__name__} has no final norm of that name. Use another kind.")
        self._keeps = False
        self._opening_cache: tuple[tuple[int, torch.device], Any] | None = None
        self._openings: list[list[int]] = []
        """Of each reading what stands before the token that the first one of the chunk follows."""
        if tokenizer is not None:
            frames = [self._frame(tokenizer, asked) for asked in (question, *self.other_questions)]
            self._openings = [frame.before[: frame.unread_before] for frame in frames]
            self.num_readings, self.unread = len(frames), len(self._openings[0])
        elif other_questions:
            raise ValueError(
                "A recited context encoder reads other_questions with the base model's tokenizer, got none."
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._opening_cache = False, None

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "module": self.module,
            "question": self.question,
            "other_questions": self.other_questions,
            "min_chunk_tokens": self.min_chunk_tokens,
        }

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        return self._frame(tokenizer, self.question)

    @staticmethod
    def _frame(tokenizer: PreTrainedTokenizerBase, question: str) -> Frame:
        layout = ChatLayout.of(tokenizer)
        (before,) = layout.prompt_ids(tokenizer, [question])
        opening, closing = framed_ids(tokenizer, [(layout.before_answer, "", ""), ("", "", layout.after_answer)])
        before = before + opening
        return Frame(before, closing, unread_before=len(before) - 1, unread_after=max(0, len(closing) - 1))

    def margins(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """How far the next token's logit is above the highest other one, the least of all readings, [C, T - unread].

        It is infinite where nothing of the chunk follows.

        Args:
            states: as `stream` returns them. ids, mask: [C, T], as given to it.
        """
        ids, mask = ids[:, self.unread :], mask[:, self.unread :].bool()
        says = saying_places(mask)
        following = ids.roll(-1, dims=1)[says]
        found = torch.full(says.shape, torch.inf, device=states.device)
        for reading in states.unflatten(0, (-1, len(ids))):
            least = []
            # 49,152 logits a token: 512 tokens at once are .1 GB.
            for some, wanted in zip(reading[says].split(512), following.split(512), strict=True):
                logits = self.base_model.get_output_embeddings()(some)
                each = torch.arange(len(wanted), device=ids.device)
                own = logits[each, wanted].float()
                logits[each, wanted] = -torch.inf
                least.append(own - logits.amax(1).float())
            found[says] = torch.minimum(found[says], torch.cat(least))
        return found

    def _read_maps(
        self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], Tensor | None], readings: int
    ) -> Tensor | None:
        following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)[:, self.unread :]
        embeddings = self.base_model.get_output_embeddings().weight
        if self._mean_row is None or self._mean_row.device != embeddings.device:
            self._mean_row = embeddings.mean(0, dtype=torch.float32)
        rows = (embeddings[following].float() - self._mean_row) * self._decoder.norm.weight.float()
        directions = F.normalize(rows, dim=-1).to(embeddings.dtype).repeat(readings, 1, 1)
        opened = self._opened(ids, readings)
        states: dict[int, Tensor] = {}

        def enter(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[index] = args[0] if args else kwargs["hidden_states"]

        def leave(index: int, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            added = read(index, torch.cat([args[0], states.pop(index), directions], dim=-1))
            return None if added is None else output + added.to(output.dtype)

        blocks = getattr(self._decoder, self._blocks_name)
        with ExitStack() as undo:
            for index, place in enumerate(self._places):
                module = self.base_model.get_submodule(place.path)
                hooks = (
                    blocks[index].register_forward_pre_hook(partial(enter, index), with_kwargs=True),
                    # Before the injector's: what it adds is no feature.
                    module.register_forward_hook(partial(leave, index), prepend=True),
                )
                for hook in hooks:
                    undo.callback(hook.remove)
            if opened is None:
                return self._last_state(ids, mask)
            cache, lengths = opened
            own, shown = ids[:, self.unread :], self._seen(mask)[:, self.unread :]
            first = torch.tensor(lengths, device=ids.device).repeat_interleave(len(ids))[:, None]
            before = torch.arange(max(lengths), 0, -1, device=ids.device) <= first
            return self._decoder(
                input_ids=own.repeat(readings, 1),
                attention_mask=torch.cat([before.long(), shown.repeat(readings, 1)], dim=1),
                position_ids=first + torch.arange(own.shape[1], device=ids.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    def _opened(self, ids: Tensor, readings: int) -> tuple[Any, list[int]] | None:
        """Keys and values of what stands before each chunk, [M C], right-aligned, and its length in each reading."""
        if not self._openings:
            return None
        first = torch.tensor(self._openings[0], device=ids.device)
        if ids.shape[1] <= self.unread or not (ids[:, : self.unread] == first).all():
            raise ValueError("A chunk does not begin as the context encoder's frame has it. Chunk the text with it.")
        openings = self._openings[:readings]
        lengths = [len(opening) for opening in openings]
        if self._opening_cache is None or self._opening_cache[0] != (readings, ids.device):
            rows = torch.zeros(readings, max(lengths), dtype=torch.long, device=ids.device)
            shown = torch.zeros_like(rows)
            for row, opening in enumerate(openings):
                rows[row, -len(opening) :] = torch.tensor(opening, device=ids.device)
                shown[row, -len(opening) :] = 1
            places = (shown.cumsum(1) - 1).clamp(min=0)
            read = self._decoder(input_ids=rows, attention_mask=shown, position_ids=places, use_cache=True)
            self._opening_cache = (readings, ids.device), read.past_key_values
        cache = deepcopy(self._opening_cache[1])  # the chunks' own are added to it
        cache.batch_repeat_interleave(len(ids))
        if not self._keeps:
            self._opening_cache = None
        return cache, lengths


CONTEXT_ENCODERS: dict[str, type[ContextEncoder]] = {
    encoder.kind: encoder for encoder in (PerLayerActivations, EarlyExit, EmbedOnly, Recited)
}


def make_context_encoder(
    base_model: PreTrainedModel,
    settings: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ContextEncoder:
    """The context encoder that plain settings describe.

    Args:
        settings: kind (per_layer_activations if it is not given) and what its class takes, as in
            conf/task/doc_to_lora.yaml and in a checkpoint's config.yaml. What is null there may belong to another kind.
        tokenizer: the base model's, for the kinds that read more than the chunk.

    Raises:
        ValueError: an unknown kind, a setting that means nothing to it, or one that its class refuses.
    """
    given = dict(settings or {})
    kind = given.pop("kind", PerLayerActivations.kind)
    encoder = CONTEXT_ENCODERS.get(kind) if isinstance(kind, str) else None
    if encoder is None:
        raise ValueError(f"Unknown context encoder kind {kind!r}: choose one of {', '.join(CONTEXT_ENCODERS)}.")
    if "beside" in given:  # in configurations of version 0.1
        raise ValueError("A context encoder has no beside any more; it is called concat_layer now.")
    takes = inspect.signature(encoder).parameters.keys()
    known = takes - {"base_model", "tokenizer"}
    for name in sorted(given.keys() - known):
        if given.pop(name) is not None:
            raise ValueError(f"{kind} takes no {name}, got {dict(settings or {})[name]}. Leave it out.")
    if "tokenizer" in takes:
        given["tokenizer"] = tokenizer
    return encoder(base_model, **given)


def _ascends(layers: Any, end: int) -> bool:
    """Whether these are some layers' numbers below `end`, each once, in order."""
    if isinstance(layers, (str, int)) or not layers:
        return False
    return all(type(i) is int and 0 <= i < end for i in layers) and sorted({*layers}) == [*layers]


def drop_context(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features [C, M, T, D] and mask [C, T] of the chunks' own tokens, moved together; as they are without context.

    Returns:
        [C, M, T', D] and [C, T'], T' the most tokens that a chunk has.
    """
    mask = mask.bool()
    if (order := _own_first(mask)) is None:
        return features, mask
    return features.take_along_dim(order[:, None, :, None], dim=2), mask.gather(1, order)


def saying_places(mask: Tensor) -> Tensor:
    """[C, T] bool: places behind which another one of the chunk follows; what comes last says nothing any more."""
    says = mask.clone()
    says[:, -1] = False
    says[:, :-1] &= mask[:, 1:]
    return says


def with_context(values: Tensor, mask: Tensor) -> Tensor:
    """Values [C, M, T', D] of the chunks' own tokens back at their places, [C, M, T, D], with 0 at the context.

    Args:
        values: 0 behind a chunk's own tokens. mask: [C, T], as given to `drop_context`.
    """
    if (order := _own_first(mask.bool())) is None:
        return values
    placed = values.new_zeros(*values.shape[:2], mask.shape[1], values.shape[3])
    return placed.scatter(2, order[:, None, :, None].expand_as(values), values)


def _own_first(mask: Tensor) -> Tensor | None:
    """Places [C, T'] of the chunks' own tokens, first; None where they are already."""
    if (mask[:, 1:] <= mask[:, :-1]).all():
        return None
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
