"""SelfStudy: stored answers as a source of training.

source = SelfStudy("train", path="outputs/study", tokenizer=tokenizer)
source.record(7)                                   # a passage with its questions and their stored answers
"""

import random
from array import array
from functools import cached_property, lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hypernet.data.encyclopedia import SPLITS
from hypernet.data.records import UNKNOWN, Question, Record
from hypernet.data.self_study.shards import check_same, read_provenance, read_shard, tokenizer_fingerprint
from hypernet.data.sources import MAX_CORRUPT_ROWS, CorruptRows

SHARDS_TOGETHER = 8  # shards whose passages are shuffled together, and that are kept in memory


class SelfStudy:
    """Stored passages with questions and answers; a `hypernet.data.sources.Source` that is read shard by shard.

    Of the texts, a tenth each is kept for validation and test by a hash of the whole text, so that no two splits have
    passages of the same one. Each time round, shards come in another order, and `SHARDS_TOGETHER` of them are shuffled
    together: memory holds no more than these, however many there are.

    Args:
        split: "train", "validation" or "test".
        tokenizer: of the model in training; it must be the one that the answers were stored with.
        path: the folder with the shards.
        max_corrupt_rows: stored answers that may be left out because they cannot be used, of those read so far. A
            passage that has no others gives its place to the next one.

    Raises:
        ValueError: an unknown split. When reading: no shards, of several runs, of another tokenizer, with more corrupt
            rows than that, or none of their texts is in this split.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        path: str | Path,
        max_corrupt_rows: int = MAX_CORRUPT_ROWS,
    ) -> None:
        if split not in SPLITS[:3]:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS[:3])}.")
        self.split = split
        self.seed = seed
        self.tokenizer = tokenizer
        self.path = Path(path)
        self.corrupt = CorruptRows(self.path, max_corrupt_rows)
        self._counted: set[int] = set()  # shards whose corrupt rows are

    def record(self, index: int) -> Record:
        place, size = self._place(index), len(self._index)
        for i in range(size):
            if (record := self._passage((place + i) % size)) is not None:
                return record
        raise ValueError(f"{self.path} has no passage that can be used. Remove its shards, make them again.")

    def _passage(self, place: int) -> Record | None:
        """None where all of its rows are corrupt."""
        shard, passage, _ = self._index[place]
        found, reasons = _kept_shard(self.shards[shard])
        if reasons and shard not in self._counted:
            self._counted.add(shard)
            for reason in reasons:
                self.corrupt.skip(reason)
            self.corrupt.report(num_good=1)
        return found.get(passage)

    def num_tokens(self, index: int) -> int:
        return self._index[self._place(index)][2]

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        """A question about another passage. Its answer is not stored, so it needs a teacher."""
        for _ in range(1000):
            other = self._passage(rng.randrange(len(self._index)))
            if other is not None and other.document != record.document:
                return rng.choice(other.questions)._replace(answer=UNKNOWN, kind="cross_document", stored=None)
        raise ValueError(f"{self.path} has one passage, so none is asked about another. Set num_cross_document: 0.")

    @cached_property
    def shards(self) -> list[Path]:
        found = sorted(self.path.glob("shard-*.parquet"))
        if not found:
            raise ValueError(f"No shards in {self.path}. Make them: hypernet self-study --help.")
        first = {key: value for key, value in read_provenance(found[0]).items() if key != "sources"}
        for shard in found[1:]:
            check_same(shard, first)
        if self.tokenizer is not None and tokenizer_fingerprint(self.tokenizer) != first["tokenizer_fingerprint"]:
            raise ValueError(
                f"{self.path} was stored with the tokenizer of {first['settings']['base_model']}, whose ids mean other "
                "tokens here. Train that base model, or make the shards with this one."
            )
        return found

    @cached_property
    def _index(self) -> list[tuple[int, int, int]]:
        """(shard, passage, tokens) of every passage of this split."""
        import pyarrow.parquet as pq

        buckets = {0: "test", 1: "validation"}
        found = {}
        for number, shard in enumerate(self.shards):
            columns = pq.read_table(shard, columns=["passage", "source_sha256", "num_tokens"]).to_pydict()
            for passage, sha256, size in zip(*columns.values(), strict=True):
                if passage is None or sha256 is None or size is None:
                    continue  # counted when the shard is read
                if buckets.get(int(sha256[:8], 16) % 10, "train") == self.split:
                    found[number, passage] = size
        if not found:
            raise ValueError(f"None of the texts in {self.path} is in the {self.split} split. Study more of them.")
        return [(*place, size) for place, size in found.items()]

    def _place(self, index: int) -> int:
        """In `_index`."""
        epoch, place = divmod(index, len(self._index))
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> "array[int]":
        if epoch not in self._orders:
            rng = random.Random(f"{self.seed}/{self.split}/study/{epoch}")
            of_shard: dict[int, list[int]] = {}
            for i, (shard, _, _) in enumerate(self._index):
                of_shard.setdefault(shard, []).append(i)
            order = array("q")
            shards = rng.sample(list(of_shard), len(of_shard))
            for start in range(0, len(shards), SHARDS_TOGETHER):
                passages = [i for shard in shards[start : start + SHARDS_TOGETHER] for i in of_shard[shard]]
                order.extend(rng.sample(passages, len(passages)))
            # The last epoch may still be asked for by a step that began in it.
            self._orders.update({epoch: order})
            for old in [e for e in self._orders if abs(e - epoch) > 1]:
                del self._orders[old]
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, "array[int]"]:
        return {}


@lru_cache(maxsize=2 * SHARDS_TOGETHER)
def _kept_shard(path: Path) -> tuple[dict[int, Record], tuple[str, ...]]:
    return read_shard(path)
