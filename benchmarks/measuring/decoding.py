"""Greedy answers and their likelihood from token ids, one batch, with or without a kept prefix: the same loop for every
method, so that their seconds can be compared.

    prefix = Prefix.of(base_model, ids)                     # keys and values of a text that many prompts begin with
    generated = greedy(base_model, tokenizer, prompts, max_new_tokens=32, prefix=prefix)
"""

import time
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from hypernet.base.generation import decode_answer, end_ids, until_end


class Prefix(NamedTuple):
    """Keys and values of the first `length` tokens, one sequence."""

    cache: DynamicCache
    length: int

    @classmethod
    @torch.no_grad()
    def of(cls, base_model: nn.Module, ids: Sequence[int]) -> Self:
        cache = DynamicCache(config=base_model.config)
        tokens = torch.tensor([list(ids)], device=_device(base_model))
        base_model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cls(cache, len(ids))

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def repeated(self, number: int, config: object) -> DynamicCache:
        """A copy for so many sequences; the prefix itself stays as it is."""
        cache = DynamicCache(config=config)
        for index, layer in enumerate(self.cache.layers):
            keys, values = (tensor.expand(number, -1, -1, -1) for tensor in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return cache


class Generated(NamedTuple):
    """texts: stripped, without special tokens. num_tokens: of each, the closing one included.

    first_token_s: until the first token of all of them was there; total_s: until the last.
    """

    texts: list[str]
    num_tokens: list[int]
    first_token_s: float
    total_s: float


@torch.no_grad()
def greedy(
    base_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    prefix: Prefix | None = None,
) -> Generated:
    """The most likely token again and again, until an end token or max_new_tokens."""
    device, ends = _device(base_model), end_ids(base_model, tokenizer)
    started = time.perf_counter()
    number, width = len(prompts), max(map(len, prompts))
    before = prefix.length if prefix else 0
    config = base_model.config
    cache = prefix.repeated(number, config) if prefix else DynamicCache(config=config)
    ids = torch.full((number, width), tokenizer.pad_token_id)
    mask = torch.zeros(number, before + width, dtype=torch.long)
    mask[:, :before] = 1
    for row, prompt in enumerate(prompts):  # on the left, so that all answers begin at the same place
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, before + width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    end_tensor = torch.tensor(ends, dtype=torch.long, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
    done = torch.zeros(number, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    first_token_s = 0.0
    while len(tokens) < max_new_tokens and not bool(done.all()):
        logits = base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = logits.argmax(-1).masked_fill(done, tokenizer.pad_token_id)
        tokens.append(chosen)
        done |= torch.isin(chosen, end_tensor)
        if len(tokens) == 1:
            first_token_s = _seconds_since(started, device)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(number, 1)], dim=1)
    columns = torch.stack(tokens, dim=1).tolist()
    total_s = _seconds_since(started, device)
    answers = [until_end(row, ends) for row in columns]
    texts = [decode_answer(tokenizer, answer, ends) for answer in answers]
    return Generated(texts, [len(answer) for answer in answers], first_token_s, total_s)


@torch.no_grad()
def log_likelihoods(
    base_model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    pad_id: int,
    prefix: Prefix | None = None,
) -> list[float]:
    """log p of each answer's tokens after its prompt, summed, in nats."""
    device, before = _device(base_model), prefix.length if prefix else 0
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * (before + len(row)) + [0] * (width - len(row)) for row in rows], device=device)
    positions = torch.arange(before, before + width, device=device).expand(len(rows), -1)
    cache = {"past_key_values": prefix.repeated(len(rows), base_model.config)} if prefix else {}
    logits = base_model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache).logits
    result = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        where = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1, device=device)
        log_probs = logits[row, where].float().log_softmax(-1)
        result.append(log_probs.gather(1, torch.tensor(answer, device=device)[:, None]).sum().item())
    return result


def _device(base_model: nn.Module) -> torch.device:
    return next(base_model.parameters()).device


def _seconds_since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
