"""Memories of one user, a sentence each, and questions on them: by their number, and with some of them forgotten."""

from collections.abc import Iterator, Sequence

from benchmarks.tasks.base import Asked, Case, practice_on_text
from hypernet.data.encyclopedia import Encyclopedia

NUM_PRACTICE = 16  # questions for methods that train on questions


class MemoriesTask:
    """Facts of the encyclopedia, one memory each; each names its subject, and no two say the same thing of one name.

    Attribute: num_memories.

    Args:
        num_memories: of one user, a set for each.
        num_questions: of a set, at most; small sets have more cases.
        num_cases: of a set.
        num_forgotten: of the memories that are told and taken back. With it, there are six sets: questions on what is
            kept and on what is forgotten, before and after it is forgotten, and where it was never told.

    Raises:
        ValueError: there are no sizes, or no fewer memories than are forgotten.
    """

    def __init__(
        self, *, num_memories: Sequence[int], num_questions: int = 100, num_cases: int = 10, num_forgotten: int = 0
    ) -> None:
        if not num_memories or min(num_memories) <= num_forgotten or min(num_memories) < 1:
            raise ValueError(
                f"num_memories is {list(num_memories)} and num_forgotten {num_forgotten}; give sizes above it."
            )
        self.num_memories, self.num_questions = list(num_memories), num_questions
        self.num_cases, self.num_forgotten = num_cases, num_forgotten

    def cases(self, seed: int) -> Iterator[Case]:
        encyclopedia = Encyclopedia("test", seed=seed)
        needed = max(size * (1 + self._num_cases(size)) for size in self.num_memories)
        facts = list(_facts(encyclopedia, needed))
        for size in self.num_memories:
            number = self._num_cases(size)
            others = tuple(sentence for sentence, *_ in facts[number * size : number * size + size])
            for case in range(number):
                own = facts[case * size : (case + 1) * size]
                rng = encyclopedia.rng("asked", size, case)
                chosen = sorted(rng.sample(range(size), min(size, self.num_questions // number)))
                if self.num_forgotten:
                    yield from self._forgetting(str(case), own, chosen, others, _practice(encyclopedia, own, case))
                    continue
                yield Case(
                    _name(size),
                    str(case),
                    tuple(sentence for sentence, *_ in own),
                    tuple(_asked(own, place) for place in chosen),
                    others=others,
                    practice=_practice(encyclopedia, own, case),
                    attributes={"num_memories": size},
                )

    def _num_cases(self, size: int) -> int:
        return 1 if self.num_forgotten else max(1, min(self.num_cases, self.num_questions // size))

    def _forgetting(
        self,
        name: str,
        own: list[tuple[str, str, str, str]],
        chosen: list[int],
        others: tuple[str, ...],
        practice: tuple[str, ...],
    ) -> Iterator[Case]:
        """The last ones are forgotten."""
        size = len(own)
        first = size - self.num_forgotten
        kept = tuple(sentence for sentence, *_ in own[:first])
        gone = tuple(sentence for sentence, *_ in own[first:])
        asked = {
            "kept": tuple(_asked(own, place) for place in chosen if place < first),
            "forgotten": tuple(_asked(own, place) for place in range(first, size)),
        }
        for what, questions in asked.items():
            for when, documents, replaced in (
                ("before", kept + gone, ()),
                ("after", kept, gone),
                ("never told", kept, ()),
            ):
                yield Case(
                    f"{what}, {when}",
                    name,
                    documents,
                    questions,
                    others=others,
                    replaced=replaced,
                    practice=practice,
                    attributes={"num_memories": size},
                )


def _practice(encyclopedia: Encyclopedia, own: Sequence[tuple[str, str, str, str]], case: int) -> tuple[str, ...]:
    rng = encyclopedia.rng("practice", len(own), case)
    return practice_on_text(" ".join(sentence for sentence, *_ in own), rng, NUM_PRACTICE)


def _name(size: int) -> str:
    return f"{size} memor{'y' if size == 1 else 'ies'}"


def _subject(question: str) -> str:
    return " ".join(word for word in question.rstrip("?").split()[1:] if word[:1].isupper())


def _asked(facts: Sequence[tuple[str, str, str, str]], place: int) -> Asked:
    sentence, question, answer, group = facts[place]
    return Asked(question, (answer,), group, evidence=sentence)


def _facts(encyclopedia: Encyclopedia, number: int) -> Iterator[tuple[str, str, str, str]]:
    """(sentence, question, answer, relation): the sentence names its subject in full."""
    told: set[tuple[str, str]] = set()
    index = 0
    while len(told) < number:
        record = encyclopedia.record(f"memories/{index}", num_entities=1, num_facts=4)
        index += 1
        for question in record.questions:
            name = _subject(question.text)
            holding = [sentence for sentence in record.sentences if question.answer in sentence and name in sentence]
            if name and len(holding) == 1 and (name, question.group) not in told and len(told) < number:
                told.add((name, question.group))
                yield holding[0], question.text, question.answer, question.group
