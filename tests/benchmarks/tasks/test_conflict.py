"""benchmarks/tasks/conflict.py: documents say something else than what the base model learned."""

import pytest

from benchmarks.tasks.conflict import ConflictTask
from hypernet.data.encyclopedia import background_questions

STATEMENTS = {"capital": "The capital of {s} is {v}.", "symbol": "The chemical symbol of {s} is {v}."}


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
