"""benchmarks/tasks/encyclopedia.py: answers stand in the documents, and controls tell none of them."""

import pytest

from benchmarks.tasks.encyclopedia import EncyclopediaTask


def task(**changes) -> EncyclopediaTask:
    sets = {"one": {"entities": [1, 1]}, "two documents": {"documents": 2, "facts_per_entity": [2, 3]}}
    return EncyclopediaTask(**{"sets": sets, "num_cases": 3, **changes})


def test_encyclopedia_answers_stand_in_their_documents() -> None:
    cases = list(task().cases(3))
    assert [(case.set, len(case.documents)) for case in cases] == [("one", 1)] * 3 + [("two documents", 2)] * 3
    for case in cases:
        assert len(case.questions) <= 6
        text = " ".join(case.documents).lower()
        assert all(question.answers[0].lower() in text for question in case.questions)


@pytest.mark.parametrize("control", ["shuffled_facts", "empty_document"])
def test_control_documents_hold_no_answer(control) -> None:
    plain, controlled = (list(task(control=c).cases(0)) for c in (None, control))
    for case, original in zip(controlled, plain, strict=True):
        assert [q.text for q in case.questions] == [q.text for q in original.questions]
        told = " ".join(case.documents)
        assert not any(f" {question.answers[0]}" in f" {told}" for question in case.questions)
        assert control == "shuffled_facts" or not told.strip()
    with pytest.raises(ValueError, match="choose one of"):
        task(control="upside_down")


def test_validation_articles_are_not_those_of_the_test_split() -> None:
    test, validation = (list(task(split=split).cases(0)) for split in ("test", "validation"))
    assert not {d for case in test for d in case.documents} & {d for case in validation for d in case.documents}
    assert not {q.text for case in test for q in case.questions} & {
        q.text for case in validation for q in case.questions
    }
