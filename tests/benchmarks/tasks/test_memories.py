"""benchmarks/tasks/memories.py: every question has one memory that answers it."""

import pytest

from benchmarks.tasks.memories import MemoriesTask


def test_each_question_is_answered_by_its_memory_alone():
    cases = list(MemoriesTask(num_memories=[1, 10, 40], num_questions=30, num_cases=5).cases(3))
    assert [case.attributes["num_memories"] for case in cases] == [1] * 5 + [10] * 3 + [40]
    for case in cases:
        assert len(case.documents) == case.attributes["num_memories"] == len(case.others)
        assert len(set(case.documents)) == len(case.documents) and not set(case.documents) & set(case.others)
        for question in case.questions:
            name = " ".join(word for word in question.text.rstrip("?").split()[1:] if word[0].isupper())
            holding = [told for told in (*case.documents, *case.others) if name in told and question.answers[0] in told]
            assert holding == [question.evidence] and question.evidence in case.documents
    told = [(question.text, question.answers) for case in cases[-1:] for question in case.questions]
    assert len({text for text, _ in told}) == len(told) == 30


def test_forgotten_memories_are_asked_about_in_sets_of_their_own():
    cases = {case.set: case for case in MemoriesTask(num_memories=[10], num_questions=10, num_forgotten=3).cases(0)}
    assert list(cases) == [f"{what}, {when}" for what in ("kept", "forgotten") for when in _WHEN]
    before, after, never = (cases[f"kept, {when}"] for when in _WHEN)
    assert len(before.documents) == 10 and len(before.questions) == 7
    assert after.documents == never.documents == before.documents[:7]
    assert after.replaced == before.documents[7:] and not never.replaced and not before.replaced
    for case in (cases[f"forgotten, {when}"] for when in _WHEN):
        assert len(case.questions) == 3
        assert all(question.evidence in before.documents[7:] for question in case.questions)
        assert not any(question.evidence in never.documents for question in case.questions)


_WHEN = ("before", "after", "never told")


@pytest.mark.parametrize("settings", [{"num_memories": []}, {"num_memories": [3], "num_forgotten": 3}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(ValueError, match="give sizes above it"):
        MemoriesTask(**settings)
