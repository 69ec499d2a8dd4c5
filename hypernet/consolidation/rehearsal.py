"""What is rehearsed, so that the rest stays as it is: nothing, given questions, what the model writes itself, or
what is asked about the memories, of other subjects.

questions = SelfSynthesised(number=128).questions(model, seed=0)    # loss + weight * KL(base ‖ student)(their answers)
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from hypernet.base.generation import decode_answer, end_ids, generate_ids
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.tokens import framed_ids

_BATCH = 64
_NUM_TEXTS = 32  # that names are taken from


class AboutSubject(NamedTuple):
    """A question that has the name of its subject in it."""

    question: str
    subject: str


class Rehearsal(Protocol):
    """weight: of its loss, where what is learned has 1."""

    weight: float

    def questions(self, model: DocToLoRA, *, seed: int, trained: Sequence[AboutSubject] = ()) -> list[str]:
        """trained: what is asked about the memories."""
        ...

    def texts(self, model: DocToLoRA, *, seed: int) -> list[str]:
        """All tokens of which are rehearsed, without a question."""
        return []


class NoRehearsal(Rehearsal):
    """Nothing: the control."""

    weight = 0.0

    def questions(self, model: DocToLoRA, *, seed: int, trained: Sequence[AboutSubject] = ()) -> list[str]:
        return []


class Replay(Rehearsal):
    """Questions that are given, such as held ones of earlier memories or of a background.

    Args:
        questions: texts.
        weight: of the loss.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, *, questions: Sequence[str], weight: float = 1.0) -> None:
        if not questions:
            raise ValueError("There is nothing to replay. Give questions, or choose another rehearsal.")
        self._given, self.number, self.weight = list(questions), len(questions), weight

    def questions(self, model: DocToLoRA, *, seed: int, trained: Sequence[AboutSubject] = ()) -> list[str]:
        return list(self._given)


class SelfSynthesised(Rehearsal):
    """Questions that the base model writes where a user would, drawn at a temperature; no user's data is needed.

    They are grouped by their words without names and numbers, and taken from the groups in turn, so that what the model
    writes most often does not crowd out the rest.

    Args:
        number: of questions, at most; twice as many are drawn.
        temperature: of drawing.
        max_tokens: of a question.
        weight: of the loss.

    Source: Huang et al. 2024, https://arxiv.org/abs/2403.01244
    """

    def __init__(
        self, *, number: int = 128, temperature: float = 1.0, max_tokens: int = 24, weight: float = 1.0
    ) -> None:
        if number < 1 or not temperature > 0:
            raise ValueError(f"number is {number} and temperature {temperature}. Give more than 0.")
        self.number, self.temperature, self.max_tokens, self.weight = number, temperature, max_tokens, weight

    def questions(self, model: DocToLoRA, *, seed: int, trained: Sequence[AboutSubject] = ()) -> list[str]:
        layout, tokenizer = model.layout, model.tokenizer
        opening = framed_ids(tokenizer, [(layout.before_user, "", "")])[0]
        if not opening:  # a template without an opening
            opening = framed_ids(tokenizer, [("", "What", "")])[0]
        ends = end_ids(model.base_model, tokenizer)
        drawn: list[str] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            while len(drawn) < 2 * self.number:
                rows = generate_ids(
                    model.base_model,
                    tokenizer,
                    [opening] * min(_BATCH, 2 * self.number - len(drawn)),
                    max_new_tokens=self.max_tokens,
                    temperature=self.temperature,
                )
                drawn += [decode_answer(tokenizer, row, ends) for row in rows]
        return _in_turn([text for text in dict.fromkeys(drawn) if text], self.number)


class OtherSubjects(Rehearsal):
    """What is asked about the memories, of other subjects, whose names the base model writes.

    A student that is told one teacher answers with that name wherever a teacher is asked for: these questions are the
    ones that it gets wrong first. Of names that nobody was told of the base model says that it does not know.

    Args:
        number: of questions, at most.
        also: given questions in addition, such as those that the base model is known to answer.
        num_texts: that the base model writes, so that it writes on as before.
        weight: of the loss.

    Raises:
        ValueError: number is below 1.
    """

    def __init__(
        self, *, number: int = 160, also: Sequence[str] = (), num_texts: int = 64, weight: float = 1.0
    ) -> None:
        if number < 1:
            raise ValueError(f"number is {number}. Give at least 1.")
        self.number, self.also, self.num_texts, self.weight = number, tuple(also), num_texts, weight

    def questions(self, model: DocToLoRA, *, seed: int, trained: Sequence[AboutSubject] = ()) -> list[str]:
        told = {one.subject for one in trained}
        names = sorted(set(written_names(model, seed=seed)) - told)
        rng = random.Random(seed)
        if not names or not trained:
            return list(self.also)
        chosen = [trained[place % len(trained)] for place in range(max(self.number, len(trained)))]
        asked = [one.question.replace(one.subject, rng.choice(names)) for one in rng.sample(chosen, self.number)]
        return [*dict.fromkeys(asked), *self.also]

    def texts(self, model: DocToLoRA, *, seed: int) -> list[str]:
        if not self.num_texts:
            return []
        return SelfSynthesised(number=self.num_texts, max_tokens=40).questions(model, seed=seed + 1)


def written_names(model: DocToLoRA, *, seed: int) -> list[str]:
    """Names that the base model writes: runs of capitalised words inside sentences."""
    texts = SelfSynthesised(number=_NUM_TEXTS, max_tokens=40).questions(model, seed=seed)
    return sorted({name for text in texts for name in re.findall(r"(?<=[a-z,] )[A-Z]\w{2,}(?: [A-Z]\w{2,})*", text)})


def _in_turn(texts: Sequence[str], number: int) -> list[str]:
    groups: dict[str, list[str]] = {}
    for text in texts:
        words = [word for word in text.split()[1:] if word[:1].islower()]
        groups.setdefault(" ".join([*text.split()[:1], *words]), []).append(text)
    found: list[str] = []
    while groups and len(found) < number:
        for form in list(groups):
            found.append(groups[form].pop())
            if not groups[form]:
                del groups[form]
    return found[:number]
