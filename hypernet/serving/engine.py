"""BatchEngine: continuous batching. Sequences join and leave between two decode steps, each with its own adapter.

engine = BatchEngine(model, max_batch=32)
engine.admit([Generation(prompt=ids, sampling=Sampling(max_new_tokens=32), adapter=adapter, emit=print)])
while engine.running:
    engine.step()                      # one token for each

New sequences are read by themselves, left-padded, and their keys and values put under those of the running ones. Keys
are stored with their position applied, so padding on the left moves a sequence without changing it. Of the sequences
that leave, rows are taken out, and columns that are padding in all that stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.injection import AdapterPool
from hypernet.base.base_model import contiguous_states, num_embeddings
from hypernet.base.generation import check_fits, end_ids
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.tokens import check_known

_HALF = "\N{REPLACEMENT CHARACTER}"  # what an unfinished character decodes to


class Sampling(NamedTuple):
    """How tokens are chosen.

    temperature: 0 takes the most likely one. top_p: of the most likely tokens, those that together have this
    probability. seed: of this sequence's own generator; None: a random one. stop: texts before which the answer ends.
    logprobs: alternatives that are given for each token; None: no log probabilities.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class TokenLogprob(NamedTuple):
    """A token's text and log p under the model, before temperature; top: those of the most likely ones."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Delta(NamedTuple):
    """What one step added. finish: "stop", "length", or None: it goes on. error: why it ended without an answer."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: BaseException | None = None


@dataclass(eq=False, kw_only=True)
class Generation:
    """One sequence.

    Attributes:
        prompt: token ids. adapter: as `DocToLoRA.joined` gives it; None: the plain base model.
        emit: called by the engine's thread with what each step adds; the last `Delta` has `finish` or `error`.
        strips: whether blanks around the answer are left out, as `DocToLoRA.generate` does.
        cancelled: set by anybody; it then leaves before the next step.
    """

    prompt: Sequence[int]
    sampling: Sampling
    emit: Callable[[Delta], None]
    adapter: LoRAAdapter | None = None
    strips: bool = True
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    _sent: int = 0
    _unsent: list[TokenLogprob] = field(default_factory=list)
    _generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> int:
        """The next token; logits: [V]."""
        if not self.sampling.temperature:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator()
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        probabilities, order = (logits / self.sampling.temperature).softmax(-1).cpu().sort(descending=True)
        # A token counts while those before it have less than top_p: the most likely one always does.
        probabilities[probabilities.cumsum(-1) - probabilities >= self.sampling.top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])

    def take(self, token: int, tokenizer: Any, ends: Sequence[int], logprob: TokenLogprob | None = None) -> bool:
        """Adds a token and emits what is new of the text; whether it goes on."""
        self.ids.append(token)
        is_end, is_last = token in ends, len(self.ids) >= self.sampling.max_new_tokens
        if logprob is not None:
            self._unsent.append(logprob)
        kept = self.ids[:-1] if is_end else self.ids
        text = str(tokenizer.decode(kept, skip_special_tokens=True))
        text = text.lstrip() if self.strips else text
        found = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        finish = "stop" if is_end or found else "length" if is_last else None
        if found:
            text = text[: min(found)]
        if finish is None:
            text = text[: self._certain(text)]
        elif self.strips:
            text = text.rstrip()
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        if new or finish:
            logprobs, self._unsent = tuple(self._unsent), []
            self.emit(Delta(new, logprobs, finish))
        return finish is None

    def _certain(self, text: str) -> int:
        """Length of what no later token can take back: half a character, a stop text's beginning, a trailing blank."""
        text = text.rstrip(_HALF)
        end = len(text)
        for stop in self.sampling.stop:
            cut = next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
            end = min(end, len(text) - cut)
        return len(text[:end].rstrip()) if self.strips else end


class DecodingEngine(Protocol):
    """What a `Scheduler` runs. Not thread-safe: one thread owns it and the model."""

    running: list[Generation]

    @property
    def room(self) -> int:
        """Sequences that may be admitted now."""

    def check(self, generation: Generation) -> None:
        """ValueError if it cannot be answered."""

    def admit(self, arrivals: Sequence[Generation]) -> None:
        """New sequences, which join `running` unless they are done at once."""

    def step(self) -> None:
        """More of each running sequence's answer; those that are done or cancelled leave."""

    def clear(self) -> list[Generation]:
        """Takes all sequences out, and returns them."""


class BatchEngine:
    """Decodes many sequences in one batch. Not thread-safe: one thread owns it and the model.

    Args:
        model: whose base model answers; causal attention over a key-value cache, as all Llama-like ones have.
        max_batch: sequences decoded at once.
    """

    def __init__(self, model: DocToLoRA, *, max_batch: int = 32) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}. Give at least 1.")
        self.model, self.max_batch = model, max_batch
        self.ends = end_ids(model.base_model, model.tokenizer)
        self.running: list[Generation] = []
        self._cache, self._mask = DynamicCache(), torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._resident: dict[int, tuple[LoRAAdapter, list[int]]] = {}  # id → adapter, its slots of the pool
        self._pool: AdapterPool | None = None
        # Slots of the last batch, with their plans: 1.5 ms of 9 of a step of eight sequences, if made for each.
        self._batch: tuple[list[int], AdapterPool | None] = [], None

    @property
    def room(self) -> int:
        """Sequences that may be admitted now."""
        return self.max_batch - len(self.running)

    def check(self, generation: Generation) -> None:
        """ValueError if a prompt does not fit the window with its answer, or has a token that the model lacks; or if
        its adapter is of another hypernetwork, which would fail the whole batch."""
        model, adapter = self.model.base_model, generation.adapter
        wanted = self.model.hypernetwork.targets, self.model.hypernetwork.scaling
        if adapter is not None and (adapter.targets, adapter.scaling) != wanted:
            raise ValueError("The adapter was made by another hypernetwork than the one served. Make it again.")
        check_known([generation.prompt], self.model.tokenizer, num_embeddings=num_embeddings(model))
        check_fits(model, [len(generation.prompt)], max_new_tokens=generation.sampling.max_new_tokens)

    @torch.inference_mode()
    def admit(self, arrivals: Sequence[Generation]) -> None:
        """Reads the prompts of new sequences, gives each its first token, and lets them join the batch."""
        if not arrivals:
            return
        width = max(len(one.prompt) for one in arrivals)
        pad = self.model.tokenizer.pad_token_id or 0
        rows = [[pad] * (width - len(one.prompt)) + list(one.prompt) for one in arrivals]
        ids = torch.tensor(rows, device=self.model.device)
        lengths = torch.tensor([len(one.prompt) for one in arrivals], device=self.model.device)
        mask = (torch.arange(width, device=self.model.device) >= width - lengths[:, None]).long()
        # Without the model's configuration every layer keeps all keys; sliding windows come from the mask.
        cache = DynamicCache()
        logits = self._forward(arrivals, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        stay = self._take(arrivals, logits)
        if stay:
            cache, mask = _rows_of(cache, mask, stay)
            self._cache, self._mask = stacked(self._cache, self._mask, cache, mask)
            self.running += [arrivals[place] for place in stay]

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for each running sequence; those that are done or cancelled leave."""
        self._keep([place for place, one in enumerate(self.running) if not one.cancelled])
        if not self.running:
            return
        positions = self._mask.sum(-1, keepdim=True)
        ids = torch.tensor([[one.ids[-1]] for one in self.running], device=self.model.device)
        self._mask = F.pad(self._mask, (0, 1), value=1)
        logits = self._forward(self.running, ids, self._mask, positions, self._cache)
        self._keep(self._take(self.running, logits))

    def clear(self) -> list[Generation]:
        """Takes all sequences out, and returns them."""
        dropped, self.running = self.running, []
        self._keep([])
        return dropped

    def _forward(
        self, batch: Sequence[Generation], ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Logits of the next token, [B, V], float32; the cache grows."""
        pool = self._pool_of(batch)
        with self.model.injector.using(pool), contiguous_states(self.model.base_model):
            output = self.model.base_model(
                input_ids=ids,
                **{"attention_mask": mask, "position_ids": positions, "past_key_values": cache},
                **{"use_cache": True, "logits_to_keep": 1},
            )
        return output.logits[:, -1].float()

    def _pool_of(self, batch: Sequence[Generation]) -> AdapterPool | None:
        """The adapters' slots for this batch. Weights are copied only where an adapter is new."""
        wanted = {id(one.adapter): one.adapter for one in batch if one.adapter is not None}
        if not wanted:
            return None
        if not wanted.keys() <= self._resident.keys():
            still = {id(one.adapter): one.adapter for one in self.running if one.adapter is not None}
            adapters = list((still | wanted).values())
            self._pool = self.model.injector.pool(adapters)
            slots = self._pool.slots if self._pool else [[]] * len(adapters)
            self._resident = {id(one): (one, ids) for one, ids in zip(adapters, slots, strict=True)}
            self._batch = [], None
        if self._pool is None:
            return None
        ids = [id(one.adapter) for one in batch]
        if ids != self._batch[0]:
            none: tuple[None, list[int]] = (None, [])
            slots = [self._resident.get(one, none)[1] for one in ids]
            self._batch = ids, replace(self._pool, slots=slots, plans={})
        return self._batch[1]

    def _take(self, batch: Sequence[Generation], logits: Tensor) -> list[int]:
        """Gives each sequence its token; the places of those that go on."""
        greedy = logits.argmax(-1).tolist()
        stay = []
        for place, one in enumerate(batch):
            token = one.choose(logits[place]) if one.sampling.temperature else greedy[place]
            num_top, tokenizer = one.sampling.logprobs, self.model.tokenizer
            logprob = None if num_top is None else _logprob(token, logits[place], num_top, tokenizer)
            if one.take(token, tokenizer, self.ends, logprob):
                stay.append(place)
        return stay

    def _keep(self, places: Sequence[int]) -> None:
        if self.running and len(places) == len(self.running):
            return
        self.running = [self.running[place] for place in places]
        if self.running:
            self._cache, self._mask = _rows_of(self._cache, self._mask, places)
        else:
            self._cache, self._mask = DynamicCache(), self._mask.new_zeros(0, 0)
            self._resident, self._pool, self._batch = {}, None, ([], None)


def _rows_of(cache: DynamicCache, mask: Tensor, places: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """These rows, without columns that are padding in all of them."""
    if len(places) == len(mask):
        return cache, mask
    index = torch.tensor(places, device=mask.device)
    width = int(mask[index].sum(-1).max())
    layers = [(keys[index, :, -width:], values[index, :, -width:]) for keys, values in cache_layers(cache)]
    return cache_of(layers), mask[index, -width:]


def stacked(cache: DynamicCache, mask: Tensor, other: DynamicCache, other_mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """The rows of both, left-padded to one width."""
    if not len(mask):
        return other, other_mask
    width = max(mask.shape[1], other_mask.shape[1])

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])

    pairs = zip(cache_layers(cache), cache_layers(other), strict=True)
    layers = [(joined(keys, more_keys), joined(values, more)) for (keys, values), (more_keys, more) in pairs]
    masks = [F.pad(part, (width - part.shape[1], 0)) for part in (mask, other_mask)]
    return cache_of(layers), torch.cat(masks)


def cache_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [B, heads, S, d]."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def cache_of(layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _logprob(token: int, logits: Tensor, num_top: int, tokenizer: Any) -> TokenLogprob:
    found = logits.log_softmax(-1)
    values, ids = found.topk(min(num_top, len(found)))
    top = tuple(
        (str(tokenizer.decode([other])), float(value)) for other, value in zip(ids.tolist(), values, strict=True)
    )
    return TokenLogprob(str(tokenizer.decode([token])), float(found[token]), top)
