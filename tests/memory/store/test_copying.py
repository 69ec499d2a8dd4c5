"""A memory copied between databases is the same in every table, and goes on with the same numbers."""

import random

import pytest
from sqlalchemy import func, select

from hypernet.memory.retriever import Retriever
from hypernet.memory.store.copying import copy_memory
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.schema import metadata, vectors
from hypernet.memory.store.token_store import TokenStore

ALICE = Filters("alice", "agent", "run")


def rows_of(store: TokenStore) -> dict[str, list[tuple]]:
    """Every row of every table."""
    with store.database.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in metadata.sorted_tables
        }


def told(store: TokenStore) -> str:
    """Something of every kind: versions, ends, tombstones, what was derived, purged and taken back. Returns a
    deleted one that can be restored."""
    rng = random.Random(0)
    for number in range(12):
        key = {"subject": f"s{number % 4}", "relation": "place"} if number % 3 else {}
        store.add(
            [
                Draft(
                    text=f"Übung “{number}” in \\x{number} 东京",
                    filters=ALICE if number % 2 else Filters("bob"),
                    valid_at=f"0001-01-{1 + rng.randrange(27):02d}" if number == 5 else f"2026-01-{1 + number:02d}",
                    metadata={"nested": [1.5, None, {"ü": "\u0000 escaped"}]},
                    **key,
                )
            ]
        )
    first, second, third, fourth = store.statements()[:4]
    store.update(first.id, "an update", invalid_at="9999-12-31")
    store.invalidate(second.id, at="2026-05-01")
    store.add([Draft(text="derived", filters=Filters("bob"), derived_from=(first.ref,))])
    store.delete(third.ref, reason="asked by ‘phone’")
    store.purge()
    store.delete(fourth.ref)
    store.rollback(store.add([Draft(text="a mistake")])[0].batch)
    with store.database.write() as connection:
        connection.execute(vectors.insert(), {"seq": 1, "embedder": "tiny", "vector": bytes(range(256))})
    last = store.add([Draft(text="the last one", filters=ALICE)])[0]
    store.delete(last.id)
    store.purge(last.id)  # its number is not given again
    store.log.append_audit({"passed": True})
    return fourth.ref


def test_memory_goes_to_postgresql_and_back_without_loss(schema, tmp_path):
    first = TokenStore(tmp_path / "first")
    deleted = told(first)
    before, deletions = rows_of(first), (first.folder / "deletions.jsonl").read_bytes()
    assert {name for name, rows in before.items() if rows} >= {"batches", "events", "memories", "contains", "vectors"}
    (first.folder / "adapters/entry").mkdir(parents=True)
    (first.folder / "adapters/entry/file").write_bytes(b"adapter")
    counts = copy_memory(first, tmp_path / "second", database=schema())
    assert counts == {name: len(rows) for name, rows in before.items()}
    second = TokenStore(tmp_path / "second")
    copy_memory(second, tmp_path / "third", database=schema())
    copy_memory(TokenStore(tmp_path / "third"), tmp_path / "fourth")
    stores = [first, second, TokenStore(tmp_path / "third"), TokenStore(tmp_path / "fourth")]
    for store in stores[1:]:
        assert rows_of(store) == before
        assert (store.folder / "deletions.jsonl").read_bytes() == deletions
        assert (store.folder / "adapters/entry/file").read_bytes() == b"adapter"
        assert store.verify() == ((), ()) and store.versions() == first.versions()
        assert store.statements() == first.statements() and store.counts() == first.counts()
    found = [[hit.ref for hit in Retriever(store).search("übung 东京 update", Filters("bob"))] for store in stores]
    assert found == [found[0]] * 4 and len(found[0]) > 2
    # They go on alike: what was purged frees no number.
    highest = max(row[0] for row in before["memories"])
    for store in stores:
        (ref,) = store.add([Draft(text="next")])
        with store.database.read() as connection:
            assert connection.execute(select(func.max(metadata.tables["memories"].c.seq))).scalar() > highest + 1
        assert ref.batch == f"v{max(row[0] for row in before['batches']) + 1}"
        store.rollback("v1")
        assert store.restore(deleted).memories == (deleted,)
        store.close()


def test_copy_is_there_completely_or_not_at_all(schema, tmp_path):
    store = TokenStore(tmp_path / "first")
    store.add([Draft(text="one"), Draft(text="a\0b")])
    url = schema()
    with pytest.raises(ValueError, match="U\\+0000"):
        copy_memory(store, tmp_path / "second", database=url)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]
    other = TokenStore(tmp_path / "other", database=url)  # its tables are there, and empty
    other.add([Draft(text="one")])
    with pytest.raises(ValueError, match="holds a memory. Name an empty database or schema"):
        copy_memory(other, tmp_path / "second", database=url)
    with pytest.raises(ValueError, match="is there already. Name a new folder"):
        copy_memory(store, tmp_path / "other")
    assert not (tmp_path / "second").exists()
