"""The database of a memory: opened, migrated, and read and written in transactions by any number of processes.

database = Database(Path("outputs/memory"), create=True)          # or url="postgresql+psycopg://user@host/name"
with database.write() as connection: ...       # one writer at a time; all of the block or nothing
with database.read() as connection: ...        # one state of the data throughout
database.erase()                               # what was deleted leaves the free pages and the log too
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from hypernet.memory.store.dialects import DATABASE_FILE, NEW_FILE, POINTER_FILE, Dialect, PostgreSQL, SQLite

_LOCK_FILE = ".lock"


class Database:
    """A connection pool on one memory's database: memory.sqlite in its folder, or tables of a PostgreSQL server.

    Args:
        folder: of the memory.
        create: whether it may be made where it is missing.
        url: of PostgreSQL; None: the one that the folder keeps, or SQLite.

    Raises:
        ValueError: the folder is no memory, a damaged one, or one of a newer version; the URL is none.
        OSError: it cannot be read, written or reached.
    """

    def __init__(self, folder: Path, *, create: bool = True, url: str | None = None) -> None:
        check_folder(folder, create=create, url=url)
        self.folder = folder
        self.dialect: Dialect = PostgreSQL(folder, url) if url or (folder / POINTER_FILE).exists() else SQLite(folder)
        self._closed = False
        self._engine = self.dialect.engine()
        if url:  # before a folder is made
            with self.read():
                pass
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / _LOCK_FILE), self._translated():
            self.dialect.prepare(self._engine)

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
            OSError: the disk is full, nothing may be written, the server is not reached, or another process wrote for
                longer than `BUSY_TIMEOUT_S`.
            ValueError: the database is damaged, or cannot store a text.
        """
        engine = self._engine.execution_options(writes=True)
        with self._translated(), engine.connect() as connection, connection.begin():
            yield connection

    def erase(self) -> bool:
        """Rewrites what held deleted rows: SQLite's file and log, or the tables of PostgreSQL, whose log is its own.

        Returns:
            False where another process was reading meanwhile, so that something old may still be there.
        """
        with self._translated():
            return self.dialect.erase(self._engine)

    def damage(self) -> list[str]:
        """What SQLite finds wrong with its file; empty if nothing is. PostgreSQL has no such check."""
        with self.read() as connection:
            return self.dialect.damage(connection)

    def num_bytes(self) -> int:
        """Of what lies outside the folder."""
        with self.read() as connection:
            return self.dialect.num_bytes(connection)

    def make_twin(self, name: str) -> str | None:
        """The URL of an empty database of the same kind, for `drop_twin` to remove; None: SQLite in any folder."""
        with self.write() as connection:
            return self.dialect.make_twin(connection, name)

    def drop_twin(self, name: str) -> None:
        """Removes it, if it is there."""
        with self.write() as connection:
            self.dialect.drop_twin(connection, name)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed:
            raise ValueError(f"The memory {self.folder} was closed. Open it again.")
        try:
            yield
        except Exception as error:
            if isinstance(error, (DBAPIError, *self.dialect.errors)):
                raise self.dialect.explained(error) from error
            raise


def schema_url(url: str, name: str, *, folder: Path) -> str:
    """The URL of a schema that has this name, made where it is missing, of the database that `url` leads to.

    Args:
        folder: of the memory that will lie in it; it need not be there.

    Raises:
        ValueError: it is no URL of PostgreSQL.
        OSError: the server cannot be reached, or the role may not make a schema.
    """
    return PostgreSQL(folder, url).schema_url(name)


def check_schemas(url: str) -> None:
    """Raises as `schema_url`, or ValueError if the role may make no schema. Makes nothing."""
    PostgreSQL(Path(), url).check_schemas()


def check_folder(folder: Path, *, create: bool, url: str | None = None) -> None:
    """Raises ValueError unless the folder is a memory that is not empty, or may become one. Makes nothing."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name the folder of a memory.")
    if (folder / DATABASE_FILE).exists():
        if url or (folder / POINTER_FILE).exists():
            raise ValueError(f"{folder} holds {DATABASE_FILE}. Copy the memory: hypernet memory copy --help.")
        SQLite(folder).check()
        return
    if (folder / POINTER_FILE).exists():
        return
    if not create:
        raise ValueError(f"No memory at {folder}: {DATABASE_FILE} is missing. Check the path, or add a memory first.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if (folder / DATABASE_FILE).exists() or (folder / POINTER_FILE).exists():  # another process made it meanwhile
        return check_folder(folder, create=create, url=url)
    # A lock and new files are what a process has there that is making the memory, or leaves that was killed then.
    if any(name != _LOCK_FILE and not name.startswith((NEW_FILE, f".{POINTER_FILE}.")) for name in names):
        raise ValueError(f"{folder} holds other files and no {DATABASE_FILE}. Name an empty or a new folder.")


def check_outside(path: Path) -> None:
    """Raises ValueError if `path`, or what it links to, lies in the folder of a memory."""
    for place in (path.parent.resolve() / path.name, path.resolve()):
        for folder in place.parents:
            if (folder / DATABASE_FILE).exists() or (folder / POINTER_FILE).exists():
                raise ValueError(f"{path} lies in {folder}, the folder of a memory. Name a file elsewhere.")


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
