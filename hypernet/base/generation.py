"""What the base model writes: by settings of our own alone, until a token that ends an answer.

texts = generate_text(base_model, tokenizer, prompts, max_new_tokens=32)     # greedy; prompts are token ids
ends = end_ids(base_model, tokenizer)
rows = generate_ids(base_model, tokenizer, prompts, max_new_tokens=32, temperature=1.0)
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from hypernet.base.base_model import contiguous_states, num_embeddings
from hypernet.text.chat import closing_ids
from hypernet.text.tokens import check_known


def end_ids(base_model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, the tokenizer's, those of the chat template.

    All of them, since each is missing or another one in some model: a model tuned for chat often keeps the generation
    config of the one before, whose end token it never writes.
    """
    config: Any = base_model.generation_config
    own = config.eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *closing_ids(tokenizer)]
    return [token for token in dict.fromkeys(found) if token is not None and token >= 0]


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Up to the first end token, which is included; behind it is padding."""
    end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:end])


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of an answer, stripped, without what ends it and without special tokens."""
    kept = until_end(ids, ends)
    if kept and kept[-1] in ends:
        kept.pop()  # not every tokenizer has it among its special tokens
    return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()


def context_window(base_model: nn.Module) -> int:
    """Most tokens that the base model takes at once, its answer included; no limit where its configuration has none."""
    config: Any = base_model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_fits(base_model: nn.Module, lengths: Sequence[int], *, max_new_tokens: int) -> None:
    """Prompts of these lengths and their answers fit the window; beyond it, a model writes something, but nonsense.

    Raises:
        ValueError: one does not.
    """
    window = context_window(base_model)
    for number, length in enumerate(lengths, start=1):
        if length + max_new_tokens > window:
            raise ValueError(
                f"Prompt {number} does not fit: {length} tokens and {max_new_tokens} for the answer, the base model "
                f"takes {window}. Shorten the question or its document, or lower max_new_tokens."
            )


def generate_text(
    base_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    between: Callable[[], None] | None = None,
) -> list[str]:
    """Greedy continuations of prompts, token ids each, one batch; arguments and errors as `generate_ids`."""
    ends = end_ids(base_model, tokenizer)
    rows = generate_ids(base_model, tokenizer, prompts, max_new_tokens=max_new_tokens, between=between)
    return [decode_answer(tokenizer, row, ends) for row in rows]


def generate_ids(
    base_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    between: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Continuations of prompts, token ids each, one batch, left-padded; each up to its end token, which is included.

    Args:
        temperature: 0 takes the most likely token; above, tokens are drawn.
        between: called after each step; it may use the model.

    Raises:
        ValueError: a prompt and its answer do not fit the model's window, or it has a token that the model lacks.
    """
    check_known(prompts, tokenizer, num_embeddings=num_embeddings(base_model))
    check_fits(base_model, [len(row) for row in prompts], max_new_tokens=max_new_tokens)
    rows = [torch.tensor(row, dtype=torch.long) for row in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, mask = pad(rows, padding_value=tokenizer.pad_token_id), pad([torch.ones_like(row) for row in rows])
    device = next(base_model.parameters()).device
    ends = end_ids(base_model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
    )
    criteria = StoppingCriteriaList([] if between is None else [_Between(between)])
    with _only(base_model, settings), contiguous_states(base_model):
        output = base_model.generate(  # type: ignore[operator]
            ids.to(device), attention_mask=mask.to(device), generation_config=settings, stopping_criteria=criteria
        )
    return [until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]


class _Between(StoppingCriteria):
    """What transformers calls after each step; it ends nothing."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _only(base_model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """These settings alone inside the `with` block: transformers fills what they leave open from the model's own.

    Those penalise repetition, suppress tokens, ask for beams ...: an answer with the document in the prompt, where it
    repeats the prompt, would then be another than an adapter's.
    """
    own: Any = base_model.generation_config
    base_model.generation_config = settings  # type: ignore[assignment]
    try:
        yield
    finally:
        base_model.generation_config = own
