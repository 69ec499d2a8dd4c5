"""A full disk in the adapter tier: one line, what was there stays as it was, and the next run goes on."""

import json
import re
import resource
from contextlib import contextmanager

import pytest
import torch
from sqlalchemy import event

from hypernet.adapters.library import AdapterLibrary
from hypernet.cli.errors import one_line
from hypernet.memory.bank import AdapterBank
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters

# What a library says, and what SQLite does where a file of its own had to grow.
FULL_FILE = r"File too large|The disk failed: \S+/memory\.sqlite"
TEXTS = [f"Fact number {number} is about Halvawold." for number in range(7)]


@contextmanager
def full_files(most_bytes: int = 1000):
    """No file grows beyond so many bytes, by a limit of the system: tensors and JSON of adapters break off."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_library():
    """Only what a library writes meets the limit; SQLite's own files may have to grow for a reader too."""
    add = AdapterLibrary.add

    def limited(self, adapter):
        with full_files():
            return add(self, adapter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLibrary, "add", limited)
        yield


@contextmanager
def full_database(memory: Memory):
    """The database has no page left."""
    engine = memory.store.database._engine
    pages = engine.raw_connection().driver_connection.execute("PRAGMA page_count").fetchone()[0]

    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count = {pages}")

    engine.dispose()  # its next connection has the limit
    event.listen(engine, "connect", limit)
    try:
        yield
    finally:
        event.remove(engine, "connect", limit)
        engine.dispose()


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora()


@pytest.fixture
def memory(tmp_path, model):
    memory = Memory.open(tmp_path / "memory", model=model, shard_memories=3, dtype="float32")
    for text in TEXTS[:4]:
        memory.add(text, user_id="alice")
    memory.write_adapters()
    yield memory
    memory.close()


def rows_of(memory: Memory) -> dict[str, list[torch.Tensor]]:
    """id@version → its adapter, as a process that opens the folder anew reads it."""
    held = AdapterBank(memory.store, memory.bank.model, shard_memories=3, dtype="float32").held(_ALICE)
    tensors = [*held.adapter.A.values(), *held.adapter.B.values()]
    return {r: [t[a:b] for t in tensors] for r, (a, b) in zip(held.refs, held.adapter.chunk_spans(), strict=True)}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys() and all(all(map(torch.equal, one[ref], other[ref])) for ref in one)


def told(error: BaseException) -> str:
    """The line that a command would print."""
    line = one_line(error)
    assert line is not None and "\n" not in line
    return line


@pytest.mark.parametrize("full", ["files", "database"])
def test_written_adapters_stay_and_the_next_run_writes_the_rest(memory, model, tmp_path, full):
    before = rows_of(memory)
    texts = [f"Another fact, number {number}." for number in range(40)]
    for text in texts:
        memory.add(text, user_id="alice")
    with full_library() if full == "files" else full_database(memory), pytest.raises(OSError) as error:
        memory.write_adapters()
    assert re.match(FULL_FILE if full == "files" else "No space left on the disk", told(error.value))
    so_far = rows_of(memory)
    assert_same({ref: so_far[ref] for ref in before}, before)
    assert len(so_far) < 44 and AdapterLibrary(memory.bank.folder).verify() == ()
    assert memory.write_adapters().written == 44 - len(so_far)
    after = rows_of(memory)
    assert_same({ref: after[ref] for ref in so_far}, so_far)
    assert not memory.bank.is_unfinished and memory.verify() == ((), ())
    twin = Memory.open(tmp_path / "twin", model=model, dtype="float32")
    for text in (*TEXTS[:4], *texts):
        twin.add(text, user_id="alice")
    twin.write_adapters()
    there, here = ({memory.get(ref).text: a for ref, a in rows_of(memory).items()} for memory in (twin, memory))
    assert_same(there, here)
    twin.close()


def test_slots_stay_where_one_cannot_be_taken_out(memory):
    before = rows_of(memory)
    gone = memory.list(user_id="alice")[0].ref  # one of three in its shard, which is written anew
    with full_library(), pytest.raises(OSError) as error:
        memory.bank.drop([gone])
    assert re.match(FULL_FILE, told(error.value))
    assert_same(rows_of(memory), before)
    assert AdapterLibrary(memory.bank.folder).verify() == () and not memory.bank.is_unfinished
    memory.bank.drop([gone])
    assert_same(rows_of(memory), {ref: rows for ref, rows in before.items() if ref != gone})


@pytest.mark.parametrize("finish", ["purge", "verify"])
def test_forgotten_memory_is_not_back_and_its_adapter_goes_later(memory, monkeypatch, finish):
    """The disk is full when its shard is to be written without it."""
    before, drop = rows_of(memory), memory.bank.drop
    gone = memory.list(user_id="alice")[0].ref  # one of three in its shard, which is written anew

    def drop_on_full_disk(refs):
        with full_library():
            drop(refs)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(memory.bank, "drop", drop_on_full_disk)
        memory.forget(gone, verify=False)
    left = {ref: rows for ref, rows in before.items() if ref != gone}
    assert_same(rows_of(memory), left)
    assert gone not in {hit.ref for hit in memory.search("Halvawold", user_id="alice")}
    assert memory.status()["tiers"]["adapter"]["stale"] == 1  # waits in the file, as after `delete`
    sweep = memory.bank.sweep
    if finish == "verify":  # the disk is full again when the purge comes to the files

        def sweep_on_full_disk():
            with full_library():
                sweep()

        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(memory.bank, "sweep", sweep_on_full_disk)
            memory.purge()
        assert memory.status()["is_unfinished"] and memory.verify().repaired
    else:
        memory.purge()
    assert_same(rows_of(memory), left)
    assert memory.verify() == ((), ()) and not memory.status()["is_unfinished"]
    named = b"".join(path.read_bytes() for path in memory.bank.folder.rglob("provenance.json"))
    assert gone.encode() not in named


def test_measurements_stay_where_no_more_can_be_kept(memory):
    measured = memory.measure(user_id="alice", questions=[("Which fact?", "number 1")], tiers=["token"])[0]
    kept = [measured]
    with full_database(memory), pytest.raises(OSError) as error:
        for _ in range(1000):  # what fits into the pages that are there
            kept.append(memory.ledger.add(measured, _ALICE))
    assert told(error.value).startswith("No space left on the disk of ")
    latest = memory.ledger.latest(_ALICE, generator=None, base_model=None)
    assert latest == {"token": kept[-1]} and len(kept) < 1000
    assert memory.ledger.add(measured, _ALICE).at > kept[-1].at and memory.verify() == ((), ())


def test_report_that_does_not_fit_leaves_whole_lines(memory, monkeypatch):
    first, second, *_ = rows_of(memory)
    path, append = memory.store.folder / "deletions.jsonl", memory.store.log.append_audit

    def append_on_full_disk(report):
        with full_files(path.stat().st_size + 40):
            append(report)

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(memory.store.log, "append_audit", append_on_full_disk)
        memory.forget(first)
    assert told(error.value)
    assert memory.forget(second).passed
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["operation"], line.get("memory", line.get("memories"))) for line in lines] == [
        ("delete", first),
        ("delete", second),
        ("audit", [second]),
    ]
    assert memory.verify() == ((), ()) and {first, second}.isdisjoint(rows_of(memory))


_ALICE = Filters("alice")
