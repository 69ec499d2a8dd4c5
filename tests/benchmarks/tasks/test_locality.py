"""benchmarks/tasks/locality.py: nothing is asked about the document whose adapter is there."""

from benchmarks.tasks.locality import LocalityTask
from hypernet.data.encyclopedia import background_questions


def test_locality_asks_nothing_about_the_document() -> None:
    for case in LocalityTask(num_cases=2).cases(0):
        for question in case.questions:
            assert (question.context is None) == case.set.startswith("background")
            assert question.context != case.documents[0]
            if question.context:  # the answer is in the prompt
                assert question.answers[0].lower() in question.context.lower()


def test_facts_never_protected_in_training_are_their_own_set() -> None:
    held_out = {question.text for question in background_questions(held_out=True)}
    asked = {"background": set(), "background, never protected": set()}
    for case in LocalityTask(num_cases=20).cases(0):
        if case.set in asked:
            asked[case.set] |= {question.text for question in case.questions}
    assert asked["background, never protected"] <= held_out and not asked["background"] & held_out
