"""Encyclopedia articles for tasks: drawn by sizes, with other values, and questions to practise on them."""

import random
import re
from collections.abc import Sequence

from benchmarks.tasks.base import some
from hypernet.data.encyclopedia import Encyclopedia, relations
from hypernet.data.records import Question, Record


def article(
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


def with_new_values(record: Record, encyclopedia: Encyclopedia, rng: random.Random) -> tuple[str, dict[str, str]]:
    """The same article with another value for each fact, and old value → new value."""
    kind_of = {relation.name: relation.value_kind for relation in relations()}
    values: dict[str, str] = {}
    for question in record.questions:
        if question.answer not in values:
            values[question.answer] = other_value(encyclopedia, rng, kind_of[question.group], question.answer)
    capitalised = {old[0].upper() + old[1:]: new[0].upper() + new[1:] for old, new in values.items()}
    mapping = capitalised | values
    pattern = "|".join(re.escape(old) for old in sorted(mapping, key=len, reverse=True))
    return re.sub(rf"\b(?:{pattern})\b", lambda match: mapping[match[0]], record.document), values


def practice_questions(questions: Sequence[Question], rng: random.Random, number: int) -> tuple[str, ...]:
    """Questions on every relation of the entities that are asked about, in forms in which they are not asked.

    They stand for what a language model would ask about the text; a model as small as the shipped one cannot.
    """
    kind_of = {relation.name: relation.entity_kind for relation in relations()}
    asked = {question.text for question in questions}
    made: list[str] = []
    for question in questions:
        name, kind = entity_of(question), kind_of[question.group]
        made += [form.format(n=name) for other in relations() if other.entity_kind == kind for form in other.questions]
    return tuple(some(rng, [text for text in dict.fromkeys(made) if text not in asked], number))


def entity_of(question: Question) -> str:
    """The name that a question about an article asks about."""
    (relation,) = (relation for relation in relations() if relation.name == question.group)
    patterns = (re.escape(form).replace(re.escape("{n}"), "(.+)") for form in relation.questions)
    return next(found[1] for pattern in patterns if (found := re.fullmatch(pattern, question.text)))


def other_value(encyclopedia: Encyclopedia, rng: random.Random, kind: str, value: str) -> str:
    while (new := encyclopedia.value(rng, kind)) == value:
        pass
    return new
