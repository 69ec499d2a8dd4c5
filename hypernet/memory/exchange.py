"""Memories from files of other programs and to them: plain JSONL, Mem0, Graphiti, Letta.

drafts = read_drafts(Path("mem0.jsonl"), format="mem0")
write_memories(versions, Path("alice.jsonl"), format="plain")

plain      every version with all its fields; read back, the same view at every date; what `search --json` prints too
mem0       what `get_all` returns: id, memory, user_id, agent_id, run_id, metadata, created_at, updated_at
graphiti   entity edges: uuid, group_id (the user), name (the relation), fact, valid_at, invalid_at, created_at
letta      archival passages (id, text, agent_id, created_at, metadata) and memory blocks (label, value)

A file is JSON lines, one JSON array, or an object that holds it as "results", "edges" or "passages" and "blocks".
What another format has no field for stays in `metadata`, and goes back where it came from when exported again. Times
stored by others are when something was true; when it was stored here is now. No memory of others supersedes another:
their ends are stated.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hypernet.io.files import replaced
from hypernet.io.paths import output_file
from hypernet.memory.store.records import Draft, Filters, MemoryVersion, whole_number

_ARRAYS = ("results", "edges", "passages", "blocks")
_PLAIN = ("text", "role", "subject", "relation", "source", "valid_at", "conflict")
_KNOWN = tuple(field.name for field in dataclasses.fields(MemoryVersion))
_FOUND = ("ref", "score", "conflicts", "tiers")  # what searches and lists say of a memory beside it
_HALF = re.compile("[\ud800-\udfff]")
Fields = dict[str, Any]


def read_drafts(path: str | Path, *, format: str = "plain") -> list[Draft]:
    """All memories of a file.

    Raises:
        ValueError: the format is unknown, or a line is no memory in it; the message names the line.
        OSError: it cannot be read.
    """
    reader, _ = _format(format)
    drafts: list[Draft] = []
    given: dict[tuple[str, int | None], tuple[str, Draft]] = {}
    for place, fields in _objects(Path(path).expanduser()):
        try:
            _check_whole(fields)
            draft = reader(fields).checked()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(f"{path}, {place} is no memory of the format {format}: {reason}.") from error
        if draft.id is not None:
            first, same = given.setdefault((draft.id, draft.version), (place, draft))
            if same != draft:
                raise ValueError(
                    f"{path}, {place} says something else under the id {draft.id!r} and version {draft.version} than "
                    f"{first}. Give each memory its own id."
                )
        drafts.append(draft)
    return drafts


def write_memories(memories: Iterable[MemoryVersion], path: str | Path, *, format: str = "plain") -> int:
    """One JSON line per memory; the file is there completely or not at all. Returns how many.

    Raises:
        ValueError: the format is unknown, or no file can be there.
        OSError: it cannot be written.
    """
    _, writer = _format(format)
    path = Path(output_file(str(path))).expanduser()
    lines = [json.dumps(writer(memory), ensure_ascii=False) for memory in memories]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _format(name: str) -> tuple[Callable[[Fields], Draft], Callable[[MemoryVersion], Fields]]:
    if name not in FORMATS:
        raise ValueError(f"Unknown format {name!r}: choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def _objects(path: Path) -> Iterator[tuple[str, Fields]]:
    """Each entry, and where it stands: "line 3" of JSON lines, "entry 3" of one value."""
    content = _decoded(path)
    found: Any
    try:
        found = _loaded(content) if content.strip() else []
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg != "Extra data":  # more than one value: JSON lines
            raise ValueError(
                f"{path}, line {error.lineno} is no JSON: {error.msg}. Give one object per line."
            ) from error
        # Not splitlines: a JSON text may hold other line ends, such as U+2028, as they are.
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        unit, found = "line", [(number, _line(path, number, line)) for number, line in lines]
    else:
        if isinstance(found, Mapping):
            if isinstance(found, _Repeating):
                raise ValueError(f"{path}, entry 1 has the key {found.key!r} twice. Give it once.")
            arrays = [found[name] for name in _ARRAYS if isinstance(found.get(name), list)]
            found = [entry for array in arrays for entry in array] if arrays else [found]
        unit, found = "entry", list(enumerate(found if isinstance(found, list) else [found], 1))
    for number, entry in found:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, {unit} {number} is {_short(entry)}. Give objects.")
        yield f"{unit} {number}", entry


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number} is not UTF-8. Save the file as UTF-8.") from error


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return _loaded(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{path}, line {number} is no JSON: {reason}. Give one object per line.") from error


def _loaded(content: str) -> Any:
    """Raises JSONDecodeError, or ValueError for what no memory can hold."""
    try:
        return json.loads(content, parse_constant=_refused, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(str(error) if "is no number" in str(error) else "a number has too many digits") from error


class _Repeating(dict[str, Any]):
    """An object with a key that stands twice, of which `json` would drop the first."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    repeating.key = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return repeating


def _check_whole(entry: Fields) -> None:
    """Raises ValueError where an object at any depth has a key twice, or a text half a character."""
    todo: list[Any] = [entry]
    while todo:  # not recursive: a file may nest deeper than Python calls
        value = todo.pop()
        if isinstance(value, _Repeating):
            raise ValueError(f"the key {value.key!r} stands twice. Give it once")
        if isinstance(value, str) and _HALF.search(value):
            raise ValueError(f"{_short(value)} holds half a character. Give whole ones")
        if isinstance(value, Mapping):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _short(entry: Any) -> str:
    return text if len(text := repr(entry)) <= 60 else f"{text[:60]}..."


def _rest(fields: Fields, format: str, used: Iterable[str]) -> Fields:
    """Metadata: the entry's own, and under the format's name what has no field here."""
    own = fields.get("metadata")
    left = {name: value for name, value in fields.items() if name not in {*used, "metadata"} and value is not None}
    return {**(own if isinstance(own, Mapping) else {}), **({format: left} if left else {})}


def _own(memory: MemoryVersion, format: str) -> tuple[Fields, Fields]:
    """What the format had no field for, and the rest of the metadata."""
    metadata = dict(memory.metadata)
    return dict(metadata.pop(format, {})), metadata


def _from_plain(fields: Fields) -> Draft:
    if unknown := [name for name in fields if name not in (*_KNOWN, *_FOUND)]:
        raise ValueError(f"unknown key {_short(unknown[0])}. Known are {', '.join(_KNOWN)}")
    filters = Filters(*(fields.get(name) for name in Filters._fields))
    stated, text = fields.get("sha256"), fields["text"]
    if stated is not None and isinstance(text, str) and stated != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError("its sha256 is another text's. Restore the text, or leave sha256 out")
    metadata, until = fields.get("metadata"), fields.get("stated_until")
    metadata = {} if metadata is None else metadata
    values: Fields = {name: fields.get(name) for name in _PLAIN} | {"text": text, "metadata": metadata}
    if "stated_until" not in fields:  # not written here, but by hand
        until = fields.get("invalid_at")
    return Draft(filters=filters, invalid_at=until, id=fields.get("id"), version=_number(fields), **values)


def _number(fields: Fields) -> int | None:
    version = fields.get("version", 1 if "id" in fields else None)
    return None if version is None else whole_number(version, "version")


def _from_mem0(fields: Fields) -> Draft:
    used = ("id", "memory", *Filters._fields, "created_at")
    return Draft(
        text=fields["memory"],
        filters=Filters(*(fields.get(name) or None for name in Filters._fields)),
        valid_at=fields.get("created_at"),
        metadata=_rest(fields, "mem0", used),
        conflict="add_only",
        **_identity(fields.get("id")),
    )


def _to_mem0(memory: MemoryVersion) -> Fields:
    own, metadata = _own(memory, "mem0")
    return {
        **own,
        **{"id": memory.id, "memory": memory.text, "hash": own.get("hash", memory.sha256), "metadata": metadata},
        **{"created_at": memory.valid_at, "updated_at": own.get("updated_at")},
        **{name: getattr(memory, name) for name in Filters._fields},
    }


def _from_graphiti(fields: Fields) -> Draft:
    subject, relation = fields.get("source_node_name") or fields.get("source_node_uuid"), fields.get("name")
    keyed = bool(subject and relation)
    used = ("uuid", "group_id", "fact", "valid_at", "invalid_at", *(("name",) if keyed else ()))
    return Draft(
        text=fields["fact"],
        filters=Filters(user_id=fields.get("group_id") or None),
        subject=str(subject) if keyed else None,
        relation=str(relation) if keyed else None,
        valid_at=fields.get("valid_at") or fields.get("created_at"),
        invalid_at=fields.get("invalid_at"),
        metadata=_rest(fields, "graphiti", used),
        conflict="add_only",
        **_identity(fields.get("uuid")),
    )


def _to_graphiti(memory: MemoryVersion) -> Fields:
    own, attributes = _own(memory, "graphiti")
    names = {"source_node_name": memory.subject} if memory.subject else {}
    return {
        **{"uuid": memory.id, "group_id": memory.user_id or "", "name": memory.relation or "STATES"},
        **{"fact": memory.text, "valid_at": memory.valid_at, "invalid_at": memory.invalid_at},
        **{"created_at": memory.created_at, "expired_at": memory.expired_at, "attributes": attributes},
        **names,
        **own,
    }


def _from_letta(fields: Fields) -> Draft:
    is_block = "value" in fields
    text = fields["value"] if is_block else fields["text"]
    agent = fields.get("agent_id") or None
    used = ("id", "value" if is_block else "text", "agent_id", "created_at", *(("label",) if is_block else ()))
    return Draft(
        text=text,
        filters=Filters(agent_id=agent),
        subject=str(agent or "agent") if is_block else None,
        relation=str(fields["label"]) if is_block else None,
        valid_at=fields.get("created_at"),
        metadata=_rest(fields, "letta", used),
        conflict="add_only",
        **_identity(fields.get("id")),
    )


def _to_letta(memory: MemoryVersion) -> Fields:
    own, metadata = _own(memory, "letta")
    place = {"agent_id": memory.agent_id, "created_at": memory.valid_at, "metadata": metadata}
    if memory.relation is not None:
        return {**own, "id": memory.id, "label": memory.relation, "value": memory.text, **place}
    return {**own, "id": memory.id, "text": memory.text, **place}


def _identity(value: Any) -> Fields:
    """An imported memory keeps its id, so that the same file imported again adds nothing."""
    return {} if value is None else {"id": str(value), "version": 1}


FORMATS: dict[str, tuple[Callable[[Fields], Draft], Callable[[MemoryVersion], Fields]]] = {
    "plain": (_from_plain, MemoryVersion.as_dict),
    "mem0": (_from_mem0, _to_mem0),
    "graphiti": (_from_graphiti, _to_graphiti),
    "letta": (_from_letta, _to_letta),
}
