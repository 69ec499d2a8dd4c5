"""Sources of records besides the encyclopedia, and how they are drawn: by number, so that any run can resume.

    source.record(7)                                   # the same record on every machine
    order = Epochs(len(rows), "squad", 0)              # a finite dataset without end: order[i] is a row
    mixture = Mixture({"needles": 3, "squad": 1}, 0)   # mixture[i] is a name and a number within that source

Nothing here has a state that a checkpoint would have to hold: what is kept is only there to save time.
"""

import logging
import random
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from hypernet.data.records import Question, Record

log = logging.getLogger(__name__)

MAX_CORRUPT_ROWS = 100  # of a dataset; more are no accident
BLOCK = 1024  # draws of a mixture that are worked out together


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


class Epochs:
    """The rows of a finite dataset again and again, each time in another order.

    Args:
        size: how many rows.
        key: what the orders depend on, e.g. name, split and seed.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        self.size = size
        self.key = key

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.size)
        return _order(self.size, epoch, self.key)[place]


@lru_cache(maxsize=16)
def _order(size: int, epoch: int, key: tuple[int | str, ...]) -> array:
    order = array("q", range(size))
    random.Random("/".join(map(str, (*key, "epoch", epoch)))).shuffle(order)
    return order


class Mixture:
    """Draws among several sources with given weights, each source's records one after the other.

    Args:
        weights: name → weight, of any sum.
        key: what the draws depend on.

    Raises:
        ValueError: a weight is negative, or none is above 0.
    """

    def __init__(self, weights: Mapping[str, float], *key: int | str) -> None:
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"A mixture needs weights that are not negative and not all 0, got {dict(weights)}.")
        self.names = list(weights)
        self.weights = list(weights.values())
        self.key = key
        self._before = [Counter()]  # what was drawn before each block

    def __getitem__(self, draw: int) -> tuple[str, int]:
        if len(self.names) == 1:
            return self.names[0], draw
        block, place = divmod(draw, BLOCK)
        drawn = self._block(block)
        return drawn[place], self._counts_before(block)[drawn[place]] + drawn[:place].count(drawn[place])

    def counts(self, num_draws: int) -> Counter:
        """How many of the first `num_draws` come from each source."""
        if len(self.names) == 1:
            return Counter({self.names[0]: num_draws})
        block, place = divmod(num_draws, BLOCK)
        return self._counts_before(block) + Counter(self._block(block)[:place])

    def _counts_before(self, block: int) -> Counter:
        while len(self._before) <= block:
            self._before.append(self._before[-1] + Counter(self._block(len(self._before) - 1)))
        return self._before[block]

    def _block(self, block: int) -> tuple[str, ...]:
        return _drawn(tuple(self.names), tuple(self.weights), (*self.key, "mixture", block))


@lru_cache(maxsize=16)
def _drawn(names: tuple[str, ...], weights: tuple[float, ...], key: tuple[int | str, ...]) -> tuple[str, ...]:
    return tuple(random.Random("/".join(map(str, key))).choices(names, weights, k=BLOCK))


class Buckets:
    """Draws sorted by length within windows and cut into steps, so that the documents of a step need little padding.

    Args:
        length: draw → tokens.
        window: how many draws are sorted together.
        batch_size: documents per step, where there is no budget.
        max_step_tokens: tokens per step, padding included: documents times the longest of them. A document longer than
            that makes a step alone. Steps then hold as many documents as fit, so finding one means going through
            the lengths of all draws before it, once per process.
        key: what the order of the steps depends on.
    """

    def __init__(
        self,
        length: Callable[[int], int],
        *key: int | str,
        window: int,
        batch_size: int,
        max_step_tokens: int | None = None,
    ) -> None:
        self.length = length
        self.key = key
        self.max_step_tokens = max_step_tokens
        self.batch_size = batch_size
        self.window = window if max_step_tokens else max(1, round(window / batch_size)) * batch_size
        # Of the windows so far, under a budget: their steps, and how many these are up to the end of each.
        self._steps: list[list[int]] = []
        self._ends: list[int] = []

    def __getitem__(self, step: int) -> list[int]:
        """The draws of this step."""
        if self.max_step_tokens is None:
            window, place = divmod(step, self.window // self.batch_size)
            return self._cut(window)[place]
        self._fill(step + 1)
        return self._steps[step]

    def num_draws(self, num_steps: int) -> int:
        """How many draws the windows of the first `num_steps` take up."""
        if self.max_step_tokens is None:
            return -(-num_steps * self.batch_size // self.window) * self.window
        self._fill(num_steps)
        return (bisect_left(self._ends, num_steps) + 1) * self.window

    def _fill(self, num_steps: int) -> None:
        while len(self._steps) < num_steps:
            self._steps += self._cut(len(self._ends))
            self._ends.append(len(self._steps))

    def _cut(self, window: int) -> list[list[int]]:
        draws = range(window * self.window, (window + 1) * self.window)
        lengths = {draw: self.length(draw) for draw in draws}
        steps: list[list[int]] = [[]]
        for draw in sorted(draws, key=lengths.__getitem__):  # so the draw at hand is the longest of its step
            fits = (
                len(steps[-1]) < self.batch_size
                if self.max_step_tokens is None
                else (len(steps[-1]) + 1) * lengths[draw] <= self.max_step_tokens
            )
            if steps[-1] and not fits:
                steps.append([])
            steps[-1].append(draw)
        random.Random("/".join(map(str, (*self.key, "window", window)))).shuffle(steps)
        return steps


def count_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens of each text without special ones, or words where there is no tokenizer."""
    if tokenizer is None or not texts:
        return [len(text.split()) for text in texts]
    # verbose=False: a document may be longer than the model reads at once; chunks are for that.
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
