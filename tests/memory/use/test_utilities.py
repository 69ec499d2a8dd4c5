"""Utilities against values computed by hand, their ranking and eviction; deletion reaches them on both databases."""

import pytest
from sqlalchemy import func, select

from hypernet.memory.memory import Memory
from hypernet.memory.retriever import Retriever
from hypernet.memory.store.copying import copy_memory
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.schema import utilities as table
from hypernet.memory.store.token_store import TokenStore
from hypernet.memory.use.utilities import Utilities, Utility, mixed

ALICE = Filters("alice")


def tell(store, text, **given):
    return str(store.add([Draft(text=text, filters=ALICE, **given)])[0])


def num_rows(store) -> int:
    with store.database.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def test_update_is_the_formula_s_by_hand(store):
    ref, other = tell(store, "one"), tell(store, "other")
    learned = Utilities(store, rate=0.25, initial=0.5)
    assert learned.get(ref) == Utility(0.5, 0) and learned.of() == {}
    # .5 + .25 (1 - .5) = .625; .625 + .25 (0 - .625) = .46875; .46875 + .25 (1 - .46875) = .6015625
    assert [learned.credit([ref], r)[ref].value for r in (1, 0, 1)] == [0.625, 0.46875, 0.6015625]
    assert learned.get(ref) == Utility(0.6015625, 3) and learned.get(other) == Utility(0.5, 0)
    # Another object, and another process, see the same; a rate of 1 keeps the last outcome alone.
    assert Utilities(TokenStore(store.folder), rate=1.0).credit([ref, ref, other], -2.0) == {
        **{ref: Utility(-2.0, 4)},
        **{other: Utility(-2.0, 1)},
    }


def test_mixture_is_that_of_z_scores_by_hand():
    # z(1, 2, 3) = (-1.2247, 0, 1.2247), z(0, 0, 3) = (-.7071, -.7071, 1.4142)
    assert mixed([1, 2, 3], [3, 0, 0], weight=0.5) == pytest.approx([0.0947, -0.3536, 0.2588], abs=1e-4)
    assert mixed([1, 2, 3], [3, 0, 0], weight=0.0) == pytest.approx([-1.2247, 0, 1.2247], abs=1e-4)
    assert mixed([1, 1], [5, 7], weight=0.25) == pytest.approx([-0.25, 0.25])
    assert mixed([], [], weight=0.5) == []


def test_ranking_prefers_what_was_useful_among_the_similar(store):
    refs = [tell(store, f"The door in hall {name} needs the {name} key.") for name in ("iron", "brass", "tin")]
    learned = Utilities(store, rate=0.5, weight=0.8)
    hits = Retriever(store).search("Which key does the door in the hall need?", ALICE)
    assert [hit.ref for hit in learned.ranked(hits)] == [hit.ref for hit in hits]  # nothing learned: similarity's order
    learned.credit([refs[1]], 1.0)
    learned.credit([refs[2]], 0.0)
    assert [hit.ref for hit in learned.ranked(hits)] == [refs[1], refs[0], refs[2]]
    # Of two, z-scores are 1 and -1: with equal weights the useful one comes first.
    pair = sorted(hits[:2], key=lambda hit: learned.get(hit.ref).value)
    assert Utilities(store).ranked(pair) == pair[::-1]


def test_eviction_keeps_the_useful_and_can_be_taken_back(store):
    refs = [tell(store, f"memory {number}") for number in range(5)]
    bob = str(store.add([Draft(text="bob's", filters=Filters("bob"))])[0])
    learned = Utilities(store, rate=1.0)
    learned.credit([refs[4]], 0.0)
    learned.credit([refs[0]], 1.0)
    batch = learned.evict(ALICE, keep=2)
    # The bad one first, then the oldest of those without an outcome.
    assert set(batch.memories) == {refs[4], refs[1], refs[2]} and batch.version
    assert {memory.ref for memory in store.valid()} == {refs[0], refs[3], bob}
    assert learned.evict(ALICE, keep=2).memories == () and len(learned.of(ALICE)) == 1
    store.rollback(batch.version)
    assert len(store.valid(ALICE)) == 5 and learned.get(refs[4]) == Utility(0.0, 1)


def test_deletion_reaches_utilities_through_the_closure(store):
    told, kept = tell(store, "I tried the iron key."), tell(store, "I tried the tin key.")
    principle = tell(store, "Iron keys open doors.", derived_from=(told,))
    learned = Utilities(store, rate=0.5)
    learned.credit([told, kept, principle], 1.0)
    store.delete(told)
    assert set(learned.of()) == {kept}
    for ref in (told, principle):
        with pytest.raises(ValueError, match="There is no memory"):
            learned.get(ref)
        with pytest.raises(ValueError, match="There is no memory"):
            learned.credit([kept, ref], 0.0)
    assert learned.get(kept) == Utility(0.75, 1)  # untouched, also by the credit that failed
    store.restore(told)
    assert learned.get(principle) == Utility(0.75, 1) and num_rows(store) == 3
    store.delete(told)
    store.purge()
    assert num_rows(store) == 1 and set(learned.of()) == {kept}


def test_new_version_begins_anew(store):
    ref = tell(store, "The door needs the iron key.")
    learned = Utilities(store)
    learned.credit([ref], 1.0)
    anew = str(store.update(ref.partition("@")[0], "The door needs the tin key."))
    assert learned.get(anew) == Utility(0.5, 0) and learned.get(ref).outcomes == 1


def test_utilities_are_copied_with_their_memory(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    ref = str(memory.add("one", user_id="alice"))
    memory.utilities.credit([ref], 1.0)
    assert copy_memory(memory.store, tmp_path / "copy")["utilities"] == 1
    assert Memory.open(tmp_path / "copy").utilities.get(ref) == memory.utilities.get(ref) == Utility(0.55, 1)


def test_impossible_settings_are_refused(tmp_path):
    store = TokenStore(tmp_path / "memory")
    for settings in ({"rate": 0}, {"rate": 1.5}, {"weight": -0.1}, {"initial": float("nan")}):
        with pytest.raises(ValueError, match="Give a rate above 0"):
            Utilities(store, **settings)
    with pytest.raises(ValueError, match="has no version"):
        Utilities(store).credit(["abc"], 1.0)
    with pytest.raises(ValueError, match="Give a finite number"):
        Utilities(store).credit(["abc@1"], float("inf"))
    with pytest.raises(ValueError, match="evict needs a filter"):
        Utilities(store).evict(Filters(), keep=1)
    with pytest.raises(ValueError, match="has no version"):
        store.delete_versions(["abc"])
