"""What differs between a memory's databases: SQLite's file in its folder, and a schema of a PostgreSQL server.

Tables, statements and transactions are one SQLAlchemy Core code; here is how each database is opened, made, locked,
erased, and what its errors mean. The full-text index, whose languages differ, is in `hypernet.memory.store.full_text`.
"""

import errno
import json
import logging
import os
import re
import secrets
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError

from hypernet.io.files import replaced, sync_folder
from hypernet.memory.store.schema import APPLICATION_ID, SCHEMA_VERSION

DATABASE_FILE, POINTER_FILE = "memory.sqlite", "memory.postgresql"
NEW_FILE = f".{DATABASE_FILE}.new"  # until it has its tables
_SMALLEST_PAGE = 512  # bytes, of SQLite
BUSY_TIMEOUT_S = 30.0
# Pages that a connection of SQLite keeps. Its own 2,000 KiB are reached only after thousands of writes, so a server,
# with some connections for each user, grew all the while. Searches of 10,000 memories take as long with 64 as with
# 2,000, for the system caches the file too; one write of 10,000 takes 7% longer with 256, and 18% with 128.
_CACHE_KIB = 256
_CONNECT_TIMEOUT_S = 10
_ERASED_TABLES = ("memories", "vectors", "words", "words_counted")  # whose rows hold content
_COMMENT = "hypernet memory "  # and an id: of the table alembic_version, which SQLite's application_id stands for
_SECRETS = ("password", "sslpassword", "oauth_client_secret")  # of a URL's query; libpq takes them there too
_UNREACHED = ("08", "28", "3D", "57")  # SQLSTATE classes: connection, authorization, database, operator intervention
_INSTALL = "PostgreSQL needs the extra [postgres]: pip install 'doc-to-lora[postgres]'."


class Dialect(ABC):
    """One memory's database.

    Attributes:
        place: it, for messages; never a password.
    """

    place: str

    @property
    @abstractmethod
    def errors(self) -> tuple[type[Exception], ...]:
        """Of the driver, where SQLAlchemy is not in between."""

    @abstractmethod
    def engine(self) -> Engine:
        """A pool of connections. Transactions with the execution option `writes` exclude one another."""

    @abstractmethod
    def prepare(self, engine: Engine) -> None:
        """Makes the tables where there are none, or brings them to this version. The caller is alone in the folder.

        Raises:
            ValueError: it is damaged, another program's or of a newer version.
        """

    @abstractmethod
    def erase(self, engine: Engine) -> bool:
        """Rewrites what held deleted rows. False where another transaction may still read them."""

    @abstractmethod
    def damage(self, connection: Connection) -> list[str]:
        """What the database itself finds wrong; empty if nothing is, or if it has no such check."""

    @abstractmethod
    def finds_vectors(self, connection: Connection) -> bool:
        """Whether the table `vectors` has a column `embedding` of pgvector's type."""

    @abstractmethod
    def num_bytes(self, connection: Connection) -> int:
        """Of what lies outside the folder."""

    @abstractmethod
    def make_twin(self, connection: Connection, name: str) -> str | None:
        """The URL of an empty database beside this one, of which `name` is a part; None: SQLite in any folder."""

    @abstractmethod
    def drop_twin(self, connection: Connection, name: str) -> None:
        """Undoes `make_twin`, whether or not it was called."""

    @abstractmethod
    def counters(self, connection: Connection) -> dict[str, int]:
        """Table → the highest number that its rows ever had, where numbers are not given twice."""

    @abstractmethod
    def set_counters(self, connection: Connection, last: Mapping[str, int]) -> None:
        """Numbers that follow are higher than these."""

    @abstractmethod
    def explained(self, error: Exception) -> Exception:
        """What an error means to the user, in one line; itself where that is not known."""

    def damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.place} is damaged ({reason}). Restore a copy, or import an export elsewhere.")

    def is_old(self, version: object) -> bool:
        """Whether a schema of this version is to be migrated.

        Raises:
            ValueError: it is no version, or a newer one.
        """
        if version is None or not str(version).isdecimal():
            raise self.damaged(f"its schema is {version!r}")
        if str(version) > SCHEMA_VERSION:
            raise ValueError(
                f"{self.place} has schema {version}, this version reads up to {SCHEMA_VERSION}. Use the version that "
                "wrote it."
            )
        return str(version) < SCHEMA_VERSION


class SQLite(Dialect):
    """memory.sqlite in the memory's folder."""

    def __init__(self, folder: Path, file: str = DATABASE_FILE) -> None:
        self.path = folder / file
        self.place = str(self.path)

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        return (sqlite3.Error,)

    def check(self) -> None:
        """Raises ValueError where the file is none. Before SQLite opens it: an empty file or a byte is a new database
        to it, whose log it throws away."""
        if self.path.is_file() and (size := self.path.stat().st_size) < _SMALLEST_PAGE:
            raise self.damaged(f"it has {size} bytes")

    def engine(self) -> Engine:
        # Not as text of a URL, where % and ? in a folder's name would lead into another folder.
        url = URL.create("sqlite", database=str(self.path.absolute()))
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

        @event.listens_for(engine, "connect")
        def connect(connection: DBAPIConnection, _: Any) -> None:
            connection.isolation_level = None  # transactions are begun below, not by sqlite3
            for setting in (
                "journal_mode = WAL",
                "synchronous = FULL",  # what was acknowledged survives a power cut too
                "secure_delete = ON",  # deleted content is overwritten at once
                "temp_store = MEMORY",  # no content in temporary files
                f"cache_size = -{_CACHE_KIB}",
                "foreign_keys = ON",
            ):
                connection.execute(f"PRAGMA {setting}")
            # SQLite has it since 3.43.
            connection.create_function("octet_length", 1, _octet_length, deterministic=True)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A transaction that first reads and then writes would fail, not wait, if another had written in between.
            writes = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    def prepare(self, engine: Engine) -> None:
        if not self.path.exists():
            self._make()
            return
        with engine.connect() as connection, connection.begin():
            identity = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            if not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one():
                raise self.damaged("it has no tables")
            if identity != APPLICATION_ID:
                raise ValueError(f"{self.path} is the database of another program. Name another folder.")
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
        if self.is_old(found):
            self._upgrade(engine)

    def _make(self) -> None:
        """A file is there with all of its tables or not at all, so one without them is a damaged memory's."""
        for left in self.path.parent.glob(f"{NEW_FILE}*"):  # by a killed process
            left.unlink()
        new = SQLite(self.path.parent, NEW_FILE)
        engine = new.engine()
        try:
            self._upgrade(engine)
        finally:
            engine.dispose()  # with its last connection the log goes into the file
        new.path.replace(self.path)
        sync_folder(self.path.parent)

    def _upgrade(self, engine: Engine) -> None:
        with engine.execution_options(writes=True).connect() as connection, connection.begin():
            _upgrade(connection)
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")

    def erase(self, engine: Engine) -> bool:
        with closing(engine.raw_connection()) as pooled:
            connection = pooled.driver_connection
            assert isinstance(connection, sqlite3.Connection)
            connection.execute("VACUUM")  # refuses to run in a transaction
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def damage(self, connection: Connection) -> list[str]:
        found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def finds_vectors(self, connection: Connection) -> bool:
        return False

    def num_bytes(self, connection: Connection) -> int:
        return 0

    def make_twin(self, connection: Connection, name: str) -> str | None:
        return None

    def drop_twin(self, connection: Connection, name: str) -> None:
        pass

    def counters(self, connection: Connection) -> dict[str, int]:
        return {name: last for name, last in connection.exec_driver_sql("SELECT name, seq FROM sqlite_sequence")}

    def set_counters(self, connection: Connection, last: Mapping[str, int]) -> None:
        for name, number in last.items():
            values = {"name": name, "seq": number}
            connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), values)
            connection.execute(text("INSERT INTO sqlite_sequence(name, seq) VALUES(:name, :seq)"), values)

    def explained(self, error: Exception) -> Exception:
        reason = str(getattr(error, "orig", error))
        if "full" in reason:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if "readonly" in reason:
            return OSError(errno.EROFS, "The memory may not be written", str(self.path))
        if "locked" in reason or "busy" in reason:
            return _busy(self.place)
        if "unable to open" in reason:
            return OSError(errno.EACCES, "The memory cannot be opened", str(self.path))
        if "I/O" in reason:
            return OSError(errno.EIO, "The disk failed", str(self.path))
        if any(sign in reason for sign in ("not a database", "malformed", "no such table", "no such column")):
            return self.damaged(reason)
        return error


class PostgreSQL(Dialect):
    """The first schema of a connection's search path. The folder keeps its URL, without a password, and its id.

    Args:
        folder: of the memory.
        url: None: the one that the folder keeps. A password that it lacks is libpq's to find: PGPASSWORD, ~/.pgpass.

    Raises:
        ValueError: it is no URL of PostgreSQL, or the driver is not installed.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        self._pointer = folder / POINTER_FILE
        self._kept = _kept(self._pointer)
        self._url = postgres_url(self._kept["url"] if url is None else url)
        shown = URL.create("postgresql", host=self._url.host, port=self._url.port, database=self._url.database)
        schema = re.search(r"search_path[= ]+([^\s,]+)", str(self._url.query.get("options", "")))
        self.place = f"{shown.render_as_string()}{f', schema {schema[1]}' if schema else ''}"

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        import psycopg

        return (psycopg.Error,)

    def engine(self) -> Engine:
        # Parameters hold content, which no message is to repeat. A server that was started again closed what is pooled.
        # One connection stays open: `hypernet serve` has a memory for each user, and PostgreSQL 100 connections.
        engine = create_engine(
            self._url,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=1,
            max_overflow=14,
            connect_args={"client_encoding": "utf8", "connect_timeout": _CONNECT_TIMEOUT_S},
        )

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            if connection.get_execution_options().get("writes", False):
                # READ COMMITTED: what the writer before had written is seen once it is this one's turn. Not a lock of
                # a table, for which autovacuum would have to give way.
                connection.exec_driver_sql(
                    f"SET LOCAL lock_timeout = {round(1000 * BUSY_TIMEOUT_S)}; "
                    f"SELECT pg_advisory_xact_lock({APPLICATION_ID}, oid::int4) FROM pg_namespace "
                    "WHERE nspname = current_schema()"
                )
            else:
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

        return engine

    def prepare(self, engine: Engine) -> None:
        with engine.execution_options(writes=True).connect() as connection, connection.begin():
            schema, encoding = connection.exec_driver_sql(
                "SELECT current_schema(), current_setting('server_encoding')"
            ).one()
            if schema is None:
                raise ValueError(f"{self.place} is not there. Make it first: CREATE SCHEMA ...")
            if encoding != "UTF8":
                raise ValueError(f"{self.place} has the encoding {encoding}. Name a database that has UTF8.")
            tables, comment = connection.execute(
                text(
                    "SELECT count(*), max(obj_description(oid, 'pg_class')) FILTER (WHERE relname = 'alembic_version') "
                    "FROM pg_class WHERE relnamespace = CAST(:schema AS regnamespace) AND relkind IN ('r', 'p')"
                ),
                {"schema": f'"{schema}"'},
            ).one()
            if not tables and self._kept:
                raise self.damaged("it has no tables")
            if not tables:
                identity = secrets.token_hex(16)
                _upgrade(connection)
                connection.exec_driver_sql(f"COMMENT ON TABLE alembic_version IS '{_COMMENT}{identity}'")
            else:
                identity = str(comment or "").removeprefix(_COMMENT)
                if not self._kept and not str(comment).startswith(_COMMENT):
                    raise ValueError(
                        f"{self.place} holds tables of another program. Give the memory a schema of its own: CREATE "
                        "SCHEMA name, and ?options=-csearch_path%3Dname at the end of the URL."
                    )
                found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
                if self._kept and self._kept["identity"] != identity:
                    raise ValueError(f"{self.place} holds another memory than {self._pointer.parent}. Check the URL.")
                if self.is_old(found):
                    _upgrade(connection)
        open_query = {name: value for name, value in self._url.query.items() if name not in _SECRETS}
        # Not `set`, to which None means to keep the password.
        url = self._url._replace(password=None).set(query=open_query)
        self._keep({"identity": identity, "url": url.render_as_string(hide_password=False)})

    def _keep(self, values: dict[str, str]) -> None:
        if values == self._kept or (self._kept and not os.access(self._pointer.parent, os.W_OK)):
            return
        with replaced(self._pointer) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._kept = values

    def erase(self, engine: Engine) -> bool:
        told: list[int] = []  # by VERBOSE, for each table: rows that another transaction may still see

        def note(diagnostic: Any) -> None:
            if diagnostic.message_detail and (number := re.search(r"\d+", diagnostic.message_detail)):
                told.append(int(number.group()))

        with closing(engine.raw_connection()) as pooled:
            connection: Any = pooled.driver_connection
            connection.rollback()
            connection.autocommit = True  # VACUUM refuses to run in a transaction
            connection.add_notice_handler(note)
            try:
                connection.execute(f"SET lock_timeout = {round(1000 * BUSY_TIMEOUT_S)}")
                connection.execute(f"VACUUM (FULL, VERBOSE) {', '.join(_ERASED_TABLES)}")
            except Exception as error:
                if _sqlstate(error) == "55P03":
                    return False
                raise
            finally:
                connection.remove_notice_handler(note)
                if not connection.closed:
                    connection.execute("RESET lock_timeout")
                    connection.autocommit = False
        if len(told) < len(_ERASED_TABLES):  # it only warns
            raise OSError(errno.EACCES, "Only the owner of the tables may erase what was deleted from", self.place)
        return not any(told)

    def damage(self, connection: Connection) -> list[str]:
        return []

    def finds_vectors(self, connection: Connection) -> bool:
        statement = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'vectors'::regclass AND attname = 'embedding'"
        return bool(connection.exec_driver_sql(statement).scalar())

    def num_bytes(self, connection: Connection) -> int:
        statement = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relnamespace = "
        return int(connection.exec_driver_sql(f"{statement}current_schema()::regnamespace").scalar() or 0)

    def make_twin(self, connection: Connection, name: str) -> str | None:
        schema = self._twin(connection, name)
        connection.exec_driver_sql(f'CREATE SCHEMA "{schema}"')
        # Behind it the others, where extensions are, but not this memory's own.
        path = connection.exec_driver_sql("SELECT current_schemas(false)").scalar_one()
        return self._searching([schema, *path[1:]])

    def schema_url(self, name: str) -> str:
        """The URL of a schema of this name, made where it is missing; behind it those that were searched before.

        Raises:
            OSError: the server cannot be reached, or no schema be made.
        """
        assert name.isidentifier() and name == name.lower()  # it needs no quotes
        with self._connected() as connection:
            path = connection.exec_driver_sql("SELECT current_schemas(false)").scalar_one()
            # Not IF NOT EXISTS alone, for which a role that may make none is refused.
            if not connection.exec_driver_sql(f"SELECT to_regnamespace('{name}')").scalar():
                connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {name}")
            return self._searching([name, *(one for one in path if one != name)])

    def check_schemas(self) -> None:
        """ValueError if the role may make no schema; OSError if the server cannot be reached."""
        with self._connected() as connection:
            statement = "SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE')"
            role, database, may = connection.exec_driver_sql(statement).one()
        if not may:
            raise ValueError(
                f"The role {role} may make no schema in {self.place}. Let it: GRANT CREATE ON DATABASE {database} TO "
                f"{role}."
            )

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """One writing transaction, on a connection that is closed after it."""
        engine = self.engine()
        try:
            with engine.execution_options(writes=True).connect() as connection, connection.begin():
                yield connection
        except Exception as error:
            raise self.explained(error) from error
        finally:
            engine.dispose()

    def _searching(self, path: list[str]) -> str:
        options = f"{self._url.query.get('options', '')} -csearch_path={','.join(path)}".strip()
        return self._url.update_query_dict({"options": options}).render_as_string(hide_password=False)

    def drop_twin(self, connection: Connection, name: str) -> None:
        connection.exec_driver_sql(f'DROP SCHEMA IF EXISTS "{self._twin(connection, name)}" CASCADE')

    def _twin(self, connection: Connection, name: str) -> str:
        schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
        # A name has 63 bytes at most; only what needs no quotes is safe in a search path.
        return re.sub(r"[^a-z0-9_]", "_", f"{schema[:30]}_{name}".casefold())

    def counters(self, connection: Connection) -> dict[str, int]:
        return {
            table: connection.exec_driver_sql(f"SELECT last_value FROM {sequence} WHERE is_called").scalar() or 0
            for table, sequence in self._sequences(connection)
        }

    def set_counters(self, connection: Connection, last: Mapping[str, int]) -> None:
        for table, sequence in self._sequences(connection):
            if last.get(table):
                connection.execute(text("SELECT setval(:sequence, :last)"), {"sequence": sequence, "last": last[table]})

    def _sequences(self, connection: Connection) -> list[tuple[str, str]]:
        rows = connection.exec_driver_sql(
            "SELECT t.relname, d.objid::regclass::text FROM pg_depend d JOIN pg_class t ON t.oid = d.refobjid "
            "JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' WHERE d.deptype = 'a' "
            "AND t.relnamespace = current_schema()::regnamespace"
        )
        return [(table, sequence) for table, sequence in rows]

    def explained(self, error: Exception) -> Exception:
        import psycopg

        state, reason = _sqlstate(error), " ".join(str(getattr(error, "orig", error)).split())
        meanings: dict[str, Callable[[], Exception]] = {
            "53100": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.place),
            "25006": lambda: OSError(errno.EROFS, "The memory may not be written", self.place),
            "42501": lambda: OSError(errno.EACCES, f"PostgreSQL refuses: {reason}", self.place),
            "55P03": lambda: _busy(self.place),
            "42P01": lambda: self.damaged(reason.partition(" LINE ")[0]),
            "42703": lambda: self.damaged(reason.partition(" LINE ")[0]),
            "XX001": lambda: self.damaged(reason),
            "XX002": lambda: self.damaged(reason),
        }
        if state in meanings:
            return meanings[state]()
        if "NUL (0x00)" in reason:
            return ValueError("A text holds the character U+0000, which PostgreSQL does not store. Leave it out.")
        if isinstance(getattr(error, "orig", error), psycopg.OperationalError) and (state or "08")[:2] in _UNREACHED:
            return OSError(f"{self.place} cannot be reached: {reason[:300]}")
        return error


def postgres_url(url: str | URL) -> URL:
    """With its driver.

    Raises:
        ValueError: it is no URL of PostgreSQL, or the driver is not installed. The URL, which may hold a password, is
            not repeated.
    """
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        found = None
    if found is None or found.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ValueError("database is no URL of PostgreSQL. Give postgresql+psycopg://user@host/name.")
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise ValueError(_INSTALL) from error
    return found.set(drivername="postgresql+psycopg")


def _kept(pointer: Path) -> dict[str, str]:
    """What the folder keeps of its database; empty if there is nothing."""
    try:
        found = json.loads(pointer.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("identity", "url")):
        raise ValueError(f"{pointer} is damaged. Remove it, and open the folder with database=URL.")
    return found


def _upgrade(connection: Connection) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells each of its plugins
    # Alembic takes 0.4 s to import; a memory of this version does not need it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _busy(place: str) -> OSError:
    return OSError(f"Another process has been writing to {place} for {BUSY_TIMEOUT_S:.0f} s. Try again.")


def _octet_length(value: str | bytes | None) -> int | None:
    return None if value is None else len(value.encode() if isinstance(value, str) else value)


def _sqlstate(error: Exception) -> str | None:
    return getattr(getattr(error, "orig", error), "sqlstate", None)
