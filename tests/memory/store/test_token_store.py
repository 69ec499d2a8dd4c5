"""TokenStore: two time axes, keys, conflicts, deletion, rollback and purge, against small models of our own."""

import json
import random
import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.token_store import TokenStore

ALICE, BOB = Filters("alice"), Filters("bob")


def tell(store: TokenStore, content: str, day: int | None = None, *, filters: Filters = ALICE, **fields):
    """Adds one memory, true from a day of 2026 on."""
    valid_at = None if day is None else date(day)
    (ref,) = store.add([Draft(text=content, filters=filters, valid_at=valid_at, **fields)])
    return ref


def date(day: int) -> str:
    return f"2026-01-{day:02d}"


def texts(store: TokenStore, day: int, filters: Filters = ALICE, **when) -> list[str]:
    return sorted(memory.text for memory in store.valid(filters, as_of=date(day), **when))


def view(store: TokenStore) -> bytes:
    """Everything that can be read of live memories, byte by byte."""
    return json.dumps([memory.as_dict() for memory in store.statements()]).encode()


# --- Time -----------------------------------------------------------------------------------------------------------


def test_update_holds_from_its_date_on(store):
    ref = tell(store, "Orla", 3)
    second = store.update(ref.id, "Jorun", valid_at=date(9))
    assert (second.id, second.version) == (ref.id, 2)
    assert [texts(store, day) for day in (2, 3, 8, 9, 20)] == [[], ["Orla"], ["Orla"], ["Jorun"], ["Jorun"]]
    assert store.get(ref.id, as_of=date(5)).text == "Orla" and store.get(f"{ref.id}@1").text == "Orla"


def on_both(*, num_seeds: int):
    """Many seeds of SQLite and one of PostgreSQL, where the same takes five times as long."""
    cases = [*(("sqlite", seed) for seed in range(num_seeds)), ("postgresql", 0)]
    return pytest.mark.parametrize(("new_store", "seed"), cases, indirect=["new_store"])


@on_both(num_seeds=5)
def test_order_of_arrival_changes_no_view(new_store, seed):
    """Backfilled logs (graphiti #1489): statements and ends told in any order."""
    rng = random.Random(seed)
    days = rng.sample(range(1, 29), 12)
    told = [(day, rng.randrange(3), rng.random() < 0.3) for day in days]
    views = []
    for number, order in enumerate([sorted(told), rng.sample(told, len(told))]):
        store = new_store(str(number))
        for day, subject, ends in order:
            key = {"subject": f"s{subject}", "relation": "place"}
            until = date(day + 1) if ends else None
            tell(store, f"s{subject} at {day}", day, invalid_at=until, **key)
        views.append([texts(store, day) for day in range(1, 31)])
    assert views[0] == views[1]


def test_end_told_before_a_backfilled_statement_stands(store):
    ref = tell(store, "Paris", 1)
    store.invalidate(ref.id, at=date(10))
    store.update(ref.id, "Rome", valid_at=date(5))
    assert [texts(store, day) for day in (4, 7, 10, 20)] == [["Paris"], ["Rome"], [], []]


def test_past_knowledge_is_what_was_seen_then(store):
    """Every view that was seen is seen again with `known_at`, whatever was told later."""
    rng, refs, seen = random.Random(0), [], []
    for step in range(40):
        day = rng.randrange(1, 28)
        kind = rng.choice(["add", "keyed", "update", "invalidate"]) if refs else "add"
        try:
            if kind in ("add", "keyed"):
                key = {"subject": f"s{rng.randrange(3)}", "relation": "place"} if kind == "keyed" else {}
                refs.append(tell(store, f"text {step}", day, **key))
            elif kind == "update":
                store.update(rng.choice(refs).id, f"text {step}", valid_at=date(day))
            else:
                store.invalidate(rng.choice(refs).id, at=date(day))
        except ValueError as error:
            assert "holds from" in str(error)  # invalidated before it began
        stamp = max(memory.created_at for memory in store.statements())
        seen.append((stamp, [texts(store, day) for day in (5, 15, 27)]))
    for stamp, views in seen:
        assert [texts(store, day, known_at=stamp) for day in (5, 15, 27)] == views


def test_time_never_runs_backwards(store, monkeypatch):
    first = tell(store, "one")
    monkeypatch.setattr("hypernet.memory.store.token_store.now", lambda: 0)
    second = tell(store, "two")
    assert store.get(second.id, as_of="2100-01-01").created_at > store.get(first.id, as_of="2100-01-01").created_at


# --- Keys and conflicts ---------------------------------------------------------------------------------------------


def test_facts_with_other_keys_retire_nothing(store):
    """Unrelated facts retired each other in graphiti #1728: 143 of 887."""
    rng = random.Random(0)
    pairs = [(f"s{n % 40}", f"r{n // 40}") for n in range(1000)]
    rng.shuffle(pairs)
    store.add(
        [
            Draft(text=f"{s} {r}", filters=ALICE, subject=s, relation=r, valid_at=date(rng.randrange(1, 28)))
            for s, r in pairs
        ]
    )
    before = view(store)
    ref = tell(store, "another", 1, subject="s0", relation="new")
    assert all(memory.invalid_at is None for memory in store.statements())
    store.rollback(ref.batch)
    assert view(store) == before


def test_same_key_supersedes_in_every_wording(store):
    """Similar updates were treated differently in graphiti #1841: the key decides, not a model."""
    for n, (subject, relation) in enumerate([("Alice", "lives in"), ("alice", "Lives  in"), (" ALICE", "lives in ")]):
        tell(store, f"place {n}", 1 + n, subject=subject, relation=relation)
    (memory,) = store.valid(ALICE, as_of=date(9))
    assert (memory.text, memory.version) == ("place 2", 3)


def test_key_of_another_user_or_agent_is_another_key(store):
    key = {"subject": "home", "relation": "is"}
    for filters in (ALICE, BOB, Filters("alice", "agent"), Filters()):
        tell(store, str(filters), 1, filters=filters, **key)
    assert len(store.valid(as_of=date(2))) == 4


def test_text_without_a_key_stands_alone(store):
    for _ in range(2):
        tell(store, "the same", 1)
    assert texts(store, 2) == ["the same", "the same"]


@pytest.mark.parametrize(
    ("conflict", "expected"), [("latest", ["b"]), ("add_only", ["a", "b"]), ("keep_both", ["a", "b"])]
)
def test_conflict_policy_decides_what_holds(new_store, conflict, expected):
    store = new_store(conflict=conflict)
    for content, day in (("a", 1), ("b", 2)):
        tell(store, content, day, subject="home", relation="is")
    assert texts(store, 3) == expected


def test_better_source_wins_whenever_it_was_told(new_store):
    views = []
    for number, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        store = new_store(str(number), conflict="source_priority", source_priority=("registry", "notes/*"))
        told = [("registry", 5, "R"), ("notes/a.md", 8, "N"), (None, 2, "chat")]
        for which in order:
            source, day, content = told[which]
            tell(store, content, day, subject="home", relation="is", source=source)
        views.append([texts(store, day) for day in (3, 6, 9)])
    assert views == [[["chat"], ["R"], ["R"]]] * 3


# --- Deleting -------------------------------------------------------------------------------------------------------


def words_of(store: TokenStore) -> list[str]:
    """Texts in the index, in lower case."""
    statement = text("SELECT lower(m.text) FROM words w JOIN memories m ON m.seq = w.rowid")
    with store.database.read() as connection:
        return list(connection.execute(statement).scalars())


@pytest.mark.parametrize("reopened", [False, True])
def test_deleted_memory_is_nowhere(store, reopened):
    """It came back in search in mem0 #3695, and was still counted in supermemory #142."""
    ref = tell(store, "secret one")
    tell(store, "other")
    store.update(ref.id, "secret two")
    store.delete(ref.id, reason="asked")
    if reopened:
        store.close()
        store = TokenStore(store.folder)
    assert [memory.text for memory in store.valid()] == ["other"] and words_of(store) == ["other"]
    assert store.counts() == {"memories": 1, "versions": 1, "valid_now": 1, "deleted": 2}
    assert [memory.text for memory in store.valid(known_at=store.history(ref.id)[0].at)] == []
    assert {entry.text for entry in store.history(ref.id)} == {None}
    for key in (ref.id, f"{ref.id}@1"):
        with pytest.raises(ValueError, match="There is no memory"):
            store.get(key)


def test_filter_of_delete_all_touches_no_row_outside_it(store):
    """`delete_all(user_id, run_id)` wiped everybody in mem0 #3746."""
    everyone = [Filters(u, a, r) for u in ("alice", "bob", None) for a in ("x", None) for r in ("1", "2", None)]
    for number, filters in enumerate(everyone):
        tell(store, str(number), filters=filters)
    for chosen in (Filters("alice", None, "1"), Filters(None, "x", None), Filters("bob")):
        before = store.valid()
        batch = store.delete_all(chosen)
        inside = [m for m in before if all(getattr(m, name) == value for name, value in chosen.given.items())]
        assert inside and sorted(batch.memories) == sorted(m.ref for m in inside)
        assert [m.ref for m in store.valid()] == [m.ref for m in before if m not in inside]


@pytest.mark.parametrize("filters", [Filters(), Filters(""), Filters("alice", "  "), Filters(run_id="")])
def test_empty_filter_is_refused_and_deletes_nothing(sqlite_store, filters):
    tell(sqlite_store, "one")
    with pytest.raises(ValueError, match="needs a filter|or leave it out"):
        sqlite_store.delete_all(filters)
    assert len(sqlite_store.valid()) == 1


def test_delete_all_of_10000_takes_under_a_second(sqlite_store):
    """Resetting a user took 142 s for 793 memories in MemOS #1103. Processor time: the tests share their cores."""
    store = sqlite_store
    store.add([Draft(text=f"fact number {n}", filters=ALICE) for n in range(10_000)])
    tell(store, "other", filters=BOB)
    start = time.process_time()
    batch = store.delete_all(ALICE)
    assert time.process_time() - start < 1
    assert len(batch.memories) == 10_000 and [memory.text for memory in store.valid()] == ["other"]


def test_what_was_derived_goes_with_its_member(store):
    """A deleted fact lived on in a derived summary in graphiti #1837."""
    first, second = tell(store, "one"), tell(store, "two")
    summary = tell(store, "one and two", derived_from=(str(first), str(second)))
    principle = tell(store, "all of them", derived_from=(str(summary),))
    batch = store.delete(first.id)
    assert [memory.text for memory in store.valid()] == ["two"]
    assert batch.memories == (str(first), str(summary), str(principle)) and batch.num_derived == 2
    with pytest.raises(ValueError, match="stays deleted"):
        store.restore(summary.id)
    store.restore(first.id)
    assert len(store.valid()) == 4 and sorted(words_of(store)) == ["all of them", "one", "one and two", "two"]


def test_purge_of_a_member_erases_what_was_made_of_it(store, bytes_of):
    ref = tell(store, "zanzibar")
    summary = tell(store, "all about zanzibar", derived_from=(str(ref),))
    store.delete(ref.id)
    assert store.purge(ref.id).memories == (str(ref), str(summary))
    assert b"zanzibar" not in bytes_of(store) and store.counts()["deleted"] == 0


def test_derived_from_anothers_memory_is_refused(store):
    ref = tell(store, "bob's", filters=BOB)
    for member in (str(ref), "nobody@1", ref.id):
        with pytest.raises(ValueError, match="derived_from holds"):
            tell(store, "summary", derived_from=(member,))
    assert len(store.valid()) == 1


def test_deleted_version_gives_way_to_the_one_before(store):
    ref = tell(store, "right", 1)
    store.update(ref.id, "wrong", valid_at=date(5))
    store.delete(f"{ref.id}@2")
    assert texts(store, 9) == ["right"]
    assert store.update(ref.id, "newer", valid_at=date(7)).version == 3  # id@2 names one text forever


def test_deletions_file_says_when_and_why_without_content(store):
    ref = tell(store, "a secret")
    store.delete(ref.id, reason="asked by phone")
    store.purge()
    content = (store.folder / "deletions.jsonl").read_text()
    lines = [json.loads(line) for line in content.splitlines()]
    assert [(line["memory"], line["operation"]) for line in lines] == [(str(ref), "delete"), (str(ref), "purge")]
    assert lines[0]["reason"] == "asked by phone" and "secret" not in content
    other = tell(store, "another secret")
    for reason, message in (("it said Another Secret.", "holds the memory's text"), ("x" * 501, "501 characters")):
        with pytest.raises(ValueError, match=message):
            store.delete(other.id, reason=reason)


def test_lines_that_a_killed_process_did_not_write_are_added(store):
    refs = [tell(store, f"n{n}") for n in range(3)]
    for ref in refs:
        store.delete(ref.id)
    path = store.folder / "deletions.jsonl"
    whole = path.read_bytes()
    for kept in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "deletions.jsonl" in store.verify().repaired[0] and path.read_bytes() == whole
    assert store.verify() == ((), ())


# --- Taking back ----------------------------------------------------------------------------------------------------


def test_rollback_of_any_batch_restores_the_view_bytewise(store):
    ref, other = tell(store, "one", 1, subject="a", relation="b"), tell(store, "two", 2)
    operations = {
        "import": lambda: (
            store.add([Draft(text=f"n{n}", filters=ALICE) for n in range(3)], operation="import")[0].batch
        ),
        "keyed": lambda: tell(store, "three", 3, subject="a", relation="b").batch,
        "backfilled": lambda: store.update(other.id, "earlier", valid_at=date(1)).batch,
        "invalidate": lambda: store.invalidate(ref.id, at=date(9)).batch,
        "delete": lambda: store.delete(ref.id).version,
        "delete_all": lambda: store.delete_all(ALICE).version,
    }
    for name, operation in operations.items():
        before, words = view(store), sorted(words_of(store))
        version = operation()
        after = view(store)
        assert after != before, name
        undone = store.rollback(version)
        assert view(store) == before and sorted(words_of(store)) == words, name
        store.rollback(undone.version)
        assert view(store) == after, name
        store.rollback(store.versions()[-1]["version"])
        assert view(store) == before, name


def test_rollback_leaves_later_batches_alone(store):
    first, second = tell(store, "one").batch, tell(store, "two").batch
    store.rollback(first)
    assert [memory.text for memory in store.valid()] == ["two"]
    assert [entry["taken_back"] for entry in store.versions()] == [True, False, False]
    for version, message in (
        (first, "has been taken back"),
        ("v99", "There is no batch"),
        ("third", "no version of a batch"),
    ):
        with pytest.raises(ValueError, match=message):
            store.rollback(version)
    assert second == "v2"


def test_restore_brings_back_one_of_many(store):
    refs = [tell(store, f"n{n}") for n in range(3)]
    store.delete_all(ALICE)
    store.restore(refs[1].id)
    assert [memory.text for memory in store.valid()] == ["n1"]
    with pytest.raises(ValueError, match="is not deleted"):
        store.restore(refs[1].id)


# --- Purging --------------------------------------------------------------------------------------------------------


def test_purge_leaves_no_byte_of_the_content(store, bytes_of):
    """Not in tables, index, free pages or the write-ahead log; the rest is still found."""
    secrets = [f"zanzibar{n:04d}quokka" for n in range(300)]
    for start in range(0, 300, 50):
        store.add(
            [
                Draft(
                    text=f"My word is {secret}.", filters=ALICE, subject=f"word {secret}", relation="is", source=secret
                )
                for secret in secrets[start : start + 50]
            ]
        )
    taken_back = tell(store, "I take zanzibar9999quokka back", filters=BOB)
    kept = tell(store, "This stays.", filters=BOB)
    assert b"zanzibar" in bytes_of(store)
    store.rollback(taken_back.batch)
    batch = store.delete_all(ALICE)
    assert b"zanzibar" in bytes_of(store)  # reversible until now
    assert store.purge().finished
    found = bytes_of(store)
    assert b"zanzibar" not in found and b"quokka" not in found and b"This stays." in found
    with pytest.raises(ValueError, match="content that would return was purged"):
        store.rollback(batch.version)
    assert store.verify() == ((), ()) and words_of(store) == ["this stays."] and store.get(kept.id)


def test_purge_touches_neither_live_memories_nor_others(store):
    mine, his, live = tell(store, "mine"), tell(store, "his", filters=BOB), tell(store, "live")
    store.delete(mine.id)
    store.delete(his.id)
    assert store.purge(filters=ALICE).memories == (str(mine),)
    with pytest.raises(ValueError, match="is not deleted"):
        store.purge(live.id)
    assert not store.is_unfinished and store.restore(his.id)
    assert sorted(memory.text for memory in store.valid()) == ["his", "live"]


def test_purge_beside_a_reader_is_finished_later(store, bytes_of, monkeypatch):
    monkeypatch.setattr("hypernet.memory.store.dialects.BUSY_TIMEOUT_S", 0.1)
    store.close()
    store = TokenStore(store.folder)
    ref = tell(store, "zanzibar quokka")
    other = TokenStore(store.folder)
    with other.database.read() as connection:
        connection.execute(text("SELECT count(*) FROM memories")).scalar()
        store.delete(ref.id)
        assert not store.purge().finished and store.is_unfinished
        assert store.verify().damage[0].startswith("a purge waits")
    assert store.verify().repaired == ("an interrupted purge",) and not store.is_unfinished
    assert b"zanzibar" not in bytes_of(store)


def test_imported_id_does_not_resurrect(store):
    draft = Draft(text="old", filters=ALICE, id="m-1", version=1)
    assert store.add([draft]) and store.add([draft]) == []
    store.delete("m-1")
    assert store.add([draft]) == []
    store.purge()
    assert store.add([draft]) == [] and store.valid() == []


# --- Whole ----------------------------------------------------------------------------------------------------------


def test_events_cannot_be_changed(store):
    tell(store, "one")
    for change in ("UPDATE events SET reason = 'x'", "DELETE FROM events"):
        with pytest.raises((DatabaseError, ValueError), match="append-only"), store.database.write() as connection:
            connection.execute(text(change))


def test_verify_finds_changed_text_and_mends_the_rest(store):
    ref = tell(store, "one", 1)
    store.update(ref.id, "two", valid_at=date(5))
    before = view(store)
    with store.database.write() as connection:
        connection.execute(text("UPDATE memories SET invalid_at = NULL, live = (version = 2)"))
        connection.execute(text("DELETE FROM words"))
    (store.folder / "deletions.jsonl").write_text("")
    assert store.verify().repaired and view(store) == before and sorted(words_of(store)) == ["one", "two"]
    assert store.verify() == ((), ())
    with store.database.write() as connection:
        connection.execute(text("UPDATE memories SET text = 'forged' WHERE version = 1"))
    assert store.verify().damage == (f"{ref.id}@1 is not the text that was stored",)


@on_both(num_seeds=3)
def test_random_schedules_resurrect_nothing(new_store, seed):
    """Add, update, delete, restore, roll back, purge and re-open, against a dict."""
    rng = random.Random(seed)
    store = new_store()
    live: dict[str, str] = {}
    deleted: dict[str, str] = {}
    for step in range(60):
        kind = rng.choice(["add", "add", "update", "delete", "restore", "rollback", "purge", "reopen", "delete_all"])
        whose = rng.choice([ALICE, BOB])
        if kind == "add":
            live[str(tell(store, f"{whose.user_id} {step}", 1, filters=whose))] = whose.user_id
        elif kind == "update" and live:
            key = rng.choice(sorted(live))
            ref = store.update(key.partition("@")[0], f"text {step}", valid_at=date(1))
            live[str(ref)] = live[key]
        elif kind == "delete" and live:
            key = rng.choice(sorted(live))
            store.delete(key)
            deleted[key] = live.pop(key)
        elif kind == "restore" and deleted:
            key = rng.choice(sorted(deleted))
            store.restore(key)
            live[key] = deleted.pop(key)
        elif kind == "delete_all":
            for key in store.delete_all(whose).memories:
                deleted[key] = live.pop(key)
        elif kind == "rollback":
            ref = tell(store, "a mistake", filters=whose)
            store.rollback(ref.batch)
        elif kind == "purge":
            store.purge()
            deleted = {}
        elif kind == "reopen":
            store.close()
            store = TokenStore(store.folder)
        assert {memory.ref: memory.user_id for memory in store.statements()} == live
        assert len(words_of(store)) == len(live)
    assert store.verify() == ((), ())


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Draft(text=""), "A memory is a text"),
        (Draft(text=" \n"), "A memory is a text"),
        (Draft(text=None), "A memory is a text"),
        (Draft(text="x", subject="a"), "Give both, or neither"),
        (Draft(text="x", subject=" ", relation="b"), "subject is ' '"),
        (Draft(text="x", valid_at="2026-02-30"), "valid_at is '2026-02-30', not a date"),
        (Draft(text="x", valid_at="2026-03-01", invalid_at="2026-03-01"), "It would end at .*, which is not after"),
        (Draft(text="x", invalid_at="2020-01-01"), "It would end at .*, which is not after"),
        (Draft(text="x", conflict="newest"), "Unknown conflict 'newest'"),
        (Draft(text="x", filters=Filters("")), "user_id is ''"),
        (Draft(text="x", filters=Filters(5)), "user_id is 5"),
        (Draft(text="x", id="a b", version=1), "is no memory's id"),
    ],
)
def test_impossible_memory_is_one_line_and_stores_nothing(sqlite_store, draft, message):
    with pytest.raises(ValueError, match=message) as error:
        sqlite_store.add([Draft(text="good"), draft])
    assert "\n" not in str(error.value) and sqlite_store.valid() == [] and sqlite_store.versions() == []


@pytest.mark.parametrize("key", ["nobody", "nobody@1", "", "a b", "x@0", "x@one", "x@"])
def test_unknown_id_is_one_line(sqlite_store, key):
    for call in (
        sqlite_store.get,
        sqlite_store.delete,
        sqlite_store.history,
        sqlite_store.invalidate,
        sqlite_store.restore,
        sqlite_store.purge,
    ):
        with pytest.raises(ValueError) as error:
            call(key)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        sqlite_store.update(key, "text")


def test_memory_is_not_invalidated_before_it_began(sqlite_store):
    ref = tell(sqlite_store, "one", 9)
    with pytest.raises(ValueError, match="Give a later time, or delete it"):
        sqlite_store.invalidate(ref.id, at=date(3))
    with pytest.raises(ValueError, match="did not hold at"):
        sqlite_store.get(ref.id, as_of=date(3))


# --- A damaged log of deletions -------------------------------------------------------------------------------------
DAMAGES = [
    b"{}",
    b"[1]",
    b"garbage",
    b'{"event":99}',
    b"\xff\xfe",
    b'{"event": "1"}',
    b'{"event": true}',
    b"[" * 99_999,
]
DAMAGES += [b'{"event": 3, "operation": "audit"}', b'{"event": 1, "memory": "x@1"}', b"9" * 5000, b"\0" * 70_000]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[:20].hex())
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("instead", [False, True])
def test_damaged_log_takes_deletions_and_is_repaired(sqlite_store, damage, end, instead):
    store = sqlite_store
    refs = [tell(store, f"n{n}") for n in range(3)]
    path = store.folder / "deletions.jsonl"
    store.delete(refs[0].id)  # event 4
    first = path.read_bytes()
    store.delete(refs[1].id)
    path.write_bytes(damage + end if instead else path.read_bytes() + damage + end)
    store.delete(refs[2].id, reason="asked")
    # Done and logged, whatever came before; said once.
    lines = [line for line in path.read_bytes().split(b"\n") if str(refs[2]).encode() in line]
    assert [json.loads(line)["reason"] for line in lines] == ["asked"] and store.valid() == []
    number = 1 if instead else 3
    repaired = store.verify().repaired
    assert f"deletions.jsonl, line {number}, which tells of no deletion here" in repaired[0]
    assert (path.with_name("deletions.jsonl.damaged")).read_bytes().strip() == damage.strip()
    assert path.read_bytes().startswith(first)
    told = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["memory"] for line in told] == [str(ref) for ref in refs]
    assert store.verify() == ((), ())


def test_line_left_out_in_the_middle_is_written_again(sqlite_store):
    for n in range(3):
        sqlite_store.delete(tell(sqlite_store, f"n{n}").id)
    path = sqlite_store.folder / "deletions.jsonl"
    sqlite_store.log.append_audit({"passed": True})
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert sqlite_store.verify().repaired == ("1 lines missing in deletions.jsonl",) and path.read_bytes() == whole
    path.write_bytes(b"".join([lines[3], *lines[:3]]).replace(b"\n", b"\r\n"))
    assert sqlite_store.verify().repaired == ("order and line ends of deletions.jsonl",) and path.read_bytes() == whole
    path.write_bytes(b"".join(lines).strip())  # an editor's
    assert sqlite_store.verify().repaired and path.read_bytes() == whole
    path.write_bytes(whole + lines[1])
    assert "line 5, which" in sqlite_store.verify().repaired[0] and path.read_bytes() == whole


def test_whole_last_line_without_its_end_is_kept(sqlite_store):
    sqlite_store.delete(tell(sqlite_store, "one").id)
    sqlite_store.log.append_audit({"passed": True})
    path = sqlite_store.folder / "deletions.jsonl"
    path.write_bytes(before := path.read_bytes().strip())
    sqlite_store.delete(tell(sqlite_store, "two").id)
    assert path.read_bytes().startswith(before + b"\n") and path.read_bytes().count(b"\n") == 3
    assert sqlite_store.verify() == ((), ())


def test_audit_longer_than_the_tail_is_gone_on_from(sqlite_store):
    store = sqlite_store
    store.delete(tell(store, "one").id)
    store.log.append_audit({"memories": ["0123456789abcdef@1"] * 5000})
    store.delete(tell(store, "two").id)
    store.log.append_audit({"passed": True})
    content = (store.folder / "deletions.jsonl").read_bytes()
    operations = [json.loads(line)["operation"] for line in content.splitlines()]
    assert operations == ["delete", "audit", "delete", "audit"] and store.verify() == ((), ())


def test_log_that_cannot_be_written_refuses_before(sqlite_store):
    gone, kept = tell(sqlite_store, "one"), tell(sqlite_store, "two")
    sqlite_store.delete(gone.id)
    path = sqlite_store.folder / "deletions.jsonl"
    path.unlink()
    path.mkdir()
    before = view(sqlite_store), sqlite_store.versions()
    for refused in (
        lambda: sqlite_store.delete(kept.id),
        lambda: sqlite_store.delete_all(Filters("alice")),
        lambda: sqlite_store.restore(gone.id),
        lambda: sqlite_store.rollback("v1"),
        sqlite_store.purge,
    ):
        with pytest.raises(IsADirectoryError):
            refused()
    assert (view(sqlite_store), sqlite_store.versions()) == before
