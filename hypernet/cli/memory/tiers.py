"""hypernet memory ask, explain, write-adapters, measure and forget: what needs a model."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hypernet.memory.ask import Answer
    from hypernet.memory.memory import Memory

UNFINISHED = 3  # exit status where work is left, such as adapters to be written
_DIRECTORY, _MODEL = "outputs/memory", "assets/tiny"
_COLUMNS = ("memories", "valid_now", "missing", "stale", "bytes")


def text_or_nothing(option: typer.CallbackParam, value: str | None) -> str | None:
    """Checks an option here: the library's messages have its own names for it, and a wrong option exits with 2."""
    from hypernet.memory.store.records import check_text

    with wrong_option():
        check_text(option.opts[0], value)
    return value


def instant(option: typer.CallbackParam, value: str | None) -> str | None:
    """As `text_or_nothing`."""
    from hypernet.memory.store.times import to_micros

    if value is not None:
        with wrong_option():
            to_micros(value, option.opts[0])
    return value


def one_of(*names: str) -> Callable[[str], str]:
    """A callback that takes these values."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}.")
        return value

    return check


@contextmanager
def wrong_option() -> Iterator[None]:
    """What is wrong with an option is told as such."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def bar(verb: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, on terminals alone; called with (done, altogether)."""
    from tqdm import tqdm

    with tqdm(desc=verb, unit=unit, disable=None, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


_Directory = Annotated[str, typer.Option(help="The memory's folder.")]
_Text: dict[str, Any] = {"show_default": False, "callback": text_or_nothing}
_Instant: dict[str, Any] = {"show_default": False, "callback": instant}
User = Annotated[str | None, typer.Option("--user", help="User id.", **_Text)]
Agent = Annotated[str | None, typer.Option("--agent", help="Agent id.", **_Text)]
Run = Annotated[str | None, typer.Option("--run", help="Id of a run or conversation.", **_Text)]
Reason = Annotated[str | None, typer.Option(help="Kept in deletions.jsonl.", **_Text)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]
AsOf = Annotated[str | None, typer.Option(help="What held then; ISO 8601, default now.", **_Instant)]
KnownAt = Annotated[str | None, typer.Option(help="As it was known then; default now.", **_Instant)]
Checkpoint = Annotated[str, typer.Option("--model", help="Checkpoint: a folder, or hub:owner/repository/name.")]
_TIERS = ("auto", "token", "adapter", "none")
Tier = Annotated[
    str,
    typer.Option(
        help="auto, token (in the prompt), adapter, weights, weights+adapter or none.",
        callback=one_of(*_TIERS, "weights", "weights+adapter"),
    ),
]
ExplainedTier = Annotated[
    str, typer.Option(help="auto, token (in the prompt), adapter or none.", callback=one_of(*_TIERS))
]
Accuracy = Annotated[float, typer.Option(help="That auto asks a tier to have measured.", min=0, max=1)]
AskedText = Annotated[str, typer.Argument(help="What is asked.", show_default=False)]
Questions = Annotated[
    Path | None,
    typer.Option(help="JSON lines with question and answer; default made of the memories.", show_default=False),
]


def add_to(app: typer.Typer) -> None:
    """Adds these commands."""
    for name, command in (
        ("ask", ask),
        ("explain", explain),
        ("write-adapters", write_adapters),
        ("measure", measure),
        ("forget", forget),
    ):
        app.command(name)(command)


def ask(
    question: AskedText,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    tier: Tier = "auto",
    accuracy: Accuracy = 0.9,
    as_of: AsOf = None,
    known_at: KnownAt = None,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Answer from the memories, and say by which tier and which memories. Exit status 3 if adapters are missing.

    \b
    hypernet memory ask "Who taught Fenda Elfax?" --user alice
    hypernet memory ask "Who taught Fenda Elfax?" --user alice --tier adapter
    """
    with _memory(directory, model) as memory:
        if tier.startswith("weights"):
            from hypernet.consolidation.consolidation import Consolidation
            from hypernet.memory.store.records import Filters

            if as_of is not None or known_at is not None:
                raise ValueError("Weights know one time, that of their making. Ask the tier token about another.")
            (answer,) = Consolidation(memory).ask([question], Filters(user, agent, run), tier=tier)
        else:
            answer = memory.ask(
                question,
                user_id=user,
                agent_id=agent,
                run_id=run,
                tier=tier,
                accuracy=accuracy,
                as_of=as_of,
                known_at=known_at,
            )
    typer.echo(json.dumps(answer.as_dict(), ensure_ascii=False, indent=2) if as_json else _said(answer))


def explain(
    question: AskedText,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    tier: ExplainedTier = "auto",
    accuracy: Accuracy = 0.9,
    as_of: AsOf = None,
    known_at: KnownAt = None,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Answer, and measure for each memory behind it log p(answer) with it and without it, in nats.

    \b
    hypernet memory explain "Who taught Fenda Elfax?" --user alice
    """
    with _memory(directory, model) as memory:
        answer = memory.ask(
            question,
            user_id=user,
            agent_id=agent,
            run_id=run,
            tier=tier,
            accuracy=accuracy,
            as_of=as_of,
            known_at=known_at,
        )
        effects = memory.explain(answer)
    if as_json:
        found = {**answer.as_dict(), "effects": [effect.as_dict() for effect in effects]}
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    typer.echo(_said(answer))
    for effect in effects:
        until = f" to {effect.invalid_at[:10]}" if effect.invalid_at else ""
        typer.echo(f"{effect.effect:+9.2f}  {effect.memory}  {effect.valid_at[:10]}{until}  {effect.text}")


def write_adapters(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Give every memory version its adapter; those that are there stay. Exit status 3 if some make none.

    \b
    hypernet memory write-adapters --user alice
    """
    with _memory(directory, model) as memory, bar("write adapters", "memory") as progress:
        written = memory.write_adapters(user_id=user, agent_id=agent, run_id=run, progress=progress)
    if as_json:
        typer.echo(json.dumps(written._asdict(), ensure_ascii=False))
    else:
        typer.echo(
            f"{written.written} written, {written.copied} copied, {written.kept} kept; {written.bytes:,} bytes, "
            f"{written.seconds:.1f} s"
        )
        for ref, reason in written.refused.items():
            typer.echo(f"{ref} makes none: {reason}", err=True)
    if written.refused:
        raise typer.Exit(UNFINISHED)


def measure(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    questions: Questions = None,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Ask held questions of each tier, and keep accuracy and cost, by which ask --tier auto chooses.

    Without --questions, each memory with a subject and a relation is asked for,
    and the right answer is the model's with that memory alone in its prompt.

    \b
    hypernet memory measure --user alice
    hypernet memory measure --user alice --questions questions.jsonl
    """
    pairs = None if questions is None else _pairs(questions)
    with _memory(directory, model) as memory:
        found = memory.measure(user_id=user, agent_id=agent, run_id=run, questions=pairs)
    if as_json:
        typer.echo(json.dumps([vars(measured) for measured in found], indent=2))
        return
    for measured in found:
        typer.echo(
            f"{measured.tier:8}  {measured.accuracy:.2f} of {measured.questions} questions  "
            f"{measured.question_tokens:.0f} tokens  {1e3 * measured.question_s:.1f} ms"
        )


def forget(
    key: Annotated[str, typer.Argument(help="ID or ID@VERSION.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Compare with a memory that never had it.")] = False,
    reason: Reason = None,
    questions: Questions = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint; needed to compare adapters and answers.", show_default=False),
    ] = None,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Delete a memory, what was derived from it and its adapters. Exit status 1 if the comparison finds a difference.

    What is left is compared with a fresh memory that never had it: adapters to
    the bit, searches, answers, and how likely the deleted answer is. The report
    goes to deletions.jsonl. rollback brings it back until purge.

    \b
    hypernet memory forget 4f1c9a3be2d07788 --verify --model assets/tiny
    """
    pairs = None if questions is None else _pairs(questions)
    with _memory(directory, model) as memory:
        report = memory.forget(key, verify=verify, reason=reason, questions=pairs)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        derived = f", {report.num_derived} of them derived" if report.num_derived else ""
        typer.echo(f"forgot {len(report.memories)} versions{derived} ({report.batch})")
        if report.audited:
            typer.echo(f"adapters   {report.slots_equal} of {report.slots} are the twin's to the bit")
            typer.echo(f"searches   {report.searches_equal} of {report.searches} are the twin's")
            for tier, number in report.answers.items():
                typer.echo(f"answers    {report.answers_equal[tier]} of {number} are the twin's ({tier})")
            for tier, values in report.membership.items():
                said = ", ".join(f"{when} {value:.2f}" for when, value in values.items())
                typer.echo(f"log p      of its answer: {said} ({tier})")
            typer.echo("passed" if report.passed else "FAILED: what is left is not what it would be without it")
    if not report.passed:
        raise typer.Exit(1)


def tiers_table(tiers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`Memory.status`'s tiers as lines."""
    lines: list[tuple[str, ...]] = [("tier", *_COLUMNS, "accuracy", "oracle", "tokens", "ms", "break-even", "measured")]
    for name, of_tier in tiers.items():
        seconds, even, at = of_tier["question_s"], of_tier["break_even"], of_tier["measured_at"]
        lines.append(
            (
                name,
                *(f"{of_tier[column]:,}" for column in _COLUMNS),
                *(_figure(of_tier[key], "{:.2f}") for key in ("accuracy", "oracle")),
                _figure(of_tier["question_tokens"], "{:.0f}"),
                _figure(None if seconds is None else 1e3 * seconds, "{:.1f}"),
                "never" if even == float("inf") else _figure(even, "{:.0f} questions"),
                "-" if at is None else at[:10],
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


@contextmanager
def _memory(directory: str, model: str | None) -> Iterator["Memory"]:
    from hypernet.memory.ask import Unwritten
    from hypernet.memory.memory import Memory

    memory = Memory.open(directory, create=False, model=model)
    try:
        yield memory
    except Unwritten as error:
        typer.echo(f"hypernet: {error}", err=True)
        raise typer.Exit(UNFINISHED) from error
    finally:
        memory.close()


def _said(answer: "Answer") -> str:
    if answer.tier.startswith("weights") and not answer.memories:
        return f"{answer.text}\n{answer.tier}: {answer.reason}"
    behind = ", ".join(answer.memories) or "no memory"
    return f"{answer.text}\n{answer.tier}: {behind} ({answer.reason})"


def _pairs(path: Path) -> Sequence[tuple[str, str]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                fields = json.loads(line)
                found.append((fields["question"], fields["answer"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no object with question and answer.") from error
    return found
