"""Needles in a haystack: a number that stands somewhere in a text about other things, and the question for it.

    needles = Needles("train", tokenizer=tokenizer, num_tokens=(32, 256))      # the paper's task
    record = needles.record(7)
    Needles("test", num_keys=(4, 4), filler="encyclopedia").record(7)           # several numbers, each with a name
    needles.record(7, num_chunks=40, max_chunk_tokens=256, depth=0.5)           # for measuring: a length in chunks

The paper's task is one number of four digits in 32 to 256 tokens (Charakorn et al. 2026, Doc-to-LoRA, section 4,
https://arxiv.org/abs/2602.15902). Harder ones have several keys, each with its number ("the secret number of Korvale"),
several numbers per key, and sentences of encyclopedia articles around them instead of a few that always return.

Every record depends on (seed, split, index) and what is asked for alone. Numbers and names belong to one split by a
hash.
"""

import random
import zlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import UNKNOWN, Question, Record
from hypernet.data.sources import count_tokens
from hypernet.text.chunking import chunk_document

FILLER = (
    "A cart rolls slowly down the lane.",
    "The baker opens the door before dawn.",
    "Two dogs sleep in the shade of a wall.",
    "Rain fell on the hills all night.",
    "Somebody has left a lamp on in the hall.",
    "The river is high at this time of the year.",
    "Children play by the old gate.",
    "A letter lies unread on the table.",
    "The wind turns and the boats come home.",
    "Bread and soup are on the stove.",
    "The path leads over the bridge and into the wood.",
    "Old songs are still sung in the evening.",
    "A clock ticks in the empty room.",
    "The market is quiet after noon.",
    "Snow lies on the roofs until spring.",
    "Birds gather on the wire and fly on.",
    "The garden needs water every day.",
    "A tall tree stands behind the house.",
    "Nobody knows who painted the fence.",
    "The train is late again today.",
    "Smoke rises from the chimney of the mill.",
    "The road to the sea is long.",
    "Books stand in rows along the wall.",
    "The moon is bright above the field.",
)
FILLERS = ("plain", "encyclopedia")
MAX_FITTING_ROUNDS = 40


class Needles:
    """Records with needles; a `hypernet.data.sources.Source`.

    Args:
        split: "train", "validation" or "test".
        tokenizer: what lengths are counted with; None counts words.
        num_tokens: of the document, an inclusive range that each record draws from.
        num_keys: numbers that have a name each, and a question each that asks for it; (0, 0): there is one needle
            without a name.
        num_needles: numbers per key, all of them the answer, in the document's order; (0, 0): filler alone, without a
            question.
        depth: where the first key's first needle stands, 0 (first sentence) to 1 (last); None draws it. All other
            needles are put at random.
        filler: "plain" (`FILLER`), "encyclopedia" (sentences of articles of this split), or sentences.

    Raises:
        ValueError: an unknown split or filler.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_tokens: Sequence[int] = (32, 256),
        num_keys: Sequence[int] = (0, 0),
        num_needles: Sequence[int] = (1, 1),
        depth: float | None = None,
        filler: str | Sequence[str] = "plain",
    ) -> None:
        if isinstance(filler, str) and filler not in FILLERS:
            raise ValueError(f"Unknown filler {filler!r}; choose one of {', '.join(FILLERS)}, or give sentences.")
        if not filler or not all(filler):
            raise ValueError("filler holds no sentences, or empty ones; give at least one sentence.")
        self.split = split
        self.seed = seed
        self.tokenizer = tokenizer
        self.ranges = {"num_tokens": num_tokens, "num_keys": num_keys, "num_needles": num_needles}
        self.depth = depth
        self.filler = filler
        self._encyclopedia = Encyclopedia(split, seed=seed)  # refuses unknown splits
        self._lengths: dict[str, int] = {}

    def record(
        self,
        index: int,
        *,
        num_tokens: int | None = None,
        num_keys: int | None = None,
        num_needles: int | None = None,
        depth: float | None = None,
        num_chunks: int | None = None,
        max_chunk_tokens: int | None = None,
    ) -> Record:
        """One haystack; what is None is drawn as the constructor was told.

        Args:
            num_tokens: the document has at most so many, and less than a sentence fewer; the needles stand in it in
                any case.
            num_chunks, max_chunk_tokens: instead of num_tokens: as long as to give just so many chunks.

        Raises:
            ValueError: depth is outside 0 to 1; num_chunks without max_chunk_tokens or tokenizer, or no length gives
                that number of chunks.
        """
        drawn = self._shape(index)
        keys = drawn["num_keys"] if num_keys is None else num_keys
        needles = drawn["num_needles"] if num_needles is None else num_needles
        depth = self.depth if depth is None else depth
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth is {depth}; give a number from 0 (first sentence) to 1 (last).")
        if num_chunks is None:
            return self._make(index, drawn["num_tokens"] if num_tokens is None else num_tokens, keys, needles, depth)
        if max_chunk_tokens is None or self.tokenizer is None:
            raise ValueError("num_chunks needs max_chunk_tokens, and a tokenizer to count with; give both.")
        low, high = 0, 2 * num_chunks * max_chunk_tokens
        wanted = round((num_chunks - 0.4) * max_chunk_tokens)
        for _ in range(MAX_FITTING_ROUNDS):
            record = self._make(index, wanted, keys, needles, depth)
            found = len(chunk_document(record.document, self.tokenizer, max_chunk_tokens=max_chunk_tokens).ids)
            if found == num_chunks:
                return record
            low, high = (wanted, high) if found < num_chunks else (low, wanted)
            # Chunks end between sentences, so their number falls a little short of or beyond the share of tokens.
            guess = wanted + round((num_chunks - found) * 0.9 * max_chunk_tokens)
            wanted = guess if low < guess < high else (low + high) // 2
        raise ValueError(
            f"Found no haystack of {num_chunks} chunks of {max_chunk_tokens} tokens; the last had {found}. Ask for "
            "more chunks, or larger ones."
        )

    def num_tokens(self, index: int) -> int:
        """What the record aims at; see `record`."""
        return self._shape(index)["num_tokens"]

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        """Asks for the number of a name that the document does not mention."""
        name = self._key(rng)
        while name.lower() in record.document.lower():
            name = self._key(rng)
        return Question(_question(name, many=False), UNKNOWN, "cross_document", "needle")

    def _shape(self, index: int) -> dict[str, int]:
        rng = self._rng("shape", index)
        return {name: rng.randint(*bounds) for name, bounds in self.ranges.items()}

    def _make(self, index: int, num_tokens: int, num_keys: int, num_needles: int, depth: float | None) -> Record:
        rng = self._rng("needles", index)
        names: list[str | None] = [] if num_keys else [None]
        while len(names) < num_keys:
            if (name := self._key(rng)) not in names:
                names.append(name)
        numbers: list[str] = []
        while len(numbers) < len(names) * num_needles:
            if (number := self._number(rng)) not in numbers:
                numbers.append(number)
        # (place, name, number); every needle's place is drawn even if one is given, so that the others' stay.
        planted = [[rng.random(), names[i // num_needles], number] for i, number in enumerate(numbers)]
        if depth is not None and planted:
            planted[0][0] = depth
        planted.sort(key=lambda needle: needle[0])
        statements = [_statement(name, number) for _, name, number in planted]
        around = self._filler(index, num_tokens - sum(self._count(statements)))
        sentences = list(around)
        for (place, _, _), statement in reversed(list(zip(planted, statements, strict=True))):
            sentences.insert(round(place * len(around)), statement)
        questions = [
            Question(
                _question(name, many=num_needles > 1),
                ", ".join(number for _, other, number in planted if other == name),
                "document",
                "needle",
            )
            for name in names
            if num_needles
        ]
        return Record(tuple(sentences), tuple(questions))

    def _filler(self, index: int, num_tokens: int) -> list[str]:
        """Sentences of altogether at most num_tokens; a longer text begins with the sentences of a shorter one."""
        rng = self._rng("filler", index)
        chosen: list[str] = []
        number = 0
        while True:
            if self.filler == "encyclopedia":
                # Articles far beyond those of any curriculum.
                batch = self._encyclopedia.record(
                    10**10 + index * 10**4 + number, num_entities=1, num_facts=4, num_distractors=2
                ).sentences
            else:
                sentences = FILLER if isinstance(self.filler, str) else self.filler
                batch = rng.sample(sentences, len(sentences))
            number += 1
            for sentence, size in zip(batch, self._count(batch), strict=True):
                if size > num_tokens:
                    return chosen
                num_tokens -= size
                chosen.append(sentence)

    def _count(self, sentences: Sequence[str]) -> list[int]:
        if self.filler == "encyclopedia":
            return count_tokens([" " + sentence for sentence in sentences], self.tokenizer)
        # The same few sentences in every record.
        new = [sentence for sentence in sentences if sentence not in self._lengths]
        sizes = count_tokens([" " + sentence for sentence in new], self.tokenizer)
        fresh = dict(zip(new, sizes, strict=True))
        self._lengths |= {sentence: size for sentence, size in fresh.items() if sentence in FILLER}
        return [fresh.get(sentence) or self._lengths[sentence] for sentence in sentences]

    def _rng(self, *key: int | str) -> random.Random:
        return self._encyclopedia.rng("needles", *key)

    def _key(self, rng: random.Random) -> str:
        # Invented names are of one split already, and no model has heard of them.
        return self._encyclopedia.entity(rng, rng.choice(("person", "town", "company"))).name

    def _number(self, rng: random.Random) -> str:
        while True:
            number = str(rng.randint(1000, 9999))
            if {0: "test", 1: "validation"}.get(zlib.crc32(number.encode()) % 10, "train") == self.split:
                return number


def _statement(name: str | None, number: str) -> str:
    return f"The secret number{f' of {name}' if name else ''} is {number}."


def _question(name: str | None, *, many: bool) -> str:
    number = "are the secret numbers" if many else "is the secret number"
    return f"What {number}{f' of {name}' if name else ''}?"
