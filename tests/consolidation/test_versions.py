"""Versions against the bytes on the disk: promoted, refused, forced, rolled back, killed at any point."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hypernet.consolidation.versions import BASE, GateRefused, Manifest, Versions
from hypernet.memory.store.records import Filters

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


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.consolidation.test_versions import PASSED, make
from hypernet.consolidation.versions import Versions
from hypernet.memory.store.records import Filters
versions = Versions.of(Path({folder!r}), Filters(user_id="alice"))
print("begun", flush=True)
for number in range(10_000):
    versions.promote(versions.judge(make(versions, f"m{{number}}@1", content=b"%d" % number * 100_000), PASSED))
"""


def test_killed_at_any_point_leaves_whole_versions(versions, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = KILLED.format(root=root, folder=str(tmp_path))
    for trial in range(6):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root)
        assert process.stdout.readline() == b"begun\n"
        time.sleep(0.03 + 0.037 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for version in versions.all():
            versions.check(version)  # whole, or not there
        assert versions.current == BASE or versions.get(versions.current).passed
        logged = [entry["version"] for entry in versions.promotions()]
        assert versions.current in {BASE, *logged[-2:]}
    assert len(versions.all()) > 3
    json.dumps(versions.promotions())
