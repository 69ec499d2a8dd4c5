"""What answers cost in FLOPs, from shapes alone, and in seconds, fitted to measured ones; and break-even: the number of
questions after which an adapter is cheaper.

    costs = Costs(prepare=2.1e9, question=5e7)
    break_even(costs, Costs(prepare=0, question=8e8))        # 3 questions
    ratio = amortised(costs, 10) / amortised(other, 10)      # one document version is asked 10 questions

A product of [m, k] and [k, n] counts 2 m k n, as in torch.utils.flop_counter; attention counts every pair of a new
token and a token that is kept or new, masked or not, as that does.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hypernet.adapters.break_even import Costs

if TYPE_CHECKING:  # torch takes seconds, and tables of stored rows need none
    from torch import nn

    from hypernet.base.targets import LoRATarget
    from hypernet.doc_to_lora import DocToLoRA


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs that torch counts, with those of attention on a CPU, which torch leaves out.

    `lora_delta` is one opaque op to torch: what an adapter adds is counted by `adapter_flops`.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: object, **kwargs: object
) -> int:
    batch, heads, new, width = query
    return 2 * batch * heads * new * key[-2] * (width + value[-1])


class ModelShape(NamedTuple):
    """What the FLOPs of a decoder depend on: weights of its linear layers without the head's, the head's, attention."""

    linear_weights: int
    head_weights: int
    num_layers: int
    attention_width: int  # heads times head_dim

    @classmethod
    def of(cls, base_model: "nn.Module") -> "ModelShape":
        from torch import nn

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


def adapter_flops(targets: "Sequence[LoRATarget]", rank: int, num_tokens: int) -> int:
    """Of an adapter of that total rank on so many tokens."""
    return 2 * rank * num_tokens * sum(module.d_in + module.d_out for t in targets for module in t.modules())


def break_evens(adapter: Costs, other: Costs) -> np.ndarray:
    """`break_even` of many pairs at once: each part an array of the same shape, and so is the result."""
    more_at_first = np.asarray(adapter.prepare - other.prepare)
    less_each = np.asarray(other.question - adapter.question)
    never = np.where((more_at_first < 0) & (less_each == 0), 0.0, np.inf)
    return np.where(less_each > 0, np.maximum(0.0, more_at_first / np.where(less_each > 0, less_each, 1.0)), never)


def amortised(costs: Costs, questions_per_version: float) -> float:
    """Per question, where a version of the document is asked so many questions before it changes."""
    return costs.question + costs.prepare / questions_per_version


class Phases(NamedTuple):
    """FLOPs of a method: once per version of the document, to a question's first token, for each token after it."""

    prepare: float
    first_token: float
    further_token: float


class CostModel(NamedTuple):
    """FLOPs by document length: analytic, but for those of `internalize`, which are counted.

    tokens_per_chunk: of a document of several chunks; less than max_chunk_tokens, as chunks end between sentences.
    internalize_flops: (per chunk, per token), of reading and of the hypernetwork.
    question_tokens, answer_tokens: of every question, whatever the method. retrieved_tokens: in retrieval's prompt.
    """

    shape: ModelShape
    targets: "tuple[LoRATarget, ...]"
    rank_per_chunk: int
    bias_rank: int
    max_chunk_tokens: int
    tokens_per_chunk: float
    internalize_flops: tuple[float, float]
    question_tokens: int
    answer_tokens: int
    retrieved_tokens: int

    @classmethod
    def of(cls, model: "DocToLoRA") -> "CostModel":
        """With questions of 16 tokens and answers of 5; replace them by what is measured. The model is frozen.

        A document of a few short chunks and one of full chunks are internalized to count.
        """
        from benchmarks.internalize_cost import make_document

        counted = []  # tokens of a chunk, FLOPs of a chunk
        for num_tokens in (model.max_chunk_tokens // 2, 8 * model.max_chunk_tokens):
            document = make_document(model, num_tokens)
            chunks = model.internalize(document).num_chunks
            counted.append((num_tokens / chunks, flops_of(lambda d=document: model.internalize(d).fused()) / chunks))
        (short, few), (long, many) = counted
        per_token = (many - few) / (long - short)
        return cls(
            shape=ModelShape.of(model.base_model),
            targets=model.hypernetwork.targets,
            rank_per_chunk=model.hypernetwork.rank,
            bias_rank=model.hypernetwork.bias_rank,
            max_chunk_tokens=model.max_chunk_tokens,
            tokens_per_chunk=long,
            internalize_flops=(few - per_token * short, per_token),
            question_tokens=16,
            answer_tokens=5,
            retrieved_tokens=0,
        )

    def num_chunks(self, num_tokens: float) -> int:
        return 1 if num_tokens <= self.max_chunk_tokens else math.ceil(num_tokens / self.tokens_per_chunk)

    def phases(self, method: str, num_tokens: float) -> Phases:
        """Of a method with a document of that length.

        Raises:
            ValueError: no doc_to_lora, full_context, prefix_cache or retrieval.
        """
        shape, question = self.shape, self.question_tokens
        if method == "doc_to_lora":
            chunks = self.num_chunks(num_tokens)
            per_chunk, per_token = self.internalize_flops
            rank = chunks * self.rank_per_chunk + self.bias_rank
            return Phases(
                per_chunk * chunks + per_token * num_tokens,
                shape.forward_flops(question) + adapter_flops(self.targets, rank, question),
                self._further(question) + adapter_flops(self.targets, rank, 1),
            )
        if method == "full_context":
            return Phases(0, shape.forward_flops(num_tokens + question), self._further(num_tokens + question))
        if method == "prefix_cache":
            first = shape.forward_flops(question, past=num_tokens)
            return Phases(shape.forward_flops(num_tokens), first, self._further(num_tokens + question))
        if method == "retrieval":  # ranking is no matter of FLOPs
            read = min(num_tokens, self.retrieved_tokens) + question
            return Phases(0, shape.forward_flops(read), self._further(read))
        raise ValueError(f"No cost model for {method!r}; there is one for {', '.join(MODELLED)}.")

    def costs(self, method: str, num_tokens: float) -> Costs:
        """FLOPs to prepare, and of a question with its whole answer."""
        prepare, first, further = self.phases(method, num_tokens)
        return Costs(prepare, first + (self.answer_tokens - 1) * further)

    def _further(self, before: float) -> float:
        """Of an answer's token after the first, on average; `before` stand before the answer."""
        return self.shape.forward_flops(1, past=before + max(0, self.answer_tokens - 2) / 2)


MODELLED = ("doc_to_lora", "full_context", "prefix_cache", "retrieval")


class Line(NamedTuple):
    """seconds = fixed + slope * work"""

    fixed: float
    slope: float

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """Least squares of the relative errors over (work, seconds), with neither part below 0.

        Raises:
            ValueError: no points, or seconds that are not above 0.
        """
        if not points or min(y for _, y in points) <= 0:
            raise ValueError(
                f"A line needs points with seconds above 0, but they are {list(points)}; leave others out."
            )
        weights = [1 / y**2 for _, y in points]
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        if spread == 0:
            return cls(mean_y, 0.0)
        slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
        if slope < 0:
            return cls(mean_y, 0.0)
        if (fixed := mean_y - slope * mean_x) >= 0:
            return cls(fixed, slope)
        through_zero = [(w * x * y, w * x * x) for w, (x, y) in zip(weights, points, strict=True)]
        return cls(0.0, sum(a for a, _ in through_zero) / sum(b for _, b in through_zero))

    def at(self, work: float) -> float:
        return self.fixed + self.slope * work


class Measured(NamedTuple):
    """Medians of a method on documents of one length, in seconds: what `SecondsModel` is fitted to."""

    method: str
    num_tokens: float
    prepare_s: float
    first_token_s: float
    further_token_s: float


class SecondsModel(NamedTuple):
    """Seconds by document length: for each method and phase, a line over the cost model's FLOPs.

    Where a phase has no FLOPs (retrieval's index), the line goes over the document's tokens.
    """

    model: CostModel
    lines: dict[str, tuple[Line, Line, Line]]

    @classmethod
    def fitted(cls, model: CostModel, measured: Sequence[Measured]) -> "SecondsModel":
        lines = {}
        for method in dict.fromkeys(m.method for m in measured):
            mine = [m for m in measured if m.method == method]
            work = [_work(model, method, m.num_tokens) for m in mine]
            lines[method] = tuple(
                Line.fitted([(w[i], m[2 + i]) for w, m in zip(work, mine, strict=True)]) for i in range(3)
            )
        return cls(model, lines)

    def costs(self, method: str, num_tokens: float) -> Costs:
        """Seconds to prepare, and of a question with its whole answer; KeyError for a method that was not measured."""
        work = _work(self.model, method, num_tokens)
        prepare, first, further = (line.at(w) for line, w in zip(self.lines[method], work, strict=True))
        return Costs(prepare, first + (self.model.answer_tokens - 1) * further)


def _work(model: CostModel, method: str, num_tokens: float) -> Phases:
    phases = model.phases(method, num_tokens)
    return phases if phases.prepare else phases._replace(prepare=num_tokens)
