"""Adapters of several documents joined: what of each is left, compared with the same document alone."""

from collections.abc import Iterator, Sequence

from benchmarks.tasks.articles import article, entity_of, practice_questions
from benchmarks.tasks.base import Asked, Case, some
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import Record


class CompositionTask:
    """Articles about one entity each, one by one and in groups, one set for each size of the groups.

    All sets have the same articles and ask the same questions, so they differ in how many articles are joined alone. No
    two articles are about one entity. Attribute: num_documents.

    Args:
        num_documents: sizes of the groups; each divides the largest.
        num_cases: groups of the largest size; a set of a smaller size has as many more.
        facts_per_entity, distractors: of an article, inclusive ranges.
        questions_per_document: at most so many.
        num_practice: questions for methods that train on questions.

    Raises:
        ValueError: a size does not divide the largest.
    """

    def __init__(
        self,
        *,
        num_documents: Sequence[int],
        num_cases: int,
        facts_per_entity: Sequence[int] = (2, 5),
        distractors: Sequence[int] = (0, 2),
        questions_per_document: int = 3,
        num_practice: int = 16,
    ) -> None:
        if not num_documents or min(num_documents) < 1 or any(max(num_documents) % size for size in num_documents):
            raise ValueError(f"num_documents is {list(num_documents)}; each must divide the largest, as 1, 2, 4, 8 do.")
        self.num_documents = num_documents
        self.num_cases = num_cases
        self.sizes = {"facts_per_entity": facts_per_entity, "distractors": distractors}
        self.questions_per_document = questions_per_document
        self.num_practice = num_practice

    def cases(self, seed: int) -> Iterator[Case]:
        encyclopedia = Encyclopedia("test", seed=seed)
        articles = self._articles(encyclopedia, self.num_cases * max(self.num_documents))
        asked = [
            some(encyclopedia.rng("asked", number), record.questions, self.questions_per_document)
            for number, record in enumerate(articles)
        ]
        for size in self.num_documents:
            groups = [range(start, start + size) for start in range(0, len(articles), size)]
            for number, group in enumerate(groups):
                other = groups[(number + 1) % len(groups)]
                yield Case(
                    f"{size} document{'s' if size > 1 else ''}",
                    str(number),
                    tuple(articles[i].document for i in group),
                    tuple(Asked(q.text, (q.answer,), q.group) for i in group for q in asked[i]),
                    others=tuple(articles[i].document for i in other),
                    practice=practice_questions(
                        [q for i in group for q in articles[i].questions],
                        encyclopedia.rng("practice", size, number),
                        self.num_practice,
                    ),
                    attributes={"num_documents": size},
                )

    def _articles(self, encyclopedia: Encyclopedia, number: int) -> list[Record]:
        found: dict[str, Record] = {}
        tried = 0
        while len(found) < number:
            record = article(encyclopedia, f"composition/{tried}", **self.sizes)
            found.setdefault(entity_of(record.questions[0]), record)
            tried += 1
        return list(found.values())
