"""Memory: the story of one user, from the public name, with and without a model."""

import subprocess
import sys
from pathlib import Path

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
