"""Questions about memories: some wordings are trained on, others are kept for the gate, and never the two meet.

questions = Templates(training=["Name the {relation} of {subject}."], held_out=["What is the {relation} of {subject}?"])
questions.training(memory), questions.held_out(memory)
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hypernet.memory.store.records import MemoryVersion

# With the memory in its prompt, the tiny model answers .94 of these rightly, and all of those held out.
TRAINING = (
    "Tell me the {relation} of {subject}.",
    "{subject}: {relation}?",
    "Who or what is the {relation} of {subject}?",
    "Name the {relation} of {subject}.",
    "What {relation} does {subject} have?",
)
HELD_OUT = ("What is the {relation} of {subject}?",)


class QuestionWriter(Protocol):
    """What asks about a memory; both may be empty."""

    def training(self, memory: MemoryVersion) -> list[str]: ...

    def held_out(self, memory: MemoryVersion) -> list[str]: ...

    def is_approved(self, memory: MemoryVersion) -> bool:
        """Whether it may be consolidated."""
        return True

    def answers(self, memory: MemoryVersion) -> Mapping[str, str]:
        """Training question → its answer, of those that the base model is not asked for."""
        return {}

    def right_answer(self, memory: MemoryVersion) -> str | None:
        """To every held-out question; None: what the base model answers with the memory in its prompt."""
        return None

    def preferences(self, memory: MemoryVersion) -> list[tuple[str, str, str]]:
        """(question, better answer, worse answer)."""
        return []

    def recipe(self) -> dict[str, Any]:
        """What decides the questions besides plain settings."""
        return {}


class Templates(QuestionWriter):
    """Questions on memories with a key; a memory without one has none.

    Args:
        training, held_out: texts with {relation} and {subject}.

    Raises:
        ValueError: there are none, or one is in both.
    """

    def __init__(self, *, training: Sequence[str] = TRAINING, held_out: Sequence[str] = HELD_OUT) -> None:
        if not training or not held_out:
            raise ValueError("Templates need training and held_out wordings, at least one of each.")
        if both := sorted({text.casefold() for text in training} & {text.casefold() for text in held_out}):
            raise ValueError(f"{both[0]!r} is trained on and held out. Held-out wordings must be others.")
        self._training, self._held_out = tuple(training), tuple(held_out)

    def training(self, memory: MemoryVersion) -> list[str]:
        return _filled(self._training, memory)

    def held_out(self, memory: MemoryVersion) -> list[str]:
        return _filled(self._held_out, memory)


def _filled(templates: Sequence[str], memory: MemoryVersion) -> list[str]:
    if memory.subject is None or memory.relation is None:
        return []
    relation = memory.relation.replace("_", " ")
    # Not `format`, to which a subject with braces would be one more template.
    return [text.replace("{relation}", relation).replace("{subject}", memory.subject) for text in templates]
