"""Needles in a haystack, by how many chunks the haystack has and by where the needle stands."""

import random
from collections.abc import Iterator, Sequence

from benchmarks.tasks.base import Asked, Case, practice_on_text, some
from hypernet.data.needles import Needles
from hypernet.data.sources import count_tokens
from hypernet.doc_to_lora import DocToLoRA


class NeedlesTask:
    """Haystacks of so many of the model's own chunks, one set for each number of chunks.

    Case by case all sets have the same needles at the same depths: only the haystack grows. Attributes: num_chunks,
    num_tokens, depth.

    Args:
        model: whose tokens and chunks the lengths are counted in.
        num_chunks: a set for each.
        depths: of the (first key's first) needle, 0 (first sentence) to 1 (last); the cases take them in turn.
        num_cases: of each set.
        num_keys, num_needles: numbers distinguished by a name, 0 for one without a name; numbers per key.
        filler: "plain", "encyclopedia", or sentences.
        max_questions: keys asked for.
        num_practice: questions for methods that train on questions.
        split: "test"; choices are tuned on "validation".

    Raises:
        ValueError: an unknown split or filler, or a depth outside 0 to 1.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        num_chunks: Sequence[int],
        depths: Sequence[float],
        num_cases: int,
        num_keys: int = 0,
        num_needles: int = 1,
        filler: str | Sequence[str] = "plain",
        max_questions: int = 6,
        num_practice: int = 16,
        split: str = "test",
    ) -> None:
        Needles(split, filler=filler)  # refuses what it does not know, before anything is measured
        if not depths or min(depths) < 0 or max(depths) > 1:
            raise ValueError(f"depths is {list(depths)}; give numbers from 0 (first sentence) to 1 (last).")
        self.model = model
        self.num_chunks = num_chunks
        self.depths = depths
        self.num_cases = num_cases
        self.num_keys = num_keys
        self.num_needles = num_needles
        self.filler = filler
        self.max_questions = max_questions
        self.num_practice = num_practice
        self.split = split

    def cases(self, seed: int) -> Iterator[Case]:
        """Raises ValueError where no haystack has just so many chunks: chunks too small for its sentences."""
        needles = Needles(self.split, seed=seed, tokenizer=self.model.tokenizer, filler=self.filler)
        for num_chunks in self.num_chunks:
            records = [
                needles.record(
                    number,
                    num_keys=self.num_keys,
                    num_needles=self.num_needles,
                    depth=self.depths[number % len(self.depths)],
                    num_chunks=num_chunks,
                    max_chunk_tokens=self.model.max_chunk_tokens,
                )
                for number in range(self.num_cases)
            ]
            sizes = count_tokens([record.document for record in records], self.model.tokenizer)
            for number, (record, num_tokens) in enumerate(zip(records, sizes, strict=True)):
                # Not by the number of chunks, so that all sets ask the same.
                rng = random.Random(f"{seed}/{number}")
                yield Case(
                    f"{num_chunks} chunk{'s' if num_chunks > 1 else ''}",
                    str(number),
                    (record.document,),
                    tuple(Asked(q.text, (q.answer,), q.group) for q in some(rng, record.questions, self.max_questions)),
                    others=(records[(number + 1) % len(records)].document,),
                    practice=practice_on_text(record.document, rng, self.num_practice),
                    attributes={
                        "num_chunks": num_chunks,
                        "num_tokens": num_tokens,
                        "depth": self.depths[number % len(self.depths)],
                    },
                )
