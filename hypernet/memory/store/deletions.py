"""deletions.jsonl: what was deleted, restored and purged, when and why; never the content.

It repeats the events of the database, so that whoever gets the folder can read it with any program, and so that lines
which a killed process did not write can be added later.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from sqlalchemy import select

from hypernet.memory.store.database import Database
from hypernet.memory.store.schema import events
from hypernet.memory.store.times import to_text

DELETIONS_FILE = "deletions.jsonl"
MAX_REASON_CHARACTERS = 500
_OPERATIONS = ("delete", "hide", "restore", "show", "rollback", "purge")
_TAIL = 1 << 16  # bytes that are sure to hold a whole line


class DeletionLog:
    """The file of one memory's folder."""

    def __init__(self, folder: Path, database: Database) -> None:
        self._path, self._database = folder / DELETIONS_FILE, database

    def catch_up(self) -> int:
        """Appends a line for each event that the file lacks. Returns how many."""
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _TAIL))
            tail = file.read()
            whole, _, cut = tail.rpartition(b"\n")
            if cut:  # its writer was killed
                file.truncate(end - len(cut))
            last = json.loads(whole.rpartition(b"\n")[2])["event"] if whole else 0
            with self._database.read() as connection:
                rows = connection.execute(
                    select(events)
                    .where(events.c.seq > last, events.c.operation.in_(_OPERATIONS))
                    .order_by(events.c.seq)
                ).all()
            for row in rows:
                line = {"event": row.seq, "memory": f"{row.memory_id}@{row.version}", "operation": row.operation}
                line |= {"at": to_text(row.at), "batch": f"v{row.batch}", "reason": row.reason}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return len(rows)

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line about what the log holds so far, such as the audit of a deletion."""
        self.catch_up()
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            last = file.read().splitlines()[-1:]
            event = json.loads(last[0])["event"] if last else 0  # where `catch_up` goes on
            file.write(json.dumps({"event": event, **line}, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
