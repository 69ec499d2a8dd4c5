"""ingest on a real Ray cluster of this machine: two workers, one of them killed."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from hypernet.adapters.library import AdapterLibrary
from hypernet.corpora.corpus import Corpus
from hypernet.corpora.ingest import ingest
from tests.corpora.conftest import NUM_DOCUMENTS

# Not importorskip: Ray reads its environment when it is imported.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra [ray]")


@pytest.fixture(scope="module")
def cluster():
    from hypernet.corpora.on_ray import cluster

    with cluster(2, threads=1) as ray:
        yield ray


def workers() -> dict[int, str]:
    """Process id → name of the actors of this process's cluster: children of a child, Ray's raylet."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes().decode(errors="replace")
            if name.startswith("ray::MapWorker") and _parent(_parent(int(path.name))) == os.getpid():
                found[int(path.name)] = name.rstrip("\0")
        except OSError:  # it has ended
            continue
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.story(60)
def test_killed_worker_loses_nothing_and_changes_no_id(cluster, folder, ids, reader, tmp_path, capfd):
    """And a row without a text is a line, not the end."""
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n')
    output, corpus = str(tmp_path / "library"), Corpus([str(folder), str(tmp_path / "rows.jsonl")])
    results = ingest(corpus, output, reader=reader, workers=2)
    found = [next(results)]
    before = set(workers())
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    for result in results:
        found.append(result)
    assert len(before) == 2 and not Path(f"/proc/{killed}").exists()
    found.sort(key=lambda result: result.status)
    failed = found.pop()
    assert (
        failed.status == "failed" and failed.name == "rows.jsonl/0" and failed.reason.startswith("It has None as text")
    )
    names = [item.name for item in Corpus([str(folder)]).items()]
    assert sorted(result.name for result in found) == sorted(names) and len(names) == NUM_DOCUMENTS
    assert {result.status for result in found} == {"added"} and {result.id for result in found} == ids
    assert {entry.id for entry in AdapterLibrary(output).list()} == ids
    assert {damage.reason for damage in AdapterLibrary(output).verify()} <= {"left by a killed writer; clean up"}
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_memory_of_one_process_is_no_output_of_workers(folder, reader):
    results = ingest(Corpus([str(folder)]), "memory://library", reader=reader, workers=2)
    with pytest.raises(ValueError, match="lies in this process, where no worker reaches it"):
        next(results)
