"""Methods that train an adapter for each document by gradient steps: on the text, or by distilling the context.

Quality is reported after 0, ... steps, with the seconds it took to get there: a curve, not a number.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measuring.cost import flops_of
from benchmarks.measuring.decoding import greedy
from benchmarks.measuring.peak import peak_bytes
from benchmarks.methods.adapters import internalized
from benchmarks.methods.base import Method
from benchmarks.tasks.base import Asked, Case
from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.base.base_model import logits_at
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.chunking import chunk_document
from hypernet.training.losses import answer_nll, context_distillation_kl


class Batch(NamedTuple):
    """Right-padded sequences, and which positions' next tokens count: ids, mask, counts [N, S]."""

    ids: Tensor
    mask: Tensor
    counts: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], int]], *, pad_id: int, device: torch.device) -> "Batch":
        """From (token ids, how many of the first are given and not predicted)."""
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), pad_id)
        mask, counts = torch.zeros(2, len(rows), width, dtype=torch.bool)
        for row, (tokens, given) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(list(tokens))
            mask[row, : len(tokens)] = True
            counts[row, given - 1 : len(tokens) - 1] = True
        return cls(ids.to(device), mask.to(device), counts.to(device))

    @property
    def targets(self) -> Tensor:
        return self.ids.roll(-1, dims=1)[self.counts]

    def logits(self, base_model: nn.Module) -> Tensor:
        """[number of counted positions, V]"""
        return logits_at(base_model, self.counts, input_ids=self.ids, attention_mask=self.mask.long())


class GradientMethod(Method, ABC):
    """A LoRA of the same targets and, where its rank is None, the same total rank as the documents' generated adapter.

    It is the documents' own: where one replaces another, it is trained anew.

    Args:
        lr: Adam's.
        record_at: steps after which quality is reported; the last is the number of steps.
        rank: total; None: what the generated adapter has.
        warm_start: begin with the generated adapter instead of none.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        lr: float,
        record_at: Sequence[int],
        rank: int | None = None,
        warm_start: bool = False,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__(model=model, max_new_tokens=max_new_tokens)
        self.lr = lr
        self.record_at = tuple(record_at)
        self.rank = rank
        self.warm_start = warm_start
        self.num_steps = max(record_at)
        self.snapshots: dict[int, tuple[LoRAAdapter, float]] = {}
        self.losses: list[float] = []

    @abstractmethod
    def loss(self, documents: tuple[str, ...], questions: Sequence[str]) -> Callable[[], Tensor]:
        """What a step lowers: a function that is called with the adapter active."""

    def training_questions(self, case: Case) -> Sequence[str]:
        """The questions that it trains on, if it does."""
        return ()

    def build(self, case: Case) -> None:
        started = time.perf_counter()
        self.snapshots, self.losses = {}, []
        start = self._start(case)
        questions = self.training_questions(case)
        if self.documents:
            self._train(start, self.loss(self.documents, questions), started)
        else:  # nothing to train on
            self.snapshots = dict.fromkeys(self.record_at, (start, time.perf_counter() - started))
        self.adapter = self.snapshots[max(self.snapshots)][0]

    @property
    def steps(self) -> tuple[int | None, ...]:
        return self.record_at

    def use(self, step: int | None) -> None:
        self.adapter = self.snapshots[step][0]

    def seconds_at(self, step: int | None) -> float | None:
        return self.snapshots[step][1]

    def stored_bytes(self) -> int:
        return self.adapter.num_bytes

    def prepare_flops(self, case: Case) -> int:
        """Every step costs the same, so two are counted; without the adapter's own products, a few percent."""
        one, two = (flops_of(lambda n=n: self._prepare_short(case, n)) for n in (1, 2))
        return one + (two - one) * (self.num_steps - 1)

    def prepare_peak_bytes(self, case: Case) -> int:
        return peak_bytes(lambda: self._prepare_short(case, 2), device=self.model.device.type)

    def _prepare_short(self, case: Case, num_steps: int) -> None:
        steps, self.num_steps = self.num_steps, num_steps
        try:
            self.prepare(case)
        finally:
            self.num_steps = steps

    def _start(self, case: Case) -> LoRAAdapter:
        model = self.model
        if self.warm_start:
            generated = internalized(model, self.documents).fused()
            blocks = generated.concatenated()
            # The scaling goes half to A and half to B, so that Adam's step means the same as for a LoRA from nothing.
            half = generated.scaling**0.5
            A = {name: half * rows for name, (rows, _) in blocks.items()}
            B = {name: half * rows for name, (_, rows) in blocks.items()}
            provenance = generated.provenance
        else:
            rank = self.rank or self._generated_rank()
            targets = model.hypernetwork.targets
            A = {t.name: torch.randn(len(t.paths), rank, t.d_in, device=model.device) / t.d_in**0.5 for t in targets}
            B = {t.name: torch.zeros(len(t.paths), rank, t.d_out, device=model.device) for t in targets}
            provenance = new_provenance(
                [],
                generator=None,
                base_model_name=model.base_model_source,
                base_model_fingerprint=model.base_model_fingerprint,
            )
        return LoRAAdapter(
            targets=model.hypernetwork.targets,
            A={name: rows.new_zeros(0, *rows.shape) for name, rows in A.items()},
            B={name: rows.new_zeros(0, *rows.shape) for name, rows in B.items()},
            bias_A=A,
            bias_B=B,
            scaling=1.0,
            provenance=provenance,
        )

    def _generated_rank(self) -> int:
        model = self.model
        size = model.max_chunk_tokens
        chunks = (chunk_document(text, model.tokenizer, max_chunk_tokens=size).ids for text in self.documents)
        return sum(map(len, chunks)) * model.hypernetwork.rank + model.hypernetwork.bias_rank

    def _train(self, start: LoRAAdapter, loss: Callable[[], Tensor], started: float) -> None:
        A, B = (
            {name: rows.detach().clone().requires_grad_() for name, rows in part.items()}
            for part in (start.bias_A, start.bias_B)
        )
        optimizer = torch.optim.Adam([*A.values(), *B.values()], lr=self.lr)
        injector = self.model.injector

        def snapshot() -> LoRAAdapter:
            fixed = ({name: rows.detach().clone() for name, rows in part.items()} for part in (A, B))
            return replace(start, **dict(zip(("bias_A", "bias_B"), fixed, strict=True)))

        self.snapshots[0] = snapshot(), time.perf_counter() - started
        with torch.enable_grad():
            for step in range(1, self.num_steps + 1):
                try:
                    # A pool of one slot, which every sequence uses.
                    injector.set(
                        {name: rows[None] for name, rows in A.items()},
                        {name: rows[None] for name, rows in B.items()},
                        [[0]] * self._num_sequences,
                        scaling=1.0,
                    )
                    value = loss()
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                finally:
                    injector.clear()
                optimizer.step()
                self.losses.append(value.item())
                if step in self.record_at or step == self.num_steps:
                    self.snapshots[step] = snapshot(), time.perf_counter() - started


class TextLoRA(GradientMethod):
    """Next-token loss on the documents' text, in pieces that fit the window."""

    def loss(self, documents: tuple[str, ...], questions: Sequence[str]) -> Callable[[], Tensor]:
        before = self.encode("", before=self.model.layout.before_user)
        size = self.window - len(before)
        rows = []
        for document in documents:
            ids = self.encode(document)
            rows += [(before + ids[i : i + size], max(1, len(before))) for i in range(0, len(ids), size)]
        batch = Batch.of(rows, pad_id=self.model.tokenizer.pad_token_id, device=self.model.device)
        self._num_sequences = len(rows)
        return lambda: answer_nll(batch.logits(self.model.base_model), batch.targets).mean()


class ContextDistillation(GradientMethod):
    """KL to the base model that has the documents in its prompt, on its own answers to some questions.

    Args:
        questions: "oracle" takes the very questions of the test, without their answers; "generated" others.

    Raises:
        ValueError: another kind of questions.

    Source: Charakorn et al. 2026, Doc-to-LoRA, section 5, the baselines of that name, https://arxiv.org/abs/2602.15902
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        questions: str,
        lr: float,
        record_at: Sequence[int],
        rank: int | None = None,
        warm_start: bool = False,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__(
            model=model, lr=lr, record_at=record_at, rank=rank, warm_start=warm_start, max_new_tokens=max_new_tokens
        )
        if questions not in ("oracle", "generated"):
            raise ValueError(f"questions is {questions!r}; choose oracle or generated.")
        self.questions = questions

    def training_questions(self, case: Case) -> Sequence[str]:
        # Where the task puts another document into the prompt, the oracle's question comes without it.
        return [question.text for question in case.questions] if self.questions == "oracle" else case.practice

    def loss(self, documents: tuple[str, ...], questions: Sequence[str]) -> Callable[[], Tensor]:
        model = self.model
        tails = [self.tail(Asked(text, ("",))) for text in questions]
        self.tail_tokens = max(self.tail_tokens, *map(len, tails))
        head, _ = self.head(documents)
        prompts = [head + tail for tail in tails]
        generated = greedy(model.base_model, model.tokenizer, prompts, max_new_tokens=self.max_new_tokens)
        answers = [self.encode_answer(text) for text in generated.texts]
        make = lambda prompts: Batch.of(  # noqa: E731
            [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)],
            pad_id=model.tokenizer.pad_token_id,
            device=model.device,
        )
        with torch.no_grad():
            teacher = make(prompts).logits(model.base_model)
        before = self.encode("", before=model.layout.before_user)
        student = make([before + tail for tail in tails])
        self._num_sequences = len(tails)
        return lambda: context_distillation_kl(student.logits(model.base_model), teacher).mean()
