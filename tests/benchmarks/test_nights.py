"""benchmarks.memory.nights: what is trained on, what the gate asks and what is measured never meet."""

import pytest

from benchmarks.memory.nights import Wordings, _eights, _forms, _known, facts, rows
from benchmarks.memory.nights_tables import markdown
from hypernet.data.encyclopedia import background_questions
from hypernet.memory.memory import Memory


@pytest.fixture
def told(tmp_path):
    told = facts(0, 25)
    memory = Memory.open(tmp_path / "memory")
    for one in told:
        memory.add(one.text, user_id="alice", subject=one.subject, relation=one.relation)
    yield list(zip(told, memory.list(user_id="alice"), strict=True))
    memory.close()


def test_no_wording_is_trained_on_and_measured(told):
    writer = Wordings()
    for one, memory in told:
        assert one.question == _forms(memory)[3] and one.subject in one.question
        training, held = set(writer.training(memory)), set(writer.held_out(memory))
        assert (
            len(held) in (1, 2) and len(training) >= 6 and not training & held and one.question not in training | held
        )


def test_facts_are_25_keys_told_in_sentences_with_the_answer(told):
    assert len({(one.subject, one.relation) for one, _ in told}) == 25
    assert all(one.answer in one.text and one.subject in one.text for one, _ in told)
    assert facts(0, 25) == [one for one, _ in told] != facts(1, 25)
    assert list(rows(type("Settings", (), {"parts": []})())) == []


def test_tables_are_means_over_seeds():
    night = {"kind": "nights", "night": 1, "shuffled": False, "before": 0.0, "oracle": 1.0, "handed_over": 5}
    night |= {"background": 1.0, "gate_locality": 0.1, "gate_recall": 0.9, "processor_s": 9.0}
    rows = [night | {"after": 1.0, "all_so_far": value, "promoted": value == 1, "anew": True} for value in (1.0, 0.5)]
    rows += [rows[0] | {"anew": False}, rows[0] | {"shuffled": True}]
    assert markdown([*rows, {"kind": "rollback"}], "nights").splitlines()[2:] == [
        "| 1, anew | 1.00 | 0.75 | 0.50 | 1.00 | 1.00 | 1.00 |",
        "| 1, on top | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |",
        "| 1, told another's facts | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |",
    ]
    line = "| 1, anew | 0.00 | 0.90 | 0.10 | 0.50 | 5.00 | 9.00 |"
    assert markdown(rows, "nights_gate").splitlines()[2] == line
    trained = {"kind": "objectives", "objective": "Deep", "start": "nothing", "open_book": 1.0, "background": 0.9}
    rows = [
        trained | {"steps": steps, "closed_book": closed, "processor_s": 1.0 * steps, "tflops": 0.1 * steps}
        for steps, closed in ((10, 0.5), (10, 0.7), (30, 0.8), (30, 0.9))
    ]
    line = "| deep, from nothing | 0.60 | 0.85 | 0.90 | 30.00 | 3.00 |"
    assert markdown(rows, "objectives").splitlines()[2] == line
    assert markdown(rows[:2], "objectives").splitlines()[2].endswith("| 0.60 | – | – | – |")


def test_wordings_that_overlap_are_counted_by_eight_words():
    assert _eights("a b c d e f G h i") == [tuple("abcdefgh"), tuple("bcdefghi")] and _eights("a b c d e f g") == []
    known = _known(3, 5)
    assert len(known) == 5 and set(known) <= {q.text for q in background_questions(held_out=False)}
    measured = {eight for question in background_questions(held_out=True) for eight in _eights(question.text)}
    assert measured and not [text for text in known if measured & set(_eights(text))]
