"""What goes into the memory and comes out of it.

draft = Draft(text="Fenda Elfax was taught by Orla Wint.", filters=Filters(user_id="alice"))
ref.id, ref.version, ref.batch             # str(ref) is id@version, the key of everything derived from it
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hypernet.memory.store.times import Instant

_ID = re.compile(r"[^@\s]{1,128}")


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
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"{name} is {value!r}. Give a name, or leave it out.")
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

    version: its name, such as "v12". memories: id@version of each. num_derived: how many of them had only been derived
    from what was asked for. finished: False if another process still reads what was to be erased.
    """

    version: str
    operation: str
    memories: tuple[str, ...] = ()
    num_derived: int = 0
    finished: bool = True


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


def split_ref(key: str) -> tuple[str, int | None]:
    """Id and version of "id" or "id@version".

    Raises:
        ValueError: it is neither.
    """
    identity, at, version = str(key).partition("@")
    if not _ID.fullmatch(identity) or (at and not (version.isascii() and version.isdigit() and int(version) > 0)):
        raise ValueError(f"{key!r} is no memory's id. Give an id or id@version, as add and search print them.")
    return identity, int(version) if at else None
