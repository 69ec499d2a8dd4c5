"""benchmarks.memory.nights: what is trained on, what the gate asks and what is measured never meet."""

import pytest

from benchmarks.memory.nights import Wordings, _forms, facts, rows
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
