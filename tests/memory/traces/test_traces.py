"""Traces: kept beside memories, gone with any memory of their prompt, of both databases."""

import pytest

from hypernet.memory.ask import Answer, Effect
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters
from hypernet.memory.traces.trace_store import Example, TraceStore


def answered(question, refs, *, user_id="alice"):
    whose = {"user_id": user_id, "agent_id": None, "run_id": None}
    asked = {
        "question": question,
        "text": "Orla Wint",
        "tier": "token",
        "reason": "",
        "memories": tuple(map(str, refs)),
    }
    return Answer(**asked, **whose, as_of="2026-01-01", known_at=None, prompt_tokens=9)


def effect(ref, log_p, without):
    told = {"text": "", "valid_at": "", "invalid_at": None, "rank": 1, "entry": None}
    return Effect(memory=str(ref), log_p=log_p, log_p_without=without, **told)


@pytest.fixture
def memory(tmp_path, database):
    memory = Memory.open(tmp_path / "memory", database=database)
    yield memory
    memory.close()


@pytest.fixture
def told(memory):
    """Refs of two memories of alice and one of bob."""
    pairs = (("Orla Wint taught Fenda.", "alice"), ("Fenda lives in Norbach.", "alice"), ("Bob likes tea.", "bob"))
    return [memory.add(text, user_id=user) for text, user in pairs]


def record(memory, told):
    traces = TraceStore(memory.store)
    question = "Who taught Fenda?"
    traces.record(answered(question, told[:2]), [effect(told[0], -1.0, -9.0), effect(told[1], -1.0, -1.5)])
    traces.record(answered("What does Bob like?", told[2:], user_id="bob"), [effect(told[2], -2.0, -3.0)])
    return traces


def test_example_has_what_each_memory_moved(memory, told):
    traces = record(memory, told)
    assert traces.count() == 3
    assert traces.examples() == [
        Example("Who taught Fenda?", ("Fenda lives in Norbach.", "Orla Wint taught Fenda."), (0.5, 8.0), "alice"),
        Example("What does Bob like?", ("Bob likes tea.",), (1.0,), "bob"),
    ]
    assert [one.user_id for one in traces.examples(Filters("bob"))] == ["bob"]


def test_order_does_not_depend_on_when_a_trace_was_recorded(memory, told):
    traces = TraceStore(memory.store)
    first = [effect(told[0], -1.0, -9.0), effect(told[1], -1.0, -1.5)]
    for question in ("b?", "a?", "c?"):
        traces.record(answered(question, told[:2]), first if question != "c?" else first[::-1])
    assert [one.question for one in traces.examples()] == ["a?", "b?", "c?"]
    assert len({one[1:] for one in traces.examples()}) == 1


def test_trace_goes_with_any_memory_of_its_prompt_and_comes_back(memory, told):
    traces = record(memory, told)
    memory.delete(told[1])
    assert [one.user_id for one in traces.examples()] == ["bob"] and traces.count() == 3
    memory.restore(told[1])
    assert [one.user_id for one in traces.examples()] == ["alice", "bob"]


def test_purge_erases_traces_with_their_questions(memory, told):
    traces = record(memory, told)
    memory.delete_all(user_id="alice")
    memory.purge()
    assert traces.count() == 1 and [one.user_id for one in traces.examples()] == ["bob"]
    content = b"".join(path.read_bytes() for path in memory.store.folder.rglob("*") if path.is_file())
    assert b"Who taught Fenda" not in content


def test_memory_derived_from_a_deleted_one_loses_its_traces(memory, told):
    traces = TraceStore(memory.store)
    derived = memory.add("Fenda of Norbach was taught by Orla.", user_id="alice", derived_from=told[:2])
    traces.record(answered("Who?", [derived]), [effect(derived, -1.0, -2.0)])
    memory.delete(told[0])
    assert traces.examples() == []


def test_traces_of_a_user_are_deleted_by_themselves(memory, told):
    traces = record(memory, told)
    assert traces.delete(Filters("alice")) == 2
    assert [one.user_id for one in traces.examples()] == ["bob"]
    assert memory.get(told[0]).text == "Orla Wint taught Fenda."
    with pytest.raises(ValueError, match="never means everybody"):
        traces.delete(Filters())


def test_effect_of_another_prompt_is_refused(memory, told):
    with pytest.raises(ValueError, match="was not behind this answer"):
        TraceStore(memory.store).record(answered("Who?", told[:1]), [effect(told[1], -1.0, -2.0)])


def test_copied_memory_has_its_traces(memory, told, tmp_path):
    traces = record(memory, told)
    assert memory.copy(tmp_path / "copy")["traces"] == 3
    copy = Memory.open(tmp_path / "copy")
    assert TraceStore(copy.store).examples() == traces.examples()
    copy.close()
