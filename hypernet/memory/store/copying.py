"""A memory copied with all that it keeps, under the same numbers: from SQLite to PostgreSQL, and back.

copy_memory(TokenStore("outputs/memory"), "outputs/shared", database="postgresql+psycopg://user@host/name")
"""

import shutil
from pathlib import Path

from sqlalchemy import Connection, insert, select

from hypernet.io.files import replaced_folder, sync_folder
from hypernet.memory.store import full_text
from hypernet.memory.store.database import Database
from hypernet.memory.store.deletions import DAMAGED_FILE, DELETIONS_FILE
from hypernet.memory.store.schema import memories, metadata
from hypernet.memory.store.token_store import UNFINISHED_PURGE, TokenStore

_FILES = (DELETIONS_FILE, DAMAGED_FILE, UNFINISHED_PURGE)
_FOLDERS = ("adapters",)
_ROWS = 1000  # at a time


def copy_memory(source: TokenStore, folder: str | Path, *, database: str | None = None) -> dict[str, int]:
    """Copies every row and every adapter; nobody writes to the source meanwhile.

    Args:
        folder: a new or empty one, there completely or not at all.
        database: URL of PostgreSQL, of a schema without a memory; None: SQLite in the folder.

    Returns:
        Table → its rows.

    Raises:
        ValueError: the folder or the database holds something, or cannot store a text.
        OSError: it cannot be written or reached.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already. Name a new folder for the copy.")
    with replaced_folder(folder) as new:
        target = Database(new, url=database)
        try:
            with target.read() as connection:
                if any(target.dialect.counters(connection).values()):
                    raise ValueError(f"{target.dialect.place} holds a memory. Name an empty database or schema.")
            with source.database.write() as reading, target.write() as writing:
                _copy_files(source.folder, new)
                found = _copy_rows(reading, writing)
                target.dialect.set_counters(writing, source.database.dialect.counters(reading))
        finally:
            target.close()
    return found


def _copy_files(folder: Path, new: Path) -> None:
    for name in _FOLDERS:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, new / name)
    for name in _FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, new / name)
    for path in (new, *(path for path in new.rglob("*") if path.is_dir())):
        sync_folder(path)


def _copy_rows(reading: Connection, writing: Connection) -> dict[str, int]:
    numbers = {}
    for table in metadata.sorted_tables:
        numbers[table.name] = 0
        rows = reading.execute(select(table).order_by(*table.primary_key))
        for part in rows.partitions(_ROWS):
            writing.execute(insert(table), [dict(row._mapping) for row in part])
            numbers[table.name] += len(part)
    for part in reading.execute(select(memories).where(memories.c.live).order_by(memories.c.seq)).partitions(_ROWS):
        full_text.index_rows(writing, part)
    return numbers
