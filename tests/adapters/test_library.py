"""library: content addresses, what is refused, every kind of damage, two processes at once, kill -9 in the middle."""

import json
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.composition import compress, concatenate, scale, weight
from hypernet.adapters.library import AdapterLibrary
from tests.adapters.test_adapter import assert_one_line_value_error, assert_same, make_adapter, targets  # noqa: F401
from tests.adapters.test_composition import UNEVEN, uneven_adapter

WEIGHTS, CONFIG, PROVENANCE, ENTRY = "adapter_model.safetensors", "adapter_config.json", "provenance.json", "entry.json"
# The children import nothing: what they need is here already.
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def library(tmp_path):
    return AdapterLibrary(tmp_path / "library")


def ids(library):
    return {entry.id for entry in library.list()}


def visible(library):
    return sorted(path.name for path in library.directory.iterdir() if path.name != ".lock")


# Add, list, load, remove, replace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_chunks, rank", [(0, 1), (1, 1), (5, 3)])
def test_library_loads_added_adapter_exactly(library, num_chunks, rank, dtype):
    adapter = uneven_adapter(num_chunks, rank=rank, dtype=dtype)
    identity = library.add(adapter)
    assert re.fullmatch("[0-9a-f]{64}", identity) and identity == adapter.content_id()
    for key in (identity, identity[:6], "d1.txt"):
        assert_same(library.load(key), adapter)
    assert_same(LoRAAdapter.load(library.directory / identity), adapter)  # an ordinary folder
    assert library.verify() == () and visible(library) == [identity]


def test_peft_loads_library_entry_in_place(library, tmp_path):
    from peft import PeftModel

    from hypernet.base.targets import find_targets
    from tests.adapters.test_adapter import make_base_model

    adapter = make_adapter(find_targets(make_base_model(), ["q_proj"]), 2)
    model = PeftModel.from_pretrained(make_base_model(), library.directory / library.add(adapter))
    assert any("lora_A" in name for name, _ in model.named_modules())


def test_document_name_removes_only_an_entry_of_its_own(library):
    joined = uneven_adapter(2) + uneven_adapter(1, seed=1)
    identity = library.add(joined)
    name = joined.provenance["documents"][0]["name"]
    for call in (lambda: library.remove(name), lambda: library.replace(name, uneven_adapter(3))):
        assert_one_line_value_error(call, f"'{name}' is one of 2 documents of .* Give the id to mean all")
    assert ids(library) == {identity} and library.remove(identity[:8]) == identity


def test_add_is_idempotent_and_id_is_content_hash(library):
    adapter = uneven_adapter(2)
    identity = library.add(adapter)
    before = {path: path.stat().st_mtime_ns for path in (library.directory / identity).iterdir()}
    later = LoRAAdapter(
        **{**vars(adapter), "provenance": {**adapter.provenance, "created": "2001-01-01", "versions": {}}}
    )
    assert library.add(later) == identity
    assert {path: path.stat().st_mtime_ns for path in before} == before
    others = [
        uneven_adapter(2, seed=2),
        uneven_adapter(2, scaling=1.0),
        uneven_adapter(2, dtype=torch.bfloat16),
        uneven_adapter(2, base_model_fingerprint="base-2"),
        uneven_adapter(2, generator="generator-2"),
        weight(adapter, 2.0),
        scale(adapter, 2.0),
        compress(adapter, 9)[0],
        adapter + adapter,
    ]
    assert len({identity, *(other.content_id() for other in others)}) == len(others) + 1
    narrow = uneven_adapter(2)
    narrow.A["up"][:, 1] = 7  # a layer that has no such module: it is not stored either
    assert narrow.content_id() == identity


def test_list_describes_entries_without_reading_weights(library):
    one, two = uneven_adapter(2, seed=1), uneven_adapter(1, seed=2, dtype=torch.bfloat16)
    both = concatenate([uneven_adapter(2, seed=1), uneven_adapter(1, seed=3)])
    added = [library.add(adapter) for adapter in (two, both, one)]
    entries = library.list()
    assert [entry.id for entry in entries] == added  # the oldest first
    entry = entries[1]
    assert entry.documents == (("d1.txt", "d1" * 8), ("d3.txt", "d3" * 8))
    assert (entry.base_model_name, entry.base_model_fingerprint, entry.generator) == (
        "tiny-llama",
        "base-1",
        "generator-1",
    )
    assert (entry.num_chunks, entry.rank, entry.replaces) == (3, 12, ())
    assert entry.num_bytes == sum(path.stat().st_size for path in entry.directory.iterdir())
    assert entry.created == both.provenance["created"] and entry.added >= entry.created[:19]


def test_library_refuses_adapter_of_another_base_model(library):
    identity = library.add(uneven_adapter(1))
    library.load(identity, base_model_fingerprint="base-1")
    assert_one_line_value_error(
        lambda: library.load(identity, base_model_fingerprint="base-2", base_model_name="other-llama"),
        r"base model tiny-llama \(fingerprint base-1\), but this base model is other-llama \(fingerprint base-2\)",
    )
    nameless = library.add(uneven_adapter(1, base_model_fingerprint=None))
    assert_one_line_value_error(
        lambda: library.load(nameless, base_model_fingerprint="base-2"), r"\(fingerprint None\)"
    )


def test_unknown_or_ambiguous_key_is_refused_with_candidates(library):
    one, two = library.add(uneven_adapter(1)), library.add(uneven_adapter(2))
    for call in (library.find, library.load, library.remove):
        assert_one_line_value_error(
            lambda: call("d1.txt"),  # noqa: B023
            rf"'d1.txt' could be 2 adapters: {one[:12]} \(d1.txt\); {two[:12]} \(d1.txt\). Give more of the id",
        )
        assert_one_line_value_error(lambda: call("xyz"), f"No adapter 'xyz' in .*{one[:12]}")  # noqa: B023
        assert_one_line_value_error(lambda: call(""), "No adapter ''")  # noqa: B023
    assert ids(library) == {one, two}


@pytest.mark.parametrize("name", ["list", "verify", "clean"])
def test_missing_library_is_an_error(library, name):
    assert_one_line_value_error(getattr(library, name), "No adapter library at .*library")
    assert not library.directory.exists()


def test_remove_deletes_one_entry(library):
    one, two = library.add(uneven_adapter(1)), library.add(uneven_adapter(1, seed=2))
    assert library.remove("d1.txt") == one
    assert ids(library) == {two} and visible(library) == [two]
    assert_one_line_value_error(lambda: library.remove(one), "No adapter")


def test_replace_adds_before_removing_and_records_ids(library, monkeypatch):
    first, second, third = (uneven_adapter(1, seed=seed) for seed in (1, 2, 3))
    one = library.add(first)
    seen = []
    monkeypatch.setattr(library, "remove", lambda key: seen.append(ids(library)) or AdapterLibrary.remove(library, key))
    two = library.replace("d1.txt", second)
    assert seen == [{one, two}]
    three = library.replace(two, third)
    assert [(entry.id, entry.replaces) for entry in library.list()] == [(three, (two, one))]
    assert library.replace(three, third) == three and library.verify() == ()
    # What is there already learns what it replaces, and keeps what it knew.
    four = library.add(uneven_adapter(1, seed=4))
    assert library.replace(four, third) == three
    assert library.find(three).replaces == (four, two, one) and library.verify() == ()


# Damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


def changed_json(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def forged_weights(folder):
    """Other weights, with hashes that fit them."""
    from hypernet.adapters.library import _own_digest, _sha256

    weights = load_file(folder / WEIGHTS)
    weights[min(weights)] += 1
    save_file(weights, folder / WEIGHTS)
    record = json.loads((folder / ENTRY).read_text())
    record["files"][WEIGHTS] = {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": _sha256(folder / WEIGHTS)}
    record.pop("sha256")
    (folder / ENTRY).write_text(json.dumps(record | {"sha256": _own_digest(record)}))


DAMAGES = {
    **{
        f"{name} flipped at {place}": (lambda folder, n=name, p=place: flip(folder / n, p), n_reason)
        for name, n_reason in [
            (WEIGHTS, "not what was stored"),
            (CONFIG, "not what was stored"),
            (PROVENANCE, "not what was stored|not valid|Error"),
            (ENTRY, "not what was stored|Error"),
        ]
        for place in (0, 40, 299, -2)
    },
    **{
        f"{name} missing": (lambda folder, n=name: (folder / n).unlink(), f"{name} is missing")
        for name in (WEIGHTS, CONFIG, PROVENANCE, ENTRY)
    },
    **{
        f"weights cut to {size}": (lambda folder, s=size: os.truncate(folder / WEIGHTS, s), f"has {size} bytes, not")
        for size in (0, 8, 500)
    },
    "an entry of another": (lambda folder: changed_json(folder / ENTRY, id="f" * 64), "not what was stored"),
    "forged": (forged_weights, "another id than its folder's name"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_finds_damage_and_add_repairs_it(library, name):
    damage, reason = DAMAGES[name]
    adapter, other = uneven_adapter(2), uneven_adapter(1, seed=2)
    identity, sound = library.add(adapter), library.add(other)
    damage(library.directory / identity)
    (found,) = library.verify()
    assert found.name == identity and re.search(reason, found.reason) and "\n" not in found.reason
    if name != "forged":  # who can write hashes that fit is found by verify, which reads everything
        assert_one_line_value_error(lambda: library.load(identity), "damaged")
    assert_same(library.load(sound), other)
    assert library.add(adapter) == identity
    assert library.verify() == ()
    assert_same(library.load(identity), adapter)


@pytest.mark.parametrize("name", ["provenance.json missing", "entry.json missing", f"{WEIGHTS} flipped at 40"])
def test_damaged_entry_can_be_removed(library, name):
    identity = library.add(uneven_adapter(2))
    DAMAGES[name][0](library.directory / identity)
    assert library.remove(identity[:8]) == identity
    assert visible(library) == [] and library.verify() == ()


def test_verify_reports_entry_under_wrong_name(library):
    identity = library.add(uneven_adapter(2))
    (library.directory / identity).rename(library.directory / ("0" * 64))
    (found,) = library.verify()
    assert found.name == "0" * 64 and f"belongs to {identity}" in found.reason


def test_clean_removes_leftovers_and_keeps_other_files(library):
    identity = library.add(uneven_adapter(2))
    left = [library.directory / f".{'0' * 32}.new", library.directory / f".{'1' * 32}.old"]
    for path in left:
        path.mkdir()
        (path / WEIGHTS).write_text("half")
    inside = library.directory / identity / f".{ENTRY}.{'2' * 32}"
    inside.write_text("half")
    (library.directory / "notes.txt").write_text("mine")
    found = {damage.name: damage.reason for damage in library.verify()}
    names = {str(path.relative_to(library.directory)) for path in (*left, inside)}
    assert found.keys() == names and library.foreign() == ("notes.txt",)
    assert all("left by a killed writer" in found[name] for name in names)
    with library._writing():  # somebody writes: theirs and what was left look the same
        assert library.clean() == () == library.verify()
    assert set(library.clean()) == names
    assert library.verify() == () and library.foreign() == ("notes.txt",)


def test_entry_under_another_name_is_damage(library):
    identity = library.add(uneven_adapter(2))
    (library.directory / identity).rename(library.directory / f"{identity} copy")
    (found,) = library.verify()
    assert found.name == f"{identity} copy" and "under another name than its id" in found.reason
    assert library.foreign() == ()


@pytest.mark.parametrize("action", ["list", "verify", "clean", "foreign"])
def test_folder_of_other_things_is_no_library(library, action):
    library.directory.mkdir()
    assert getattr(library, action)() == ()  # an empty folder is one that nothing was added to
    (library.directory / ".lock").unlink(missing_ok=True)
    for name in ("letter.txt", "photos"):
        (library.directory / name).mkdir()
    with pytest.raises(ValueError, match="is no adapter library: it holds letter.txt, photos and no adapter"):
        getattr(library, action)()
    with pytest.raises(ValueError, match="is no adapter library"):
        library.add(uneven_adapter(1))
    assert visible(library) == ["letter.txt", "photos"]


def test_emptied_library_is_still_one(library):
    library.remove(library.add(uneven_adapter(1)))
    (library.directory / "notes.txt").touch()
    assert library.list() == () and library.verify() == ()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_list_says_which_entries_are_cut_off(library, name):
    identity, sound = library.add(uneven_adapter(2)), library.add(uneven_adapter(1, seed=2))
    path = library.directory / identity / name
    path.write_bytes(path.read_bytes()[:-1])
    damages = {entry.id: entry.damage for entry in library.list()}
    assert damages[sound] is None and f"{name} has {path.stat().st_size} bytes, not " in damages[identity]
    path.unlink()
    assert f"{name} is missing" in {entry.id: entry.damage for entry in library.list()}[identity]


@pytest.mark.parametrize("wrong", ["outputs/fenda", None, {}, 3])
def test_library_takes_adapters_alone(library, wrong):
    identity = library.add(uneven_adapter(1))
    for action in (library.add, lambda adapter: library.replace(identity, adapter)):
        with pytest.raises(TypeError, match="^Expected a LoRAAdapter, got .*LoRAAdapter.load") as error:
            action(wrong)
        assert "\n" not in str(error.value)
    assert ids(library) == {identity}


def test_library_add_on_full_disk_leaves_no_files(library, monkeypatch):
    from tests.adapters.test_adapter import no_space

    identity = library.add(uneven_adapter(1))
    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        library.add(uneven_adapter(2))
    assert visible(library) == [identity] and library.verify() == ()


# Several processes


def add_many(directory, adapters, barrier):
    library = AdapterLibrary(directory)
    for adapter in adapters:
        barrier.wait()
        library.add(adapter)


def test_concurrent_adds_of_same_adapters_are_safe(library):
    adapters = [uneven_adapter(1, seed=seed) for seed in range(12)]
    adapters[0]._peft_config()  # imported before the fork
    barrier = FORK.Barrier(2)
    processes = [FORK.Process(target=add_many, args=(library.directory, adapters, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert ids(library) == {adapter.content_id() for adapter in adapters}
    assert library.verify() == () and visible(library) == sorted(ids(library))


def add_forever(directory, adapters):
    library = AdapterLibrary(directory)
    while True:
        for adapter in adapters:
            library.add(adapter)
        for adapter in adapters:
            library.remove(adapter.content_id())


def test_kill_9_leaves_complete_entries_only(library):
    wide = (UNEVEN[0]._replace(d_in=4000, d_out=3000, widths=None, paths=("a.0.up", "a.1.up")),)
    adapters = [make_adapter(wide, 4, seed=seed) for seed in range(3)]  # about a megabyte each
    adapters[0]._peft_config()
    kept = uneven_adapter(1, seed=9)
    identity = library.add(kept)
    clock, interrupted = random.Random(0), 0
    for _ in range(12):
        process = FORK.Process(target=add_forever, args=(library.directory, adapters))
        process.start()
        time.sleep(0.03 + 0.3 * clock.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        known = {adapter.content_id(): adapter for adapter in (*adapters, kept)}
        for entry in library.list():  # whatever is there is there whole
            assert_same(library.load(entry.id), known[entry.id])
        left = library.verify()
        assert all("left by a killed writer" in damage.reason for damage in left)
        interrupted += bool(left)
        library.clean()
        assert library.verify() == () and identity in ids(library)
    assert interrupted  # some were hit in the middle
