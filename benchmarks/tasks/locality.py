"""What an adapter changes that it should not: background knowledge, and reading a document in the prompt."""

from collections.abc import Iterator, Sequence

from benchmarks.tasks.articles import article, practice_questions
from benchmarks.tasks.base import Asked, Case, some
from hypernet.data.encyclopedia import Encyclopedia, background_questions


class LocalityTask:
    """What an adapter changes that it should not: answers on background knowledge, and on a document in the prompt.

    The document is one article; none of the questions is about it, so no context is the best that can be hoped for.

    Args:
        num_cases: articles, for each of the three sets.
        questions_per_case: background questions, or at most so many on the other document.
    """

    def __init__(self, *, num_cases: int, questions_per_case: int = 6) -> None:
        self.num_cases = num_cases
        self.questions_per_case = questions_per_case

    def cases(self, seed: int) -> Iterator[Case]:
        encyclopedia = Encyclopedia("test", seed=seed)
        articles = [article(encyclopedia, f"locality/{i}") for i in range(2 * self.num_cases)]
        own, others = articles[: self.num_cases], articles[self.num_cases :]

        def case(name: str, number: int, questions: Sequence[Asked]) -> Case:
            return Case(
                name,
                str(number),
                (own[number].document,),
                tuple(questions),
                others=(own[(number + 1) % len(own)].document,),
                practice=practice_questions(own[number].questions, encyclopedia.rng("practice", number), 16),
            )

        for name, held_out in (("background", False), ("background, never protected", True)):
            known = background_questions(held_out=held_out)
            for number in range(self.num_cases):
                drawn = encyclopedia.rng(name, number).sample(known, self.questions_per_case)
                yield case(name, number, [Asked(q.text, (q.answer,), q.group) for q in drawn])
        for number, other in enumerate(others):
            drawn = some(encyclopedia.rng("other", number), other.questions, self.questions_per_case)
            asked = [Asked(q.text, (q.answer,), q.group, context=other.document) for q in drawn]
            yield case("another document in the prompt", number, asked)
