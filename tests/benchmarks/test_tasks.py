"""benchmarks/tasks.py: same seed same cases, nothing of training in them, controls that tell nothing."""

import random

import pytest

from benchmarks.tasks import ConflictTask, EncyclopediaTask, LocalityTask, UpdatesTask, with_new_values
from hypernet.data.encyclopedia import Encyclopedia, background_questions

STATEMENTS = {"capital": "The capital of {s} is {v}.", "symbol": "The chemical symbol of {s} is {v}."}


def encyclopedia_task(**changes) -> EncyclopediaTask:
    sets = {"one": {"entities": [1, 1]}, "two documents": {"documents": 2, "facts_per_entity": [2, 3]}}
    return EncyclopediaTask(**{"sets": sets, "num_cases": 3, **changes})


TASKS = [
    encyclopedia_task(),
    encyclopedia_task(control="shuffled_facts"),
    LocalityTask(num_cases=2),
    ConflictTask(num_cases=3, statements=STATEMENTS),
    UpdatesTask(num_cases=3),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_same_seed_same_cases_and_another_seed_others(task) -> None:
    assert list(task.cases(0)) == list(task.cases(0))
    assert list(task.cases(0)) != list(task.cases(1))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_practice_never_holds_a_test_question_and_another_case_is_another(task) -> None:
    for case in task.cases(0):
        assert not {question.text for question in case.questions} & set(case.practice)
        assert case.others and case.others != case.documents


def test_answers_stand_in_the_documents_as_many_as_asked_for() -> None:
    cases = list(encyclopedia_task().cases(3))
    assert [(case.set, len(case.documents)) for case in cases] == [("one", 1)] * 3 + [("two documents", 2)] * 3
    for case in cases:
        assert len(case.questions) <= 6
        text = " ".join(case.documents).lower()
        assert all(question.answers[0].lower() in text for question in case.questions)


def test_test_and_training_share_no_entity() -> None:
    """Names belong to one split by their hash, so what no training article could draw is in no training article."""
    train = Encyclopedia("train", seed=0)
    read = " ".join(train.record(i, num_entities=2, num_facts=6).document for i in range(400))
    for case in encyclopedia_task(num_cases=20).cases(0):
        for question in case.questions:
            names = [word for word in question.text.rstrip("?.").split()[1:] if word[0].isupper()]
            if len(names) >= 2:  # a person's or a company's
                assert " ".join(names) not in read


@pytest.mark.parametrize("control", ["shuffled_facts", "empty_document"])
def test_controls_tell_no_answer(control) -> None:
    plain, controlled = (list(encyclopedia_task(control=c).cases(0)) for c in (None, control))
    for case, original in zip(controlled, plain, strict=True):
        assert [q.text for q in case.questions] == [q.text for q in original.questions]
        told = " ".join(case.documents)
        assert not any(f" {question.answers[0]}" in f" {told}" for question in case.questions)
        assert control == "shuffled_facts" or not told.strip()
    with pytest.raises(ValueError, match="choose one of"):
        encyclopedia_task(control="upside_down")


def test_a_new_version_has_every_value_changed_and_nothing_else() -> None:
    encyclopedia = Encyclopedia("test", seed=0)
    record = encyclopedia.record(4, num_facts=5)
    newer, values = with_new_values(record, encyclopedia, random.Random(0))
    assert all(old != new and new.lower() in newer.lower() for old, new in values.items())
    assert len(newer.split(".")) == len(record.document.split("."))


def test_updates_ask_for_the_newer_value_and_give_the_older_document_only_to_be_dropped() -> None:
    for case in UpdatesTask(num_cases=3).cases(0):
        older = case.replaced or case.documents[:1]
        newer = case.documents[-1]
        assert bool(case.replaced) == (case.set == "old version dropped")
        for question in case.questions:
            assert question.old_answer != question.answers[0]
            assert question.answers[0].lower() in newer.lower() and question.old_answer.lower() in older[0].lower()


def test_conflicts_contradict_what_the_base_model_learned() -> None:
    learned = {question.text: question.answer for question in background_questions()}
    cases = list(ConflictTask(num_cases=5, statements=STATEMENTS).cases(0))
    assert {case.set for case in cases} == {"known entities", "the real world"}
    for case in cases:
        for question in case.questions:
            assert learned[question.text] == question.old_answer != question.answers[0]
            assert question.answers[0].lower() in case.documents[0].lower()
    with pytest.raises(ValueError, match="the background groups are"):
        ConflictTask(num_cases=1, statements={"weather": "{s} {v}"})


def test_locality_asks_nothing_about_the_document() -> None:
    for case in LocalityTask(num_cases=2).cases(0):
        for question in case.questions:
            assert (question.context is None) == case.set.startswith("background")
            assert question.context != case.documents[0]
