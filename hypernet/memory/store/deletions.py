"""deletions.jsonl: what was deleted, restored and purged, when and why; never the content.

It repeats the events of the database, so that whoever gets the folder can read it with any program, and so that lines
which a killed process did not write, or somebody changed, can be written again.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import select

from hypernet.io.files import replaced
from hypernet.memory.store.database import Database
from hypernet.memory.store.records import MAX_NUMBER
from hypernet.memory.store.schema import events
from hypernet.memory.store.times import to_text

DELETIONS_FILE = "deletions.jsonl"
DAMAGED_FILE = f"{DELETIONS_FILE}.damaged"
MAX_REASON_CHARACTERS = 500
_OPERATIONS = ("delete", "hide", "restore", "show", "rollback", "purge")
_AUDIT = "audit"
_TAIL = 1 << 16  # bytes that mostly hold a whole line; an audit of thousands of memories is longer
_BEGINNING = b'{"event": '

Line = dict[str, Any]


class DeletionLog:
    """The file of one memory's folder: a line per event, and audits behind the event that they are about."""

    def __init__(self, folder: Path, database: Database) -> None:
        self._path, self._database = folder / DELETIONS_FILE, database

    def check(self) -> None:
        """Raises OSError if nothing can be written to the log. Called before what it would tell of is done."""
        if self._path.exists():
            self._path.open("r+b").close()

    def catch_up(self) -> None:
        """Appends a line for each event since the last line; damaged lines stay for `repair`."""
        with self._alone() as file:
            self._catch_up(file)

    def append_audit(self, report: Mapping[str, Any]) -> None:
        """Adds a line about the last event."""
        with self._alone() as file:
            event = self._catch_up(file)
            _append(file, [{"event": event, "operation": _AUDIT, **report}])

    def repair(self) -> list[str]:
        """Writes what the events say and puts lines that say something else into `DAMAGED_FILE`. Returns what it did,
        a line each."""
        with self._alone() as file:
            file.seek(0)
            content = file.read()
            logged = self._logged()
            found: dict[int, bytes] = {}
            audits: list[tuple[int, bytes]] = []
            damaged: dict[int, bytes] = {}
            raw_lines = content.split(b"\n")
            if _is_begun(raw_lines[-1]):  # its writer was killed
                raw_lines.pop()
            for number, raw in enumerate(raw_lines, 1):
                line = _line(raw)
                if _is_audit(line, logged):
                    audits.append((line["event"], raw.strip()))
                elif _is_event(line, logged) and line["event"] not in found:
                    found[line["event"]] = raw
                elif raw.strip():
                    damaged[number] = raw
            # An audit comes after its event: sorting keeps the order of equals.
            right = [(event, _encoded(line)) for event, line in logged.items()] + audits
            right.sort(key=lambda entry: entry[0])
            if (new := b"".join(raw + b"\n" for _, raw in right)) == content:
                return []
            if damaged:
                with self._path.with_name(DAMAGED_FILE).open("ab") as aside:
                    _write(aside, damaged.values())
            with replaced(self._path) as temporary, temporary.open("wb") as file_anew:
                file_anew.write(new)
                file_anew.flush()
                os.fsync(file_anew.fileno())
        told = [
            f"{DELETIONS_FILE}, line {number}, which tells of no deletion here; it is in {DAMAGED_FILE}"
            for number in damaged
        ]
        if missing := len(logged) - len(found):
            told.append(f"{missing} lines missing in {DELETIONS_FILE}")
        return told or [f"order and line ends of {DELETIONS_FILE}"]

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        """The file, which no other process writes to or replaces meanwhile."""
        while True:
            with self._path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    yield file
                    return

    def _catch_up(self, file: BinaryIO) -> int:
        """Returns the last event of the log."""
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _TAIL))
        tail = file.read()
        cut = tail.rpartition(b"\n")[2]
        if _is_begun(cut):  # its writer was killed
            file.truncate(end - len(cut))
            tail = tail[: len(tail) - len(cut)]
        elif cut:  # an editor left the line's end out
            _write(file, [b""])
        line = _line(tail.rstrip().rpartition(b"\n")[2])
        logged = self._logged(line["event"]) if line else {}
        if _is_event(line, logged) or _is_audit(line, logged):
            last = int(line["event"])
        else:  # a new log, or a damaged one
            logged = self._logged()
            file.seek(0)
            lines = map(_line, file.read().split(b"\n"))
            last = max((line["event"] for line in lines if _is_event(line, logged)), default=0)
        _append(file, [line for event, line in logged.items() if event > last])
        return max(logged, default=last)

    def _logged(self, first: int = 0) -> dict[int, Line]:
        """Event → its line, in their order."""
        where = (events.c.seq >= first, events.c.operation.in_(_OPERATIONS))
        with self._database.read() as connection:
            rows = connection.execute(select(events).where(*where).order_by(events.c.seq)).all()
        return {
            row.seq: {
                **{"event": row.seq, "memory": f"{row.memory_id}@{row.version}", "operation": row.operation},
                **{"at": to_text(row.at), "batch": f"v{row.batch}", "reason": row.reason},
            }
            for row in rows
        }


def _loaded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _line(raw: bytes) -> Line:
    """Empty where it is no JSON object with the number of an event."""
    found = _loaded(raw)
    event = found.get("event") if isinstance(found, dict) else None
    return found if type(event) is int and 0 < event <= MAX_NUMBER else {}


def _is_begun(raw: bytes) -> bool:
    """Whether it is the beginning of a line of ours, and not the whole, which alone is JSON."""
    return bool(raw) and raw[: len(_BEGINNING)] == _BEGINNING[: len(raw)] and _loaded(raw) is None


def _is_event(line: Line, logged: Mapping[int, Line]) -> bool:
    return bool(line) and logged.get(line["event"]) == line


def _is_audit(line: Line, logged: Mapping[int, Line]) -> bool:
    return line.get("operation") == _AUDIT and line["event"] in logged


def _encoded(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode()


def _append(file: BinaryIO, lines: Iterable[Line]) -> None:
    _write(file, map(_encoded, lines))


def _write(file: BinaryIO, lines: Iterable[bytes]) -> None:
    file.writelines(line + b"\n" for line in lines)
    file.flush()
    os.fsync(file.fileno())
