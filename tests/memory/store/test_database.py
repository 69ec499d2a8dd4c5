"""The database file: several writers at once, kills, full disks, and folders that are no memory."""

import errno
import os
import random
import sqlite3
import traceback
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, text

from benchmarks.memory.store import kill_writers, random_schedules
from hypernet.memory.store import dialects
from hypernet.memory.store.database import DATABASE_FILE, Database, check_folder
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.schema import SCHEMA_VERSION, metadata
from hypernet.memory.store.token_store import TokenStore


def in_children(*functions) -> None:
    """Runs each in a fork; fails if one of them does."""
    children = []
    for function in functions:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)


def test_two_processes_make_and_write_one_memory(tmp_path, database):
    """Both open a folder that is not there, and write at once: nothing is lost, nothing refused."""

    def write(name: str):
        def run() -> None:
            store = TokenStore(tmp_path / "memory", database=database)
            for number in range(20):
                store.add([Draft(text=f"{name} {number}", subject="last", relation="word")])

        return run

    in_children(*map(write, "abc"))
    store = TokenStore(tmp_path / "memory")
    versions = store.statements()
    assert sorted(memory.text for memory in versions) == sorted(f"{name} {n}" for name in "abc" for n in range(20))
    assert [memory.version for memory in versions] == list(range(1, 61))  # one memory, in one order
    assert store.verify() == ((), ()) and len(store.valid()) == 1


def test_two_connections_of_a_process_write_in_turn(new_store):
    first, second = new_store(), new_store()
    for number in range(5):
        first.add([Draft(text=f"first {number}")])
        second.add([Draft(text=f"second {number}")])
    assert first.valid() == second.valid() and len(first.valid()) == 10


def test_reader_sees_one_state_while_another_writes(new_store):
    reader, writer = new_store(), new_store()
    count = text("SELECT count(*) FROM memories")
    with reader.database.read() as connection:
        assert connection.execute(count).scalar() == 0
        writer.add([Draft(text="one")])
        assert connection.execute(count).scalar() == 0
    assert len(reader.valid()) == 1


def test_killed_writers_lose_and_resurrect_nothing(tmp_path, database):
    TokenStore(tmp_path / "memory", database=database).close()
    # A transaction of PostgreSQL takes longer, the more so on a busy machine.
    limits = {"num_kills": 6, "seconds": 0.6} if database else {"num_kills": 10}
    row = kill_writers(tmp_path / "memory", rng=random.Random(0), **limits)
    assert row["acknowledged"] and (row["lost"], row["resurrected"], row["damaged"]) == (0, 0, 0)


def test_random_schedules_agree_with_a_dict(tmp_path):
    row = random_schedules(tmp_path / "memory", num_schedules=10, rng=random.Random(1))
    assert (row["wrong"], row["damage"]) == (0, 0)


def test_full_disk_is_one_line_and_changes_nothing(tmp_path):
    store = TokenStore(tmp_path / "memory")
    store.add([Draft(text="one")])
    pages = store.database._engine.raw_connection().driver_connection.execute("PRAGMA page_count").fetchone()[0]
    store.database._engine.dispose()  # its next connection has the limit

    @event.listens_for(store.database._engine, "connect")
    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    with pytest.raises(OSError) as error:
        store.add([Draft(text="long " * 20_000)])
    assert error.value.errno == errno.ENOSPC and error.value.filename.endswith(DATABASE_FILE)
    assert [memory.text for memory in store.valid()] == ["one"]
    store.close()
    assert TokenStore(tmp_path / "memory").verify() == ((), ())


def test_busy_database_is_one_line(new_store, monkeypatch):
    monkeypatch.setattr(dialects, "BUSY_TIMEOUT_S", 0.1)
    store, other = new_store(), new_store()
    with store.database.write(), pytest.raises(OSError, match="Another process has been writing"):
        other.add([Draft(text="one")])


def test_folder_that_is_no_memory_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path, "holds other files and no memory.sqlite"),
        (tmp_path / "file", "is a file. Name the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenStore(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.txt"]
    with pytest.raises(ValueError, match="No memory at .*memory.sqlite is missing"):
        TokenStore(tmp_path / "new", create=False)
    assert not (tmp_path / "new").exists()


def test_database_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
        connection.execute("CREATE TABLE notes (text)")
    with pytest.raises(ValueError, match="is the database of another program"):
        TokenStore(tmp_path)


def test_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / DATABASE_FILE).write_bytes(b"not SQLite " * 1000)
    with pytest.raises(ValueError, match="is damaged .*not a database"):
        TokenStore(tmp_path)


def test_memory_of_an_older_schema_is_migrated(store):
    (ref,) = store.add([Draft(text="told before there were adapters")])
    with store.database.write() as connection:
        for table in ("traces", "utilities", "slots", "costs", "words_counted"):  # the last is PostgreSQL's alone
            connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    store.close()
    store = TokenStore(store.folder)
    with store.database.read() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == SCHEMA_VERSION
    assert not [
        change for change in found if getattr(change[1], "name", "") in ("traces", "utilities", "slots", "costs")
    ]
    assert store.get(str(ref)).text == "told before there were adapters" and store.verify() == ((), ())


def test_newer_schema_is_refused(store):
    with store.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(ValueError, match="has schema 9999, this version reads up to"):
        TokenStore(store.folder)


def test_interrupted_migration_leaves_an_empty_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(dialects, "APPLICATION_ID", "not a number;")  # fails after the tables were made
    with pytest.raises(Exception):  # noqa: B017
        Database(tmp_path / "memory")
    monkeypatch.undo()
    assert TokenStore(tmp_path / "memory").add([Draft(text="one")])


def test_schema_version_is_the_last_migration():
    config = Config()
    config.set_main_option("script_location", "hypernet:memory/store/migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA_VERSION


def test_migrations_make_the_tables_of_the_schema(store):
    with store.database.read() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
    # What FTS5 and Alembic keep for themselves.
    ours = [change for change in found if not str(getattr(change[1], "name", "")).startswith(("words", "alembic"))]
    assert ours == []


@pytest.mark.parametrize("name", ["team%20a", "a?b", "a?mode=ro", "%", "a#b", "file:a", "a;b 'c'", "&x=1"])
def test_memory_is_in_the_folder_that_was_named(tmp_path, monkeypatch, name):
    """Also where the name means something in a URL; relative and absolute."""
    monkeypatch.chdir(tmp_path)
    TokenStore(tmp_path / "team a").close()
    for folder in (tmp_path / "whole" / name, Path(name)):
        store = TokenStore(folder)
        store.add([Draft(text="Told here.", filters=Filters("alice"))])
        store.close()
        assert (folder / "memory.sqlite").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"team a", "whole", name}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {name}
    other = TokenStore(tmp_path / "team a")
    assert other.valid(Filters("alice")) == []
    other.close()


def test_settings_of_sqlite_hold_on_every_connection(tmp_path):
    store = TokenStore(tmp_path / "memory")
    with store.database.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "secure_delete")
        }
        assert found == {"journal_mode": "wal", "secure_delete": 1}
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        # A server has some connections for each user; at SQLite's own 2,000 it grew 1.5 MiB a minute.
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -256


def test_a_memory_in_the_making_is_no_folder_of_other_files(tmp_path, monkeypatch):
    for name in (f"{dialects.NEW_FILE}.1", f".{dialects.POINTER_FILE}.4f", ".lock"):
        (tmp_path / name).touch()
    check_folder(tmp_path, create=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        check_folder(tmp_path, create=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / DATABASE_FILE).symlink_to("nowhere")
    with pytest.raises(ValueError, match="holds other files"):
        check_folder(tmp_path / "broken", create=True)

    # Another process makes it between the look for its database and the list of files.
    TokenStore(tmp_path / "made").close()
    exists, seen = Path.exists, []

    def late(path: Path) -> bool:
        seen.append(path.name)
        return exists(path) and (path.name != DATABASE_FILE or seen.count(DATABASE_FILE) > 1)

    monkeypatch.setattr(Path, "exists", late)
    check_folder(tmp_path / "made", create=True)
    assert seen.count(DATABASE_FILE) == 3  # not there, there, and checked


@pytest.mark.parametrize("size", [0, 1, 100, 512, 4096, 8192, 40_960])
def test_database_that_was_cut_off_is_damaged_not_new(tmp_path, size):
    store = TokenStore(tmp_path)
    store.add([Draft(text=f"memory {number}") for number in range(300)])
    store.close()
    path = tmp_path / DATABASE_FILE
    assert path.stat().st_size > size
    with path.open("r+b") as file:
        file.truncate(size)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{path} is damaged .*Restore a copy, or import an export elsewhere.$"):
        store = TokenStore(tmp_path, create=size % 2 == 0)
        store.valid()
    assert path.read_bytes() == before


def test_empty_database_keeps_the_log_that_lies_beside_it(tmp_path):
    (tmp_path / DATABASE_FILE).touch()
    (log := tmp_path / f"{DATABASE_FILE}-wal").write_bytes(b"what was told last")
    with pytest.raises(ValueError, match="is damaged .it has 0 bytes"):
        TokenStore(tmp_path)
    assert log.read_bytes() == b"what was told last"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("DROP TABLE memories", "no such table: memories"),
        ("DROP TABLE alembic_version", "no such table: alembic_version"),
        ("DELETE FROM alembic_version", "its schema is None"),
        ("UPDATE alembic_version SET version_num = 'x'", "its schema is 'x'"),
        ("ALTER TABLE memories RENAME COLUMN text TO content", "no such column: memories.text"),
    ],
)
def test_memory_without_a_part_of_its_schema_is_damaged(tmp_path, statement, reason):
    store = TokenStore(tmp_path)
    store.close()
    connection = sqlite3.connect(tmp_path / DATABASE_FILE)
    connection.execute(statement)
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match=f"is damaged .{reason}"):
        TokenStore(tmp_path).valid()


def test_database_without_tables_is_damaged_not_new(tmp_path):
    connection = sqlite3.connect(tmp_path / DATABASE_FILE)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    assert (tmp_path / DATABASE_FILE).stat().st_size
    with pytest.raises(ValueError, match="is damaged .it has no tables"):
        TokenStore(tmp_path)


def test_what_a_killed_maker_left_is_made_anew(tmp_path):
    (tmp_path / ".lock").touch()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f".{DATABASE_FILE}.new{suffix}").write_bytes(b"half")
    with pytest.raises(ValueError, match="No memory at"):
        TokenStore(tmp_path, create=False)
    store = TokenStore(tmp_path)
    store.add([Draft(text="one")])
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", DATABASE_FILE]
