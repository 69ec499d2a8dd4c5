"""benchmarks/tasks/articles.py: another version of an article, and whom a question asks about."""

import random

import pytest

from benchmarks.tasks.articles import entity_of, practice_questions, with_new_values
from hypernet.data.encyclopedia import Encyclopedia


def test_updated_article_changes_only_the_values() -> None:
    encyclopedia = Encyclopedia("test", seed=0)
    record = encyclopedia.record(4, num_facts=5)
    newer, values = with_new_values(record, encyclopedia, random.Random(0))
    assert all(old != new and new.lower() in newer.lower() for old, new in values.items())
    assert len(newer.split(".")) == len(record.document.split("."))


@pytest.mark.parametrize("index", range(12))  # all four kinds of entities
def test_questions_about_one_entity_name_it(index) -> None:
    record = Encyclopedia("test", seed=0).record(index, num_facts=5)
    names = {entity_of(question) for question in record.questions}
    assert len(names) == 1
    (name,) = names
    assert name.lower() in record.document.lower()
    practice = practice_questions(record.questions, random.Random(0), 50)
    assert all(name in text for text in practice) and len(practice) > len(record.questions)
