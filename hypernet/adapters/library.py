"""AdapterLibrary: a folder of adapters, each under the hash of its content.

    library = AdapterLibrary("outputs/library")
    identity = library.add(adapter)                        # adding the same adapter again changes nothing
    fenda = library.load("fenda_elfax.txt", base_model_fingerprint=fingerprint, base_model_name="this model")
    library.verify()                                       # what is damaged, and how; empty if nothing is

On the command line it is `hypernet library`.

Every entry is an ordinary adapter folder that PEFT loads in place, plus entry.json with the hashes of its files. It is
written to a temporary name and renamed, so an entry is there completely or not at all, whoever is killed; any number of
processes of one machine may use a library at once. Needs a POSIX system (flock).
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypernet.adapters.adapter import ADAPTER_FILES, PROVENANCE_FILE, LoRAAdapter, check_is_adapter
from hypernet.io.files import replaced, sync_folder

log = logging.getLogger(__name__)

ENTRY_FILE, LOCK_FILE = "entry.json", ".lock"
ENTRY_FORMAT = 1
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}")
# What a killed writer leaves: .<32 hex digits>.new or .old, and the temporary name of an entry.json.
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(new|old)")
_HASHED_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True)
class LibraryEntry:
    """What a library knows of one adapter without reading its weights.

    Attributes:
        id: SHA-256 of the content, `LoRAAdapter.content_id`.
        directory: its folder, for PEFT or `LoRAAdapter.load`.
        documents: (name, sha256) of each document.
        base_model_name, base_model_fingerprint, generator: None where not recorded; generator is the hypernetwork's
            fingerprint.
        num_chunks, rank: chunks of their own, and total rank.
        num_bytes: of all its files.
        created, added: when the adapter was made and when it came here, ISO 8601, UTC.
        replaces: ids of what it replaced, the latest first.
        damage: what the sizes of its files say; None if they are as stored. `verify` reads the files.
    """

    id: str
    directory: Path
    documents: tuple[tuple[str | None, str | None], ...]
    base_model_name: str | None
    base_model_fingerprint: str | None
    generator: str | None
    num_chunks: int
    rank: int
    num_bytes: int
    created: str
    added: str
    replaces: tuple[str, ...]
    damage: str | None

    @property
    def label(self) -> str:
        """The beginning of the id and the documents' names, for messages."""
        return f"{self.id[:12]} ({', '.join(name or '?' for name, _ in self.documents) or 'no documents'})"


@dataclass(frozen=True)
class Damage:
    """What is wrong with one folder of a library."""

    name: str
    reason: str


class AdapterLibrary:
    """Adapters in a folder, by content.

    Args:
        directory: the library's folder; `add` makes it where it is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser().resolve()

    def add(self, adapter: LoRAAdapter) -> str:
        """Stores an adapter and returns its id; one that is here already stays as it is, a damaged one is mended.

        Two adapters of the same weights and documents are one entry, with the names and date of the first.

        Raises:
            TypeError: it is no adapter.
            ValueError: the folder is no library: it holds other things.
            OSError: it cannot be written, for example for lack of space; nothing has changed then.
        """
        return self._add(adapter, replaces=())

    def replace(self, old: str, adapter: LoRAAdapter) -> str:
        """Stores an adapter, then removes the one it replaces, so that one of them is always there.

        Args:
            old: id, unique beginning of one, or document name.
            adapter: the new one; its entry keeps a record of what it replaced.

        Returns:
            The new id.

        Raises:
            ValueError: there is no or more than one `old`.
            TypeError, OSError: as `add`.
        """
        check_is_adapter(adapter)
        entry = self._found_alone(old)
        identity = self._add(adapter, replaces=(entry.id, *entry.replaces))
        if identity != entry.id:
            self.remove(entry.id)
        return identity

    def remove(self, key: str) -> str:
        """Takes an adapter out, damaged or not, and returns its id.

        Args:
            key: id, unique beginning of one, or document name.

        Raises:
            ValueError: there is no or more than one such adapter, or it holds other documents than the one named.
        """
        if self._is_entry(key):
            identity = key
        else:
            unreadable = self._unreadable(key, self.list())  # an entry without its JSON has only its id
            identity = unreadable[0] if len(unreadable) == 1 else self._found_alone(key).id
        with self._writing():
            self._discard(self.directory / identity)
        return identity

    def _found_alone(self, key: str) -> LibraryEntry:
        """As `find`, but a document's name does for an entry that holds no other document."""
        entry = self.find(key)
        if not entry.id.startswith(key) and len(entry.documents) > 1:
            raise ValueError(
                f"{key!r} is one of {len(entry.documents)} documents of {entry.label}. Give the id to mean all."
            )
        return entry

    def list(self) -> tuple[LibraryEntry, ...]:
        """All entries, the oldest first. Those whose JSON cannot be read are logged and left to `verify`.

        Raises:
            ValueError: there is no such library.
        """
        self._check_there()
        entries = []
        for name in self._names():
            try:
                entries.append(self._entry(name))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                if (self.directory / name).exists():  # not removed meanwhile
                    log.warning("%s is damaged (%s) and left out; see verify.", self.directory / name, _one_line(error))
        return tuple(sorted(entries, key=lambda entry: (entry.added, entry.id)))

    def provenances(self) -> Iterator[dict[str, Any]]:
        """What each entry says of itself (`LoRAAdapter.provenance`), but for the damaged; none before the first `add`.

        Raises:
            ValueError: the folder is no library.
        """
        for entry in self.list() if self.directory.is_dir() else ():
            if entry.damage is None:
                with suppress(FileNotFoundError):  # removed meanwhile
                    yield json.loads((entry.directory / PROVENANCE_FILE).read_bytes())

    def find(self, key: str) -> LibraryEntry:
        """The one entry with this id, beginning of an id, or document name.

        Raises:
            ValueError: there is none, or several; the message lists them.
        """
        if self._is_entry(key):  # the others need not be read
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: told below
                return self._entry(key)
        entries = self.list()
        found = [entry for entry in entries if entry.id == key] or [
            entry for entry in entries if key and (entry.id.startswith(key) or key in dict(entry.documents))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{key!r} could be {len(found)} adapters: {'; '.join(entry.label for entry in found)}. "
                "Give more of the id."
            )
        if unreadable := self._unreadable(key, entries):
            raise ValueError(
                f"The adapter {unreadable[0]} is damaged: {self._damage(unreadable[0])}. Add it again, or remove it."
            )
        raise ValueError(
            f"No adapter {key!r} in {self.directory}, which holds "
            f"{'; '.join(entry.label for entry in entries) or 'none'}. Give an id, the beginning of one, or a document."
        )

    def load(
        self, key: str, *, base_model_fingerprint: str | None = None, base_model_name: str | None = None
    ) -> LoRAAdapter:
        """An adapter, on the CPU, once its files are what was stored.

        Args:
            key: id, unique beginning of one, or document name.
            base_model_fingerprint: of the base model it is meant for; None skips the check.
            base_model_name: that model's name, for the message.

        Raises:
            ValueError: there is no or more than one such adapter, it is damaged, or made for another base model.
        """
        entry = self.find(key)
        if base_model_fingerprint not in (None, entry.base_model_fingerprint):
            raise ValueError(
                f"The adapter {entry.label} was made for the base model {entry.base_model_name} (fingerprint "
                f"{entry.base_model_fingerprint}), but this base model is {base_model_name or 'another one'} "
                f"(fingerprint {base_model_fingerprint}). Load the right one, or generate the adapter again."
            )
        if reason := self._damage(entry.id, weights=False):
            raise ValueError(f"The adapter {entry.label} is damaged: {reason}. Add it again, or remove it.")
        return LoRAAdapter.load(entry.directory)

    def verify(self) -> tuple[Damage, ...]:
        """Reads everything and recomputes every hash: what is damaged, and what a killed writer left.

        Raises:
            ValueError: there is no such library.
        """
        self._check_there()
        found = []
        for path in sorted(self.directory.iterdir()):
            if _ENTRY_NAME.fullmatch(path.name):
                reason = self._damage(path.name)
                if reason and path.exists():  # not removed meanwhile
                    found.append(Damage(path.name, reason))
            elif not _LEFTOVER.fullmatch(path.name) and (path / ENTRY_FILE).exists():
                found.append(Damage(path.name, "is an entry under another name than its id; add it again"))
        with self._alone() as alone:
            # While others write, nobody can tell what is being written from what was left.
            leftovers = self._leftovers() if alone else []
        found += [
            Damage(str(path.relative_to(self.directory)), "left by a killed writer; clean up") for path in leftovers
        ]
        return tuple(found)

    def foreign(self) -> tuple[str, ...]:
        """Names of what is in the folder and not the library's; it is left alone.

        Raises:
            ValueError: there is no such library.
        """
        self._check_there()
        return tuple(sorted(path.name for path in self.directory.iterdir() if not _is_ours(path)))

    def own_paths(self) -> Sequence[Path]:
        """What lies in the folder under a name that a library gives: entries, leftovers, the lock."""
        return [path for path in self.directory.iterdir() if _is_named(path)] if self.directory.is_dir() else []

    def clean(self) -> tuple[str, ...]:
        """Removes what killed writers left, unless somebody is writing just now; returns the names.

        Raises:
            ValueError: there is no such library.
        """
        self._check_there()
        with self._alone() as alone:
            leftovers = self._leftovers() if alone else []
            for path in leftovers:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        return tuple(str(path.relative_to(self.directory)) for path in leftovers)

    def _add(self, adapter: LoRAAdapter, *, replaces: Sequence[str]) -> str:
        check_is_adapter(adapter)
        identity = adapter.content_id()
        replaces = [name for name in dict.fromkeys(replaces) if name != identity]
        directory = self.directory / identity
        self.directory.mkdir(parents=True, exist_ok=True)
        self._check_there()
        with self._writing():
            if directory.exists() and self._damage(identity) is None:
                self._keep_replaced(directory, replaces)
                return identity
            new = self._temporary("new")
            try:
                new.mkdir()
                adapter.write_files(new)
                _write_entry(new / ENTRY_FILE, _record(new, identity, replaces))
                sync_folder(new)
                if directory.exists() and self._damage(identity) is not None:
                    self._discard(directory)
                try:
                    new.rename(directory)
                except OSError as error:
                    # Another process was quicker, with the same content. Linux says ENOTEMPTY, others EEXIST.
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    self._keep_replaced(directory, replaces)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return identity

    def _keep_replaced(self, directory: Path, replaces: Sequence[str]) -> None:
        """Adds what it replaces to an entry that is there."""
        record = _read_entry(directory / ENTRY_FILE)
        merged = list(dict.fromkeys([*replaces, *record["replaces"]]))
        if merged != record["replaces"]:
            with replaced(directory / ENTRY_FILE) as temporary:
                _write_entry(temporary, {**record, "replaces": merged})

    def _discard(self, directory: Path) -> None:
        """Gone under its name at once; its files a moment later."""
        old = self._temporary("old")
        try:
            directory.rename(old)
        except FileNotFoundError:
            return  # another process was quicker
        shutil.rmtree(old)

    def _entry(self, name: str) -> LibraryEntry:
        directory = self.directory / name
        record = _read_entry(directory / ENTRY_FILE)
        provenance = json.loads((directory / PROVENANCE_FILE).read_bytes())
        return LibraryEntry(
            id=name,
            directory=directory,
            documents=tuple((entry.get("name"), entry.get("sha256")) for entry in provenance["documents"]),
            base_model_name=provenance["base_model"]["name"],
            base_model_fingerprint=provenance["base_model"]["fingerprint"],
            generator=provenance["generator"],
            num_chunks=int(provenance["num_chunks"]),
            rank=int(provenance["rank"]),
            num_bytes=sum(path.stat().st_size for path in directory.iterdir()),
            created=str(provenance["created"]),
            added=str(record["added"]),
            replaces=tuple(record["replaces"]),
            damage=_wrong_size(directory, record),
        )

    def _damage(self, name: str, *, weights: bool = True) -> str | None:
        """What is wrong with an entry, in words; None if nothing is.

        Args:
            name: the entry's id.
            weights: also load it and compute its id anew.
        """
        directory = self.directory / name
        try:
            record = _read_entry(directory / ENTRY_FILE)
            if record["id"] != name:
                return f"{ENTRY_FILE} belongs to {record['id']}"
            if reason := _wrong_size(directory, record):
                return reason
            for file in ADAPTER_FILES:
                if _sha256(directory / file) != record["files"][file]["sha256"]:
                    return f"{file} is not what was stored (SHA-256)"
            if weights and LoRAAdapter.load(directory).content_id() != name:
                return "its content has another id than its folder's name"
        except FileNotFoundError as error:
            return f"{Path(error.filename or directory).name} is missing"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _one_line(error)
        return None

    def _names(self) -> Sequence[str]:
        return sorted(path.name for path in self.directory.iterdir() if _ENTRY_NAME.fullmatch(path.name))

    def _leftovers(self) -> Sequence[Path]:
        inside = [path for name in self._names() for path in (self.directory / name).glob(f".{ENTRY_FILE}.*")]
        return sorted([*(path for path in self.directory.iterdir() if _LEFTOVER.fullmatch(path.name)), *inside])

    def _unreadable(self, key: str, entries: Sequence[LibraryEntry]) -> Sequence[str]:
        """Names beginning with `key` that are not among the entries, for lack of readable JSON."""
        there = {entry.id for entry in entries}
        return [name for name in self._names() if key and name.startswith(key) and name not in there]

    def _is_entry(self, key: str) -> bool:
        return bool(_ENTRY_NAME.fullmatch(key)) and (self.directory / key).is_dir()

    def _temporary(self, suffix: str) -> Path:
        return self.directory / f".{uuid.uuid4().hex}.{suffix}"

    def _check_there(self) -> None:
        if not self.directory.is_dir():
            raise ValueError(f"No adapter library at {self.directory}. Check the path, or add an adapter first.")
        # Lazily: `add` asks this for every adapter, and a library may hold a million.
        with os.scandir(self.directory) as found:
            if any(_is_ours(Path(entry.path)) for entry in found):
                return
        if there := sorted(self.directory.iterdir()):
            names = ", ".join([*(path.name for path in there[:3]), *(["..."] if len(there) > 3 else [])])
            raise ValueError(
                f"{self.directory} is no adapter library: it holds {names} and no adapter under its hash. Check the "
                "path, or name a new folder."
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells `clean` that temporary names are in use. The system lets go of it however the process ends."""
        with (self.directory / LOCK_FILE).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else is writing; if so, nobody starts within the block."""
        try:
            lock = (self.directory / LOCK_FILE).open("a")
        except OSError:  # a library that may only be read
            yield False
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _is_ours(path: Path) -> bool:
    """Whether this is of a library: an entry, also under another name, what a killed writer left, or the lock."""
    return _is_named(path) or (path / ENTRY_FILE).exists()


def _is_named(path: Path) -> bool:
    return path.name == LOCK_FILE or bool(_ENTRY_NAME.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name))


def _wrong_size(folder: Path, record: dict[str, Any]) -> str | None:
    """What is missing from an entry or has another size than what was stored; None if nothing is."""
    for name in ADAPTER_FILES:
        path, size = folder / name, record["files"][name]["bytes"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def _record(folder: Path, identity: str, replaces: Sequence[str]) -> dict[str, Any]:
    return {
        "format_version": ENTRY_FORMAT,
        "id": identity,
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in ADAPTER_FILES
        },
        "added": datetime.now(UTC).isoformat(timespec="microseconds"),
        "replaces": list(replaces),
    }


def _own_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write_entry(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps({**record, "sha256": _own_digest(record)}, indent=2) + "\n"
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_entry(path: Path) -> dict[str, Any]:
    """The record without its own hash, which is checked."""
    return entry_record(path.read_bytes())


def entry_record(data: bytes) -> dict[str, Any]:
    """The record that an entry.json holds.

    Raises:
        ValueError: it is not what was stored, or of another format.
    """
    record = json.loads(data)
    if not isinstance(record, dict) or record.pop("sha256", None) != _own_digest(record):
        raise ValueError(f"{ENTRY_FILE} is not what was stored (SHA-256)")
    if record.get("format_version") != ENTRY_FORMAT:
        raise ValueError(f"{ENTRY_FILE} has format {record.get('format_version')}, this version reads {ENTRY_FORMAT}")
    return record


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
