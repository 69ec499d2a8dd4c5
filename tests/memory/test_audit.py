"""DeletionAudit: what is left equals a twin that never had it, and an audit that finds a difference fails."""

import json

import pytest

from hypernet.memory.audit import DeletionAudit
from hypernet.memory.memory import Memory

FACTS = ("Orla Wint taught Fenda Elfax.", "Norbach is a town by the river.", "Ilda Renwick founded the mill.")


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora()


@pytest.fixture
def memory(tmp_path, model):
    memory = Memory.open(tmp_path / "memory", model=model, max_new_tokens=4, limit=2, shard_memories=4)
    yield memory
    memory.close()


@pytest.fixture
def told(memory):
    memory.refs = [memory.add(fact, user_id="alice", valid_at="2026-01-01") for fact in FACTS]
    memory.add("Bob was never in Norbach.", user_id="bob")
    memory.write_adapters()
    return memory


def log_lines(memory: Memory) -> list[dict]:
    return [json.loads(line) for line in (memory.store.folder / "deletions.jsonl").read_text().splitlines()]


def test_what_is_left_is_the_twins_to_the_bit(told):
    report = told.forget(told.refs[0], reason="asked")
    assert report.passed and report.audited and report.unreachable and report.memories == (str(told.refs[0]),)
    assert report.slots == report.slots_equal == 2
    assert report.answers == report.answers_equal and report.answers.keys() == {"token", "adapter"}
    assert report.searches == report.searches_equal >= 3
    for values in report.membership.values():
        assert values["after"] == pytest.approx(values["twin"], abs=1e-3) and values["before"] != values["after"]
    assert told.bank.entries_of(map(str, told.refs)).keys() == set(map(str, told.refs[1:]))


def test_report_is_kept_without_content(told):
    report = told.forget(told.refs[0], reason="asked", questions=[("Who taught Fenda Elfax?", "Orla Wint")])
    *_, deletion, audit = log_lines(told)
    assert (deletion["operation"], deletion["reason"], audit["operation"]) == ("delete", "asked", "audit")
    assert {key: audit[key] for key in ("passed", "slots_equal")} == {"passed": True, "slots_equal": 2}
    assert audit["memories"] == list(report.memories)
    written = (told.store.folder / "deletions.jsonl").read_text()
    assert not any(word in written for word in ("Orla", "Fenda", "Norbach"))
    told.delete(told.refs[1])  # the log goes on behind the audit
    assert log_lines(told)[-1]["operation"] == "delete" and len(log_lines(told)) == 3


def test_forgotten_memory_comes_back_by_rollback_until_purge(told):
    before = told.list(user_id="alice")
    report = told.forget(told.refs[0])
    told.rollback(report.batch)
    assert told.list(user_id="alice") == before and told.bank.counts().missing == 1
    assert told.write_adapters().written == 1
    told.forget(told.refs[0], verify=False)
    told.purge()
    assert b"Orla" not in b"".join(path.read_bytes() for path in told.store.folder.rglob("*") if path.is_file())


def test_twin_of_a_killed_audit_is_removed_by_verify(told):
    told.forget(told.refs[0])
    assert not list(told.store.folder.glob(".twin-*"))
    left = told.store.folder / ".twin-abc"
    (left / "memory").mkdir(parents=True)
    (left / "memory" / "memory.sqlite").write_text("everything that is left")
    assert told.status()["is_unfinished"]
    assert told.verify().repaired == ("1 folders of interrupted audits",) and not left.exists()
    assert not told.status()["is_unfinished"] and told.verify() == ((), ())


def test_derived_memories_and_their_adapters_go_too(told):
    summary = told.add("A summary: Orla taught.", user_id="alice", derived_from=[told.refs[0], told.refs[1]])
    of_summary = told.add("Shorter.", user_id="alice", derived_from=[summary])
    told.write_adapters()
    report = told.forget(told.refs[0])
    assert report.passed and set(report.memories) == {str(ref) for ref in (told.refs[0], summary, of_summary)}
    assert report.num_derived == 2 and report.slots == 2


def test_one_version_is_forgotten_alone(told):
    second = told.update(told.refs[0], "Jorun Pell taught Fenda Elfax.", valid_at="2026-06-01")
    told.write_adapters()
    report = told.forget(str(second))
    assert report.passed and report.memories == (str(second),) and report.slots == 3
    assert told.ask("Who?", user_id="alice", tier="adapter").memories


def test_difference_from_the_twin_fails_the_audit(told, monkeypatch):
    """Adapters that were tampered with, and a memory that a search still finds."""
    held = type(told.bank).held

    def tampered(bank, filters):
        found = held(bank, filters)
        if bank is told.bank and found.adapter is not None:
            name = next(iter(found.adapter.B))
            rows = found.adapter.B[name].clone()
            rows[0, 0, 0, 0] += 1e-3
            object.__setattr__(found.adapter, "B", {**found.adapter.B, name: rows})
        return found

    monkeypatch.setattr(type(told.bank), "held", tampered)
    report = told.forget(told.refs[0])
    assert not report.passed and report.slots_equal == report.slots - 1
    monkeypatch.undo()
    monkeypatch.setattr(DeletionAudit, "_unreachable", lambda *_: False)
    assert not told.forget(told.refs[1]).passed


def test_without_a_model_the_token_tier_is_audited(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    refs = [memory.add(fact, user_id="alice") for fact in FACTS]
    report = memory.forget(refs[0])
    assert report.passed and report.searches == report.searches_equal == 2 and report.answers == {}
    memory.close()


def test_unknown_memory_is_one_line(told):
    with pytest.raises(ValueError, match="There is no memory 0123"):
        told.forget("0123")
    told.forget(told.refs[0], verify=False)
    with pytest.raises(ValueError, match="There is no memory"):
        told.forget(told.refs[0])


def test_many_memories_leave_a_bit_equal_rest(memory):
    """Written in several shards and passes; the twin writes what is left at once."""
    refs = []
    for number in range(30):
        refs.append(memory.add(f"Fact number {number} has {number % 7} parts.", user_id="alice"))
        if number % 8 == 0:
            memory.write_adapters()
    memory.write_adapters()
    for ref in refs[::10]:
        assert memory.forget(ref).passed
    assert memory.bank.counts().slots == 27
