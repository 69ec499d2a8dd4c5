"""Interactions: what a character was asked and answered in use, curated by a person, as questions of a `Consolidator`.

review = Review.of(memory.store.folder, filters)
review.collect(sheet.ref, "Do you like crowds?", answer)             # open; a person decides, or edits the file
consolidator = Consolidator(questions=Interactions(review), preference=Preference())
Consolidation(memory, consolidator=consolidator).consolidate(filters)   # trained and judged, not yet live

The sheet is a memory, and what is trained of its interactions contains it: deleting the sheet takes the weights back at
once, and `purge` erases them with the interactions.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hypernet.consolidation.questions import QuestionWriter
from hypernet.consolidation.self_instruct.review import Review, ReviewItem
from hypernet.memory.store.records import MemoryVersion


class Interactions(QuestionWriter):
    """Accepted and edited answers are trained on, rejected ones as what they should not be; some are kept for the gate.

    Args:
        review: where they were collected.
        held_out: share of the approved questions that the gate asks, by their hash; the gate wants one at least.

    Raises:
        ValueError: the share is not above 0 and below 1.
    """

    def __init__(self, review: Review, *, held_out: float = 0.25) -> None:
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}. Give a share above 0 and below 1.")
        self.review, self.held_out_share = review, held_out

    def training(self, memory: MemoryVersion) -> list[str]:
        return [item.question for item in self._parts(memory)[0]]

    def held_out(self, memory: MemoryVersion) -> list[str]:
        return [item.question for item in self._parts(memory)[1]]

    def is_approved(self, memory: MemoryVersion) -> bool:
        return bool(self._parts(memory)[0])

    def answers(self, memory: MemoryVersion) -> Mapping[str, str]:
        return {item.question: item.final for item in self._parts(memory)[0]}

    def right_answers(self, memory: MemoryVersion) -> Mapping[str, str]:
        return {item.question: item.final for item in self._parts(memory)[1]}

    def preferences(self, memory: MemoryVersion) -> list[tuple[str, str, str]]:
        trained = set(self.training(memory))
        return [pair for pair in self.review.preferences(memory.ref) if pair[0] in trained]

    def recipe(self) -> dict[str, Any]:
        items = [asdict(item) for item in self.review.items.values() if item.status != "open"]
        said = json.dumps([items, self.review.rejected_texts], sort_keys=True).encode()
        return {"held_out": self.held_out_share, "interactions": hashlib.sha256(said).hexdigest()}

    def _parts(self, memory: MemoryVersion) -> tuple[list[ReviewItem], list[ReviewItem]]:
        """Approved items to be trained on and those of the gate; of one question the last answer counts."""
        if self.review.has_rejected(str(memory.text)):
            return [], []
        items = {item.question: item for item in self.review.trainable(memory.ref)}
        ordered = sorted(items.values(), key=lambda item: hashlib.sha256(item.question.encode()).hexdigest())
        number = min(max(1, round(self.held_out_share * len(ordered))), max(0, len(ordered) - 1))
        return ordered[number:], ordered[:number]
