"""benchmarks/tasks/conflict.py: documents say something else than what the base model learned."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.measuring.metrics import contains
from benchmarks.tasks.conflict import ConflictNQTask, ConflictTask, OverrideTask
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


# --- Memories -------------------------------------------------------------------------------------------------------

CONFLICT_NQ = Path(__file__).parents[4] / "shared/data/conflict_nq"


def override(**settings) -> OverrideTask:
    return OverrideTask(model=None, **{"num_memories": 9, "num_cases": 3, "statements": STATEMENTS, **settings})


def test_memories_contradict_what_was_learned_once_each() -> None:
    learned = {question.text: question.answer for question in background_questions()}
    cases = list(override().cases(1))
    assert [case.set for case in cases] == [name for name in (*LEARNED, "entities never learned") for _ in range(3)]
    for case in cases:
        assert len(case.documents) == len(case.questions) == len(set(case.documents)) == 9
        assert not set(case.documents) & set(case.others) and len(case.others) == 9
        for document, question in zip(case.documents, case.questions, strict=True):
            assert question.evidence == document and question.answers[0].lower() in document.lower()
            assert question.old_answer == learned.get(question.text) != question.answers[0]
    for name in LEARNED:  # no fact is told twice, by whatever words
        texts = [question.text for case in cases if case.set == name for question in case.questions]
        assert len(set(texts)) == 27
    assert list(override().cases(1)) == cases != list(override().cases(2))


def test_too_few_facts_for_so_many_memories_are_refused() -> None:
    with pytest.raises(ValueError, match="the real world has .* facts, for 3 users of 80 memories"):
        list(override(num_memories=80).cases(0))


def written(folder, *rows: dict) -> str:
    path = folder / "conflict.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def row(number: int, **changes) -> dict:
    passages = [f"Town {number} is old.", f"Town {number} was founded in 19{number:02}, they say."]
    found = {
        "cleaned_question": f"When was town {number} founded?",
        "fake_short_answer": f"19{number:02}",
        "real_short_answer": f"17{number:02}",
        "fake_passages": [{"passage": passage, "summary": ""} for passage in passages],
    }
    return found | changes


def test_conflict_nq_asks_what_words_can_decide(tmp_path) -> None:
    left_out = (
        row(50, fake_short_answer="in spring"),  # no passage says so
        row(51, real_short_answer="1951 or 1952"),  # holds the other one
        row(52, cleaned_question="Was town 52 founded in 1952?"),
        row(53, real_short_answer="When its people had all moved there"),
        row(54, real_short_answer="the"),  # no word is left of it
    )
    path = written(tmp_path, *map(row, range(6)), *left_out)
    cases = list(ConflictNQTask(paths=[path], questions_per_case=2).cases(0))
    assert len(cases) == 3
    asked = [question for case in cases for question in case.questions]
    assert {(q.text, q.answers, q.old_answer) for q in asked} == {
        (f"When was town {n} founded?", (f"190{n}",), f"170{n}") for n in range(6)
    }
    for case in cases:
        assert case.attributes == {"num_memories": 4} and len(case.documents) == 4
        for question in case.questions:
            assert question.evidence in case.documents and contains(question.evidence, question.answers)
            assert not any(contains(document, question.answers) for document in case.others)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "Cannot read .*conflict.jsonl: No such file.* Set task.paths to ConflictNQ's files"),
        ("{", "is no JSONL"),
        ('{"question": "?"}', "has no 'cleaned_question'"),
        (json.dumps(row(1)), "1 questions fill 1 users of 1"),
    ],
)
def test_files_that_are_not_conflict_nq_are_one_line(tmp_path, content, says) -> None:
    path = tmp_path / "conflict.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=says) as error:
        list(ConflictNQTask(paths=[str(path)], questions_per_case=1).cases(0))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not CONFLICT_NQ.is_dir(), reason="ConflictNQ is not at ../shared/data/conflict_nq")
def test_conflict_nq_s_own_files_have_82_such_questions() -> None:
    paths = sorted(map(str, CONFLICT_NQ.glob("*.jsonl")))
    cases = list(ConflictNQTask(paths=paths, questions_per_case=41).cases(0))
    assert [len(case.questions) for case in cases] == [41, 41]
    assert len({question.text for case in cases for question in case.questions}) == 82
    assert all(len(case.documents) == 5 * 41 for case in cases)
