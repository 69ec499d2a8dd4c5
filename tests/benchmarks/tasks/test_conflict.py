"""benchmarks/tasks/conflict.py: documents say something else than what the base model learned."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.tasks.conflict import ConflictTask
from benchmarks.times_asked import read_times_asked
from hypernet.data.encyclopedia import background_facts, background_questions, known_facts

STATEMENTS = {"capital": "The capital of {s} is {v}.", "symbol": "The chemical symbol of {s} is {v}."}
TIMES_ASKED = str(Path(__file__).parents[3] / "benchmarks/results/times_asked.jsonl")
LEARNED = ("known entities", "the real world")


def task(**settings) -> ConflictTask:
    """Of the shipped base model, whose weights the task does not need."""
    model = SimpleNamespace(base_model_fingerprint=read_times_asked(TIMES_ASKED).base_model_fingerprint)
    return ConflictTask(model=model, **{"num_cases": 5, "statements": STATEMENTS, **settings})


def test_conflicts_contradict_learned_facts() -> None:
    learned = {question.text: question.answer for question in background_questions()}
    cases = list(task().cases(0))
    assert list(dict.fromkeys(case.set for case in cases)) == [*LEARNED, "entities never learned"]
    for case in cases:
        for question in case.questions:
            assert question.answers[0].lower() in case.documents[0].lower()
            if case.set in LEARNED:
                assert learned[question.text] == question.old_answer != question.answers[0]
            else:
                assert question.text not in learned and question.old_answer is None
    with pytest.raises(ValueError, match="the background groups are"):
        task(statements={"weather": "{s} {v}"})


def test_questions_say_how_often_training_asked_for_their_fact() -> None:
    counts = read_times_asked(TIMES_ASKED).counts
    names = {fact.entity.name for fact in known_facts()} | {subject for _, subject, _ in background_facts()}
    found = Counter()
    for case in task(num_cases=40, times_asked=TIMES_ASKED).cases(0):
        for question in case.questions:
            times = question.attributes["times_asked"]
            # Which fact it is, from the question's text: the longest name in it that the group has a count for.
            asked = [n for n in names if (question.group, n) in counts and f" {n}" in f" {question.text}".rstrip("?.")]
            assert times == (counts[question.group, max(asked, key=len)] if case.set in LEARNED else 0)
            assert question.attributes["real_world"] == (case.set == "the real world")
            found[case.set in LEARNED, question.attributes["times_asked_from"]] += 1
    lowest = sorted(low for learned, low in found if learned)
    assert len(lowest) == 3 and lowest[0] == min(counts.values())
    assert min(found[True, low] for low in lowest) > 40  # of 240, in three bands of as many facts
    assert [low for learned, low in found if not learned] == [0]


def test_without_counts_questions_are_the_same_without_bands() -> None:
    texts = lambda cases: [[q.text for q in case.questions] for case in cases]  # noqa: E731
    bare = list(task().cases(3))
    assert not any(question.attributes for case in bare for question in case.questions)
    assert texts(bare) == texts(task(times_asked=TIMES_ASKED).cases(3))


def test_conflict_refuses_counts_of_another_base_model() -> None:
    other = SimpleNamespace(base_model_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="python -m benchmarks.times_asked, or set task.times_asked=null"):
        ConflictTask(model=other, num_cases=2, statements=STATEMENTS, times_asked=TIMES_ASKED)
