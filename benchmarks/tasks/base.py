"""What every task of the benchmark is: cases, that is documents and the questions asked about them.

    task = EncyclopediaTask(sets={"one entity": {"entities": [1, 1]}}, num_cases=8)
    for case in task.cases(seed=0):
        method.prepare(case)
        method.answer(case.questions)

Same seed, same cases. A new task is a class with `cases` in a file of its own and a YAML in conf/benchmark/task/.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from hypernet.text.sentences import split_sentences


class Asked(NamedTuple):
    """A question of a case.

    answers: right answers, any of which counts. group: what it asks for. context: another document, which stands in
    every method's prompt. old_answer: what was right before the document said otherwise. attributes: numbers of the
    question that its case does not have, such as times_asked. evidence: the text that answers it, of those that tasks
    on memories give.
    """

    text: str
    answers: tuple[str, ...]
    group: str = ""
    context: str | None = None
    old_answer: str | None = None
    attributes: Mapping[str, float] | None = None  # not an empty mapping: a question without any can be hashed
    evidence: str | None = None


class Case(NamedTuple):
    """Documents and what is asked about them.

    set: the table's line it belongs to. name: unit of the bootstrap, the same for every method.
    documents: what a method may keep. questions: asked one by one.
    others: another case's documents, for controls. replaced: documents given first and taken back again.
    practice: questions on the documents, made without looking at `questions`; methods that train on questions use them.
    attributes: numbers that results are plotted against, such as num_chunks; each of the case's rows has them.
    """

    set: str
    name: str
    documents: tuple[str, ...]
    questions: tuple[Asked, ...]
    others: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    practice: tuple[str, ...] = ()
    attributes: Mapping[str, float] = MappingProxyType({})


class Task(Protocol):
    def cases(self, seed: int) -> Iterator[Case]:
        """All cases of this seed; those of one set follow each other."""
        ...


def some(rng: random.Random, items: Sequence, number: int | None) -> list:
    """At most so many of them, drawn without replacement; None: all, in an order of their own."""
    return rng.sample(items, len(items) if number is None else min(number, len(items)))


def practice_on_text(text: str, rng: random.Random, number: int) -> tuple[str, ...]:
    """At most so many questions for methods that train on questions, about a text of which nothing is known."""
    words = dict.fromkeys(tuple(text[start:end].split()) for start, end in split_sentences(text))
    begun = [f"How does this go on: {' '.join(w[: len(w) // 2])}" for w in words if len(w) > 5]
    return ("What does the text say?", *some(rng, begun, number - 1))
