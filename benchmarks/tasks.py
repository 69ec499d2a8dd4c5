"""What the benchmark asks: tasks give cases, a case is some documents and the questions asked about them.

    task = EncyclopediaTask(sets={"one entity": {"entities": [1, 1]}}, num_cases=8)
    for case in task.cases(seed=0):
        method.prepare(case)
        method.answer(case.questions)

Same seed, same cases. Articles come from the encyclopedia's test split, which shares no entity and no invented name
with training, and has sentence forms of its own.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from hypernet.data.encyclopedia import (
    Encyclopedia,
    background_facts,
    background_questions,
    known_facts,
    relations,
)
from hypernet.data.records import Record


class Asked(NamedTuple):
    """A question of a case.

    answers: right answers, any of which counts. group: what it asks for. context: another document, which stands in
    every method's prompt. old_answer: what was right before the document said otherwise.
    """

    text: str
    answers: tuple[str, ...]
    group: str = ""
    context: str | None = None
    old_answer: str | None = None


class Case(NamedTuple):
    """Documents and what is asked about them.

    set: the table's line it belongs to. name: unit of the bootstrap, the same for every method.
    documents: what a method may keep. questions: asked one by one.
    others: another case's documents, for controls. replaced: documents given first and taken back again.
    practice: questions on the documents, made without looking at `questions`; methods that train on questions use them.
    """

    set: str
    name: str
    documents: tuple[str, ...]
    questions: tuple[Asked, ...]
    others: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    practice: tuple[str, ...] = ()


class Task(Protocol):
    def cases(self, seed: int) -> Iterator[Case]:
        """All cases of this seed; those of one set follow each other."""
        ...


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
        for place, (name, sizes) in enumerate(self.sets.items()):
            groups = [
                [
                    _article(encyclopedia, "/".join(map(str, (place, number, k))), **_only(sizes, "documents"))
                    for k in range(sizes.get("documents", 1))
                ]
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
                    tuple(Asked(q.text, (q.answer,), q.group) for q in _some(rng, asked, self.max_questions)),
                    others=tuple(r.document for r in groups[(number + 1) % len(groups)]),
                    practice=practice_questions(asked, rng, self.num_practice),
                )


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
        articles = [_article(encyclopedia, f"locality/{i}") for i in range(2 * self.num_cases)]
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
            drawn = _some(encyclopedia.rng("other", number), other.questions, self.questions_per_case)
            asked = [Asked(q.text, (q.answer,), q.group, context=other.document) for q in drawn]
            yield case("another document in the prompt", number, asked)


class ConflictTask:
    """Documents that contradict what the base model learned: of entities it knows by heart, of the real world.

    Args:
        num_cases: documents of each kind.
        facts_per_case: contradicted facts in a document.
        statements: background group → sentence with {s} and {v}; real-world documents are made of these.

    Raises:
        ValueError: statements for a group that has no facts.
    """

    def __init__(self, *, num_cases: int, statements: dict[str, str], facts_per_case: int = 3) -> None:
        groups = {group for group, _, _ in background_facts()}
        if unknown := set(statements) - groups:
            raise ValueError(f"statements has {sorted(unknown)}; the background groups are {sorted(groups)}.")
        self.num_cases = num_cases
        self.statements = statements
        self.facts_per_case = facts_per_case

    def cases(self, seed: int) -> Iterator[Case]:
        test = Encyclopedia("test", seed=seed)
        for name, make in (("known entities", self._known), ("the real world", self._real)):
            made = [make(test, test.rng(name, number)) for number in range(self.num_cases)]
            for number, (document, questions, practice) in enumerate(made):
                other = made[(number + 1) % len(made)][0]
                yield Case(name, str(number), (document,), tuple(questions), others=(other,), practice=practice)

    def _known(self, test: Encyclopedia, rng: random.Random) -> tuple[str, list[Asked], tuple[str, ...]]:
        facts = known_facts()
        name = rng.choice(facts).entity.name
        chosen = _some(rng, [fact for fact in facts if fact.entity.name == name], self.facts_per_case)
        sentences, asked, practice = [], [], []
        for fact in chosen:
            value = _other_value(test, rng, fact.relation.value_kind, fact.value)
            sentence = rng.choice(fact.relation.sentences).format(s=name, n=name, v=value)
            sentences.append(sentence[0].upper() + sentence[1:])
            forms = rng.sample(fact.relation.questions, len(fact.relation.questions))
            asked.append(Asked(forms[0].format(n=name), (value,), fact.relation.name, old_answer=fact.value))
            practice += [form.format(n=name) for form in forms[1:]]
        return " ".join(sentences), asked, tuple(practice)

    def _real(self, test: Encyclopedia, rng: random.Random) -> tuple[str, list[Asked], tuple[str, ...]]:
        group = rng.choice(sorted(self.statements))
        facts = [(subject, answer) for g, subject, answer in background_facts() if g == group]
        questions = {q.text: q for q in background_questions() if q.group == group}
        sentences, asked, practice = [], [], []
        for subject, answer in _some(rng, facts, self.facts_per_case):
            value = rng.choice([other for _, other in facts if other != answer])
            sentences.append(self.statements[group].format(s=subject, v=value))
            about = re.compile(rf"\b{re.escape(subject)}\b")
            forms = [text for text, q in questions.items() if about.search(text) and q.answer == answer]
            forms = rng.sample(forms, len(forms))
            asked.append(Asked(forms[0], (value,), group, old_answer=answer))
            practice += forms[1:]
        return " ".join(sentences), asked, tuple(practice)


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
            record = _article(encyclopedia, f"updates/{number}")
            rng = encyclopedia.rng("new version", number)
            newer, values = with_new_values(record, encyclopedia, rng)
            asked = [
                Asked(q.text, (values[q.answer],), q.group, old_answer=q.answer)
                for q in _some(rng, record.questions, self.max_questions)
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


class SquadTask:
    """Paragraphs of a file in SQuAD's v1.1 JSON format.

    Args:
        squad_file: the file.
        num_cases: paragraphs, drawn by the seed; null: all of them.
        max_questions: asked about each.
    """

    def __init__(self, *, squad_file: str, num_cases: int | None, max_questions: int = 6) -> None:
        self.squad_file = squad_file
        self.num_cases = num_cases
        self.max_questions = max_questions

    def cases(self, seed: int) -> Iterator[Case]:
        """Raises ValueError where the file is missing or not in this format."""
        from benchmarks.real_text import read_squad
        from hypernet.chunking import split_sentences

        paragraphs = read_squad(self.squad_file)
        rng = random.Random(seed)
        drawn = _some(rng, range(len(paragraphs)), self.num_cases or len(paragraphs))
        for place, number in enumerate(drawn):
            text, questions = paragraphs[number]
            sentences = [text[start:end].split() for start, end in split_sentences(text)]
            yield Case(
                "paragraphs",
                str(number),
                (text,),
                tuple(Asked(q, tuple(answers)) for q, answers in _some(rng, questions, self.max_questions)),
                others=(paragraphs[drawn[(place + 1) % len(drawn)]][0],),
                practice=(
                    "What does the text say?",
                    *(f"How does this go on: {' '.join(w[: len(w) // 2])}" for w in sentences if len(w) > 5),
                )[:16],
            )


def with_new_values(record: Record, encyclopedia: Encyclopedia, rng: random.Random) -> tuple[str, dict[str, str]]:
    """The same article with another value for each fact, and old value → new value."""
    kind_of = {relation.name: relation.value_kind for relation in relations()}
    values: dict[str, str] = {}
    for question in record.questions:
        if question.answer not in values:
            values[question.answer] = _other_value(encyclopedia, rng, kind_of[question.group], question.answer)
    capitalised = {old[0].upper() + old[1:]: new[0].upper() + new[1:] for old, new in values.items()}
    mapping = capitalised | values
    pattern = "|".join(re.escape(old) for old in sorted(mapping, key=len, reverse=True))
    return re.sub(rf"\b(?:{pattern})\b", lambda match: mapping[match[0]], record.document), values


def practice_questions(questions: Sequence, rng: random.Random, number: int) -> tuple[str, ...]:
    """Questions on every relation of the entities that are asked about, in forms in which they are not asked.

    They stand for what a language model would ask about the text; a model as small as the shipped one cannot.
    """
    by_name = {relation.name: relation for relation in relations()}
    asked = {question.text for question in questions}
    made: list[str] = []
    for text, group in dict.fromkeys((q.text, q.group) for q in questions):
        relation = by_name[group]
        entity = next(found[1] for form in relation.questions if (found := _filled(form).fullmatch(text)))
        made += [
            form.format(n=entity)
            for other in relations()
            if other.entity_kind == relation.entity_kind
            for form in other.questions
        ]
    return tuple(_some(rng, [text for text in dict.fromkeys(made) if text not in asked], number))


def _article(
    encyclopedia: Encyclopedia,
    key: str,
    *,
    entities: Sequence[int] = (1, 1),
    facts_per_entity: Sequence[int] = (2, 6),
    distractors: Sequence[int] = (0, 2),
) -> Record:
    rng = encyclopedia.rng("size", key)
    num_entities = rng.randint(*entities)
    return encyclopedia.record(
        key,  # any word names an article as well as a number does
        num_entities=num_entities,
        num_facts=sum(rng.randint(*facts_per_entity) for _ in range(num_entities)),
        num_distractors=rng.randint(*distractors),
    )


def _filled(form: str) -> re.Pattern:
    return re.compile(re.escape(form).replace(re.escape("{n}"), "(.+)"))


def _other_value(encyclopedia: Encyclopedia, rng: random.Random, kind: str, value: str) -> str:
    while (new := encyclopedia.value(rng, kind)) == value:
        pass
    return new


def _some(rng: random.Random, items: Sequence, number: int) -> list:
    """At most so many of them, drawn without replacement."""
    return rng.sample(items, min(number, len(items)))


def _only(settings: dict, *without: str) -> dict:
    return {key: value for key, value in settings.items() if key not in without}
