"""What a source of records is, besides the encyclopedia: records by number, the same ones on every machine.

source.record(7)
corrupt = CorruptRows("data.jsonl"); corrupt.skip("Row 3 has no question.")     # counted, up to a limit
"""

import logging
import random
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from hypernet.data.records import Question, Record
from hypernet.text.tokens import text_ids

log = logging.getLogger(__name__)

MAX_CORRUPT_ROWS = 100  # of a dataset; more are no accident


@runtime_checkable
class Source(Protocol):
    """Records by number, without end; built once per split with `split`, `seed` and `tokenizer`."""

    def record(self, index: int) -> Record:
        """The record of this number; the same one every time and everywhere."""
        ...

    def num_tokens(self, index: int) -> int:
        """Length of that record's document, found without making it: documents are sorted by it."""
        ...

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        """A question like the record's own, of kind "cross_document": its document does not answer it."""
        ...


class TooManyCorruptRows(ValueError):
    """What `CorruptRows` raises."""


class CorruptRows:
    """Rows of a dataset that cannot be used: they are left out and counted, and too many of them end the run.

    Args:
        what: the file or dataset, for messages.
        limit: rows that may be left out.
    """

    def __init__(self, what: object, limit: int = MAX_CORRUPT_ROWS) -> None:
        self.what = what
        self.limit = limit
        self.count = 0
        self.first = ""

    def skip(self, reason: str) -> None:
        """Leaves out one row.

        Raises:
            TooManyCorruptRows: it is one more than the limit.
        """
        self.count += 1
        self.first = self.first or " ".join(str(reason).split())
        if self.count > self.limit:
            raise TooManyCorruptRows(
                f"{self.what} has more than {self.limit} corrupt rows; the first: {self.first} Mend the data, or raise "
                "max_corrupt_rows."
            )

    def report(self, *, num_good: int) -> None:
        """Says how many rows were left out, if any.

        Raises:
            TooManyCorruptRows: there are corrupt rows and no others.
        """
        if self.count and not num_good:
            raise TooManyCorruptRows(f"{self.what} has no row that can be used; the first: {self.first}")
        if self.count:
            log.warning("%s: %d corrupt rows are left out; the first: %s", self.what, self.count, self.first)


def count_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens of each text without special ones, or words where there is no tokenizer."""
    if tokenizer is None or not texts:
        return [len(text.split()) for text in texts]
    return [len(ids) for ids in text_ids(tokenizer, texts)]
