"""Memory: the story of one user, from the public name, with and without a model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hypernet
from hypernet.memory.memory import Memory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("with_model", [False, True])
def test_story_of_one_user(tmp_path, tiny_base_model_folder, with_model):
    memory = hypernet.Memory.open(tmp_path / "memory", model=tiny_base_model_folder if with_model else None)
    ref = memory.add("Fenda Elfax was taught by Orla Wint.", user_id="alice", valid_at="2026-03-01", source="fenda.md")
    memory.add([{"role": "user", "content": "I moved to Halvawold"}], user_id="alice", run_id="chat-7")
    memory.update(ref, "Fenda Elfax was taught by Jorun Pell.", valid_at="2026-06-01")

    def best(**settings) -> str:
        return memory.search("Who taught Fenda Elfax?", user_id="alice", **settings)[0].text

    assert "Orla" in best(as_of="2026-04-01") and "Jorun" in best(as_of="2026-07-01")
    memory.invalidate(ref, at="2026-08-01")
    assert not any("Fenda" in hit.text for hit in memory.search("Fenda", user_id="alice", as_of="2026-09-01"))
    deleted = memory.delete(ref, reason="asked")
    assert not any("Fenda" in hit.text for hit in memory.search("Fenda", user_id="alice", as_of="2026-07-01"))
    assert [entry.operation for entry in memory.history(ref)] == ["add", "update", "invalidate"] + ["delete"] * 3
    memory.rollback(deleted.version)
    assert "Jorun" in best(as_of="2026-07-01")
    memory.delete_all(user_id="alice", run_id="chat-7")
    memory.delete(ref)
    memory.purge()
    assert memory.status(user_id="alice")["memories"] == 0 and memory.verify() == ((), ())
    assert b"Halvawold" not in b"".join(path.read_bytes() for path in (tmp_path / "memory").iterdir())
    memory.close()


def test_halves_of_characters_are_stored_whole(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    ref = memory.add("Who is K\udce4the?", user_id="alice")
    assert memory.get(ref).text == "Who is K\ufffdthe?"
    memory.update(ref, "K\udce4the", valid_at="2026-01-01")
    assert memory.search("K\udce4the is who", user_id="alice")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.search("x", limit=1.5), "limit is 1.5"),
        (lambda m: m.search("x", limit=10**20), f"limit is {10**20}. Give a whole number from 1 to 2147483647"),
        (lambda m: m.search("x", limit=True), "limit is True"),
        (lambda m: m.search(["a"]), r"A question is a text, not \['a'\]"),
        (lambda m: m.search(None), "A question is a text, not None"),
        (lambda m: m.list(limit=-1), "limit is -1"),
        (lambda m: m.list(limit=10**20), "limit is 1"),
        (lambda m: m.profile(user_id="alice", limit=0), "limit is 0"),
        (lambda m: m.profile(user_id="alice", recent_days=float("nan")), "recent_days is nan"),
        (lambda m: m.profile(user_id="alice", recent_days=1e300), "recent_days is 1e"),
        (lambda m: m.add(None), "A memory is a text or a list of messages, not None"),
        (lambda m: m.add(5), "not 5"),
        (lambda m: m.add(b"bytes"), "not b'bytes'"),
        (lambda m: m.add({"role": "user", "content": "a"}), "A memory is a text or a list of messages"),
        (lambda m: m.add("a", user_id="\ud800"), "user_id .* half a character"),
        (lambda m: m.add("a", user_id="\u200b"), "user_id .* Give a text"),
        (lambda m: m.add("a", source="\udc00"), "source .* half a character"),
        (lambda m: m.add("\ufeff"), "A memory is a text"),
        (lambda m: m.add(" \u200b\u00ad\x00\n"), "A memory is a text"),
        (lambda m: m.add([{"role": "user", "content": "\u200b"}]), "A memory is a text"),
        (lambda m: m.update("one", "\ufeff"), "A memory is a text"),
        (lambda m: m.add("a", metadata={"x": float("inf")}), "metadata is no JSON object"),
        (lambda m: m.add("a", metadata={"x": object()}), "metadata is no JSON object"),
        (lambda m: m.add("a", metadata=[1]), "metadata is no JSON object"),
        (lambda m: m.delete("one", reason="\ud800"), "reason .* half a character"),
        (lambda m: m.get(f"one@{10**20}"), "is no memory's id"),
        (lambda m: m.get("\ud800"), "is no memory's id"),
        (lambda m: m.rollback("v" + "9" * 30), "is no version of a batch"),
    ],
)
def test_impossible_argument_is_one_line_and_changes_nothing(tmp_path, call, says):
    memory = Memory.open(tmp_path / "memory")
    (tmp_path / "one.jsonl").write_text('{"id": "one", "text": "one"}')
    memory.import_jsonl(tmp_path / "one.jsonl")
    with pytest.raises(ValueError, match=says) as error:
        call(memory)
    assert "\n" not in str(error.value) and [m.text for m in memory.list()] == ["one"]
    assert len(memory.versions()) == 1 and memory.verify() == ((), ())


def test_integers_of_numpy_are_limits(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    memory.add("one")
    assert len(memory.search("one", limit=np.int64(3))) == len(memory.list(limit=np.int32(1))) == 1


def test_calls_after_close_are_one_line(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    memory.add("one")
    memory.close()
    memory.close()
    calls = [lambda: memory.add("two"), lambda: memory.search("one"), memory.list, memory.status, memory.versions]
    for call in [*calls, memory.purge, memory.verify, lambda: memory.get("x")]:
        with pytest.raises(ValueError, match="was closed. Open it again."):
            call()
    assert [m.text for m in Memory.open(tmp_path / "memory").list()] == ["one"]


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "/no/such/model"},
        {"embedder": "sentence-transformers:none"},
        {"num_candidates": 0},
        {"dense_weight": float("nan")},
        {"conflict": "newest"},
        {"source_priority": "notes/*"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_memory_that_cannot_be_opened_leaves_no_file(tmp_path, settings):
    with pytest.raises(ValueError):
        Memory.open(tmp_path / "memory", **settings)
    assert not (tmp_path / "memory").exists()


def test_call_with_nothing_to_do_leaves_no_batch(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    assert memory.delete_all(user_id="nobody").version == memory.purge().version == ""
    assert memory.versions() == () and memory.add("one").batch == "v1"


def test_restore_says_what_kept_a_memory_away(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    ref = memory.add("one", user_id="alice")
    with pytest.raises(ValueError, match=f"{ref.id} is not deleted: there is nothing to restore"):
        memory.restore(ref)
    undone = memory.rollback(ref.batch)
    with pytest.raises(ValueError, match="was not deleted but taken back with its batch v1. .* roll back v2"):
        memory.restore(ref)
    memory.rollback(undone.version)
    summary = memory.add("of one", user_id="alice", derived_from=[str(ref)])
    memory.delete(f"{ref.id}@1")
    with pytest.raises(ValueError, match=f"stays deleted: it was derived from {ref.id}@1, deleted too"):
        memory.restore(summary)
    memory.purge()
    with pytest.raises(ValueError, match=f"{ref.id} was purged: its content is gone for good"):
        memory.restore(ref)
    with pytest.raises(ValueError, match="There is no memory nobody"):
        memory.restore("nobody")


def test_folder_moves_with_its_memories(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    ref = memory.add("one")
    memory.close()
    (tmp_path / "memory").rename(tmp_path / "moved")
    assert Memory.open(tmp_path / "moved", create=False).get(ref).text == "one"


def test_memory_without_a_model_imports_no_torch(tmp_path):
    script = (
        "import sys; from hypernet import Memory\n"
        f"memory = Memory.open({str(tmp_path / 'memory')!r}); memory.add('one', user_id='alice')\n"
        "print(memory.search('one', user_id='alice')[0].text, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "one []\n" and done.stderr == ""
