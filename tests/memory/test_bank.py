"""AdapterBank: slots bit-equal to a document internalized alone, whatever is written, killed, damaged or taken out."""

import os
import random
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from hypernet.adapters.composition import select_chunks
from hypernet.adapters.library import AdapterLibrary
from hypernet.memory.bank import AdapterBank
from hypernet.memory.embedding import LazyModel
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.times import now, to_micros
from hypernet.memory.store.token_store import TokenStore
from hypernet.text.documents import Document

ALICE, BOB = Filters("alice"), Filters("bob")
PAGE = "Norbach is a town. " + "Ilda Renwick founded the mill in 1807, and it still stands by the river. " * 9
NUM_KILLS = int(os.environ.get("HYPERNET_NUM_KILLS", "6"))


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora()


@pytest.fixture
def store(tmp_path):
    store = TokenStore(tmp_path / "memory")
    yield store
    store.close()


@pytest.fixture
def bank(store, model):
    return AdapterBank(store, LazyModel(model), shard_memories=3, dtype="float32")


def add(store: TokenStore, *texts: str, filters: Filters = ALICE, **fields):
    return [str(ref) for ref in store.add([Draft(text=text, filters=filters, **fields) for text in texts])]


def by_ref(held) -> dict[str, list[torch.Tensor]]:
    if held.adapter is None:
        return {}
    tensors = [*held.adapter.A.values(), *held.adapter.B.values()]
    spans = zip(held.refs, held.adapter.chunk_spans(), strict=True)
    return {ref: [rows[start:end] for rows in tensors] for ref, (start, end) in spans}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(all(map(torch.equal, one[ref], other[ref])) for ref in one)


def alone(model, texts: dict[str, str]) -> dict[str, list[torch.Tensor]]:
    """Each text read by itself, in a pass of the same shape."""
    found = {}
    for ref, text in texts.items():
        adapter = model.internalize(Document(name="x", text=text, sha256="0" * 64), pass_chunks=16)
        found[ref] = [*adapter.A.values(), *adapter.B.values()]
    return found


def test_slot_is_its_text_internalized_alone(store, bank, model):
    texts = ["Orla taught Fenda.", PAGE, *(f"Fact number {n} is short." for n in range(7))]
    refs = add(store, *texts)
    written = bank.write(ALICE)
    assert (written.written, written.copied, written.kept, written.refused) == (9, 0, 0, {})
    held = bank.held(ALICE)
    assert same(by_ref(held), alone(model, dict(zip(refs, texts, strict=True))))
    assert len(held.owner) > len(refs) and sorted(set(bank.entries_of(refs))) == sorted(refs)
    assert written.bytes == bank.counts(ALICE).bytes > 0


def test_writing_again_changes_nothing(store, bank):
    add(store, "one.", "two.", "three.", "four.")
    bank.write()
    before = {path: path.stat().st_mtime_ns for path in bank.folder.rglob("*")}
    written = bank.write()
    assert (written.written, written.copied, written.kept) == (0, 0, 4)
    assert {path: path.stat().st_mtime_ns for path in bank.folder.rglob("*")} == before


def test_same_text_is_copied_instead_of_read_again(store, bank, caplog):
    first, second = add(store, "The same.", "The same.")
    assert bank.write()[:2] == (1, 1)
    (third,) = add(store, "The same.", filters=BOB)
    assert bank.write()[:2] == (0, 1)
    held = by_ref(bank.held(Filters()))
    assert same({"": held[first]}, {"": held[second]}) and same({"": held[first]}, {"": held[third]})
    assert "given several times" not in caplog.text


def test_one_by_one_or_at_once_gives_the_same_bits(store, bank, model, tmp_path):
    texts = [f"Fact number {n} has {'many ' * (n % 5)}words." for n in range(8)]
    refs = []
    for text in texts:
        refs += add(store, text)
        bank.write()
    other = TokenStore(tmp_path / "other")
    others = add(other, *reversed(texts))
    at_once = AdapterBank(other, LazyModel(model), shard_memories=100, dtype="float32")
    at_once.write()
    one, two = by_ref(bank.held(ALICE)), by_ref(at_once.held(ALICE))
    assert same(one, {ref: two[of] for ref, of in zip(refs, reversed(others), strict=True)})
    assert len(list(bank.folder.glob("[0-9a-f]*"))) == 3  # 3 + 3 + 2
    assert AdapterLibrary(bank.folder).verify() == ()


def test_users_never_share_an_entry(store, bank):
    refs = {user: add(store, "one.", "two.", filters=Filters(user)) for user in ("alice", "bob")}
    bank.write()
    entries = [set(bank.entries_of(of_user).values()) for of_user in refs.values()]
    assert entries[0].isdisjoint(entries[1])
    assert set(bank.held(ALICE).refs) == set(refs["alice"])


def test_version_of_a_date_is_chosen(store, bank):
    (first,) = add(store, "Orla taught Fenda.", valid_at="2026-01-01", subject="Fenda", relation="teacher")
    (second,) = add(store, "Jorun taught Fenda.", valid_at="2026-06-01", subject="Fenda", relation="teacher")
    bank.write()
    held = bank.held(ALICE)
    for date, expected in (("2025-01-01", []), ("2026-03-01", [first]), ("2026-07-01", [second])):
        (choice,) = bank.choose(["Who taught Fenda?"], held, [held.holding(to_micros(date, "as_of"))])
        assert list(choice.refs) == expected and (choice.adapter is None) == (not expected)


@pytest.mark.parametrize("join", ["route", "gate"])
def test_hidden_memories_are_never_chosen(store, model, join):
    refs = add(store, *(f"Fact number {n}." for n in range(9)))
    bank = AdapterBank(store, LazyModel(model), join=join)
    bank.write()
    held = bank.held(ALICE)
    questions = ["Which fact?", "What is number 3?"]
    for shown in ([0, 4], [7], []):
        mask = np.isin(np.arange(9), shown)
        allowed = {held.refs[number] for number in shown}
        for choice in bank.choose(questions, held, [mask] * 2):
            assert set(choice.refs) <= allowed and len(choice.refs) == min(2, len(shown))
            names = {d["name"] for d in choice.adapter.provenance["documents"]} if choice.adapter else set()
            assert names <= allowed <= set(refs)


def test_copies_of_a_passage_are_chosen_once(store, bank):
    add(store, "The mill stands by the river.", "The mill stands by the river.", "Nobody lives there.")
    bank.write()
    held = bank.held(ALICE)
    (choice,) = bank.choose(["Where is the mill?"], held, [held.holding(now())])
    texts = [store.get(ref).text for ref in choice.refs]
    assert len(set(texts)) == len(texts) == 2


def test_cut_out_is_what_select_chunks_gives(store, bank):
    add(store, "one.", PAGE, "two.", PAGE.replace("mill", "barn"), "three.")
    bank.write()
    held, rng = bank.held(ALICE), random.Random(0)
    for _ in range(12):
        chunks = sorted(rng.sample(range(len(held.owner)), rng.randint(1, len(held.owner))))
        weights = rng.choice([None, [rng.random() for _ in chunks]])
        cut, expected = held.cut(np.array(chunks), weights), select_chunks(held.adapter, chunks, weights)
        for one, other in ((cut.A, expected.A), (cut.B, expected.B)):
            assert all(torch.equal(one[name], other[name]) for name in other)
        for key in ("documents", "operations"):
            assert cut.provenance.get(key) == expected.provenance.get(key)


# --- Stale slots ----------------------------------------------------------------------------------------------------


def test_slots_of_another_model_are_known_and_replaced(store, bank, make_doc_to_lora, tiny_base_model):
    refs = add(store, "one.", "two.")
    bank.write()
    other = AdapterBank(store, LazyModel(make_doc_to_lora(seed=7)), shard_memories=3)
    counts = other.counts(ALICE, other.generator)
    assert (counts.slots, counts.missing) == (0, 2) and set(other.held(ALICE).missing) == set(refs)
    with torch.no_grad():
        tiny_base_model.lm_head.weight[0, 0] += 1
    foreign = AdapterBank(store, LazyModel(make_doc_to_lora(base_model=tiny_base_model)))
    foreign.write(BOB)  # nothing of alice's
    add(store, "three.")
    foreign.write()
    assert bank.counts(ALICE, bank.generator).missing == 3
    assert foreign.counts(ALICE, foreign.generator)[:4] == (3, 3, 3, 0)
    assert foreign.counts(ALICE).stale == 0  # all were written anew
    assert len(list(bank.folder.glob("[0-9a-f]*"))) == 1


def test_counts_say_why_a_slot_answers_nothing(store, bank, make_doc_to_lora, tiny_base_model):
    gone, old, _ = add(store, "one.", "two.", "three.")
    bank.write()
    with torch.no_grad():
        tiny_base_model.lm_head.weight[0, 0] += 1
    add(store, "four.", filters=BOB)
    AdapterBank(store, LazyModel(make_doc_to_lora(seed=5))).write(BOB)
    add(store, "five.", filters=Filters("carol"))
    AdapterBank(store, LazyModel(make_doc_to_lora(base_model=tiny_base_model))).write(Filters("carol"))
    store.delete(gone)
    store.update(old.partition("@")[0], "two, again.")
    counts = bank.counts(generator=bank.generator)
    assert (counts.memories, counts.slots, counts.valid_now, counts.missing) == (5, 2, 1, 3)
    assert (counts.superseded, counts.deleted, counts.other_generator, counts.other_base_model) == (1, 1, 1, 1)
    assert counts.stale == 3


# --- Taking out -----------------------------------------------------------------------------------------------------


def test_dropped_slot_leaves_the_others_bit_equal(store, bank):
    refs = add(store, *(f"Fact number {n}." for n in range(7)))
    bank.write()
    before = by_ref(bank.held(ALICE))
    bank.drop([refs[1], refs[5]])
    left = by_ref(bank.held(ALICE))
    assert left.keys() == set(refs) - {refs[1], refs[5]} and same(left, {ref: before[ref] for ref in left})
    assert AdapterLibrary(bank.folder).verify() == () and bank.write()[:2] == (2, 0)
    assert same(by_ref(bank.held(ALICE)), before)


def test_deleted_memory_answers_nothing_and_comes_back(store, bank):
    refs = add(store, "one.", "two.")
    bank.write()
    before = by_ref(bank.held(ALICE))
    deleted = store.delete(refs[0].partition("@")[0])
    assert bank.held(ALICE).refs == (refs[1],) and bank.counts(ALICE).deleted == 1
    store.rollback(deleted.version)
    assert same(by_ref(bank.held(ALICE)), before) and bank.write()[:2] == (0, 0)


def test_purge_leaves_no_byte_of_a_text_and_no_adapter(tmp_path, model):
    memory = Memory.open(tmp_path / "memory", model=model, shard_memories=4)
    refs = [memory.add(f"{word} is a secret word.", user_id="alice") for word in ("Halvawold", "Korvale", "Elmouth")]
    memory.add("Halvawold was said too.", user_id="bob", derived_from=())
    memory.write_adapters()
    memory.search("Halvawold", user_id="alice")
    memory.delete(refs[0])
    memory.delete_all(user_id="bob")
    assert memory.status()["tiers"]["adapter"]["stale"] == 2
    memory.purge()
    content = b"".join(path.read_bytes() for path in (tmp_path / "memory").rglob("*") if path.is_file())
    assert b"Halvawold" not in content and b"Korvale" in content
    named = b"".join(path.read_bytes() for path in memory.bank.folder.rglob("provenance.json"))
    assert str(refs[0]).encode() not in named and str(refs[1]).encode() in named
    assert memory.bank.counts().slots == 2 and memory.verify() == ((), ())


@pytest.mark.parametrize("name", ["zz", "new_folder", ".git", "notes.txt"])
def test_what_others_put_into_the_folder_is_left_alone(store, bank, name):
    add(store, "Fact number 1.", "Fact number 2.")
    stray = bank.folder / name
    bank.write()
    stray.write_text("mine") if stray.suffix == ".txt" else stray.mkdir()
    assert bank.verify() == [] and not bank.is_unfinished
    add(store, "Fact number 3.")
    bank.write()
    bank.sweep()
    assert stray.exists() and bank.counts().slots == 3


# --- Kills and damage -----------------------------------------------------------------------------------------------


def test_kill_9_loses_nothing_that_verify_and_write_do_not_mend(tmp_path, model):
    folder, rng = tmp_path / "memory", random.Random(0)
    store = TokenStore(folder)
    add(store, *(f"Fact number {n} of alice." for n in range(12)))
    add(store, *(f"Fact number {n} of bob." for n in range(5)), filters=BOB)
    store.close()
    for _ in range(NUM_KILLS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                own = TokenStore(folder)
                writer = AdapterBank(own, LazyModel(model), shard_memories=3, dtype="float32")
                while True:
                    writer.write()
                    writer.drop(random.sample(sorted(writer.held(Filters()).refs), 5))
            finally:
                os._exit(1)
        time.sleep(0.05 + rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = TokenStore(folder)
        bank = AdapterBank(store, LazyModel(model), shard_memories=3, dtype="float32")
        bank.verify()
        assert bank.verify() == [] and not bank.is_unfinished
        store.close()
    store = TokenStore(folder)
    bank = AdapterBank(store, LazyModel(model), shard_memories=3, dtype="float32")
    bank.write()
    texts = {memory.ref: memory.text for memory in store.statements()}
    assert same(by_ref(bank.held(Filters())), alone(model, texts))
    assert AdapterLibrary(bank.folder).verify() == ()


def test_two_processes_write_one_memory_at_once(tmp_path, model):
    folder = tmp_path / "memory"
    store = TokenStore(folder)
    add(store, *(f"Fact number {n}." for n in range(14)))
    store.close()
    children = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                own = TokenStore(folder)
                AdapterBank(own, LazyModel(model), shard_memories=3).write()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    store = TokenStore(folder)
    bank = AdapterBank(store, LazyModel(model), shard_memories=3)
    assert bank.counts().slots == 14 and bank.verify() == [] and len(bank.held(ALICE).refs) == 14
    store.close()


def test_orphans_missing_and_damaged_entries_are_mended(store, bank, model):
    refs = add(store, *(f"Fact number {n}." for n in range(8)))
    bank.write()
    before = by_ref(bank.held(ALICE))
    orphan = bank.library.add(model.internalize("Nobody's."))
    assert bank.is_unfinished
    entries = sorted(set(bank.entries_of(refs).values()))
    weights = bank.folder / entries[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    bank.library.remove(entries[1])
    done = bank.verify()
    assert len(done) == 2 and "damaged or missing adapters" in done[0]
    assert not (bank.folder / orphan).exists() and not bank.is_unfinished and bank.verify() == []
    bank.write()
    assert same(by_ref(bank.held(ALICE)), before)


def test_damaged_entry_is_one_line(store, model, tmp_path):
    refs = add(store, "one.")
    AdapterBank(store, LazyModel(model)).write()
    bank = AdapterBank(store, LazyModel(model))
    (bank.folder / bank.entries_of(refs)[refs[0]] / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match="run verify, then write the adapters") as error:
        bank.held(ALICE)
    assert "\n" not in str(error.value)


# --- Borders --------------------------------------------------------------------------------------------------------


def test_text_that_makes_no_adapter_is_named(store, bank, monkeypatch):
    good, bad = add(store, "one.", "two.")
    chunk = type(bank.model.doc_to_lora()).chunk

    def refusing(self, text):
        if text == "two.":
            raise ValueError("The document is empty.")
        return chunk(self, text)

    monkeypatch.setattr(type(bank.model.doc_to_lora()), "chunk", refusing)
    written = bank.write()
    assert written.refused == {bad: "The document is empty."} and written.written == 1
    assert bank.held(ALICE).refs == (good,)


def test_without_a_checkpoint_is_one_line(store, tiny_base_model_folder):
    add(store, "one.")
    with pytest.raises(ValueError, match="open the memory with model="):
        AdapterBank(store).write()
    with pytest.raises(ValueError, match="is a base model without a hypernetwork"):
        AdapterBank(store, LazyModel(tiny_base_model_folder)).write()
    assert AdapterBank(store).counts().missing == 1 and AdapterBank(store).verify() == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"join": "sum"}, "joined by route or gate"),
        ({"shard_memories": 0}, "Give at least 1 and 2"),
        ({"pass_chunks": 1}, "Give at least 1 and 2"),
        ({"dtype": "int8"}, "float32, float16 or bfloat16"),
    ],
)
def test_impossible_settings_are_refused(store, settings, says):
    with pytest.raises(ValueError, match=says):
        AdapterBank(store, **settings)


def test_half_precision_halves_the_bytes(store, model):
    add(store, "one.", "two.")
    whole = AdapterBank(store, LazyModel(model), dtype="float32").write().bytes
    half = AdapterBank(store, LazyModel(model))
    assert half.write().bytes * 2 == whole
    assert half.held(ALICE).adapter.A["down_proj"].dtype == torch.float32
