"""The SQLite file of a memory: opened, migrated, and read and written in transactions by any number of processes.

database = Database(Path("outputs/memory"), create=True)
with database.write() as connection: ...       # one writer at a time; all of the block or nothing
with database.read() as connection: ...        # one state of the data throughout
database.erase()                               # what was deleted leaves the free pages and the log too
"""

import errno
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError

from hypernet.io.files import sync_folder
from hypernet.memory.store.schema import APPLICATION_ID, SCHEMA_VERSION

DATABASE_FILE, _LOCK_FILE = "memory.sqlite", ".lock"
_NEW_FILE = f".{DATABASE_FILE}.new"  # until it has its tables
_SMALLEST_PAGE = 512  # bytes, of SQLite
BUSY_TIMEOUT_S = 30.0


class Database:
    """A connection pool on one folder's memory.sqlite.

    Args:
        folder: of the memory.
        create: whether it may be made where it is missing.

    Raises:
        ValueError: the folder is no memory, a damaged one, or one of a newer version.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        self.path = folder / DATABASE_FILE
        check_folder(folder, create=create)
        folder.mkdir(parents=True, exist_ok=True)
        self._closed = False
        self._engine = _engine(self.path)
        with _locked(folder / _LOCK_FILE), self._translated():
            if self.path.exists():
                self._migrate()
            else:
                self._make()

    def close(self) -> None:
        """Whatever is called afterwards raises ValueError."""
        self._closed = True
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the data.

        Raises:
            OSError, ValueError: as `write`.
        """
        with self._translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that nobody else writes beside; committed when the block ends well, else nothing has changed.

        Raises:
            OSError: the disk is full, the file is read-only or another process held it for `BUSY_TIMEOUT_S`.
            ValueError: the file is damaged.
        """
        engine = self._engine.execution_options(writes=True)
        with self._translated(), engine.connect() as connection, connection.begin():
            yield connection

    def erase(self) -> bool:
        """Rewrites the file without its free pages and empties the write-ahead log.

        Returns:
            False where another process was reading meanwhile, so that the log still holds old pages.
        """
        with self._translated(), closing(self._engine.raw_connection()) as pooled:
            connection = pooled.driver_connection
            assert isinstance(connection, sqlite3.Connection)
            connection.execute("VACUUM")  # refuses to run in a transaction
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file; empty if nothing is."""
        with self.read() as connection:
            found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def _make(self) -> None:
        """A file is there with all of its tables or not at all, so one without them is a damaged memory's."""
        new = self.path.with_name(_NEW_FILE)
        for left in self.path.parent.glob(f"{_NEW_FILE}*"):  # by a killed process
            left.unlink()
        engine = _engine(new)
        try:
            _upgrade(engine)
        finally:
            engine.dispose()  # with its last connection the log goes into the file
        new.replace(self.path)
        sync_folder(self.path.parent)

    def _migrate(self) -> None:
        with self._engine.connect() as connection, connection.begin():
            identity = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
            if not tables:
                raise _damaged(self.path, "it has no tables")
            if identity != APPLICATION_ID:
                raise ValueError(f"{self.path} is the database of another program. Name another folder.")
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
        if found == SCHEMA_VERSION:
            return
        if found is None or not str(found).isdecimal():
            raise _damaged(self.path, f"its schema is {found!r}")
        if found > SCHEMA_VERSION:
            raise ValueError(
                f"{self.path} has schema {found}, this version reads up to {SCHEMA_VERSION}. Use the version that "
                "wrote it."
            )
        _upgrade(self._engine)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed:
            raise ValueError(f"The memory {self.path.parent} was closed. Open it again.")
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        reason = str(getattr(error, "orig", error))
        if "full" in reason:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if "readonly" in reason:
            return OSError(errno.EROFS, "The memory may not be written", str(self.path))
        if "locked" in reason or "busy" in reason:
            return OSError(f"Another process has been writing to {self.path} for {BUSY_TIMEOUT_S:.0f} s. Try again.")
        if "unable to open" in reason:
            return OSError(errno.EACCES, "The memory cannot be opened", str(self.path))
        if "I/O" in reason:
            return OSError(errno.EIO, "The disk failed", str(self.path))
        if any(sign in reason for sign in ("not a database", "malformed", "no such table", "no such column")):
            return _damaged(self.path, reason)
        return error


def check_folder(folder: Path, *, create: bool) -> None:
    """Raises ValueError unless the folder is a memory that is not empty, or may become one. Makes nothing."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name the folder of a memory.")
    if (path := folder / DATABASE_FILE).exists():
        # Before SQLite opens it: an empty file or a byte is a new database to it, whose log it throws away.
        if path.is_file() and (size := path.stat().st_size) < _SMALLEST_PAGE:
            raise _damaged(path, f"it has {size} bytes")
        return
    if not create:
        raise ValueError(f"No memory at {folder}: {DATABASE_FILE} is missing. Check the path, or add a memory first.")
    # A lock and a new file are what a process leaves that was killed while it made the memory.
    if folder.exists() and any(
        path.name != _LOCK_FILE and not path.name.startswith(_NEW_FILE) for path in folder.iterdir()
    ):
        raise ValueError(f"{folder} holds other files and no {DATABASE_FILE}. Name an empty or a new folder.")


def check_outside(path: Path) -> None:
    """Raises ValueError if `path`, or what it links to, lies in the folder of a memory."""
    for place in (path.parent.resolve() / path.name, path.resolve()):
        if folder := next((parent for parent in place.parents if (parent / DATABASE_FILE).exists()), None):
            raise ValueError(f"{path} lies in {folder}, the folder of a memory. Name a file elsewhere.")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}). Restore a copy, or import an export elsewhere.")


def _upgrade(engine: Engine) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells each of its plugins
    # Alembic takes 0.4 s to import; a memory of this version does not need it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.execution_options(writes=True).connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes that open this memory: SQLite refuses to wait while another turns its log on."""
    try:
        lock = path.open("a")
    except OSError:  # a memory that may only be read
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def connect(connection: DBAPIConnection, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by sqlite3
        for setting in (
            "journal_mode = WAL",
            "synchronous = FULL",  # what was acknowledged survives a power cut too
            "secure_delete = ON",  # deleted content is overwritten at once
            "temp_store = MEMORY",  # no content in temporary files
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that first reads and then writes would fail, not wait, if another had written in between.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
