"""Articles of the synthetic encyclopedia: one, long ones, several; and the controls that must score like no context.

Articles come from the test split, which shares no entity and no invented name with training, and has sentence forms of
its own.
"""

from collections.abc import Iterator

from benchmarks.tasks.articles import article, practice_questions, with_new_values
from benchmarks.tasks.base import Asked, Case, some
from hypernet.data.encyclopedia import Encyclopedia

CONTROLS = (None, "shuffled_facts", "empty_document")


class EncyclopediaTask:
    """Articles of the synthetic encyclopedia, by how much they hold.

    Args:
        sets: name → documents (how many), entities and facts_per_entity of each and distractors, inclusive ranges.
        num_cases: of each set.
        max_questions: asked about each case.
        num_practice: questions for methods that train on questions.
        split: "test"; choices are tuned on "validation".
        control: "shuffled_facts" tells other values than the questions' answers, "empty_document" nothing at all; both
            must score like no context.

    Raises:
        ValueError: an unknown control.
    """

    def __init__(
        self,
        *,
        sets: dict[str, dict],
        num_cases: int,
        max_questions: int = 6,
        num_practice: int = 16,
        split: str = "test",
        control: str | None = None,
    ) -> None:
        if control not in CONTROLS:
            raise ValueError(f"control is {control!r}; choose one of {', '.join(map(str, CONTROLS))}.")
        self.sets = sets
        self.num_cases = num_cases
        self.max_questions = max_questions
        self.num_practice = num_practice
        self.split = split
        self.control = control

    def cases(self, seed: int) -> Iterator[Case]:
        encyclopedia = Encyclopedia(self.split, seed=seed)
        for place, (name, settings) in enumerate(self.sets.items()):
            sizes = dict(settings)
            num_documents = sizes.pop("documents", 1)
            groups = [
                [article(encyclopedia, f"{place}/{number}/{k}", **sizes) for k in range(num_documents)]
                for number in range(self.num_cases)
            ]
            for number, records in enumerate(groups):
                rng = encyclopedia.rng("asked", place, number)
                documents = tuple(record.document for record in records)
                if self.control == "shuffled_facts":
                    told = encyclopedia.rng("control", place, number)
                    documents = tuple(with_new_values(record, encyclopedia, told)[0] for record in records)
                elif self.control == "empty_document":
                    documents = ("",) * len(records)
                asked = [question for record in records for question in record.questions]
                yield Case(
                    name,
                    f"{place}/{number}",
                    documents,
                    tuple(Asked(q.text, (q.answer,), q.group) for q in some(rng, asked, self.max_questions)),
                    others=tuple(r.document for r in groups[(number + 1) % len(groups)]),
                    practice=practice_questions(asked, rng, self.num_practice),
                )
