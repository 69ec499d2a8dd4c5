"""PromotionGate: what a candidate must show before it may answer, measured beside what answers now. No model judges.

report = PromotionGate(min_recall=0.8).judge(model, candidate, live, exam)
report.passed, report.failed, report.as_dict()

check        what is measured                                                              asked
asked        new memories that a held-out wording asks about                               all
recall       held-out wordings answered as with the memory in the prompt, or as a person   >= min_recall
             corrected that; closed book
gain         the same, minus that of what is live now                                      >= min_gain
kept         held-out wordings on memories that were in already                            >= min_kept
background   questions that the base model answers by itself, answered as before           >= min_background
in_context   other users' memories in the prompt, answered as before                       >= min_in_context
locality     KL(base ‖ candidate) on unrelated text, nats a token                          <= max_kl
absent       how much further log p of a deleted answer rose than that of any decoy, nats    <= max_leak
cost         seconds of training                                                           <= max_seconds
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from hypernet.consolidation.objectives import kl
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.matching import exact_match

_BATCH = 64


class Asked(NamedTuple):
    """A held-out question with the memory's text that answers it, and the right answer; None: the base model's with
    that text in its prompt (and without it for a background question)."""

    question: str
    document: str | None = None
    answer: str | None = None


class Exam(NamedTuple):
    """What a candidate is asked; none of it was trained on.

    Attributes:
        new, kept: held-out wordings on what came in and on what was in already. unasked: new memories without any.
        background: questions without a memory. others: other users' questions with their memories. deleted: on what was
        deleted. decoys: answers that nobody was told. texts: unrelated. seconds: that training took.
    """

    new: Sequence[Asked]
    kept: Sequence[Asked] = ()
    background: Sequence[Asked] = ()
    others: Sequence[Asked] = ()
    deleted: Sequence[Asked] = ()
    decoys: Sequence[str] = ()
    texts: Sequence[str] = ()
    unasked: Sequence[str] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    """name, value: what was measured. limit, at_least: what was asked. number: of questions or texts behind it."""

    name: str
    value: float
    limit: float
    at_least: bool
    number: int

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = (">=" if self.at_least else "<=") if self.passed else ("<" if self.at_least else ">")
        return f"{self.name} {self.value:.3g} {sign} {self.limit:g}"


@dataclass(frozen=True)
class GateReport:
    """checks: those that there was something to measure for."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(str(check) for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        return not self.failed

    def value(self, name: str) -> float:
        return next(check.value for check in self.checks if check.name == name)

    def as_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {"passed": self.passed, "failed": list(self.failed), "checks": checks}


class PromotionGate:
    """Thresholds, see the module's table; the keys of conf/consolidation/."""

    def __init__(
        self,
        *,
        min_recall: float = 0.8,
        min_gain: float = 0.0,
        min_kept: float = 0.8,
        min_background: float = 0.8,
        min_in_context: float = 0.9,
        max_kl: float = 0.5,
        max_leak: float = 2.0,
        max_seconds: float = 3600.0,
    ) -> None:
        self.limits = {
            **{"asked": 1.0, "recall": min_recall, "gain": min_gain, "kept": min_kept, "background": min_background},
            **{"in_context": min_in_context, "locality": max_kl, "absent": max_leak, "cost": max_seconds},
        }

    def judge(self, model: DocToLoRA, candidate: MovedWeights, live: MovedWeights | None, exam: Exam) -> GateReport:
        """Asks both and compares.

        Args:
            live: what answers now; None: the base model.
        """
        new, kept = (_read(model, part) for part in (exam.new, exam.kept))
        background, others = (_with_answers(model, part) for part in (exam.background, exam.others))
        before = 0.0
        if new:
            with installed(model.base_model, live.tensors if live else {}):
                before = _right(model, new, with_documents=False)
        found = [self._check("asked", len(exam.new) / (len(exam.new) + len(exam.unasked) or 1), len(exam.new))]
        with installed(model.base_model, candidate.tensors):
            recall = _right(model, new, with_documents=False) if new else 0.0
            found.append(self._check("recall", recall, len(new)))
            found.append(self._check("gain", recall - before, len(new)))
            for name, part, with_documents in (
                ("kept", kept, False),
                ("background", background, False),
                ("in_context", others, True),
            ):
                if part:
                    found.append(self._check(name, _right(model, part, with_documents=with_documents), len(part)))
        if exam.texts:
            found.append(self._check("locality", _distance(model, candidate, exam.texts), len(exam.texts)))
        if exam.deleted:
            found.append(self._check("absent", _leak(model, candidate, exam.deleted, exam.decoys), len(exam.deleted)))
        return GateReport((*found, self._check("cost", exam.seconds, 1)))

    def _check(self, name: str, value: float, number: int) -> Check:
        return Check(name, value, self.limits[name], name not in ("locality", "absent", "cost"), number)


class AlwaysYes(PromotionGate):
    """Control: measures the same and lets everything pass."""

    def _check(self, name: str, value: float, number: int) -> Check:
        at_least = name not in ("locality", "absent", "cost")
        return Check(name, value, float("-inf") if at_least else float("inf"), at_least, number)


def answered(model: DocToLoRA, weights: MovedWeights, asked: Sequence[Asked]) -> list[bool]:
    """Of each question whether these weights answer it rightly at an empty prompt."""
    asked = _with_answers(model, asked)
    with installed(model.base_model, weights.tensors):
        answers = _answers(model, asked, with_documents=False)
    return [bool(exact_match(answer, str(one.answer))) for answer, one in zip(answers, asked, strict=True)]


def _with_answers(model: DocToLoRA, asked: Sequence[Asked]) -> list[Asked]:
    open_ones = [one for one in asked if one.answer is None]
    answers = iter(_answers(model, open_ones, with_documents=True))
    return [one if one.answer is not None else one._replace(answer=next(answers)) for one in asked]


def _read(model: DocToLoRA, asked: Sequence[Asked]) -> list[Asked]:
    """With answers, without questions that the base model answers alike without the memory, which it did not read then.

    All, if it reads none.
    """
    with_answers = _with_answers(model, asked)
    own = [one.answer is None for one in asked]
    alone = iter(_answers(model, [one for one in asked if one.answer is None], with_documents=False))
    read = [one for one, is_own in zip(with_answers, own, strict=True) if not is_own or one.answer != next(alone)]
    return read or with_answers


def _answers(model: DocToLoRA, asked: Sequence[Asked], *, with_documents: bool) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        documents = [one.document if with_documents else None for one in part]
        answers += model.generate([one.question for one in part], documents=documents)
    return answers


def _right(model: DocToLoRA, asked: Sequence[Asked], *, with_documents: bool) -> float:
    answers = _answers(model, asked, with_documents=with_documents)
    pairs = zip(answers, asked, strict=True)
    return sum(exact_match(answer, (str(one.answer),)) for answer, one in pairs) / len(asked)


@torch.no_grad()
def _distance(model: DocToLoRA, candidate: MovedWeights, texts: Sequence[str]) -> float:
    """KL(base ‖ candidate), the mean over the tokens of all texts."""
    total = tokens = 0.0
    model.injector.clear()
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"].to(model.device)
        before = model.base_model(ids).logits[0].float()
        with installed(model.base_model, candidate.tensors):
            after = model.base_model(ids).logits[0].float()
        total += kl(before, after).item() * len(before)
        tokens += len(before)
    return total / tokens


def _leak(model: DocToLoRA, candidate: MovedWeights, deleted: Sequence[Asked], decoys: Sequence[str]) -> float:
    """How much further a deleted answer's log p rose above the base model's than that of any decoy, the worst, in nats.

    Weights that never saw an answer raise it too: what says "unknown" less often says all names more often.
    """
    asked = _with_answers(model, deleted)
    pairs = [(one.question, answer) for one in asked for answer in (str(one.answer), *decoys)]
    questions, answers = [question for question, _ in pairs], [answer for _, answer in pairs]
    before = model.log_likelihoods(questions, answers)
    with installed(model.base_model, candidate.tensors):
        after = model.log_likelihoods(questions, answers)
    rises = torch.tensor(after).view(len(asked), -1) - torch.tensor(before).view(len(asked), -1)
    own, others = rises[:, 0], rises[:, 1:]
    return float((own - others.amax(1) if decoys else own).max())
