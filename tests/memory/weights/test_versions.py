"""Versions against the bytes on the disk: promoted, refused, forced, rolled back, killed at any point."""

import hashlib
import json
import signal

import pytest

from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters
from hypernet.memory.weights.versions import BASE, REVIEW, GateRefused, Manifest, Versions

PASSED = {"passed": True, "failed": []}
REFUSED = {"passed": False, "failed": ["recall 0.10 < 0.80"]}


def manifest(*contains, parent=None, **changes):
    fields = {"new": contains, "base_model": "b" * 8, "generator": None, "recipe": {"seed": 0}, **changes}
    return Manifest(parent=parent, contains=contains, **fields)


def make(versions, *contains, content=b"weights", **changes):
    wanted = manifest(*contains, **changes)
    with versions.written(wanted) as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter/adapter_model.safetensors").write_bytes(content)
    return versions.made_of(wanted)


@pytest.fixture
def versions(tmp_path):
    return Versions.of(tmp_path, Filters(user_id="alice"))


def bytes_of(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_content_has_the_same_name(versions):
    first, again, other = make(versions, "a@1"), make(versions, "a@1"), make(versions, "a@1", content=b"others")
    assert first.name == again.name and len(versions.all()) == 2 and other.name in {v.name for v in versions.all()}


def test_only_what_passed_the_gate_becomes_live(versions):
    version = make(versions, "a@1")
    with pytest.raises(GateRefused, match="was not judged. Nothing was changed; --force makes it live"):
        versions.promote(version)
    version = versions.judge(version, REFUSED)
    with pytest.raises(GateRefused, match="was refused: recall 0.10 < 0.80. Nothing"):
        versions.promote(version)
    assert versions.current == BASE and versions.promotions() == []
    versions.promote(versions.judge(version, PASSED))
    assert versions.current == version.name and not versions.promotions()[0]["forced"]


def test_forced_promotion_is_recorded_for_ever(versions):
    version = versions.judge(make(versions, "a@1"), REFUSED)
    versions.promote(version, force=True)
    versions.judge(version, PASSED)
    versions.rollback(BASE)
    assert [entry["forced"] for entry in versions.promotions()] == [True, False]


def test_rollback_gives_back_the_same_bytes(versions):
    first = versions.judge(make(versions, "a@1"), PASSED)
    versions.promote(first)
    before, digest = bytes_of(first.folder), versions.check(first)
    second = versions.judge(make(versions, "a@1", "b@1", content=b"two", parent=first.name), PASSED)
    versions.promote(second)
    versions.rollback(first.name)
    assert versions.current == first.name and bytes_of(first.folder) == before
    assert versions.check(versions.get(first.name)) == digest != versions.check(second)
    with pytest.raises(ValueError, match="w-never was never live"):
        versions.rollback("w-never")


def test_changed_file_is_refused(versions):
    version = versions.judge(make(versions, "a@1"), PASSED)
    (version.folder / "adapter/adapter_model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ValueError, match="was changed since it was written"):
        versions.promote(version)


def test_version_of_a_deleted_memory_answers_nothing(versions):
    first = versions.judge(make(versions, "a@1"), PASSED)
    second = versions.judge(make(versions, "a@1", "b@1", content=b"two", parent=first.name), PASSED)
    for version in (first, second):
        versions.promote(version)
    assert versions.live(lambda ref: True).name == second.name
    assert versions.live(lambda ref: ref != "b@1").name == first.name  # the one before b
    assert versions.live(lambda ref: ref != "a@1") is None
    assert versions.remove(["b@1"]) == [second.name] and not second.folder.exists() and versions.current == BASE


def test_users_have_versions_of_their_own(versions, tmp_path):
    versions.promote(versions.judge(make(versions, "a@1"), PASSED))
    bob = Versions.of(tmp_path, Filters(user_id="bob"))
    assert bob.all() == [] and bob.current == BASE


@pytest.fixture
def told(tmp_path):
    """A memory of two users whose weights hold what they said."""
    memory = Memory.open(tmp_path / "memory")
    memory.refs = {user: str(memory.add(f"I am {user}.", user_id=user)) for user in ("alice", "bob")}
    memory.refs["other"] = str(memory.add("I moved.", user_id="alice"))
    yield memory
    memory.close()


def filled(memory, user, ref):
    """Versions of a user: one with a memory, one without, trainings with it that were killed, and a review."""
    versions, kept = Versions.of(memory.store.folder, Filters(user_id=user)), memory.refs["other"]
    without = versions.judge(make(versions, kept), PASSED)
    with_it = versions.judge(make(versions, kept, ref, content=b"both", parent=without.name), PASSED)
    versions.promote(without)
    versions.promote(with_it)
    for number, wanted in enumerate((manifest(ref, kept), manifest(kept))):
        (versions.unfinished(wanted) / "state.safetensors").write_bytes(b"%d" % number)
    killed = versions.folder / ".new-0-1"
    killed.mkdir()
    (killed / "manifest.json").write_text(json.dumps({"contains": [ref]}))
    lines = [{"memory": ref, "question": "Who?"}, {"memory": kept, "question": "What?"}, {"reject": "Olwin"}]
    broken = [f'{{"memory": "{ref}", "Who', f'{{"memory": "{kept}", "What']
    (versions.folder / REVIEW).write_text("\n".join([*map(json.dumps, lines), *broken]) + "\n")
    return versions, without, with_it


@pytest.mark.parametrize("by", ["purge", "verify"])
def test_purged_memory_leaves_the_weights_whoever_asks(told, by):
    ref = told.refs["alice"]
    versions, without, with_it = filled(told, "alice", ref)
    others, *_ = filled(told, "bob", told.refs["bob"])
    before = bytes_of(others.folder)
    told.delete(ref)
    assert told.purge(told.refs["alice"]).finished if by == "purge" else told.store.purge()  # and killed behind it
    found = told.verify().repaired
    assert [line for line in found if "weights with purged memories" in line] == [] or by == "verify"
    assert [version.name for version in versions.all()] == [without.name] and not with_it.folder.exists()
    left = {path.parent.name for path in versions.folder.glob(".*/*")}
    assert left == {f".unfinished-{manifest(told.refs['other']).key}"}
    lines = (versions.folder / REVIEW).read_text().splitlines()
    assert len(lines) == 3 and not [line for line in lines if ref in line]
    assert bytes_of(others.folder) == before and versions.current == BASE
    assert not [line for line in told.verify().repaired if "weights" in line]


def test_purge_drops_lines_of_a_review_that_are_no_utf8(told):
    versions, without, _ = filled(told, "alice", told.refs["alice"])
    told.delete(told.refs["alice"])
    before = (versions.folder / REVIEW).read_bytes()
    (versions.folder / REVIEW).write_bytes(before + b'{"memory": "caf\xe9"}\n')
    told.store.purge()  # and killed behind it
    assert told.status()["is_unfinished"]
    told.purge()
    assert not told.status()["is_unfinished"] and [version.name for version in versions.all()] == [without.name]
    lines = (versions.folder / REVIEW).read_bytes().splitlines()
    assert len(lines) == 3 and set(lines) < set(before.splitlines())


def test_deleted_memory_stays_in_its_files_until_it_is_purged(told):
    versions, _, with_it = filled(told, "alice", told.refs["alice"])
    told.delete(told.refs["alice"])
    told.verify()
    assert with_it.folder.is_dir()
    told.restore(told.refs["alice"])
    told.purge()
    assert with_it.folder.is_dir() and versions.current == with_it.name


KILLED = """
import sys
from pathlib import Path
from tests.memory.weights.test_versions import PASSED, make
from hypernet.memory.weights.versions import Versions
from hypernet.memory.store.records import Filters
versions = Versions.of(Path({folder!r}), Filters(user_id="alice"))
for number in range(10_000):
    print(f"<{{number}}>", file=sys.stderr, flush=True)
    versions.promote(versions.judge(make(versions, f"m{{number}}@1", content=b"%d" % number * 100_000), PASSED))
"""


def test_killed_at_any_point_leaves_whole_versions(commands, versions, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(folder=str(tmp_path)))
    for trial in range(6):  # as many versions before it
        done = commands.run(str(script), [], cwd=tmp_path, kill={"said": f"<{trial}>", "seconds": 0.013 * trial})
        assert done.code == -signal.SIGKILL, done.output
        for version in versions.all():
            versions.check(version)  # whole, or not there
        assert versions.current == BASE or versions.get(versions.current).passed
        logged = [entry["version"] for entry in versions.promotions()]
        assert versions.current in {BASE, *logged[-2:]}
    assert len(versions.all()) >= 5
    json.dumps(versions.promotions())
