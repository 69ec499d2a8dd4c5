"""Versions: consolidated weights of one user as folders named by their content, one of which is live.

versions = Versions.of(store.folder, Filters(user_id="alice"))
with versions.written(manifest) as folder: ...      # all of it or nothing
versions.judge(version, report); versions.promote(version); versions.rollback("base")
versions.live(holds)                                # the live one, as long as everything in it holds

weights/<whose>/w-3f0a.../manifest.json, files.json, gate.json, adapter/ or base_model/
weights/<whose>/CURRENT           one line, replaced atomically
weights/<whose>/promotions.jsonl  append-only: what was made live, when, and whether the gate had passed it
weights/<whose>/review.jsonl      what a person said of written questions, see hypernet.consolidation.self_instruct
weights/<whose>/.unfinished-<key>/, .new-<key>-<process>/   a training that goes on or was killed, with manifest.json

A promotion is logged before it is done. Killed in between, CURRENT has not changed and counts.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hypernet.io.files import replaced, sync_folder
from hypernet.memory.store.records import Filters
from hypernet.memory.store.times import now, to_text
from hypernet.memory.store.token_store import TokenStore

WEIGHTS_FOLDER = "weights"
REVIEW = "review.jsonl"
BASE = "base"  # the name of the base model without any version
_MANIFEST, _FILES, _GATE, _CURRENT, _LOG = "manifest.json", "files.json", "gate.json", "CURRENT", "promotions.jsonl"


class GateRefused(ValueError):
    """A version that has not passed the gate was to be made live."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a version is.

    Attributes:
        parent: version that was live then; None: the base model. Training started from it if the recipe is not anew.
        contains: id@version of the memories in it. new: of those, the ones that its parent lacks.
        base_model: fingerprint. generator: of the adapters that it started from, if it did.
        recipe: the settings of training; the same memories by the same recipe are the same version.
    """

    parent: str | None
    contains: tuple[str, ...]
    new: tuple[str, ...]
    base_model: str
    generator: str | None
    recipe: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names what was to be trained, before it is."""
        return _sha256(json.dumps(asdict(self), sort_keys=True).encode())[:24]


@dataclass(frozen=True)
class Version:
    """One folder. gate: the report, if it was judged."""

    name: str
    folder: Path
    manifest: Manifest
    gate: Mapping[str, Any] | None

    @property
    def passed(self) -> bool:
        return self.gate is not None and bool(self.gate["passed"])


class Versions:
    """The versions in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, memory: Path, filters: Filters) -> Self:
        """Those of a memory's folder within these filters: each has its own, so that nobody is answered from another's
        weights."""
        whose = json.dumps(filters.checked()._asdict(), sort_keys=True)
        return cls(memory / WEIGHTS_FOLDER / _sha256(whose.encode())[:16])

    @classmethod
    def of_all(cls, memory: Path) -> list[Self]:
        """Those of everybody."""
        root = memory / WEIGHTS_FOLDER
        return [cls(path) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process consolidates for these filters inside the `with` block; a killed one does not hold it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- Writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def written(self, manifest: Manifest) -> Iterator[Path]:
        """A folder for the weights' files, which becomes a version when the block ends well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".new-{manifest.key}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write(temporary / _MANIFEST, asdict(manifest))  # first: a killed writer's weights say what is in them
            yield temporary
            files = _hashes(temporary)
            _write(temporary / _FILES, files)
            name = _name(files, asdict(manifest))
            for path in (path for path in temporary.rglob("*") if path.is_dir()):
                sync_folder(path)
            if (self.folder / name).is_dir():
                return
            temporary.rename(self.folder / name)
            _sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def unfinished(self, manifest: Manifest) -> Path:
        """A folder for what a training keeps in order to go on after it was killed; `finish` removes it."""
        folder = self._unfinished(manifest)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _MANIFEST, asdict(manifest))
        return folder

    def finish(self, manifest: Manifest) -> None:
        shutil.rmtree(self._unfinished(manifest), ignore_errors=True)

    def _unfinished(self, manifest: Manifest) -> Path:
        return self.folder / f".unfinished-{manifest.key}"

    def judge(self, version: Version, report: Mapping[str, Any]) -> Version:
        """Keeps the gate's report with the version."""
        _write(version.folder / _GATE, dict(report))
        return self.get(version.name)

    def promote(self, version: Version, *, force: bool = False) -> None:
        """Makes a version live; whether it was forced stays in promotions.jsonl.

        Raises:
            GateRefused: the gate has not passed it, and `force` is not given.
            ValueError: a file of it was changed.
        """
        self.check(version)
        if not version.passed and not force:
            reason = "was not judged" if version.gate is None else "was refused: " + "; ".join(version.gate["failed"])
            raise GateRefused(f"{version.name} {reason}. Nothing was changed; --force makes it live all the same.")
        self._make_live(version.name, forced=not version.passed)

    def rollback(self, name: str) -> None:
        """Makes a version that was live before live again, or "base": none.

        Raises:
            ValueError: it never was, or a file of it was changed.
        """
        if name != BASE:
            if name not in {entry["version"] for entry in self.promotions()}:
                raise ValueError(f"{name} was never live. See hypernet memory versions --weights.")
            self.check(self.get(name))
        self._make_live(name, forced=False, operation="rollback")

    def remove(self, refs: Sequence[str]) -> list[str]:
        """Erases every version that contains one of these memories, and returns their names."""
        gone = [version.name for version in self.all() if set(refs) & set(version.manifest.contains)]
        if self.current in gone:
            self._make_live(BASE, forced=False, operation="erased")
        for name in gone:
            shutil.rmtree(self.folder / name)
        return gone

    def keep(self, refs: Collection[str]) -> list[str]:
        """Erases all that is of other memories: versions, whose names it returns, trainings that did not end, and lines
        of the review."""
        gone = self.remove([ref for version in self.all() for ref in version.manifest.contains if ref not in refs])
        for path in self.others(refs):
            if path.name == REVIEW:
                with replaced(path) as temporary:
                    temporary.write_bytes(b"".join(line for line in _lines(path) if _is_of(line, refs)))
                    _sync(temporary)
            else:
                shutil.rmtree(path, ignore_errors=True)
            gone.append(path.name)
        return gone

    def others(self, refs: Collection[str]) -> list[Path]:
        """What `keep` erases or, of the review, changes."""
        known, review = set(refs), self.folder / REVIEW
        paths = [path.parent for path in self.folder.glob(f"*/{_MANIFEST}")]
        found = [path for path in paths if not set(json.loads((path / _MANIFEST).read_bytes())["contains"]) <= known]
        return found if all(_is_of(line, refs) for line in _lines(review)) else [*found, review]

    def _make_live(self, name: str, *, forced: bool, operation: str = "promote") -> None:
        if name == self.current:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"at": to_text(now()), "operation": operation, "version": name, "forced": forced}
        with (self.folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with replaced(self.folder / _CURRENT) as temporary:
            temporary.write_text(name + "\n", encoding="utf-8")
            _sync(temporary)
        _sync(self.folder)

    # --- Reading ----------------------------------------------------------------------------------------------------

    @property
    def current(self) -> str:
        """The live version's name, or "base"."""
        path = self.folder / _CURRENT
        return path.read_text(encoding="utf-8").strip() if path.is_file() else BASE

    def get(self, name: str) -> Version:
        """ValueError if there is none of that name."""
        folder = self.folder / name
        if not name.startswith("w-") or not (folder / _MANIFEST).is_file():
            known = ", ".join(version.name for version in self.all()) or "none"
            raise ValueError(f"There is no version {name!r} of these weights; there are: {known}.")
        fields = json.loads((folder / _MANIFEST).read_bytes())
        manifest = Manifest(**{**fields, "contains": tuple(fields["contains"]), "new": tuple(fields["new"])})
        gate = json.loads((folder / _GATE).read_bytes()) if (folder / _GATE).is_file() else None
        return Version(name, folder, manifest, gate)

    def all(self) -> list[Version]:
        """Every version, also refused ones; in the order in which they were made."""
        if not self.folder.is_dir():
            return []
        found = sorted(self.folder.glob("w-*"), key=lambda path: ((path / _MANIFEST).stat().st_mtime_ns, path.name))
        return [self.get(path.name) for path in found]

    def made_of(self, manifest: Manifest) -> Version | None:
        """The version of this manifest, if it has been trained."""
        return next((version for version in self.all() if version.manifest.key == manifest.key), None)

    def promotions(self) -> list[dict[str, Any]]:
        """What was made live and rolled back, the oldest first."""
        path = self.folder / _LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rolled_back(self) -> set[str]:
        """id@version of the memories that a rollback took out of what was live, and nothing made live since has."""
        contains = {version.name: set(version.manifest.contains) for version in self.all()}
        found: set[str] = set()
        live = BASE
        for entry in self.promotions():
            before, live = live, entry["version"]
            if entry["operation"] == "rollback":
                found |= contains.get(before, set())
            found -= contains.get(live, set())
        return found

    def live(self, holds: Callable[[str], bool]) -> Version | None:
        """The version that may answer: the live one, or the nearest of its ancestors whose memories all hold.

        A version with one memory that was deleted, corrected or taken back answers nothing.
        """
        name: str | None = self.current
        while name not in (None, BASE) and (self.folder / str(name)).is_dir():
            version = self.get(str(name))
            if all(holds(ref) for ref in version.manifest.contains):
                return version
            name = version.manifest.parent
        return None

    def check(self, version: Version) -> str:
        """The version's hash over all files.

        Raises:
            ValueError: a file was changed.
        """
        files = _hashes(version.folder)
        kept = json.loads((version.folder / _FILES).read_bytes())
        if files != kept or _name(files, json.loads((version.folder / _MANIFEST).read_bytes())) != version.name:
            raise ValueError(f"{version.folder} was changed since it was written. Consolidate again.")
        return _sha256(json.dumps(files, sort_keys=True).encode())


def erase_purged(store: TokenStore) -> list[str]:
    """Erases what is left of memories whose content was purged, whosever: see `Versions.keep`."""
    everybody = Versions.of_all(store.folder)
    refs = store.refs() if everybody else set()
    return [name for versions in everybody for name in versions.keep(refs)]


def has_purged(store: TokenStore) -> bool:
    """Whether `erase_purged` has something to erase."""
    everybody = Versions.of_all(store.folder)
    refs = store.refs() if everybody else set()
    return any(versions.others(refs) for versions in everybody)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _is_of(line: bytes, refs: Collection[str]) -> bool:
    """Whether a line of a review is about one of these memories, or about none. One that an editor has broken is where
    it names one of them; one that is no UTF-8 never is."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return False
    try:
        fields = json.loads(text)
    except ValueError:
        return any(ref in text for ref in refs)
    return isinstance(fields, dict) and ("memory" not in fields or fields["memory"] in refs)


def _name(files: Mapping[str, str], manifest: Mapping[str, Any]) -> str:
    return "w-" + _sha256(json.dumps([files, manifest], sort_keys=True, default=list).encode())[:12]


def _hashes(folder: Path) -> dict[str, str]:
    """File → hash, of the weights' files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    return {path.relative_to(folder).as_posix(): _sha256(path.read_bytes()) for path in paths}


def _write(path: Path, value: Any) -> None:
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _sync(temporary)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
