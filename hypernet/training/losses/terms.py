"""The terms of the hypernetwork's objective: each is a class with a weight, and one entry in conf/objective/.

    objective = {"kl": ContextDistillation(weight=1.0), "l1": WeightL1(weight=0.1)}
    loss = sum(term.weight_at(0) * term(step) for term in objective.values())

A term names in `needs` what must be computed for it. `LitDocToLoRA` computes what the terms in use need, once, and
hands all of them the same `Step`. A new term is a subclass of `LossTerm` here and an entry in conf/objective/.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hypernet.base.targets import LayerTarget
from hypernet.data.batches import DistillationBatch
from hypernet.data.splitting import ABOUT_DOCUMENT, StepPart
from hypernet.model.closeness import mean_closeness, scores
from hypernet.training.losses.functions import (
    answer_nll,
    attribution,
    context_distillation_kl,
    context_distillation_kl_topk,
    key_attribution,
    key_contrast,
    mean_absolute_weight,
    mean_per_document,
)

# By target name and the module's place, in the order in which they run: what enters each adapted module, [P, d_in].
ModuleInputs = dict[tuple[str, LayerTarget], Tensor]

# Keys of objectives in configurations of version 0.1 and what they are called now; None: gone, no experiment used them.
RENAMED = {
    "kl_weight": "kl.weight",
    "nll_weight": "nll.weight",
    "locality_weight": "locality_kl.weight",
    "l1_weight": "l1.weight",
    "key_weight": "key.weight",
    "key_steps": "key.steps_alone",
    "share_weight": "attribution.weight",
    "contrast_half_life": "key.half_life, and attribution.half_life",
    "contrast_chunks": "key.by_chunk, and attribution.by_chunk",
    "hidden_weight": None,
    "silence_weight": None,
}


class AnswerTokens(NamedTuple):
    """Where a batch's rows predict answer tokens, P of them; rows with a document in the prompt are left out.

    row, column: [P]. owner: [P], the document that the question is about; -1: none of the batch. chunk: [P], of all
    chunks the one that holds the answer; -1: unknown.
    """

    row: Tensor
    column: Tensor
    owner: Tensor
    chunk: Tensor

    @classmethod
    def of(cls, batch: DistillationBatch) -> "AnswerTokens":
        rows = batch.student
        is_answer = rows.target_kind >= 0
        is_answer[batch.num_own_rows :] = False
        row, column = is_answer.nonzero(as_tuple=True)
        about = _is_about_document(rows.target_kind[row, column])
        first = torch.tensor([0, *accumulate(batch.chunk_counts)], device=row.device)
        answer_chunk = batch.answer_chunk[row, column]
        chunk = torch.where(about & (answer_chunk >= 0), first[row] + answer_chunk, -1)
        return cls(row, column, torch.where(about, row, -1), chunk)

    @property
    def owned_by(self) -> Tensor:
        """The documents of the tokens that have an owner, [number of owned tokens]."""
        return self.owner[self.owner >= 0]


class QuestionInputs(NamedTuple):
    """What the questions about documents read, Q of them, in the plain base model.

    by_layer: what enters the adapted module at their own tokens, [Q, S, d_in] each. asked: [Q, S] bool, which are.
    row: [Q], the document. chunk: [Q], of all chunks the one that holds the answer; -1: unknown.
    best_cosines: of inputs, asked and A, as of `Recitation`.
    """

    by_layer: dict[int, Tensor]
    asked: Tensor
    row: Tensor
    chunk: Tensor
    best_cosines: Callable[[dict[int, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Step:
    """What the terms of a training step, or of one part of it, are computed from; None where no term needs it.

    part: the documents and questions. A, B: generated for all chunks, by target name, [C, L, R, d_in] and
    [C, L, R, d_out].
    teacher: logits of the base model with each document in its prompt, at answer tokens, [., V]; None also where all
    of its probabilities were stored. student: the same with the adapters, [P, V].
    plain_inputs, student_inputs: what enters the adapted modules at `answers` in the plain base model, and with the
    adapters active. questions: what enters them at the questions' own tokens.
    """

    part: StepPart
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    teacher: Tensor | None = None
    student: Tensor | None = None
    plain_inputs: ModuleInputs | None = None
    student_inputs: ModuleInputs | None = None
    questions: QuestionInputs | None = None

    @property
    def batch(self) -> DistillationBatch:
        return self.part.batch

    @cached_property
    def answers(self) -> AnswerTokens:
        return AnswerTokens.of(self.batch)

    @cached_property
    def is_answer(self) -> Tensor:
        """[N, S] bool: where the student's rows predict answer tokens."""
        return self.batch.student.target_kind >= 0

    @cached_property
    def row(self) -> Tensor:
        """[P]: the row of each answer token."""
        return self.is_answer.nonzero()[:, 0]

    @cached_property
    def is_about_document(self) -> Tensor:
        """[P] bool: whether each answer token's question is about the row's own document."""
        return _is_about_document(self.batch.student.target_kind[self.is_answer])

    @cached_property
    def token_kl(self) -> Tensor:
        """[P]: KL(teacher || student) of each answer token, from stored probabilities where there are any."""
        assert self.student is not None
        if self.batch.stored is None:
            assert self.teacher is not None
            return context_distillation_kl(self.student, self.teacher)
        where, indices, log_probs = (tensor[self.is_answer] for tensor in self.batch.stored)
        stored = context_distillation_kl_topk(self.student[where], indices[where], log_probs[where])
        kl = stored.new_zeros(len(self.student)).masked_scatter(where, stored)
        if self.teacher is None:
            return kl
        # The teacher's rows may hold the questions whose probabilities were stored, or lack them.
        teacher = self.teacher[~where] if len(self.teacher) == len(self.student) else self.teacher
        return kl.masked_scatter(~where, context_distillation_kl(self.student[~where], teacher))

    def mean_over_documents(self, values: Tensor, row: Tensor, *, count: str) -> Tensor:
        """This part's portion of the step's mean over documents of each document's mean.

        Args:
            values, row: of some answer tokens and their rows, [number of these].
            count: which documents the mean is over, a key of `StepPart.share`.
        """
        return mean_per_document(values, row, len(self.is_answer)) * self.part.share[count]


class LossTerm(ABC):
    """A scalar of a training step and its weight over the run.

    Args:
        weight: factor in the loss, at least 0; a term whose weight is 0 is not computed.
        steps_alone: optimizer steps at the beginning in which nothing is trained but the terms that have such steps.
        half_life: optimizer steps after these in which the weight falls to half, again and again; None: it stays.

    Attributes:
        needs: the fields of `Step` that must be computed for it, of teacher, student, plain_inputs, student_inputs,
            questions.

    Raises:
        ValueError: one of these is out of its range.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, weight: float, steps_alone: int = 0, half_life: int | None = None) -> None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
            raise ValueError(f"Expected weight to be a number, at least 0, got {weight!r}.")
        if steps_alone and not weight:
            raise ValueError(f"steps_alone={steps_alone} trains a term alone whose weight is 0. Set it, e.g. 0.5.")
        if half_life is not None and half_life <= 0:
            raise ValueError(
                f"Expected half_life to be a number of steps, or null for a weight that stays, got {half_life}."
            )
        self.weight = weight
        self.steps_alone = steps_alone
        self.half_life = half_life

    def weight_at(self, step: int) -> float:
        """The weight `step` optimizer steps after all terms are trained together."""
        return self.weight if self.half_life is None else 0.5 ** (step / self.half_life) * self.weight

    @abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """The term's value; of a part of a step, its portion of it: those of all parts add up."""


class ContextDistillation(LossTerm):
    """KL(base model with the document in its prompt || base model with the adapter) on the document's questions."""

    needs = frozenset({"teacher", "student"})

    def __call__(self, step: Step) -> Tensor:
        where = step.is_about_document
        return step.mean_over_documents(step.token_kl[where], step.row[where], count="document")


class Locality(LossTerm):
    """KL(plain base model || base model with the adapter) on all other questions.

    Those are background questions, cross-document questions, and those about another document in the prompt.
    """

    needs = frozenset({"teacher", "student"})

    def __call__(self, step: Step) -> Tensor:
        where = ~step.is_about_document
        return step.mean_over_documents(step.token_kl[where], step.row[where], count="background")


class AnswerNLL(LossTerm):
    """Next-token loss on the true answers to the document's questions."""

    needs = frozenset({"student"})

    def __call__(self, step: Step) -> Tensor:
        assert step.student is not None
        where = step.is_about_document
        nll = answer_nll(step.student[where], step.batch.student.targets()[step.is_answer][where])
        return step.mean_over_documents(nll, step.row[where], count="document")


class WeightL1(LossTerm):
    """Mean absolute entry of a document's generated A and B."""

    def __call__(self, step: Step) -> Tensor:
        sizes = mean_absolute_weight([*step.A.values(), *step.B.values()], step.batch.chunk_counts)
        # Joined documents from another part of the step come last, and count there.
        num_own = step.batch.num_own_rows  # 0 in a part that only has rows with a document in the prompt
        return sizes[:num_own].sum() / max(num_own, 1) * step.part.share["rows"]


class _Contrast(LossTerm):
    """A term that compares documents, those that are computed together: with accumulated parts or processes, fewer.

    Args:
        weight, steps_alone, half_life: as of `LossTerm`.
        by_chunk: take as a question's own not its whole document but the one chunk that holds the answer word for word,
            where there is one: then the chunks of a document are separated too.
    """

    def __init__(
        self, *, weight: float, by_chunk: bool = False, steps_alone: int = 0, half_life: int | None = None
    ) -> None:
        super().__init__(weight=weight, steps_alone=steps_alone, half_life=half_life)
        self.by_chunk = by_chunk


class KeyContrast(_Contrast):
    """How well the rows of A separate their own document's questions from all others, in the plain base model.

    `key_contrast` and both directions of `key_attribution`: means over layers, targets and documents.
    """

    needs = frozenset({"plain_inputs"})

    def __call__(self, step: Step) -> Tensor:
        assert step.plain_inputs is not None
        answers, chunk_counts = step.answers, step.batch.chunk_counts
        chunk, owned_by = answers.chunk if self.by_chunk else None, answers.owned_by
        values = []
        for (name, place), x in step.plain_inputs.items():
            keys = step.A[name][:, place.layer, :, : place.d_in]
            by_document, by_question = key_contrast(keys, x, answers.owner, chunk_counts, chunk=chunk)
            of_questions, of_rows = key_attribution(keys, x, answers.owner, chunk_counts, chunk=chunk)
            per_token = (by_document + by_question) / 2 + of_questions
            of_documents = mean_per_document(per_token, owned_by, len(step.is_answer))
            values.append(of_documents + of_rows[owned_by.unique()].mean())
        return torch.stack(values).mean() * step.part.share["document"]


class ChunkMatch(LossTerm):
    """Whether a question finds the chunk that answers it, and tells its document from others. With the scores s,
    sharpened by β, and the closeness c to the document d that is asked about and to the others,

        loss = -log softmax(β s_own) - w log softmax(β s_all) + v (softplus(-γ (c_d - b)) + mean softplus(γ (c - b))),

    the first among its own document's chunks, the second among all of the step. Of a hypernetwork that recites.
    Questions whose answer stands in no chunk, or in several, are left out.

    Args:
        weight, steps_alone, half_life: as of `LossTerm`.
        sharpness: β.
        among_all: w.
        closeness: v.
        closeness_bound, closeness_sharpness: b, γ. Where they were learned, they stayed at .38 and 21.
    """

    needs = frozenset({"questions"})

    def __init__(
        self,
        *,
        weight: float,
        steps_alone: int = 0,
        half_life: int | None = None,
        sharpness: float = 3.0,
        among_all: float = 0.5,
        closeness: float = 0.3,
        closeness_bound: float = 0.4,
        closeness_sharpness: float = 20.0,
    ) -> None:
        super().__init__(weight=weight, steps_alone=steps_alone, half_life=half_life)
        self.sharpness, self.among_all, self.closeness = sharpness, among_all, closeness
        self.closeness_bound, self.closeness_sharpness = closeness_bound, closeness_sharpness

    def __call__(self, step: Step) -> Tensor:
        assert step.questions is not None
        (A,) = step.A.values()
        by_layer, asked, row, chunk, best_cosines = step.questions
        first = [0, *accumulate(step.batch.chunk_counts)]
        best, weight = best_cosines(by_layer, asked, A)
        among_all = scores(best, weight)
        near = torch.stack(
            [mean_closeness(best[..., i:j], weight) for i, j in pairwise(first)], dim=1
        )  # [Q, documents]
        near = self.closeness_sharpness * (near - self.closeness_bound)
        values, rows = [A.sum() * 0], [row.new_zeros(1)]
        for document in row.unique().tolist():
            own = (row == document) & (chunk >= 0)
            if not own.any():
                continue
            start, end = first[document], first[document + 1]
            among_own = scores(best[own][..., start:end], weight[own])
            value = F.cross_entropy(self.sharpness * among_own, chunk[own] - start, reduction="none")
            if self.among_all:
                among = F.cross_entropy(self.sharpness * among_all[own], chunk[own], reduction="none")
                value = value + self.among_all * among
            if self.closeness and near.shape[1] > 1:
                others = torch.cat([near[own, :document], near[own, document + 1 :]], dim=1)
                apart = F.softplus(-near[own, document]) + F.softplus(others).mean(1)
                value = value + self.closeness * apart
            values.append(value)
            rows.append(row[own])
        if len(values) == 1:
            return values[0]
        return step.mean_over_documents(torch.cat(values[1:]), torch.cat(rows[1:]), count="document") + values[0]


class Attribution(_Contrast):
    """Whether what is added to the model comes from the document that is asked about, with the adapters active.

    `attribution`: means over layers, targets and documents that have questions.
    """

    needs = frozenset({"student_inputs"})

    def __call__(self, step: Step) -> Tensor:
        assert step.student_inputs is not None
        answers = step.answers
        values = [
            attribution(
                step.A[name][:, place.layer, :, : place.d_in],
                step.B[name][:, place.layer, :, : place.d_out],
                *(x, answers.owner, step.batch.chunk_counts),
                chunk=answers.chunk if self.by_chunk else None,
            )
            for (name, place), x in step.student_inputs.items()
        ]
        return step.mean_over_documents(torch.stack(values).mean(0), answers.owned_by, count="document")


def trained_terms(objective: Mapping[str, Any]) -> dict[str, LossTerm]:
    """The terms of an objective whose weight is not 0, by name.

    Raises:
        ValueError: there is none, one is no term, or it has a key of version 0.1.
    """
    for name, term in objective.items():
        if name in RENAMED:
            raise ValueError(renamed(name))
        if not isinstance(term, LossTerm):
            raise ValueError(
                f"objective.{name} should be a term, with _target_ and weight as in "
                f"conf/objective/context_distillation.yaml, got {term!r}."
            )
    terms = {name: term for name, term in objective.items() if term.weight}
    if not terms:
        raise ValueError(f"No term of the objective has a weight: set that of one of {', '.join(objective)}.")
    return terms


def renamed(name: str) -> str:
    """What to do about a key of version 0.1, one of `RENAMED`."""
    if RENAMED[name] is None:
        return f"An objective has no {name} any more: no experiment used it. Leave it out."
    return f"An objective has no {name} any more; it is called {RENAMED[name]} now."


def _is_about_document(kind: Tensor) -> Tensor:
    document, unanswerable = ABOUT_DOCUMENT
    return (kind == document) | (kind == unanswerable)
