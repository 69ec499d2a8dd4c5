"""Questions about memories: some wordings are trained on, others are kept for the gate, and never the two meet.

questions = Templates(training=["Name the {relation} of {subject}."], held_out=["What is the {relation} of {subject}?"])
questions.training(memory), questions.held_out(memory)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hypernet.memory.extraction import extract_facts
from hypernet.memory.store.records import MemoryVersion

# With the memory in its prompt, the tiny model answers .94 of these rightly, and all of those held out.
TRAINING = (
    "Tell me the {relation} of {subject}.",
    "{subject}: {relation}?",
    "Who or what is the {relation} of {subject}?",
    "Name the {relation} of {subject}.",
    "What {relation} does {subject} have?",
)
GIVEN_QUESTIONS = "consolidation"  # in a memory's metadata: {"training": [questions], "held_out": [questions]}
HELD_OUT = ("What is the {relation} of {subject}?",)
# Of what is extracted from sentences: these read as nouns in the wordings above, "born in" does not.
_VERBS = re.compile(r"\b(?:in|at|by|to|on|as|for|born|based|located|employed|married|called|named|headed|founded)$")


class QuestionWriter(Protocol):
    """What asks about a memory; both may be empty."""

    def training(self, memory: MemoryVersion) -> list[str]: ...

    def held_out(self, memory: MemoryVersion) -> list[str]: ...

    def subjects(self, memory: MemoryVersion) -> list[str]:
        """Names that the questions are about."""
        return [] if memory.subject is None else [memory.subject]

    def is_approved(self, memory: MemoryVersion) -> bool:
        """Whether it may be consolidated."""
        return True

    def answers(self, memory: MemoryVersion) -> Mapping[str, str]:
        """Training question → its answer, of those that the base model is not asked for."""
        return {}

    def right_answer(self, memory: MemoryVersion) -> str | None:
        """To every held-out question; None: what the base model answers with the memory in its prompt."""
        return None

    def right_answers(self, memory: MemoryVersion) -> Mapping[str, str]:
        """Held-out question → its answer, of those that have one of their own; the others have `right_answer`."""
        return {}

    def preferences(self, memory: MemoryVersion) -> list[tuple[str, str, str]]:
        """(question, better answer, worse answer)."""
        return []

    def recipe(self) -> dict[str, Any]:
        """What decides the questions besides plain settings."""
        return {}


class Templates(QuestionWriter):
    """Questions on a memory's key, or where it has none on the facts that its sentences name (`asked_keys`); and those
    that its metadata gives as {"consolidation": {"training": [...], "held_out": [...]}}.

    Args:
        training, held_out: texts with {relation} and {subject}.

    Raises:
        ValueError: there are none, or one is in both; also of a memory's metadata.
    """

    def __init__(self, *, training: Sequence[str] = TRAINING, held_out: Sequence[str] = HELD_OUT) -> None:
        if not training or not held_out:
            raise ValueError("Templates need training and held_out wordings, at least one of each.")
        if both := sorted({text.casefold() for text in training} & {text.casefold() for text in held_out}):
            raise ValueError(f"{both[0]!r} is trained on and held out. Held-out wordings must be others.")
        self._training, self._held_out = tuple(training), tuple(held_out)

    def training(self, memory: MemoryVersion) -> list[str]:
        return [*_filled(self._training, memory), *_given(memory)[0]]

    def held_out(self, memory: MemoryVersion) -> list[str]:
        return [*_filled(self._held_out, memory), *_given(memory)[1]]

    def subjects(self, memory: MemoryVersion) -> list[str]:
        return list(dict.fromkeys(subject for subject, _ in _keys(memory)))


def asked_keys(text: str) -> list[tuple[str, str]]:
    """(subject, relation) of the facts that a text names and the wordings can ask for."""
    facts = (fact for fact in extract_facts(text) if not _VERBS.search(fact.relation))
    return list(dict.fromkeys((fact.subject, fact.relation) for fact in facts))


def _keys(memory: MemoryVersion) -> list[tuple[str, str]]:
    if memory.subject is not None and memory.relation is not None:
        return [(memory.subject, memory.relation)]
    return asked_keys(str(memory.text))


def _filled(templates: Sequence[str], memory: MemoryVersion) -> list[str]:
    # Not `format`, to which a subject with braces would be one more template.
    return [
        text.replace("{relation}", relation.replace("_", " ")).replace("{subject}", subject)
        for subject, relation in _keys(memory)
        for text in templates
    ]


def _given(memory: MemoryVersion) -> tuple[list[str], list[str]]:
    given = memory.metadata.get(GIVEN_QUESTIONS, {})
    pair = [given.get(name, []) for name in ("training", "held_out")] if isinstance(given, dict) else []
    if not pair or not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in pair):
        raise ValueError(
            f"{memory.ref}: metadata {GIVEN_QUESTIONS!r} should be {{'training': [texts], 'held_out': [texts]}}, "
            f"not {given!r}."
        )
    training, held_out = pair
    if both := sorted({text.casefold() for text in training} & {text.casefold() for text in held_out}):
        raise ValueError(f"{memory.ref}: {both[0]!r} is trained on and held out. Held-out wordings must be others.")
    return training, held_out
