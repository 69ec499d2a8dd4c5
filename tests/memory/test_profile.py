"""The profile: stable and recent, without what has ended or what others said."""

import time

import pytest

from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.times import now, to_text

DAY = 86_400_000_000


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Everything added while `clock.ago` is n days is that old."""
    memory = Memory.open(tmp_path / "memory")
    memory.ago = 0
    monkeypatch.setattr("hypernet.memory.store.token_store.now", lambda: now() - memory.ago * DAY)
    yield memory
    memory.close()


def test_profile_divides_stable_from_recent(memory):
    memory.ago = 30
    memory.add("plays chess", user_id="alice")
    memory.add("lives in Rome", user_id="alice", subject="Alice", relation="lives in")
    memory.add("is on leave", user_id="alice", invalid_at=to_text(now() - DAY))
    memory.ago = 1
    memory.add(
        [{"role": "user", "content": "bought a car"}, {"role": "assistant", "content": "Well done!"}], user_id="alice"
    )
    memory.add("somebody else's", user_id="bob")
    memory.ago = 0
    found = memory.profile(user_id="alice")
    assert [m.text for m in found.stable] == ["lives in Rome", "plays chess"]
    assert [m.text for m in found.recent] == ["bought a car"]
    assert str(found) == "Known:\n- lives in Rome\n- plays chess\nLately:\n- bought a car"
    assert str(memory.profile(user_id="nobody")) == ""


def test_profile_of_10000_memories_takes_under_50_ms(memory):
    memory.store.add([Draft(text=f"fact {n}", filters=Filters("alice")) for n in range(10_000)])
    memory.profile(user_id="alice")
    start = time.process_time()
    assert len(memory.profile(user_id="alice").recent) == 20
    assert time.process_time() - start < 0.05


def test_profile_of_nobody_is_refused(memory):
    with pytest.raises(ValueError, match="A profile is somebody's"):
        memory.profile()
    with pytest.raises(ValueError, match="limit is 0"):
        memory.profile(user_id="alice", limit=0)
