"""A document that is replaced by a newer version of it."""

from collections.abc import Iterator

from benchmarks.tasks.articles import article, practice_questions, with_new_values
from benchmarks.tasks.base import Asked, Case, some
from hypernet.data.encyclopedia import Encyclopedia


class UpdatesTask:
    """A newer version of an article: does its answer come, when the older one was dropped, and when both are there?

    Args:
        num_cases: articles of each set.
    """

    def __init__(self, *, num_cases: int, max_questions: int = 6) -> None:
        self.num_cases = num_cases
        self.max_questions = max_questions

    def cases(self, seed: int) -> Iterator[Case]:
        encyclopedia = Encyclopedia("test", seed=seed)
        made = []
        for number in range(self.num_cases):
            record = article(encyclopedia, f"updates/{number}")
            rng = encyclopedia.rng("new version", number)
            newer, values = with_new_values(record, encyclopedia, rng)
            asked = [
                Asked(q.text, (values[q.answer],), q.group, old_answer=q.answer)
                for q in some(rng, record.questions, self.max_questions)
            ]
            made.append((record.document, newer, asked, practice_questions(record.questions, rng, 16)))
        for name in ("old version dropped", "old version kept"):
            for number, (older, newer, asked, practice) in enumerate(made):
                dropped = name == "old version dropped"
                yield Case(
                    name,
                    str(number),
                    (newer,) if dropped else (older, newer),
                    tuple(asked),
                    others=(made[(number + 1) % len(made)][1],),
                    replaced=(older,) if dropped else (),
                    practice=practice,
                )
