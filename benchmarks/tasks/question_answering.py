"""Question answering datasets, each question with all the answers that its annotators gave."""

import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tasks.base import Asked, Case, practice_on_text, some
from hypernet.data.qa import accepted_answers


class QuestionAnsweringTask:
    """Documents that a dataset is measured on, from the hub or from a local file; nothing is read before `cases`.

    Args:
        name: one of `hypernet.data.qa.DATASETS`; None: path is in SQuAD's JSON format.
        path: a local file instead of the hub, measured whole: .json in SQuAD's format, or .jsonl or .parquet in the
            columns of `name`.
        num_cases: documents, drawn by the seed; None: all of them.
        max_questions: asked about each.
        num_practice: questions for methods that train on questions.
    """

    def __init__(
        self,
        *,
        name: str | None,
        path: str | None,
        num_cases: int | None,
        max_questions: int = 6,
        num_practice: int = 16,
    ) -> None:
        self.name = name
        self.path = path
        self.num_cases = num_cases
        self.max_questions = max_questions
        self.num_practice = num_practice

    def cases(self, seed: int) -> Iterator[Case]:
        """Raises ValueError where the dataset or file is missing, damaged or lacks a column."""
        found = list(accepted_answers(self.name, path=self.path).items())
        rng = random.Random(seed)
        drawn = some(rng, range(len(found)), self.num_cases)
        for place, number in enumerate(drawn):
            document, questions = found[number]
            yield Case(
                self.name or Path(self.path).stem,
                str(number),
                (document,),
                tuple(
                    Asked(text, answers, self.name or "")
                    for text, answers in some(rng, list(questions.items()), self.max_questions)
                ),
                others=(found[drawn[(place + 1) % len(drawn)]][0],),
                practice=practice_on_text(document, rng, self.num_practice),
            )
