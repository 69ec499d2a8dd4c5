"""Review: what the model wrote about memories, one JSON line each, and a person's word on it.

review = Review(folder / "review.jsonl")
review.draft(model, memories, Templates())                  # questions, with the base model's answers: all "open"
review.decide(item.id, "accept")                            # or "reject", or "edit" with another answer
review.reject_text("Olwin Corton")                          # whatever has this in it, now and later
questions = Reviewed(Templates(), review)                   # for a `Consolidator`: what is approved, its answers
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from hypernet.consolidation.moves import settings_of
from hypernet.consolidation.questions import QuestionWriter
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.files import replaced
from hypernet.memory.store.records import Filters, MemoryVersion
from hypernet.memory.store.times import now, to_text
from hypernet.memory.weights.versions import REVIEW, Versions
from hypernet.text.matching import exact_match

DECISIONS = {"accept": "accepted", "reject": "rejected", "edit": "edited"}
APPROVED = ("accepted", "edited")


@dataclass(frozen=True)
class ReviewItem:
    """A written question on a memory.

    Attributes:
        memory: id@version. answer: the base model's, with the memory in its prompt.
        status: "open", "accepted", "edited" or "rejected". edited: the person's answer in place of the model's.
    """

    id: str
    memory: str
    question: str
    answer: str
    status: str = "open"
    edited: str | None = None
    at: str | None = None

    @property
    def final(self) -> str:
        """The answer that is trained on."""
        return self.answer if self.edited is None else self.edited


class Review:
    """A file of items and rejected texts; each change replaces it whole, so that a person may edit it too.

    Raises:
        ValueError: a line is no item.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.items: dict[str, ReviewItem] = {}
        self.rejected_texts: list[str] = []
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line.decode())
                if set(fields) == {"reject"}:
                    self.rejected_texts.append(str(fields["reject"]))
                    continue
                item = ReviewItem(**fields)
            except (ValueError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{path}, line {number} is no reviewed item ({reason}). Correct or remove the line; what one "
                    "has is in docs/consolidation.md."
                ) from error
            if item.status not in ("open", *DECISIONS.values()):
                raise ValueError(f"{path}, line {number}: status is {item.status!r}, not open, accepted, ...")
            self.items[item.id] = item

    def draft(self, model: DocToLoRA, memories: Sequence[MemoryVersion], writer: QuestionWriter) -> list[ReviewItem]:
        """Writes what is not there yet, and returns it."""
        asked = [(m, text) for m in memories for text in writer.training(m) if _id(m.ref, text) not in self.items]
        answers = (
            model.generate([text for _, text in asked], documents=[str(m.text) for m, _ in asked]) if asked else []
        )
        pairs = zip(asked, answers, strict=True)
        made = [ReviewItem(_id(m.ref, text), m.ref, text, answer) for (m, text), answer in pairs]
        self.items |= {item.id: item for item in made}
        self._write()
        return made

    def collect(self, ref: str, question: str, answer: str) -> ReviewItem:
        """Keeps what was asked and answered in use, "open" until a person decides; the same again is the same item.

        Args:
            ref: id@version of the memory that the answer comes from, such as a character's sheet.

        Raises:
            ValueError: question or answer is empty.
        """
        if not question.strip() or not answer.strip():
            raise ValueError(f"The question is {question!r} and the answer {answer!r}. Collect two texts.")
        item = ReviewItem(_id(ref, f"{question}\n{answer}"), ref, question, answer)
        if item.id not in self.items:
            self.items[item.id] = item
            self._write()
        return self.items[item.id]

    def decide(self, key: str, decision: str, answer: str | None = None) -> ReviewItem:
        """A person's word on an item; the last one counts.

        Raises:
            ValueError: there is no such item or decision, or an edit has no answer.
        """
        if key not in self.items:
            raise ValueError(f"There is no item {key!r}; the review has {len(self.items)}.")
        if decision not in DECISIONS:
            raise ValueError(f"{decision!r} is no decision: choose one of {', '.join(DECISIONS)}.")
        if (decision == "edit") != bool(answer):
            raise ValueError("An edit needs an answer, and nothing else has one.")
        item = replace(self.items[key], status=DECISIONS[decision], edited=answer, at=to_text(now()))
        self.items[key] = item
        self._write()
        return item

    def reject_text(self, text: str) -> None:
        """Rejects every item with this text in its memory, question or answer, whatever was decided on it.

        Raises:
            ValueError: it is empty.
        """
        if not text.strip():
            raise ValueError("The text to be rejected is empty.")
        self.rejected_texts.append(text)
        self._write()

    def trainable(self, ref: str, *, require_approval: bool = True) -> list[ReviewItem]:
        """Items on a memory that may be trained on: approved ones, or without that demand all that are not rejected."""
        allowed = APPROVED if require_approval else ("open", *APPROVED)
        found = [item for item in self.items.values() if item.memory == ref and item.status in allowed]
        return [item for item in found if not self.is_rejected(item)]

    def preferences(self, ref: str) -> list[tuple[str, str, str]]:
        """(question, better answer, worse answer): of an edited item the person's and the model's; of a rejected answer
        any that was approved to the same question."""
        approved = self.trainable(ref)
        edited = [item for item in approved if item.status == "edited" and item.final != item.answer]
        worse = [item for item in self.items.values() if item.memory == ref and item.status == "rejected"]
        pairs = [(item.question, item.final, item.answer) for item in edited]
        pairs += [
            (item.question, item.final, other.answer)
            for other in worse
            for item in approved
            if item.question == other.question and item.final != other.answer
        ]
        return list(dict.fromkeys(pairs))

    @classmethod
    def of(cls, memory: str | Path, filters: Filters) -> Self:
        """That of a memory's folder within these filters, next to their versions."""
        return cls(Versions.of(Path(memory), filters).folder / REVIEW)

    def is_rejected(self, item: ReviewItem) -> bool:
        """By its status, or by a rejected text."""
        if item.status == "rejected":
            return True
        return self.has_rejected(item.question) or self.has_rejected(item.final)

    def has_rejected(self, text: str) -> bool:
        return any(rejected.casefold() in text.casefold() for rejected in self.rejected_texts)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [*({"reject": text} for text in self.rejected_texts), *map(asdict, self.items.values())]
        with replaced(self.path) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())


class Reviewed(QuestionWriter):
    """The questions of a writer that a review lets through; a memory without any is not consolidated.

    Args:
        writer: what the items were drafted with, and whose held-out wordings the gate asks.
        require_approval: whether open items are left out.
    """

    def __init__(self, writer: QuestionWriter, review: Review, *, require_approval: bool = True) -> None:
        self.writer, self.review, self.require_approval = writer, review, require_approval

    def training(self, memory: MemoryVersion) -> list[str]:
        return [item.question for item in self._items(memory)]

    def held_out(self, memory: MemoryVersion) -> list[str]:
        return self.writer.held_out(memory) if self._items(memory) else []

    def is_approved(self, memory: MemoryVersion) -> bool:
        return bool(self._items(memory))

    def subjects(self, memory: MemoryVersion) -> list[str]:
        return self.writer.subjects(memory)

    def answers(self, memory: MemoryVersion) -> dict[str, str]:
        return {item.question: item.final for item in self._items(memory)}

    def right_answer(self, memory: MemoryVersion) -> str | None:
        """A person's, where they corrected the base model and all approved items have the same answer: there the base
        model is no judge. In a benchmark of 8 reviewed facts it said "unknown" to 4 of 15 held-out questions, all of
        which the candidate answered rightly."""
        items = self._items(memory)
        if not any(item.status == "edited" for item in items):
            return None
        return items[0].final if all(exact_match(item.final, items[0].final) for item in items) else None

    def preferences(self, memory: MemoryVersion) -> list[tuple[str, str, str]]:
        return self.review.preferences(memory.ref) if self._items(memory) else []

    def recipe(self) -> dict[str, Any]:
        items = [asdict(i) for i in self.review.items.values() if self.review.trainable(i.memory)]
        said = json.dumps([items, self.review.rejected_texts], sort_keys=True).encode()
        return {"writer": settings_of(self.writer), "review": hashlib.sha256(said).hexdigest()}

    def _items(self, memory: MemoryVersion) -> list[ReviewItem]:
        # The teacher has the whole memory in its prompt, so that none with a rejected text is consolidated.
        if self.review.has_rejected(str(memory.text)):
            return []
        return self.review.trainable(memory.ref, require_approval=self.require_approval)


def _id(ref: str, question: str) -> str:
    return "q-" + hashlib.sha256(f"{ref}\n{question}".encode()).hexdigest()[:12]
