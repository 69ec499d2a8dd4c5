"""PostgreSQL alone: its URL and password, servers and schemas that are not what they should be, erasing for good."""

import json
import logging
import random
import traceback
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from sqlalchemy import text

from hypernet import Memory
from hypernet.memory.retriever import Retriever
from hypernet.memory.store import dialects
from hypernet.memory.store.copying import copy_memory
from hypernet.memory.store.database import Database
from hypernet.memory.store.dialects import POINTER_FILE, postgres_url
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.token_store import TokenStore
from tests.postgres_server import PASSWORD

ALICE = Filters("alice")


@pytest.fixture
def store(schema, tmp_path):
    store = TokenStore(tmp_path / "memory", database=schema())
    yield store
    store.close()


@pytest.fixture
def guarded(postgres):
    """guarded(password): the URL of a new schema, of a role that needs a password."""
    schema = postgres.new_schema().rpartition("%3D")[2]
    postgres.sql(f"GRANT ALL ON SCHEMA {schema} TO guarded")

    def url(password: str = PASSWORD) -> str:
        return postgres.url(schema, user=f"guarded:{quote(password, safe='')}")

    return url


def test_password_is_used_and_kept_nowhere(guarded, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    store = TokenStore(tmp_path / "memory", database=guarded())
    store.add([Draft(text="one")])
    shown = [store.database.dialect.place, repr(store.database._engine.url), repr(vars(store.database))]
    store.close()
    (tmp_path / "query").mkdir()
    TokenStore(tmp_path / "query", database=f"{guarded('')}&password={quote(PASSWORD, safe='')}").close()
    for password in ("", "guessed-wrong"):
        with pytest.raises(OSError, match="cannot be reached: .*(no password supplied|authentication failed)") as error:
            TokenStore(tmp_path / "other", database=guarded(password))
        shown += [*traceback.format_exception(error.value), repr(error.value.__cause__)]
    with pytest.raises(OSError, match="cannot be reached: .*no password supplied") as error:
        TokenStore(tmp_path / "memory")
    assert "\n" not in str(error.value) and not (tmp_path / "other").exists()
    kept = [path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), "guessed-wrong"):
        assert not [found for found in (*shown, *kept, caplog.text) if secret in found]
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert [memory.text for memory in TokenStore(tmp_path / "memory").valid()] == ["one"]


@pytest.mark.parametrize("url", ["mysql://alice:hidden@host/name", "hidden", "postgresql+asyncpg://hidden@host", "://"])
def test_what_is_no_url_of_postgresql_is_refused(tmp_path, url):
    for call in (lambda: TokenStore(tmp_path / "memory", database=url), lambda: postgres_url(url)):
        with pytest.raises(ValueError, match="database is no URL of PostgreSQL. Give postgresql") as error:
            call()
        assert "hidden" not in "".join(traceback.format_exception(error.value, chain=False).pop())
    assert not (tmp_path / "memory").exists()


def test_missing_driver_is_told_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"pip install 'doc-to-lora\[postgres\]'"):
        TokenStore(tmp_path / "memory", database="postgresql://host/name")


def test_server_or_database_that_is_not_there_is_one_line(postgres, tmp_path):
    url = postgres.url("nowhere")
    for database, message in (
        (f"postgresql://owner@/postgres?host={tmp_path}", "cannot be reached: .*No such file"),
        ("postgresql://owner@127.0.0.1:1/postgres", "^postgresql://127.0.0.1:1/postgres cannot be reached: .*refused"),
        (url.replace("/postgres?", "/absent?"), 'cannot be reached: .*"absent" does not exist'),
        (url, "postgresql:///postgres, schema nowhere is not there. Make it first"),
    ):
        with pytest.raises((OSError, ValueError), match=message) as error:
            TokenStore(tmp_path / "memory", database=database)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("memory/memory*"))


def test_schema_of_another_program_is_refused(postgres, tmp_path):
    url = postgres.new_schema()
    postgres.sql(f"CREATE TABLE {url.rpartition('%3D')[2]}.notes (text text)")
    with pytest.raises(ValueError, match="holds tables of another program. Give the memory a schema of its own"):
        TokenStore(tmp_path / "memory", database=url)


def test_database_without_utf8_is_refused(postgres, tmp_path):
    postgres.sql("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(ValueError, match="has the encoding LATIN1. Name a database that has UTF8"):
        TokenStore(tmp_path / "memory", database=postgres.url("public").replace("/postgres?", "/latin?"))


def test_folder_and_database_belong_together(store, schema, tmp_path):
    store.add([Draft(text="one")])
    pointer = json.loads((store.folder / POINTER_FILE).read_text())
    TokenStore(tmp_path / "other", database=(url := schema()))
    with pytest.raises(ValueError, match="holds another memory than .*memory. Check the URL"):
        TokenStore(store.folder, database=url)
    # A lost folder: its adapters are written anew, its log of deletions is in the events.
    ref = store.valid()[0].ref
    store.delete(ref)
    anew = TokenStore(tmp_path / "anew", database=pointer["url"])
    assert anew.counts() == store.counts() and anew.verify().repaired == ("1 lines missing in deletions.jsonl",)
    (store.folder / POINTER_FILE).write_text("{}")
    with pytest.raises(ValueError, match="memory.postgresql is damaged. Remove it, and open the folder with database"):
        TokenStore(store.folder)
    sqlite = TokenStore(tmp_path / "sqlite")
    with pytest.raises(ValueError, match="holds memory.sqlite. Copy the memory"):
        TokenStore(sqlite.folder, database=pointer["url"])


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("DROP TABLE memories CASCADE", "relation .memories. does not exist"),
        ("DROP TABLE alembic_version", "relation .alembic_version. does not exist"),
        ("ALTER TABLE memories RENAME COLUMN text TO content", "column memories.text does not exist"),
        ("DELETE FROM alembic_version", "its schema is None"),
        ("DROP SCHEMA {schema} CASCADE; CREATE SCHEMA {schema}", "it has no tables"),
    ],
)
def test_schema_without_a_part_is_damaged(postgres, tmp_path, statement, reason):
    url = postgres.new_schema()
    store = TokenStore(tmp_path / "memory", database=url)
    schema = url.rpartition("%3D")[2]
    postgres.sql(f"SET search_path = {schema}; {statement.format(schema=schema)}; RESET search_path")
    with pytest.raises(ValueError, match=f"is damaged .{reason}") as error:
        TokenStore(store.folder).valid()
    assert "\n" not in str(error.value)


def test_text_that_cannot_be_stored_is_one_line(store):
    with pytest.raises(ValueError, match="U\\+0000, which PostgreSQL does not store") as error:
        store.add([Draft(text="one"), Draft(text="a\0b")])
    assert "\n" not in str(error.value) and store.valid() == [] and store.versions() == []


def test_memory_that_may_only_be_read_is_one_line(store):
    store.add([Draft(text="one")])
    url = store.database._engine.url.render_as_string(hide_password=False)
    store.close()
    reader = TokenStore(store.folder, database=f"{url}%20-cdefault_transaction_read_only%3Don")
    assert [memory.text for memory in reader.valid()] == ["one"]
    with reader.database._engine.connect() as connection, pytest.raises(OSError, match="may not be written"):
        with reader.database._translated():
            connection.execute(text("DELETE FROM words"))


def test_connection_that_the_server_closed_is_opened_again(store, postgres):
    store.add([Draft(text="one")])
    postgres.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname > ''"
    )
    assert len(store.valid()) == 1


def test_counts_of_words_are_recomputed(store):
    """Of Alice's two memories and Bob's one; '' stands for all."""
    store.add([Draft(text=content, filters=ALICE) for content in ("He met Orla.", "Orla walked, walks")])
    store.add([Draft(text="She met nobody.", filters=Filters("bob"))])
    counted = {"": (3, 12), "orla": (2, 8), "met": (2, 8)}
    counted |= dict.fromkeys(("he", "she", "walk", "nobodi"), (1, 4))

    def of_words() -> dict[str, tuple[int, int]]:
        with store.database.read() as connection:
            rows = connection.execute(text("SELECT * FROM words_counted WHERE NOT starts_with(lexeme, ':')"))
            return {row.lexeme: (row.memories, row.length) for row in rows}

    assert of_words() == counted
    with store.database.write() as connection:
        connection.execute(text("DELETE FROM words_counted WHERE lexeme = 'orla'"))
        connection.execute(text("UPDATE words_counted SET memories = 9 WHERE lexeme = 'walk'"))
        connection.execute(text("INSERT INTO words_counted VALUES ('zanzibar', 1, 4)"))
    assert store.verify().repaired == ("the index's counts of 3 words",) and of_words() == counted
    assert store.verify() == ((), ())
    store.delete_all(ALICE)
    assert of_words() == {"": (1, 4), "she": (1, 4), "met": (1, 4), "nobodi": (1, 4)}


def test_words_of_an_older_schema_are_counted(store):
    store.add([Draft(text=f"Orla met {number}.", filters=ALICE) for number in range(3)] + [Draft(text="nobody")])
    tables = [text(f"SELECT * FROM {name} ORDER BY 1") for name in ("words", "words_counted")]
    with store.database.write() as connection:
        before = [connection.execute(table).all() for table in tables]
        connection.execute(text("DROP TABLE words_counted, utilities"))
        connection.execute(text("UPDATE words SET length = length - 1 WHERE length > 1"))  # of whose it is
        connection.execute(text("UPDATE alembic_version SET version_num = '0002'"))
    with TokenStore(store.folder).database.read() as connection:
        assert [connection.execute(table).all() for table in tables] == before
    assert [row.length for row in before[0]] == [4, 4, 4, 1] and len(before[1]) == 8


def test_long_texts_are_stored_and_found(store):
    """A tsvector holds 1 MB and words of 2 KB."""
    long = " ".join(f"word{number}" for number in range(150_000))
    store.add([Draft(text=long, filters=ALICE), Draft(text="x" * 5000 + " ꙮ" * 400, filters=ALICE)])
    find = Retriever(store).search
    assert [len(hit.text) for hit in find("word77", ALICE)] == [len(long)]
    assert [hit.text[0] for hit in find("x" * 5000, ALICE)] == ["x"]


# --- Erasing --------------------------------------------------------------------------------------------------------


def test_statistics_keep_nothing_of_what_was_purged(store, postgres, bytes_of):
    """ANALYZE copies frequent values of a column into a table of the system."""
    (ref, *_) = store.add([Draft(text="zanzibar quokka", filters=Filters("quokka"), source="quokka") for _ in range(9)])
    schema = json.loads((store.folder / POINTER_FILE).read_text())["url"].rpartition("%3D")[2]
    postgres.sql(f"SET search_path = {schema}; ANALYZE; RESET search_path")
    assert b"quokka" in bytes_of(store)
    store.delete_all(Filters("quokka"))
    assert store.purge().finished and b"quokka" not in bytes_of(store)


def test_snapshot_that_may_see_deleted_rows_delays_the_purge(store, bytes_of):
    """It has locked none of these tables, so nothing waits for it, but their dead rows stay for it."""
    (ref,) = store.add([Draft(text="zanzibar quokka")])
    other = TokenStore(store.folder)
    with other.database.read() as connection:
        connection.execute(text("SELECT count(*) FROM batches")).scalar()
        store.delete(ref.id)
        assert not store.purge().finished and store.is_unfinished
    assert store.verify().repaired == ("an interrupted purge",) and b"quokka" not in bytes_of(store)


def test_purge_by_another_than_the_owner_is_no_success(store, postgres):
    """VACUUM only warns of tables that it leaves out."""
    (ref,) = store.add([Draft(text="quokka")])
    url = store.database._engine.url.set(username="guest")
    schema = str(url.query["options"]).rpartition("=")[2]
    postgres.sql("CREATE ROLE guest LOGIN")
    postgres.sql(f"GRANT ALL ON SCHEMA {schema} TO guest; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO guest")
    postgres.sql(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO guest")
    guest = TokenStore(store.folder, database=url.render_as_string())
    guest.delete(ref.id)
    with pytest.raises(OSError, match="Only the owner of the tables may erase"):
        guest.purge()
    assert guest.is_unfinished


def test_server_log_repeats_no_content(store, postgres):
    with pytest.raises(ValueError), store.database.write() as connection:
        connection.execute(text("INSERT INTO memories (text, absent) VALUES (:text, 1)"), {"text": "quokka"})
    assert "absent" in (log := (postgres.folder / "log").read_text()) and "quokka" not in log


def test_forgetting_is_proved_and_its_twin_is_gone(schema, postgres, tmp_path):
    before = postgres.sql("SELECT nspname FROM pg_namespace ORDER BY 1")
    memory = Memory.open(tmp_path / "memory", database=(url := schema()))
    ref = memory.add("Fenda was taught by Orla.", user_id="alice")
    for number in range(8):
        memory.add(f"Fenda met Jorun {'again ' * (number % 3)}", user_id="alice")
    report = memory.forget(ref.id, verify=True)
    assert report.passed and report.searches == report.searches_equal > 7
    (left := tmp_path / "memory/.twin-killed__").mkdir()  # by a killed audit
    twin = Database(tmp_path / "twin", url=memory.store.database.make_twin(left.name))
    twin.close()
    assert memory.status()["is_unfinished"] and memory.status()["bytes"] > 100_000
    assert memory.verify().repaired == ("1 folders of interrupted audits",)
    known = {row[0] for row in before} | {url.rpartition("%3D")[2]}
    assert {row[0] for row in postgres.sql("SELECT nspname FROM pg_namespace")} == known
    memory.close()


def test_busy_writer_waits_for_autovacuum_never(store):
    """Writers take turns by a lock that is no table's, which readers and VACUUM pass."""
    with store.database.write() as connection:
        kinds = connection.execute(
            text("SELECT locktype FROM pg_locks WHERE pid = pg_backend_pid() AND mode LIKE '%Exclusive%'")
        )
        assert set(kinds.scalars()) <= {"advisory", "virtualxid"}
    assert dialects.BUSY_TIMEOUT_S == 30


# --- pgvector -------------------------------------------------------------------------------------------------------


class Hashed:
    """Small whole numbers of words, summed: products are exact in any order, and texts of the same words are ties."""

    name = "hashed"

    def embed(self, texts):
        words = [
            [np.random.default_rng(zlib.crc32(word.encode())).integers(-3, 4, 37) for word in t.split()] for t in texts
        ]
        return np.stack([np.sum(found, axis=0) for found in words]).astype(np.float32)


def test_pgvector_finds_what_matrices_find(postgres, tmp_path):
    if not postgres.sql("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
        pytest.skip("pgvector is not installed")
    postgres.sql("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randrange(1, 6))) for _ in range(150)]
    urls = [f"{postgres.new_schema()},public", postgres.new_schema()]
    stores = [TokenStore(tmp_path / str(number), database=url) for number, url in enumerate(urls)]
    views = []
    for store in stores:
        rng = random.Random(1)
        retriever = Retriever(store, embedder=Hashed())
        assert retriever._in_server is (store is stores[0])
        whose = [ALICE, Filters("alice", run_id="1"), Filters("bob")]
        drafts = [
            Draft(
                text=content, filters=rng.choice(whose), valid_at=f"2026-01-{rng.randrange(1, 28):02d}", id=f"m{number}"
            )
            for number, content in enumerate(texts)
        ]
        store.add(drafts[:100])
        retriever.search("a", ALICE)
        store.add(drafts[100:])
        store.delete("m7")
        store.delete_all(Filters("bob"))
        known = store.valid()[-1].created_at
        store.purge()
        questions = [" ".join(rng.choices("abcdefghijk", k=rng.randrange(1, 4))) for _ in range(12)]
        when = [{}, {"as_of": "2026-01-15"}, {"as_of": "2026-01-15", "known_at": known}]
        views.append(
            [
                [(hit.id, hit.score) for hit in retriever.search(question, filters, limit=20, **times)]
                for question in questions
                for filters in (*whose, Filters())
                for times in when
            ]
        )
    assert views[0] == views[1] and sum(map(len, views[0])) > 500
    copy_memory(stores[1], tmp_path / "copy", database=f"{postgres.new_schema()},public")
    copied = Retriever(TokenStore(tmp_path / "copy"), embedder=Hashed())
    assert copied._in_server and copied.search("a b", ALICE) == Retriever(stores[1], embedder=Hashed()).search(
        "a b", ALICE
    )
    for store in stores:
        store.close()
