"""benchmarks.memory.peers: rows of every system that is here, and the reason of one that is not."""

import sys
import types
from importlib.util import find_spec

import pytest

from benchmarks.memory import peers
from benchmarks.memory.peers import PeersSettings, markdown, measure, measured
from benchmarks.memory.store import UserFacts


@pytest.fixture
def settings(tiny_base_model_folder):
    sizes = {"num_users": 3, "memories_per_user": 8, "num_searches": 12, "num_deleted": 6}
    return PeersSettings(model=str(tiny_base_model_folder), systems=None, seed=0, output=None, **sizes)


def test_every_system_has_a_row_or_a_reason(settings, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    *ours, mem0 = measure(settings)
    assert [row["system"] for row in ours] == ["words alone", "words and vectors", "vectors"]
    for row in ours:
        counted = ("wrong_user_hits", "resurrected", "deleted_left_on_disk", "recall_in_anothers_memory")
        assert {row[name] for name in counted} == {0} and (row["memories"], row["deleted"]) == (24, 6)
        assert row["recall_at_5"] > 0.7 and row["p50_ms"] > 0 and row["ingest_per_s"] > 0
    assert mem0["kind"] == "skipped" and "not installed" in mem0["reason"]
    head, _, *lines = markdown([*ours, mem0]).splitlines()
    assert "found again of 6 deleted" in head and [line.split(" | ")[0] for line in lines] == [
        "| this memory, words alone",
        "| this memory, words and vectors",
        "| this memory, vectors",
    ]


def test_mem0_answers_without_a_network_where_it_is_installed(settings):
    if find_spec("mem0") is None:  # importorskip would import it with its telemetry
        pytest.skip("mem0ai is not installed")
    (row,) = measure(settings.model_copy(update={"systems": ["mem0"]}))
    assert row["recall_at_5"] > 0.7 and row["wrong_user_hits"] == row["resurrected"] == 0 and row["not_run"]


def test_system_that_does_it_wrong_is_counted(tmp_path):
    """Its deletions last until it is opened again, its filter is nobody's, and its file keeps all."""

    class Forgetful:
        name = "forgetful"

        def __init__(self) -> None:
            self.kept, self.there = [], []

        def open(self) -> None:
            self.there = list(self.kept)

        def close(self) -> None:
            (tmp_path / "kept").write_text("\n".join(text for _, text in self.kept))

        def add(self, user_id: str, text: str) -> str:
            self.kept.append((user_id, text))
            self.there = list(self.kept)
            return text

        def search(self, user_id: str, question: str) -> list[tuple[str, str]]:
            return [memory for memory in self.there if memory[1].split()[0] == question]

        def delete(self, key: str) -> None:
            self.there = [memory for memory in self.there if memory[1] != key]

        def erase(self) -> None: ...

    users = [UserFacts(f"u{u}", [f"{u}{n} is so" for n in range(4)], [f"{u}{n}" for n in range(4)]) for u in range(2)]
    row = measured(Forgetful(), users, seed=0, num_searches=10, num_deleted=3, folder=tmp_path)
    assert row["recall_at_5"] == row["recall_in_anothers_memory"] == 1 and row["wrong_user_hits"] == 10
    assert row["resurrected"] == 3 and row["deleted_left_on_disk"] == 3


def test_telemetry_is_off_before_mem0_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: types.SimpleNamespace())
    for name in ("MEM0_TELEMETRY", "MEM0_DIR"):
        monkeypatch.setenv(name, "unset")
    loaded = "mem0" in sys.modules
    peers.Mem0("mem0", tmp_path, embedder=None)
    assert peers.os.environ["MEM0_TELEMETRY"] == "False" and peers.os.environ["MEM0_DIR"].startswith(str(tmp_path))
    assert ("mem0" in sys.modules) == loaded
