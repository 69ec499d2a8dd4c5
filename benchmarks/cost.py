"""What answers cost in FLOPs, from shapes alone, and after how many questions an adapter is cheaper: break-even.

    costs = Costs(prepare=2.1e9, question=5e7)
    break_even(costs, Costs(prepare=0, question=8e8))        # 3 questions
    ratio = amortised(costs, 10) / amortised(other, 10)      # one document version is asked 10 questions

A product of [m, k] and [k, n] counts 2 m k n, as in torch.utils.flop_counter; attention counts every pair of a new
token and a token that is kept or new, masked or not, as that does.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hypernet.targets import LoRATarget


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs that torch counts, with those of attention on a CPU, which torch leaves out.

    `lora_delta` is one opaque op to torch: what an adapter adds is counted by `adapter_flops`.
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: object, **kwargs: object
) -> int:
    batch, heads, new, width = query
    return 2 * batch * heads * new * key[-2] * (width + value[-1])


class Costs(NamedTuple):
    """Of a method: once per version of the document, and per question. Seconds or FLOPs."""

    prepare: float
    question: float


class ModelShape(NamedTuple):
    """What the FLOPs of a decoder depend on: weights of its linear layers without the head's, the head's, attention."""

    linear_weights: int
    head_weights: int
    num_layers: int
    attention_width: int  # heads times head_dim

    @classmethod
    def of(cls, base_model: nn.Module) -> "ModelShape":
        config = base_model.config.get_text_config()
        head = base_model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in base_model.modules() if isinstance(m, nn.Linear) and m is not head)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(linear, head.weight.numel(), config.num_hidden_layers, config.num_attention_heads * head_dim)

    def forward_flops(self, new: int, *, past: int = 0, logits: int = 1) -> int:
        """Of reading `new` tokens after `past` kept ones, with the head at `logits` positions."""
        attention = 4 * self.num_layers * self.attention_width * new * (past + new)
        return 2 * self.linear_weights * new + attention + 2 * self.head_weights * logits

    def generation_flops(self, prompt: int, *, past: int = 0, answer: int = 1) -> int:
        """Of an answer of so many tokens; the last one is not read again."""
        decoded = (self.forward_flops(1, past=past + prompt + i) for i in range(answer - 1))
        return self.forward_flops(prompt, past=past) + sum(decoded)


def adapter_flops(targets: Sequence[LoRATarget], rank: int, num_tokens: int) -> int:
    """Of an adapter of that total rank on so many tokens."""
    return 2 * rank * num_tokens * sum(module.d_in + module.d_out for t in targets for module in t.modules())


def break_even(adapter: Costs, other: Costs) -> float:
    """Questions from which on the adapter costs less altogether; 0: from the start, inf: never."""
    more_at_first, less_each = adapter.prepare - other.prepare, other.question - adapter.question
    if less_each <= 0:
        return 0.0 if more_at_first < 0 and less_each == 0 else math.inf
    return max(0.0, more_at_first / less_each)


def amortised(costs: Costs, questions_per_version: float) -> float:
    """Per question, where a version of the document is asked so many questions before it changes."""
    return costs.question + costs.prepare / questions_per_version


class CostModel(NamedTuple):
    """FLOPs by document length, for the break-even surface: analytic, but for the hypernetwork's, which are counted.

    internalize_flops: (fixed, per chunk), of reading and of the hypernetwork.
    """

    shape: ModelShape
    targets: tuple[LoRATarget, ...]
    rank_per_chunk: int
    max_chunk_tokens: int
    internalize_flops: tuple[float, float]
    question_tokens: int
    answer_tokens: int

    def costs(self, method: str, num_tokens: int) -> Costs:
        """Of doc_to_lora, full_context or prefix_cache with a document of that length.

        Raises:
            ValueError: another method.
        """
        question, answer = self.question_tokens, self.answer_tokens
        if method == "doc_to_lora":
            chunks = math.ceil(num_tokens / self.max_chunk_tokens)
            extra = adapter_flops(self.targets, (chunks + 1) * self.rank_per_chunk, question + answer - 1)
            fixed, per_chunk = self.internalize_flops
            return Costs(fixed + per_chunk * chunks, self.shape.generation_flops(question, answer=answer) + extra)
        if method == "full_context":
            return Costs(0, self.shape.generation_flops(num_tokens + question, answer=answer))
        if method == "prefix_cache":
            per_question = self.shape.generation_flops(question, past=num_tokens, answer=answer)
            return Costs(self.shape.forward_flops(num_tokens), per_question)
        raise ValueError(f"No cost model for {method!r}; there is one for doc_to_lora, full_context, prefix_cache.")
