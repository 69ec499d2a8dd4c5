"""What a source of records is, besides the encyclopedia: records by number, the same ones on every machine.

source.record(7)
corrupt = CorruptRows("data.jsonl"); corrupt.skip("Row 3 has no question.")     # counted, up to a limit
"""

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from hypernet.data.records import Question, Record
from hypernet.text.sentences import split_sentences
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


class Sentences:
    """One sentence of another source's records as a document, and as the answer to one of the record's questions.

    What a recitation is trained on: the sentence is to be said, whichever question is asked.

    Args:
        of: makes the other source, called with split, seed and tokenizer (conf/data/).
        num_tokens: least and most of a sentence.
    """

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        of: Callable[..., Source],
        num_tokens: tuple[int, int] = (3, 56),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.source, self.split, self.seed = of(split=split, seed=seed, tokenizer=tokenizer), split, seed
        self.limits, self.tokenizer = tuple(num_tokens), tokenizer

    def record(self, index: int) -> Record:
        rng = random.Random(f"sentences {self.split} {self.seed} {index}")
        for number in itertools.count(index):  # a record with a sentence of that length; most are the first
            record = self.source.record(number)
            text = record.document
            sentences = [text[start:end].strip() for start, end in split_sentences(text)]
            least, most = self.limits
            sizes = zip(sentences, count_tokens(sentences, self.tokenizer), strict=True)
            fitting = [sentence for sentence, size in sizes if least <= size <= most]
            if fitting and record.questions:
                asked = rng.choice(record.questions).text
                return Record((sentence := rng.choice(fitting),), (Question(asked, sentence),))
        raise AssertionError("unreachable")

    def num_tokens(self, index: int) -> int:
        return count_tokens([self.record(index).document], self.tokenizer)[0]

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        return self.source.cross_document(rng, record)


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
