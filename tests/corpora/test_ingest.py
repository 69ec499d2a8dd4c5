"""ingest in one process: ids, resuming from any state of the library, failures, and what stops it."""

import shutil
import signal
from pathlib import Path

import pytest

from hypernet.adapters.composition import scale
from hypernet.adapters.library import AdapterLibrary
from hypernet.corpora.corpus import Corpus
from hypernet.corpora.ingest import Totals, done_in, ingest
from hypernet.corpora.internalizer import Reader, open_library
from hypernet.text.documents import read_documents
from tests.corpora.conftest import NUM_DOCUMENTS

ROOT = Path(__file__).parents[2]


def statuses(results):
    return [result.status for result in results]


def test_adapters_are_those_of_internalize(folder, one_process, reader):
    output, results = one_process
    model = reader.load()
    expected = [model.internalize(document).content_id() for document in read_documents(str(folder))]
    assert [result.id for result in results] == expected and statuses(results) == ["added"] * NUM_DOCUMENTS
    entries = AdapterLibrary(output).list()
    assert {entry.id for entry in entries} == set(expected) and not AdapterLibrary(output).verify()
    assert sum(result.num_chunks for result in results) == sum(entry.num_chunks for entry in entries)


def test_second_run_skips_everything(folder, one_process, reader):
    before = sorted((path, path.stat().st_mtime_ns) for path in one_process[0].rglob("*.json"))
    results = list(ingest(Corpus([str(folder)]), str(one_process[0]), reader=reader))
    assert statuses(results) == ["skipped"] * NUM_DOCUMENTS
    assert sorted((path, path.stat().st_mtime_ns) for path in one_process[0].rglob("*.json")) == before


def test_only_what_is_missing_or_damaged_is_made(folder, one_process, ids, reader, tmp_path):
    output = tmp_path / "library"
    shutil.copytree(one_process[0], output)
    lost, cut, *_ = sorted(ids)
    AdapterLibrary(output).remove(lost)
    (output / cut / "adapter_model.safetensors").write_bytes(b"")
    results = list(ingest(Corpus([str(folder)]), str(output), reader=reader))
    assert {result.id for result in results if result.status == "added"} == {lost, cut}
    assert not AdapterLibrary(output).verify() and len(AdapterLibrary(output).list()) == NUM_DOCUMENTS


def test_what_a_killed_run_left_is_removed(folder, one_process, reader, tmp_path):
    output = tmp_path / "library"
    shutil.copytree(one_process[0], output)
    (output / f".{'0' * 32}.new").mkdir()
    assert [damage.reason for damage in AdapterLibrary(output).verify()] == ["left by a killed writer; clean up"]
    assert set(statuses(ingest(Corpus([str(folder)]), str(output), reader=reader))) == {"skipped"}
    assert not AdapterLibrary(output).verify()


def test_joined_or_changed_adapters_do_not_count_as_done(folder, reader, tmp_path):
    model = reader.load()
    documents = read_documents(str(folder))[:3]
    library = AdapterLibrary(tmp_path / "library")
    library.add(model.internalize(documents[:2]))
    library.add(scale(model.internalize(documents[2]), 0.5))
    assert done_in(library) == {}
    library.add(model.internalize(documents[0]))
    assert done_in(library) == {(model.base_model_fingerprint, model.generator): {documents[0].sha256}}


def test_same_text_twice_is_added_once(folder, reader, texts, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(texts[0])
    results = list(ingest(Corpus([str(tmp_path)]), str(tmp_path / "library"), reader=reader))
    assert statuses(results) == ["added", "skipped"]


def test_documents_that_fail_leave_the_others_done(texts, reader, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00 no text")
    (tmp_path / "c.txt").write_text("  \n")
    (tmp_path / "d.txt").write_text(texts[1])
    totals = Totals()
    for result in ingest(Corpus([str(tmp_path)]), str(tmp_path / "library"), reader=reader):
        totals.add(result)
        assert (result.status == "failed") == (result.name in ("b.txt", "c.txt")) == bool(result.reason)
        assert "\n" not in result.reason
    assert totals.counts == {"added": 2, "skipped": 0, "failed": 2} and totals.work_s > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_model_or_output_that_is_none_is_told_at_once(folder, reader, tmp_path, workers):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no adapter")
    corpus = Corpus([str(folder)])
    with pytest.raises(ValueError, match="There is no checkpoint folder or file lost"):
        next(ingest(corpus, str(tmp_path / "library"), reader=Reader("lost"), workers=workers))
    with pytest.raises(ValueError, match="is a file. Name a folder"):
        next(ingest(corpus, str(tmp_path / "file"), reader=reader, workers=workers))
    with pytest.raises(ValueError, match="is no adapter library"):
        next(ingest(corpus, str(tmp_path / "other"), reader=reader, workers=workers))
    assert not (tmp_path / "library").exists()


def test_library_that_cannot_be_written_ends_the_run(folder, reader, tmp_path, monkeypatch):
    def full(self, adapter):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AdapterLibrary, "add", full)
    results = ingest(Corpus([str(folder)]), str(tmp_path / "library"), reader=reader)
    with pytest.raises(ValueError, match="Cannot write to .*No space left on device"):
        list(results)


def test_kill_in_the_middle_loses_nothing(commands, folder, ids, reader, tmp_path):
    """A process is killed once it has written an adapter; the run after it makes the rest, under the same ids."""
    output = tmp_path / "library"
    arguments = ["corpus", folder, "--output", output, "--model", reader.checkpoint, "--threads", "1"]
    done = commands.run("hypernet", arguments, cwd=ROOT, kill={"found": f"{output}/[0-9a-f]*"})
    assert done.code == -signal.SIGKILL, done.output
    there = {path.name for path in output.iterdir() if len(path.name) == 64}
    assert there and there < ids
    results = list(ingest(Corpus([str(folder)]), str(output), reader=reader))
    assert {result.id for result in results if result.status == "added"} == ids - there
    assert {entry.id for entry in AdapterLibrary(output).list()} == ids
    assert not AdapterLibrary(output).verify()


def test_object_store_takes_the_same_adapters(folder, ids, reader, tmp_path):
    url = f"file://{tmp_path}/store"
    corpus = Corpus([str(folder)])
    assert {result.id for result in ingest(corpus, url, reader=reader)} == ids
    assert statuses(ingest(corpus, url, reader=reader)) == ["skipped"] * NUM_DOCUMENTS
    copied = AdapterLibrary(tmp_path / "store")
    assert {entry.id for entry in copied.list()} == ids and not copied.verify()
    assert done_in(open_library(url)) == done_in(copied)
