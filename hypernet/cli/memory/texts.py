"""hypernet memory: what users said, kept in a folder, searched, corrected and forgotten."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypernet.cli.memory import tiers as of_tiers
from hypernet.cli.memory import weights as of_weights
from hypernet.cli.memory.tiers import (
    UNFINISHED,
    Agent,
    AsOf,
    KnownAt,
    Reason,
    Run,
    User,
    instant,
    one_of,
    text_or_nothing,
    wrong_option,
)
from hypernet.text.cleaning import escaped

if TYPE_CHECKING:
    from hypernet.memory.memory import Memory
    from hypernet.memory.store.records import Batch, MemoryRef, MemoryVersion

_DIRECTORY = "outputs/memory"

app = typer.Typer(
    no_args_is_help=True,
    help="""Memories of users: text with dates, and adapters made of it, in one folder, without a network.

    Nothing is overwritten: an update is a new version, and a deletion can be
    taken back until it is purged. A KEY is an ID as add and search print it, or
    ID@VERSION. A filter that is not given does not restrict. In Python this is
    hypernet.Memory.

    Exit status: 0 done, 1 an error, no hit of search or damage that verify
    found, 2 a wrong option or weights that the gate refused, 3 work is stale or
    unfinished, such as adapters to be written.

    \b
    hypernet memory add "Orla Wint taught Fenda Elfax." --user alice
    hypernet memory search "Who taught Fenda Elfax?" --user alice
    hypernet memory versions
    hypernet memory rollback v1
    """,
)

of_tiers.add_to(app)
of_weights.add_to(app)


def _days(option: typer.CallbackParam, value: float) -> float:
    from hypernet.memory.profile import checked_days

    with wrong_option():
        return checked_days(value, option.opts[0])


_Directory = Annotated[str, typer.Option(help="The memory's folder.")]
_Database = Annotated[
    str | None,
    typer.Option(
        help="URL of PostgreSQL, for a new memory: postgresql+psycopg://user@host/name; default SQLite.",
        show_default=False,
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]
ValidAt = Annotated[
    str | None, typer.Option(help="True from then on; default now.", callback=instant, show_default=False)
]
InvalidAt = Annotated[
    str | None, typer.Option(help="True until then; default open.", callback=instant, show_default=False)
]
_At = Annotated[
    str | None, typer.Option(help="Since when; ISO 8601, default now.", callback=instant, show_default=False)
]
_Subject = Annotated[
    str | None, typer.Option(help="With --relation, the key by which it supersedes.", callback=text_or_nothing)
]
_Relation = Annotated[
    str | None, typer.Option(help="With --subject, the key by which it supersedes.", callback=text_or_nothing)
]
_Source = Annotated[str | None, typer.Option(help="Where it comes from.", callback=text_or_nothing, show_default=False)]
Format = Annotated[
    str, typer.Option(help="plain, mem0, graphiti or letta.", callback=one_of("plain", "mem0", "graphiti", "letta"))
]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1)]
Model = Annotated[
    str | None,
    typer.Option(help="Base model or checkpoint that finds by meaning too; default words alone.", show_default=False),
]
Key = Annotated[str, typer.Argument(help="ID or ID@VERSION.", show_default=False)]
MemoryText = Annotated[str, typer.Argument(help="The text; - reads standard input.", show_default=False)]


@app.command()
def add(
    text: MemoryText,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    subject: _Subject = None,
    relation: _Relation = None,
    valid_at: ValidAt = None,
    invalid_at: InvalidAt = None,
    source: _Source = None,
    directory: _Directory = _DIRECTORY,
    database: _Database = None,
    as_json: _Json = False,
) -> None:
    """Remember a text; print its id@version and the batch that rollback takes back.

    \b
    hypernet memory add "I play chess." --user alice --valid-at 2026-03-01
    hypernet memory add "Alice lives in Rome." --user alice \\
      --subject Alice --relation "lives in"
    """
    with _memory(directory, create=True, database=database) as memory:
        ref = memory.add(
            _content(text),
            user_id=user,
            agent_id=agent,
            run_id=run,
            subject=subject,
            relation=relation,
            valid_at=valid_at,
            invalid_at=invalid_at,
            source=source,
        )
    _print_ref(ref, as_json)


@app.command()
def search(
    question: Annotated[str, typer.Argument(help="What is asked.", show_default=False)],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    limit: Limit = 5,
    as_of: AsOf = None,
    known_at: KnownAt = None,
    model: Model = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Find memories, the best first. Exit status 1 if there is none.

    \b
    hypernet memory search "Who taught Fenda Elfax?" --user alice \\
      --as-of 2026-04-01
    """
    with _memory(directory, model=model) as memory:
        hits = memory.search(
            question,
            user_id=user,
            agent_id=agent,
            run_id=run,
            limit=limit,
            as_of=as_of,
            known_at=known_at,
        )
    _print_memories(hits, as_json)
    if not hits:
        raise typer.Exit(1)


@app.command()
def get(
    key: Key, as_of: AsOf = None, known_at: KnownAt = None, directory: _Directory = _DIRECTORY, as_json: _Json = False
) -> None:
    """Print one memory.

    \b
    hypernet memory get 4f1c9a3be2d07788@1
    """
    with _memory(directory) as memory:
        found = memory.get(key, as_of=as_of, known_at=known_at)
    typer.echo(
        json.dumps(found.as_dict(), ensure_ascii=False, indent=2) if as_json else escaped(found.text or "", keep="\n\t")
    )


@app.command("list")
def list_(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    limit: Limit = 1000,
    as_of: AsOf = None,
    known_at: KnownAt = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """List what holds, in the order stored.

    \b
    hypernet memory list --user alice
    """
    with _memory(directory) as memory:
        found = memory.list(user_id=user, agent_id=agent, run_id=run, limit=limit, as_of=as_of, known_at=known_at)
    _print_memories(found, as_json)


@app.command()
def history(key: Key, directory: _Directory = _DIRECTORY, as_json: _Json = False) -> None:
    """Print what happened to a memory; of deleted versions no text.

    \b
    hypernet memory history 4f1c9a3be2d07788
    """
    with _memory(directory) as memory:
        entries = memory.history(key)
    _print_rows([dataclasses.asdict(entry) for entry in entries], as_json)


@app.command()
def profile(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    limit: Limit = 20,
    recent_days: Annotated[float, typer.Option(help="Days for which what was stored is recent.", callback=_days)] = 7,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Print what is known of a user: stable facts, then recent ones.

    \b
    hypernet memory profile --user alice
    """
    if user is None and agent is None and run is None:
        raise ValueError("A profile is somebody's. Give --user, --agent or --run.")
    with _memory(directory) as memory:
        found = memory.profile(user_id=user, agent_id=agent, run_id=run, limit=limit, recent_days=recent_days)
    parts = {name: [memory.as_dict() for memory in part] for name, part in found._asdict().items()}
    typer.echo(json.dumps(parts, ensure_ascii=False, indent=2) if as_json else escaped(str(found), keep="\n\t"))


@app.command()
def update(
    key: Key,
    text: MemoryText,
    valid_at: ValidAt = None,
    invalid_at: InvalidAt = None,
    source: _Source = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """State a memory anew from a date on; the versions before stay.

    \b
    hypernet memory update 4f1c9a3be2d07788 "Alice lives in Oslo." \\
      --valid-at 2026-06-01
    """
    with _memory(directory) as memory:
        ref = memory.update(key, _content(text), valid_at=valid_at, invalid_at=invalid_at, source=source)
    _print_ref(ref, as_json)


@app.command()
def invalidate(
    key: Key,
    at: _At = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """State that a memory no longer holds.

    \b
    hypernet memory invalidate 4f1c9a3be2d07788 --at 2026-07-01
    """
    with _memory(directory) as memory:
        ref = memory.invalidate(key, at=at)
    _print_ref(ref, as_json)


@app.command()
def delete(key: Key, reason: Reason = None, directory: _Directory = _DIRECTORY, as_json: _Json = False) -> None:
    """Delete a memory and what was derived from it; restore and rollback bring it back until purge.

    \b
    hypernet memory delete 4f1c9a3be2d07788 --reason "asked by phone"
    """
    with _memory(directory) as memory:
        batch = memory.delete(key, reason=reason)
    _print_batch(batch, as_json)


@app.command("delete-all")
def delete_all(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    reason: Reason = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Delete what matches every filter that is given; without any it is refused.

    \b
    hypernet memory delete-all --user alice --run chat-7
    """
    if user is None and agent is None and run is None:
        raise ValueError("delete-all needs --user, --agent or --run. It never means everybody.")
    with _memory(directory) as memory:
        batch = memory.delete_all(user_id=user, agent_id=agent, run_id=run, reason=reason)
    _print_batch(batch, as_json)


@app.command()
def restore(key: Key, directory: _Directory = _DIRECTORY, as_json: _Json = False) -> None:
    """Bring a deleted memory back.

    \b
    hypernet memory restore 4f1c9a3be2d07788
    """
    with _memory(directory) as memory:
        batch = memory.restore(key)
    _print_batch(batch, as_json)


@app.command()
def purge(
    key: Annotated[str | None, typer.Argument(help="ID or ID@VERSION; default all.", show_default=False)] = None,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Erase the content of what was deleted or taken back from the folder, for good. Exit status 3 if unfinished.

    \b
    hypernet memory purge
    hypernet memory purge --user alice
    """
    with _memory(directory) as memory:
        batch = memory.purge(key, user_id=user, agent_id=agent, run_id=run)
    _print_batch(batch, as_json)
    if not batch.finished:
        typer.echo("Another process is reading: run hypernet memory verify when it is done.", err=True)
        raise typer.Exit(UNFINISHED)


@app.command()
def versions(
    weights: Annotated[bool, typer.Option("--weights", help="The versions of consolidated weights instead.")] = False,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """List the batches, the oldest first; or the versions of somebody's weights.

    \b
    hypernet memory versions
    hypernet memory versions --weights --user alice
    """
    with _memory(directory) as memory:
        found = of_weights.listed(memory, user, agent, run) if weights else memory.versions()
    _print_rows(found, as_json)


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="A batch such as v3, or weights: w-..., base.", show_default=False)],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Take a batch back, as if it had never been; or let weights that were live before answer again.

    \b
    hypernet memory rollback v3
    hypernet memory rollback base --user alice
    """
    with _memory(directory) as memory:
        if version.startswith("w-") or version == "base":
            typer.echo(of_weights.rolled_back(memory, version, user, agent, run))
            return
        batch = memory.rollback(version)
    _print_batch(batch, as_json)


@app.command()
def status(
    user: User = None, agent: Agent = None, run: Run = None, directory: _Directory = _DIRECTORY, as_json: _Json = False
) -> None:
    """Count memories and bytes, and show the tiers. Exit status 3 if a purge or a write was interrupted, or where there
    are adapters some are missing or stale.

    \b
    hypernet memory status --user alice
    """
    with _memory(directory) as memory:
        found = memory.status(user_id=user, agent_id=agent, run_id=run)
        if weights := of_weights.tier(memory, user, agent, run):
            found["tiers"]["weights"] = weights
    adapter = found["tiers"]["adapter"]
    if as_json:
        if adapter["break_even"] == float("inf"):  # JSON has no infinity
            adapter["break_even"] = "never"
        typer.echo(json.dumps(found))
    else:
        lines = [f"{name:14}{value}" for name, value in found.items() if name not in ("is_unfinished", "tiers")]
        lines.append(f"{'unfinished':14}{'yes, run verify' if found['is_unfinished'] else 'no'}")
        typer.echo("\n".join([*lines, *of_tiers.tiers_table(found["tiers"])]))
    has_adapters = adapter["memories"] or adapter["stale"]
    if found["is_unfinished"] or (has_adapters and (adapter["missing"] or adapter["stale"])):
        raise typer.Exit(UNFINISHED)


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="JSON lines, or one JSON value.", show_default=False)],
    format: Format = "plain",
    user: User = None,
    agent: Agent = None,
    directory: _Directory = _DIRECTORY,
    database: _Database = None,
    as_json: _Json = False,
) -> None:
    """Add a file's memories in one batch, all or none; what was ever here under its id is left out.

    \b
    hypernet memory import mem0.jsonl --format mem0 --user alice
    """
    from hypernet.memory.exchange import read_drafts

    read_drafts(file, format=format)  # a mistake in it is told before a folder is made
    with _memory(directory, create=True, database=database) as memory:
        batch = memory.import_jsonl(file, format=format, user_id=user, agent_id=agent)
    _print_batch(batch, as_json)


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="Where to write; replaced if it is there.", show_default=False)],
    format: Format = "plain",
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    directory: _Directory = _DIRECTORY,
) -> None:
    """Write memories as JSON lines: plain has every version, the others what holds now.

    \b
    hypernet memory export alice.jsonl --user alice
    """
    with _memory(directory) as memory:
        number = memory.export_jsonl(file, format=format, user_id=user, agent_id=agent, run_id=run)
    typer.echo(f"{number} memories in {file}")


@app.command()
def copy(
    folder: Annotated[str, typer.Argument(help="New folder of the copy.", show_default=False)],
    database: _Database = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Copy a whole memory, deleted versions and adapters too, into SQLite or PostgreSQL.

    \b
    hypernet memory copy outputs/shared \\
      --database postgresql+psycopg://alice@db.example/memory
    hypernet memory copy outputs/back --directory outputs/shared
    """
    with _memory(directory) as memory:
        found = memory.copy(folder, database=database)
    rows = ", ".join(f"{number} {name}" for name, number in found.items())
    typer.echo(json.dumps(found) if as_json else f"{rows} in {folder}")


@app.command()
def verify(directory: _Directory = _DIRECTORY, as_json: _Json = False) -> None:
    """Compare everything with what was stored, and finish what was interrupted. Exit status 1 if damaged.

    \b
    hypernet memory verify
    """
    with _memory(directory) as memory:
        found = memory.verify()
    if as_json:
        typer.echo(json.dumps(found._asdict()))
    else:
        lines = [*found.damage, *(f"repaired {what}" for what in found.repaired)]
        typer.echo("\n".join(map(escaped, lines)) or "Everything is as it was stored.")
    if found.damage:
        raise typer.Exit(1)


@contextmanager
def _memory(
    directory: str, *, create: bool = False, model: str | None = None, database: str | None = None
) -> Iterator["Memory"]:
    from hypernet.memory.memory import Memory

    memory = Memory.open(directory, create=create, model=model, database=database)
    try:
        yield memory
    finally:
        memory.close()


def _content(text: str) -> str:
    return sys.stdin.read().strip() if text == "-" else text


def _print_ref(ref: "MemoryRef", as_json: bool) -> None:
    typer.echo(json.dumps(ref._asdict()) if as_json else f"{ref} ({ref.batch})")


def _print_batch(batch: "Batch", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(batch._asdict()))
        return
    derived = f", {batch.num_derived} of them derived" if batch.num_derived else ""
    known = f", {batch.num_known} left out that were here before" if batch.num_known else ""
    version = f" ({batch.version})" if batch.version else ""
    typer.echo(f"{batch.operation}: {len(batch.memories)} versions{derived}{known}{version}")


def _print_memories(found: "Sequence[MemoryVersion]", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([memory.as_dict() for memory in found], ensure_ascii=False, indent=2))
        return
    for memory in found:
        until = f" to {memory.invalid_at[:10]}" if memory.invalid_at else ""
        typer.echo(escaped(f"{memory.ref}  {memory.valid_at[:10]}{until}  {memory.text}"))


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for row in rows:
        told = {name: name.replace("_", " ") if value is True else value for name, value in row.items()}
        typer.echo(escaped("  ".join(str(value) for value in told.values() if value not in (None, False))))
