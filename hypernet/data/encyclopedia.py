"""A seeded, endless encyclopedia of invented people, towns, companies and instruments.

Why it exists: a model of a few million parameters can learn its English completely, and nobody can have read it before,
so what an answer owes to the document is measured exactly. The relations, sentences and questions are data:
`encyclopedia.yaml`.

    encyclopedia = Encyclopedia("train", seed=0)
    record = encyclopedia.record(7, num_entities=1, num_facts=4, num_distractors=1)

Every record depends on (seed, split, index) and the sizes asked for alone. Names belong to one split by a hash of the
name, so no entity and no invented name of the test split ever occurs in training. The last two sentence forms of each
relation are kept for the test split. Entities of the split "known" stand in no article of the others: a base model
learns them by heart, so that there are many facts which an adapter must leave alone.
"""

import random
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import yaml

from hypernet.data.records import UNKNOWN, Question, Record

SPLITS = ("train", "validation", "test", "known")
NUM_HELD_OUT_SENTENCES = 2  # per relation, for the test split alone
NUM_KNOWN_ENTITIES = 240


class Relation(NamedTuple):
    """One thing an article can say of an entity: how it is said, how it is asked, and what kind of value it has."""

    name: str
    entity_kind: str
    value_kind: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


class Entity(NamedTuple):
    kind: str
    name: str
    mentions: tuple[str, ...]  # how a sentence may call it when it is the only entity of its article


class Fact(NamedTuple):
    entity: Entity
    relation: Relation
    value: str


@cache
def _data() -> dict:
    return yaml.safe_load(files("hypernet.data").joinpath("encyclopedia.yaml").read_text(encoding="utf-8"))


@cache
def relations() -> tuple[Relation, ...]:
    """All relations, in the order of the YAML file."""
    return tuple(
        Relation(name, kind, entry["value"], tuple(entry["sentences"]), tuple(entry["questions"]))
        for kind, entries in _data()["relations"].items()
        for name, entry in entries.items()
    )


def background_facts() -> tuple[tuple[str, str, str], ...]:
    """Real-world facts as (group, subject, answer): what the base model knows from its own weights."""
    return tuple(
        (group, str(subject), str(answer))
        for group, entry in _data()["background"].items()
        for subject, answer in entry["facts"].items()
    )


@cache
def known_facts() -> tuple[Fact, ...]:
    """Every relation of `NUM_KNOWN_ENTITIES` invented entities that no article is about."""
    encyclopedia = Encyclopedia("known")
    rng = encyclopedia.rng("known facts")
    by_kind = {kind: [r for r in relations() if r.entity_kind == kind] for kind in _data()["relations"]}
    entities: dict[str, Entity] = {}
    while len(entities) < NUM_KNOWN_ENTITIES:
        entity = encyclopedia.entity(rng, list(by_kind)[len(entities) % len(by_kind)])
        entities.setdefault(entity.name, entity)
    return tuple(
        Fact(entity, relation, encyclopedia.value(rng, relation.value_kind))
        for entity in entities.values()
        for relation in by_kind[entity.kind]
    )


def background_questions(*, held_out: bool | None = None) -> list[Question]:
    """Every question that a base model answers from its own weights, in every form: `background_facts`, `known_facts`.

    Args:
        held_out: True keeps the quarter that a hypernetwork is never trained to leave alone, so that it shows what
            generalizes: a quarter of the real-world facts and of the known entities. False gives the other three
            quarters; None all.
    """

    def wanted(key: str) -> bool:
        return held_out is None or (zlib.crc32(key.encode()) % 4 == 3) == held_out

    forms = {group: entry["questions"] for group, entry in _data()["background"].items()}
    real = [
        Question(form.format(s=subject), answer, "background", group)
        for group, subject, answer in background_facts()
        if wanted(f"{group}/{subject}")
        for form in forms[group]
    ]
    known = [
        Question(form.format(n=fact.entity.name), fact.value, "background", fact.relation.name)
        for fact in known_facts()
        if wanted(f"known/{fact.entity.name}")
        for form in fact.relation.questions
    ]
    return real + known


class Encyclopedia:
    """Articles of one split; see the module's docstring."""

    def __init__(self, split: str = "train", *, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        self.split = split
        self.seed = seed
        self._words = _data()["words"]
        self._distractors = _data()["distractors"]
        self._of_kind = {kind: [r for r in relations() if r.entity_kind == kind] for kind in _data()["relations"]}

    def record(
        self,
        index: int,
        *,
        num_entities: int = 1,
        num_facts: int = 4,
        num_distractors: int = 1,
        num_unanswerable: int = 0,
        shared_relations: bool = False,
        topic: str | None = None,
    ) -> Record:
        """One article with one question per fact, in another order.

        Args:
            index: which article; the same index gives the same article on every machine.
            num_entities: how many entities share the article; with more than one, every sentence names its entity.
            num_facts: facts altogether; at most what the entities' relations hold, and at least one per entity.
            num_distractors: sentences that answer no question.
            num_unanswerable: questions about relations that the article leaves out; their answer is `UNKNOWN`.
            shared_relations: entities of one kind, told the same relations: only the name tells them apart.
            topic: any word; entities of all articles of one topic are of one kind and told the same relations, as far
                as the number of facts allows.

        Raises:
            ValueError: num_facts smaller than num_entities.
        """
        if num_facts < num_entities:
            raise ValueError(
                f"num_facts is {num_facts}, fewer than the {num_entities} entities; give each entity a fact."
            )
        rng = self.rng(index)
        kinds = [rng.choice(list(self._of_kind)) for _ in range(num_entities)]
        kinds = kinds[:1] * num_entities if shared_relations else kinds
        if topic is not None:
            of_topic = self.rng("topic", topic)
            kinds = [of_topic.choice(list(self._of_kind))] * num_entities
        entities: list[Entity] = []
        for kind in kinds:
            entity = self.entity(rng, kind)
            while entity.name in [other.name for other in entities]:  # two of one name would contradict each other
                entity = self.entity(rng, kind)
            entities.append(entity)
        told = [(entity, relation) for entity in entities for relation in self._of_kind[entity.kind]]
        rng.shuffle(told)
        if shared_relations or topic is not None:
            drawn_from = rng if topic is None else of_topic
            order = drawn_from.sample(self._of_kind[kinds[0]], len(self._of_kind[kinds[0]]))
            told.sort(key=lambda pair: order.index(pair[1]))
        # One fact each first, so that no entity is without; the rest from what is left.
        first = [next(pair for pair in told if pair[0] is entity) for entity in entities]
        rest = [pair for pair in told if pair not in first]
        chosen = first + rest[: num_facts - num_entities]
        left_out = rest[num_facts - num_entities :]
        facts = []
        for entity, relation in chosen:
            value = self.value(rng, relation.value_kind)
            while value in [other.name for other in entities]:  # the question would hold its answer
                value = self.value(rng, relation.value_kind)
            facts.append(Fact(entity, relation, value))
        rng.shuffle(facts)
        facts.sort(key=lambda fact: entities.index(fact.entity))  # an encyclopedia treats one entity after the other
        sentences = [self._sentence(rng, fact, alone=num_entities == 1) for fact in facts]
        for _ in range(num_distractors):
            sentences.insert(rng.randrange(len(sentences) + 1), self._distractor(rng, rng.choice(entities)))
        # The first sentence says whom the article is about.
        if num_entities == 1 and entities[0].name not in sentences[0]:
            sentences.insert(0, self._opening(rng, entities[0]))
        questions = [self._question(rng, fact.entity, fact.relation, fact.value, "document") for fact in facts]
        rng.shuffle(questions)
        questions += [
            self._question(rng, entity, relation, UNKNOWN, "unanswerable")
            for entity, relation in left_out[:num_unanswerable]
        ]
        return Record(tuple(sentences), tuple(questions))

    def asked_of_another(self, rng: random.Random, question: Question, *, document: str) -> Question:
        """The same thing asked about another entity of the same kind, which the document does not name."""
        relation = next(r for r in relations() if r.name == question.group)
        entity = self.entity(rng, relation.entity_kind)
        while entity.name.lower() in document.lower():
            entity = self.entity(rng, relation.entity_kind)
        return self._question(rng, entity, relation, UNKNOWN, "cross_document")

    def rng(self, *key: int | str) -> random.Random:
        """Random numbers of this split and seed for one purpose, named by the key."""
        return random.Random("/".join(map(str, (self.seed, self.split, *key))))

    def value(self, rng: random.Random, kind: str) -> str:
        """A value of the given kind: an invented name, a date, a number or a phrase."""
        words = self._words
        match kind:
            case "person":
                return self._person_name(rng)
            case "place":
                return self._place_name(rng)
            case "date":
                return f"{rng.randint(1, 28)} {rng.choice(words['months'])}"
            case "year":
                return str(rng.randint(1700, 1999))
            case "count":
                return str(rng.randint(11, 999))
            case "population":
                return str(rng.randint(1000, 9999))
            case _:
                first, second = words[kind]
                return f"{rng.choice(first)} {rng.choice(second)}"

    def _split_of(self, name: str) -> str:
        bucket = zlib.crc32(name.encode()) % 10
        return {0: "test", 1: "validation", 2: "known"}.get(bucket, "train")

    def _own(self, make) -> str:
        """The first name that `make` yields and that belongs to this split."""
        while self._split_of(name := make()) != self.split:
            pass
        return name

    def _word(self, rng: random.Random, endings: Sequence[str]) -> str:
        return rng.choice(self._words["onsets"]) + rng.choice(endings)

    def _person_name(self, rng: random.Random) -> str:
        words = self._words
        return self._own(lambda: f"{self._word(rng, words['first_endings'])} {self._word(rng, words['last_endings'])}")

    def _place_name(self, rng: random.Random) -> str:
        return self._own(lambda: self._word(rng, self._words["middles"]) + rng.choice(self._words["place_endings"]))

    def entity(self, rng: random.Random, kind: str) -> Entity:
        """An invented person, town, company or instrument of this split."""
        words = self._words
        match kind:
            case "person":
                name = self._person_name(rng)
                return Entity(kind, name, (name, name, name.split()[1], rng.choice(("he", "she"))))
            case "town":
                name = self._place_name(rng)
                return Entity(kind, name, (name, name, "the town", "it"))
            case "company":
                name = self._own(
                    lambda: f"{self._word(rng, words['last_endings'])} {rng.choice(words['company_endings'])}"
                )
                return Entity(kind, name, (name, name, "the company", "the firm"))
            case _:
                name = self._own(
                    lambda: (
                        "the " + (self._word(rng, words["middles"]) + rng.choice(words["instrument_endings"])).lower()
                    )
                )
                return Entity(kind, name, (name, name, "the instrument", "it"))

    def _sentence(self, rng: random.Random, fact: Fact, *, alone: bool) -> str:
        forms = fact.relation.sentences[: None if self.split == "test" else -NUM_HELD_OUT_SENTENCES]
        mention = rng.choice(fact.entity.mentions) if alone else fact.entity.name
        return _capitalised(rng.choice(forms).format(s=mention, n=fact.entity.name, v=fact.value))

    def _opening(self, rng: random.Random, entity: Entity) -> str:
        return _capitalised(rng.choice(self._distractors["opening"][entity.kind]).format(n=entity.name))

    def _distractor(self, rng: random.Random, entity: Entity) -> str:
        form = rng.choice(self._distractors["any"] + self._distractors[entity.kind])
        return _capitalised(form.format(n=entity.name, person=self._person_name(rng), place=self._place_name(rng)))

    @staticmethod
    def _question(rng: random.Random, entity: Entity, relation: Relation, answer: str, kind: str) -> Question:
        return Question(rng.choice(relation.questions).format(n=entity.name), answer, kind, relation.name)


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
