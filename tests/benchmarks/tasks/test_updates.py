"""benchmarks/tasks/updates.py: the newer value is asked for, and the older document comes only to be dropped."""

from benchmarks.tasks.updates import UpdatesTask


def test_updates_ask_for_the_newer_value_and_drop_the_older() -> None:
    for case in UpdatesTask(num_cases=3).cases(0):
        older = case.replaced or case.documents[:1]
        newer = case.documents[-1]
        assert bool(case.replaced) == (case.set == "old version dropped")
        for question in case.questions:
            assert question.old_answer != question.answers[0]
            assert question.answers[0].lower() in newer.lower() and question.old_answer.lower() in older[0].lower()
