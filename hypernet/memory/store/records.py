"""What goes into the memory and comes out of it.

draft = Draft(text="Fenda Elfax was taught by Orla Wint.", filters=Filters(user_id="alice"))
ref.id, ref.version, ref.batch             # str(ref) is id@version, the key of everything derived from it
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from numbers import Integral
from typing import Any, NamedTuple, Self

from hypernet.memory.store.timeline import CONFLICTS
from hypernet.memory.store.times import Instant, to_micros
from hypernet.text.cleaning import is_blank, whole

_ID = re.compile(r"[^@\s\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}")
_NUMBER = re.compile("[1-9][0-9]{0,9}")
_HALF = re.compile("[\ud800-\udfff]")
MAX_NUMBER = 2**31 - 1  # of versions, batches and limits: an INTEGER of any database
MAX_DEPTH = 32  # of metadata: json, dataclasses and databases each give up at some depth of their own


class Filters(NamedTuple):
    """Whose memories: one that is None does not restrict."""

    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None

    def checked(self) -> "Filters":
        """Itself.

        Raises:
            ValueError: an id is blank, which would otherwise mean everybody, or no text.
        """
        for name, value in self._asdict().items():
            check_text(name, value)
        return self

    @property
    def given(self) -> dict[str, str]:
        return {name: value for name, value in self._asdict().items() if value is not None}


EVERYBODY = Filters()


class MemoryRef(NamedTuple):
    """id@version of a memory, and the batch that wrote it, which `rollback` takes back."""

    id: str
    version: int
    batch: str

    def __str__(self) -> str:
        return f"{self.id}@{self.version}"


class Batch(NamedTuple):
    """What one call changed.

    version: its name, such as "v12"; empty if nothing was to be changed. memories: id@version of each. num_derived: how
    many of them had only been derived from what was asked for. finished: False if another process still reads what was
    to be erased. num_known: of imported ones, those left out because they were here before.
    """

    version: str
    operation: str
    memories: tuple[str, ...] = ()
    num_derived: int = 0
    finished: bool = True
    num_known: int = 0


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A memory to be stored.

    Attributes:
        text: None states that nothing holds from valid_at on.
        subject, relation: the key by which it supersedes; both or neither.
        valid_at, invalid_at: when it was true; None: from now on, until something says otherwise.
        conflict: one of `CONFLICTS`; None takes the store's.
        derived_from: id@version of the memories it was made of; it is deleted with any of them.
        id, version: of an imported memory; None gives new ones.
    """

    text: str | None
    filters: Filters = EVERYBODY
    role: str | None = None
    subject: str | None = None
    relation: str | None = None
    source: str | None = None
    valid_at: Instant | None = None
    invalid_at: Instant | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    conflict: str | None = None
    derived_from: tuple[str, ...] = ()
    id: str | None = None
    version: int | None = None

    def checked(self) -> Self:
        """Itself.

        Raises:
            ValueError: there is no text, a date is impossible, only half a key is given, metadata is no JSON, ...
        """
        is_end = self.text is None and self.id is not None  # an imported statement that nothing holds
        if not is_end and (not isinstance(self.text, str) or is_blank(self.text)):
            raise ValueError(f"A memory is a text, not {self.text!r}. Give at least a word.")
        if self.text is not None and _HALF.search(self.text):
            raise ValueError(f"text is {self.text!r}, which holds half a character. Give whole ones.")
        self.filters.checked()
        if (self.subject is None) != (self.relation is None):
            raise ValueError("A key is a subject and a relation. Give both, or neither.")
        for name in ("subject", "relation", "role", "source"):
            check_text(name, getattr(self, name))
        if self.conflict is not None:
            checked_conflict(self.conflict)
        check_text("id", self.id)
        if self.id is not None and split_ref(self.id)[1] is not None:
            raise ValueError(f"id is {self.id!r}. Give it without @, and the version by itself.")
        if self.version is not None:
            whole_number(self.version, "version")
        for name in ("valid_at", "invalid_at"):
            if (value := getattr(self, name)) is not None:
                to_micros(value, name)
        self.metadata_json()
        return self

    def metadata_json(self) -> str:
        """The metadata as it is stored.

        Raises:
            ValueError: it is no JSON object, or nested deeper than `MAX_DEPTH`.
        """
        try:
            if not isinstance(self.metadata, Mapping):
                raise TypeError(f"it is {self.metadata!r}")
            _check_depth(self.metadata, MAX_DEPTH)
            found = json.dumps(dict(self.metadata), ensure_ascii=False, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metadata is no JSON object: {error}. Give texts, finite numbers, lists and dicts."
            ) from error
        return whole(found, "metadata")


@dataclass(frozen=True, kw_only=True)
class MemoryVersion:
    """One version of a memory. Times are ISO 8601, UTC.

    Attributes:
        valid_at, invalid_at: when it was true; None: still is.
        created_at, expired_at: when it was stored, and when its end became known.
        stated_until: the end that was given with it; `invalid_at` may come from what superseded it.
    """

    id: str
    version: int
    text: str | None
    user_id: str | None
    agent_id: str | None
    run_id: str | None
    role: str | None
    subject: str | None
    relation: str | None
    source: str | None
    sha256: str | None
    valid_at: str
    invalid_at: str | None
    created_at: str
    expired_at: str | None
    stated_until: str | None
    conflict: str
    metadata: dict[str, Any]

    @property
    def ref(self) -> str:
        return f"{self.id}@{self.version}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Hit(MemoryVersion):
    """A memory that was found.

    Attributes:
        score: reciprocal rank fusion's; higher is better, comparable within one search only.
        conflicts: id@version of memories with the same key that hold at the same time (conflict "keep_both").
    """

    score: float
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    """One thing that happened to a memory; `text` is None where it was deleted or purged."""

    operation: str
    version: int
    at: str
    batch: str
    taken_back: bool
    reason: str | None
    text: str | None
    valid_at: str | None
    invalid_at: str | None


def plain(value: Any) -> Any:
    """A call's result as JSON has it; references and versions with their id@version."""
    if isinstance(value, MemoryRef):
        return {**value._asdict(), "ref": str(value)}
    if isinstance(value, MemoryVersion):
        return {**value.as_dict(), "ref": value.ref}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "_asdict"):
        return {name: plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    # JSON has no infinity: adapters that are never cheaper than the prompt break even after none.
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def split_ref(key: str) -> tuple[str, int | None]:
    """Id and version of "id" or "id@version".

    Raises:
        ValueError: it is neither.
    """
    identity, at, version = str(key).partition("@")
    if not _ID.fullmatch(identity) or (at and not (_NUMBER.fullmatch(version) and int(version) <= MAX_NUMBER)):
        raise ValueError(f"{key!r} is no memory's id. Give an id or id@version, as add and search print them.")
    return identity, int(version) if at else None


def batch_number(version: str | int) -> int:
    """3 of "v3".

    Raises:
        ValueError: it is no name of a batch.
    """
    digits = str(version).removeprefix("v")
    if not (_NUMBER.fullmatch(digits) and int(digits) <= MAX_NUMBER):
        raise ValueError(f"{version!r} is no version of a batch. Give one such as v3; `versions` lists them.")
    return int(digits)


def whole_number(value: Any, name: str) -> int:
    """`value` as an int from 1 to `MAX_NUMBER`.

    Raises:
        ValueError: it is something else.
    """
    # numpy's integers count; SQLite would store them as bytes.
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= MAX_NUMBER:
        raise ValueError(f"{name} is {value!r}. Give a whole number from 1 to {MAX_NUMBER}.")
    return int(value)


def checked_conflict(conflict: str) -> str:
    """One of `CONFLICTS`.

    Raises:
        ValueError: it is something else.
    """
    if conflict not in CONFLICTS:
        raise ValueError(f"Unknown conflict {conflict!r}: choose one of {', '.join(CONFLICTS)}.")
    return conflict


def check_text(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is None or a text that can be read and stored."""
    if value is None:
        return
    if not isinstance(value, str) or is_blank(value):
        raise ValueError(f"{name} is {value!r}. Give a text, or leave it out.")
    if _HALF.search(value):
        raise ValueError(f"{name} is {value!r}, which holds half a character. Give whole ones.")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, (Mapping, list, tuple)):
        if not left:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_depth(inner, left - 1)
