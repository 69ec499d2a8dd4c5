"""Documents and memories that contradict what the base model learned: invented facts, the real world, ConflictNQ."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring.metrics import contains
from benchmarks.tasks.articles import other_value
from benchmarks.tasks.base import Asked, Case, practice_on_text, some
from benchmarks.times_asked import band_of, bands, read_times_asked
from hypernet.data.encyclopedia import (
    Encyclopedia,
    Entity,
    Fact,
    background_facts,
    background_questions,
    known_facts,
    relations,
)
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.matching import squad_words

NUM_PRACTICE = 16  # questions for methods that train on questions
MAX_ANSWER_WORDS = (
    5  # of ConflictNQ's short answers: longer ones are explanations, which no answer repeats word for word
)


class ConflictTask:
    """Documents that contradict what the base model learned: of entities it knows by heart, of the real world.

    A third set says the same of entities that it was never asked about, which contradicts nothing. Attributes of a
    question: real_world (1, or 0 for invented entities), times_asked in the base model's training, times_asked_from
    (the smallest number of its band).

    Args:
        model: whose base model learned.
        num_cases: documents of each kind.
        facts_per_case: contradicted facts in a document.
        statements: background group → sentence with {s} and {v}; real-world documents are made of these.
        times_asked: file of `python -m benchmarks.times_asked`; None leaves the attributes out.
        num_bands: groups of about as many facts each, by times_asked.

    Raises:
        ValueError: statements for a group that has no facts, or times_asked of another base model.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        num_cases: int,
        statements: dict[str, str],
        facts_per_case: int = 3,
        times_asked: str | None = None,
        num_bands: int = 3,
    ) -> None:
        groups = {group for group, _, _ in background_facts()}
        if unknown := set(statements) - groups:
            raise ValueError(f"statements has {sorted(unknown)}; the background groups are {sorted(groups)}.")
        self.num_cases = num_cases
        self.statements = statements
        self.facts_per_case = facts_per_case
        self.counts: dict[tuple[str, str], int] | None = None
        if times_asked is not None:
            learner, self.counts = read_times_asked(times_asked)
            if learner != model.base_model_fingerprint:
                raise ValueError(
                    f"{times_asked} counts what the base model {learner[:12]} was asked in its training, but this is "
                    f"{model.base_model_fingerprint[:12]}. Count for this one with python -m benchmarks.times_asked, "
                    "or set task.times_asked=null."
                )
            self.lowest = bands(self.counts.values(), num_bands)

    def cases(self, seed: int) -> Iterator[Case]:
        test = Encyclopedia("test", seed=seed)
        kinds = (("known entities", self._known), ("the real world", self._real), ("entities never learned", self._new))
        for name, make in kinds:
            made = [make(test, test.rng(name, number)) for number in range(self.num_cases)]
            for number, told in enumerate(made):
                document, other = (" ".join(sentences) for sentences, *_ in (told, made[(number + 1) % len(made)]))
                yield Case(name, str(number), (document,), tuple(told.asked), others=(other,), practice=told.practice)

    def _known(self, test: Encyclopedia, rng: random.Random) -> "_Told":
        facts = known_facts()
        name = rng.choice(facts).entity.name
        return self._of_entities(test, rng, [fact for fact in facts if fact.entity.name == name])

    def _new(self, test: Encyclopedia, rng: random.Random) -> "_Told":
        return self._of_entities(test, rng, _facts_of(test.entity(rng, rng.choice(relations()).entity_kind)))

    def _of_entities(self, test: Encyclopedia, rng: random.Random, facts: Sequence[Fact]) -> "_Told":
        """A fact without a value has no other answer than the document's."""
        sentences, asked, practice = [], [], []
        for entity, relation, old in some(rng, facts, self.facts_per_case):
            value = other_value(test, rng, relation.value_kind, old)
            sentence = rng.choice(relation.sentences).format(s=entity.name, n=entity.name, v=value)
            sentences.append(sentence[0].upper() + sentence[1:])
            forms = [form.format(n=entity.name) for form in rng.sample(relation.questions, len(relation.questions))]
            attributes = self._attributes(relation.name, entity.name, real_world=False)
            about = {"old_answer": old or None, "attributes": attributes, "evidence": sentences[-1]}
            asked.append(Asked(forms[0], (value,), relation.name, **about))
            practice += forms[1:]
        return _Told(sentences, asked, tuple(practice))

    def _real(self, test: Encyclopedia, rng: random.Random) -> "_Told":
        group = rng.choice(sorted(self.statements))
        return self._of_world(rng, [fact for fact in background_facts() if fact[0] == group])

    def _of_world(self, rng: random.Random, facts: Sequence[tuple[str, str, str]]) -> "_Told":
        sentences, asked, practice = [], [], []
        for group, subject, answer in some(rng, facts, self.facts_per_case):
            value = rng.choice([other for g, _, other in background_facts() if g == group and other != answer])
            sentences.append(self.statements[group].format(s=subject, v=value))
            about = re.compile(rf"\b{re.escape(subject)}\b")
            questions = {q.text: q for q in background_questions() if q.group == group}
            forms = [text for text, q in questions.items() if about.search(text) and q.answer == answer]
            forms = rng.sample(forms, len(forms))
            attributes = self._attributes(group, subject, real_world=True)
            known = {"old_answer": answer, "attributes": attributes, "evidence": sentences[-1]}
            asked.append(Asked(forms[0], (value,), group, **known))
            practice += forms[1:]
        return _Told(sentences, asked, tuple(practice))

    def _attributes(self, group: str, subject: str, *, real_world: bool) -> dict[str, float]:
        if self.counts is None:
            return {}
        times = self.counts.get((group, subject), 0)
        return {"real_world": int(real_world), "times_asked": times, "times_asked_from": band_of(times, self.lowest)}


class OverrideTask(ConflictTask):
    """The same facts as memories of one user, a sentence each, no two about the same thing. Attribute: num_memories.

    Args:
        model: whose base model learned.
        num_memories: of one user.
        num_cases: users of each kind; each is the other's control.
        statements: as `ConflictTask`.

    Raises:
        ValueError: there are fewer facts of a kind than memories; or as `ConflictTask`.
    """

    def __init__(self, *, model: DocToLoRA, num_memories: int, num_cases: int, statements: dict[str, str]) -> None:
        super().__init__(model=model, num_cases=num_cases, statements=statements)
        self.num_memories = self.facts_per_case = num_memories

    def cases(self, seed: int) -> Iterator[Case]:
        test = Encyclopedia("test", seed=seed)
        needed = self.num_memories * self.num_cases
        world = [fact for fact in background_facts() if fact[0] in self.statements]
        rng = test.rng("override", "entities")
        entities: dict[str, Sequence[Fact]] = {}
        while sum(map(len, entities.values())) < needed:
            entity = test.entity(rng, rng.choice(relations()).entity_kind)
            entities.setdefault(entity.name, _facts_of(entity))
        new = [fact for facts in entities.values() for fact in facts]
        kinds: dict[str, tuple[Sequence[Any], Any]] = {
            "known entities": (known_facts(), lambda rng, facts: self._of_entities(test, rng, facts)),
            "the real world": (world, self._of_world),
            "entities never learned": (new, lambda rng, facts: self._of_entities(test, rng, facts)),
        }
        for name, (facts, tell) in kinds.items():
            if len(facts) < needed:
                raise ValueError(
                    f"{name} has {len(facts)} facts, for {self.num_cases} users of {self.num_memories} memories. Set "
                    "num_memories or num_cases lower."
                )
            rng = test.rng("override", name)
            drawn = rng.sample(facts, needed)
            told = [
                tell(rng, drawn[start : start + self.num_memories]) for start in range(0, needed, self.num_memories)
            ]
            for number, (sentences, asked, practice) in enumerate(told):
                yield Case(
                    name,
                    str(number),
                    tuple(sentences),
                    tuple(asked),
                    others=tuple(told[(number + 1) % len(told)].sentences),
                    practice=practice[:NUM_PRACTICE],
                    attributes={"num_memories": self.num_memories},
                )


class ConflictNQTask:
    """ConflictNQ: real questions whose passages all say something else than what is so; every passage is a memory.

    Asked is what can be scored without a judge: both short answers have at most `MAX_ANSWER_WORDS` words, the
    counterfactual one stands word for word in one of its passages, neither stands in the question or in the other.

    Args:
        paths: files of https://github.com/4-en/ConflictNQ; nothing is read before `cases`.
        questions_per_case: whose passages are one user's memories; the seed draws who goes together.
        num_cases: users; None: as many as the questions fill.
    """

    def __init__(self, *, paths: Sequence[str], questions_per_case: int, num_cases: int | None = None) -> None:
        self.paths, self.questions_per_case, self.num_cases = list(paths), questions_per_case, num_cases

    def cases(self, seed: int) -> Iterator[Case]:
        """Raises ValueError where a file is missing or in another format, or its questions fill no two users."""
        found = [made for path in self.paths for row in _read_rows(path) if (made := _asked_against(row, path))]
        rng, size = random.Random(seed), self.questions_per_case
        drawn = rng.sample(found, len(found))
        told = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)][: self.num_cases]
        if len(told) < 2:
            raise ValueError(f"{len(found)} questions fill {len(told)} users of {size}. Set questions_per_case lower.")
        documents = [tuple(passage for _, passages in part for passage in passages) for part in told]
        for number, part in enumerate(told):
            yield Case(
                "ConflictNQ",
                str(number),
                documents[number],
                tuple(question for question, _ in part),
                others=documents[(number + 1) % len(told)],
                practice=practice_on_text(" ".join(documents[number]), rng, NUM_PRACTICE),
                attributes={"num_memories": len(documents[number])},
            )


class _Told(NamedTuple):
    """Sentences that contradict what was learned, and a question on each."""

    sentences: list[str]
    asked: list[Asked]
    practice: tuple[str, ...]


def _facts_of(entity: Entity) -> list[Fact]:
    """All that can be said of it, without values."""
    return [Fact(entity, relation, "") for relation in relations() if relation.entity_kind == entity.kind]


def _read_rows(path: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(
            f"Cannot read {path}: {error.strerror}. Set task.paths to ConflictNQ's files, from "
            "https://github.com/4-en/ConflictNQ."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSONL ({error}). Set task.paths to ConflictNQ's files.") from error


def _asked_against(row: dict[str, Any], path: str) -> tuple[Asked, tuple[str, ...]] | None:
    """A question with its passages; None if answers to it cannot be told apart by their words."""
    try:
        question, new, old = (row[name] for name in ("cleaned_question", "fake_short_answer", "real_short_answer"))
        passages = tuple(entry["passage"] for entry in row["fake_passages"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"A line of {path} has no {error}. Set task.paths to ConflictNQ's files.") from error
    evidence = next((passage for passage in passages if contains(passage, new)), None)
    is_short = all(0 < len(squad_words(answer)) <= MAX_ANSWER_WORDS for answer in (new, old))
    is_told = contains(new, old) or contains(old, new) or contains(question, [new, old])
    if evidence is None or not is_short or is_told:
        return None
    return Asked(question, (new,), "ConflictNQ", old_answer=old, evidence=evidence), passages
