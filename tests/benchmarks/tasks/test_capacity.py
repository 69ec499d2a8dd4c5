"""benchmarks/tasks/capacity.py: as many facts and entities as the set says, all of them asked for."""

import pytest

from benchmarks.tasks.articles import entity_of
from benchmarks.tasks.capacity import CapacityTask
from hypernet.data.records import Question


def entities(case) -> set[str]:
    return {entity_of(Question(q.text, q.answers[0], group=q.group)) for q in case.questions}


def test_capacity_states_and_asks_each_fact_once(make_doc_to_lora) -> None:
    task = CapacityTask(
        model=make_doc_to_lora(max_chunk_tokens=500), sets=[[1, 1], [5, 1], [8, 2], [6, 6]], num_cases=4
    )
    cases = list(task.cases(0))
    names = ["1 fact, 1 entity", "5 facts, 1 entity", "8 facts, 2 entities", "6 facts, 6 entities"]
    assert [case.set for case in cases] == [name for name in names for _ in range(4)]
    for case in cases:
        facts, number = (int(part.split()[0]) for part in case.set.split(", "))
        assert len(case.questions) == len({question.text for question in case.questions}) == facts
        assert len(entities(case)) == number
        assert all(question.answers[0].lower() in case.documents[0].lower() for question in case.questions)
        assert dict(case.attributes) == {"facts": facts, "rank": 2}


@pytest.mark.parametrize("facts, number", [(6, 1), (2, 3), (16, 3)])
def test_capacity_refuses_more_facts_than_relations(make_doc_to_lora, facts, number) -> None:
    with pytest.raises(ValueError, match=f"{facts} facts about {number} entities; each has 1 to 5"):
        CapacityTask(model=make_doc_to_lora(), sets=[[facts, number]], num_cases=1)
