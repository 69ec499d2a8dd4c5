"""hypernet memory consolidate, promote and sleep: memories into weights, behind a gate."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypernet.cli.memory.tiers import Agent, Checkpoint, Run, User, bar

if TYPE_CHECKING:
    from hypernet.consolidation.cadence import Cadence
    from hypernet.consolidation.consolidation import Consolidation
    from hypernet.memory.memory import Memory
    from hypernet.memory.weights.versions import Version

REFUSED = 2  # exit status where the gate said no
_DIRECTORY, _MODEL = "outputs/memory", "assets/tiny"
_MOVES, _OBJECTIVES, _REHEARSALS = (
    ("lora", "everything", "upper"),
    ("kl", "sft", "on-policy", "deep"),
    ("other", "self", "none"),
)
_CADENCES = ("every-n", "calendar", "pressure", "economic")


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not above 0 and finite.")
    return value


def _thresholds(path: str) -> dict[str, float]:
    """Of a --gate file. What needs no list of them is checked before torch is imported for that."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} is no YAML. Write thresholds as min_recall: 0.8.") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} is no YAML with thresholds. Write them as min_recall: 0.8.")
    found.pop("_target_", None)
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise typer.BadParameter(f"{key} in {path} is {value!r}, no finite number.")

    from hypernet.consolidation.gate import PromotionGate

    known = sorted(PromotionGate.__init__.__kwdefaults__ or ())
    if unknown := [str(key) for key in found if key not in known]:
        raise typer.BadParameter(f"{unknown[0]} in {path} is none of {', '.join(known)}.")
    return found


_Directory = Annotated[str, typer.Option(help="The memory's folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]
MovesOption = Annotated[str, typer.Option("--moves", help="What is trained: lora, everything or upper (blocks).")]
Rank = Annotated[int, typer.Option(help="Of the LoRA.", min=1)]
ObjectiveOption = Annotated[str, typer.Option("--objective", help="kl, sft, on-policy or deep.")]
RehearsalOption = Annotated[str, typer.Option("--rehearsal", help="other (subjects), self (written) or none.")]
Steps = Annotated[
    int | None, typer.Option(help="Of training; default 24, and 4.8 for each memory.", min=1, show_default=False)
]
Anew = Annotated[
    bool, typer.Option("--anew/--on-top", help="Of all memories, or on top of the live weights: it drifts.")
]
Lr = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate; default 0.003 for lora, else 0.0007.", show_default=False, callback=_positive
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything drawn.", min=0)]
Start = Annotated[str, typer.Option(help="Training starts from nothing or from adapters.")]
Gate = Annotated[
    dict[str, float] | None,
    typer.Option(
        help="YAML with thresholds, as conf/consolidation/gate.yaml.",
        show_default=False,
        parser=_thresholds,
        metavar="FILE",
    ),
]
Documents = Annotated[
    Path | None,
    typer.Option(help="File or folder whose passages become memories first.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")]
Approved = Annotated[bool, typer.Option("--approved", help="Only what was accepted or edited, see review.")]
Retry = Annotated[bool, typer.Option("--retry", help="Also what was refused or rolled back.")]


def add_to(app: typer.Typer) -> None:
    """Adds these commands."""
    for name, command in (
        ("review", review),
        ("consolidate", consolidate),
        ("promote", promote),
        ("sleep", sleep),
    ):
        app.command(name)(command)


def review(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    accept: Annotated[list[str] | None, typer.Option(help="Id of an item, or all.")] = None,
    reject: Annotated[list[str] | None, typer.Option(help="Id of an item.")] = None,
    edit: Annotated[tuple[str, str] | None, typer.Option(help="Id of an item and its right answer.")] = None,
    reject_text: Annotated[str | None, typer.Option(help="Rejects whatever has this in it.")] = None,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """List the questions and answers that the model writes about what waits; consolidate --approved trains on what was
    accepted or edited alone.

    \b
    hypernet memory review --user alice
    hypernet memory review --user alice --accept all --reject q-3f0a9c21d4e7
    """
    from hypernet.consolidation.self_instruct.review import Review

    filters = _filters(user, agent, run)
    with _consolidation(directory, model) as own:
        found = Review.of(own.memory.store.folder, filters)
        found.draft(own.model, own.waiting(filters), own.consolidator.questions)
    if reject_text:
        found.reject_text(reject_text)
    for key in accept or ():
        for one in [item.id for item in found.items.values() if item.status == "open"] if key == "all" else [key]:
            found.decide(one, "accept")
    for key in reject or ():
        found.decide(key, "reject")
    if edit:
        found.decide(edit[0], "edit", edit[1])
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(item) for item in found.items.values()], ensure_ascii=False))
        return
    for item in found.items.values():
        status = "rejected" if found.is_rejected(item) else item.status
        typer.echo(f"{item.id}  {status:9}{item.question}  {item.final}")


def consolidate(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    documents: Documents = None,
    dry_run: DryRun = False,
    retry: Retry = False,
    moves: MovesOption = "lora",
    rank: Rank = 16,
    objective: ObjectiveOption = "kl",
    rehearsal: RehearsalOption = "other",
    steps: Steps = None,
    anew: Anew = True,
    lr: Lr = None,
    seed: Seed = 0,
    start: Start = "nothing",
    gate: Gate = None,
    approved: Approved = False,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """Train weights on what waits, and judge them; promote makes them live. Exit status 2 if the gate refuses.

    \b
    hypernet memory consolidate --user alice --dry-run
    hypernet memory consolidate --user alice
    hypernet memory consolidate --user alice --documents notes/
    """
    filters = _filters(user, agent, run)
    if documents and dry_run:
        raise ValueError("--documents adds passages to the memory, and --dry-run changes nothing: give one of them.")
    with _consolidation(directory, model, moves, rank, objective, rehearsal, steps, anew, lr, seed, start, gate) as own:
        _approved_only(own, filters, approved)
        if dry_run:
            manifest, _ = own.planned(filters, retry=retry)
            if as_json:
                typer.echo(json.dumps(vars(manifest)))
            else:
                typer.echo(
                    f"{len(manifest.contains)} memories, {len(manifest.new)} new, from {manifest.parent or 'base'}"
                )
            return
        with bar("consolidate", "step") as progress:
            version = own.consolidate(filters, documents=documents, retry=retry, progress=progress)
    _print(version, as_json)
    if not version.passed:
        raise typer.Exit(REFUSED)


def promote(
    name: Annotated[str, typer.Argument(metavar="VERSION", help="As consolidate prints it.", show_default=False)],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    force: Annotated[bool, typer.Option("--force", help="Past the gate; recorded for ever.")] = False,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
) -> None:
    """Make weights live. Exit status 2 unless they passed the gate.

    \b
    hypernet memory promote w-3f0a9c21d4e7 --user alice
    """
    from hypernet.memory.weights.versions import GateRefused

    with _consolidation(directory, model) as own:
        try:
            version = own.promote(name, _filters(user, agent, run), force=force)
        except GateRefused as error:
            typer.echo(f"hypernet: {error}", err=True)
            raise typer.Exit(REFUSED) from error
        handed = own.handed_over(_filters(user, agent, run))
    forced = "" if version.passed else ", forced past the gate"
    typer.echo(
        f"{version.name} is live{forced}; {len(handed)} of {len(version.manifest.contains)} memories handed over"
    )


def sleep(
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    cadence: Annotated[str, typer.Option(help="every-n, calendar, pressure or economic.")] = "every-n",
    now: Annotated[bool, typer.Option("--now", help="Whether or not it is due.")] = False,
    moves: MovesOption = "lora",
    rank: Rank = 16,
    objective: ObjectiveOption = "kl",
    rehearsal: RehearsalOption = "other",
    steps: Steps = None,
    anew: Anew = True,
    lr: Lr = None,
    seed: Seed = 0,
    start: Start = "nothing",
    gate: Gate = None,
    approved: Approved = False,
    model: Checkpoint = _MODEL,
    directory: _Directory = _DIRECTORY,
    as_json: _Json = False,
) -> None:
    """If it is due: write adapters, consolidate, judge, promote, hand over. Exit status 2 if the gate refuses.

    \b
    hypernet memory sleep --user alice --now
    hypernet memory sleep --user alice --cadence economic
    """
    from hypernet.consolidation.sleep import Sleep

    policy, filters = _cadence(cadence), _filters(user, agent, run)
    with _consolidation(directory, model, moves, rank, objective, rehearsal, steps, anew, lr, seed, start, gate) as own:
        _approved_only(own, filters, approved)
        with bar("consolidate", "step") as progress:
            night = Sleep(own, cadence=policy).run(filters, at_once=now, progress=progress)
    if as_json:
        typer.echo(json.dumps(night._asdict()))
    elif not night.slept:
        typer.echo(night.reason)
    else:
        typer.echo(
            f"{night.version} {night.reason}; {night.waiting} memories waited, {night.handed_over} are handed over, "
            f"{night.seconds:.1f} s"
        )
    if night.slept and not night.promoted:
        raise typer.Exit(REFUSED)


def listed(memory: "Memory", user: str | None, agent: str | None, run: str | None) -> tuple[dict[str, Any], ...]:
    """Rows of somebody's versions."""
    from hypernet.memory.weights.versions import Versions

    versions = Versions.of(memory.store.folder, _filters(user, agent, run))
    forced = {entry["version"] for entry in versions.promotions() if entry["forced"]}
    return tuple(
        {
            "version": version.name,
            "live": version.name == versions.current,
            "gate": "not judged" if version.gate is None else "passed" if version.passed else "refused",
            "forced": version.name in forced,
            "memories": len(version.manifest.contains),
            "parent": version.manifest.parent or "base",
        }
        for version in versions.all()
    )


def tier(memory: "Memory", user: str | None, agent: str | None, run: str | None) -> dict[str, Any] | None:
    """The line of `hypernet memory status`; None where nothing was ever consolidated.

    memories: of the version that was made live last, or of an ancestor that answers in its place. missing: hold and are
    in no weights. stale: in that version and hold no more, so that it answers nothing. bytes: of all versions.
    """
    from hypernet.memory.weights.versions import BASE, Versions

    filters = _filters(user, agent, run)
    versions = Versions.of(memory.store.folder, filters)
    if not versions.all():
        return None
    valid = {one.ref for one in memory.store.valid(filters)}
    live = versions.live(valid.__contains__)
    inside = set(live.manifest.contains) if live else set()
    last = set() if versions.current == BASE else set(versions.get(versions.current).manifest.contains)
    files = [path for path in versions.folder.rglob("*") if path.is_file()]
    unmeasured = ("accuracy", "oracle", "question_tokens", "question_s", "break_even", "measured_at")
    return {
        **{"memories": len(inside | last), "valid_now": len(inside), "missing": len(valid - inside)},
        **{"stale": len(last - valid), "bytes": sum(path.stat().st_size for path in files)},
        **dict.fromkeys(unmeasured),
        "live": live.name if live else BASE,
    }


def rolled_back(memory: "Memory", name: str, user: str | None, agent: str | None, run: str | None) -> str:
    """Makes it live, and says so."""
    from hypernet.memory.weights.versions import Versions

    Versions.of(memory.store.folder, _filters(user, agent, run)).rollback(name)
    return f"{name} is live"


def _filters(user: str | None, agent: str | None, run: str | None) -> Any:
    from hypernet.memory.store.records import Filters

    return Filters(user, agent, run).checked()


def _chosen(option: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}.", param_hint=f"'{option}'")


def _approved_only(own: "Consolidation", filters: Any, approved: bool) -> None:
    from hypernet.consolidation.self_instruct.preference import Preference
    from hypernet.consolidation.self_instruct.review import Review, Reviewed

    if approved:
        own.consolidator.questions = Reviewed(own.consolidator.questions, Review.of(own.memory.store.folder, filters))
        own.consolidator.preference = Preference()


def _cadence(name: str) -> "Cadence":
    from hypernet.consolidation import cadence

    _chosen("--cadence", name, _CADENCES)
    made: tuple[Cadence, ...] = (cadence.EveryN(), cadence.Calendar(), cadence.Pressure(), cadence.Economic())
    return dict(zip(_CADENCES, made, strict=True))[name]


@contextmanager
def _consolidation(
    directory: str,
    model: str,
    moves: str = "lora",
    rank: int = 16,
    objective: str = "kl",
    rehearsal: str = "other",
    steps: int | None = None,
    anew: bool = True,
    lr: float | None = None,
    seed: int = 0,
    start: str = "nothing",
    gate: dict[str, float] | None = None,
) -> Iterator["Consolidation"]:
    _chosen("--moves", moves, _MOVES)
    _chosen("--objective", objective, _OBJECTIVES)
    _chosen("--rehearsal", rehearsal, _REHEARSALS)

    from hypernet.consolidation import moves as moving
    from hypernet.consolidation import objectives
    from hypernet.consolidation import rehearsal as rehearsing
    from hypernet.consolidation.consolidation import Consolidation
    from hypernet.consolidation.consolidator import Consolidator
    from hypernet.consolidation.gate import PromotionGate
    from hypernet.memory.memory import Memory

    chosen: moving.Moves = moving.LowRank(rank=rank)
    if moves != "lora":
        chosen = moving.Everything() if moves == "everything" else moving.UpperBlocks()
    learned: dict[str, objectives.Objective] = {
        "kl": objectives.TeacherKL(),
        "sft": objectives.Supervised(),
        "on-policy": objectives.OnPolicy(),
        "deep": objectives.Deep(),
    }
    rehearsed: dict[str, rehearsing.Rehearsal] = {
        "other": rehearsing.OtherSubjects(),
        "self": rehearsing.SelfSynthesised(),
        "none": rehearsing.NoRehearsal(),
    }
    consolidator = Consolidator(
        moves=chosen,
        objective=learned[objective],
        rehearsal=rehearsed[rehearsal],
        steps=steps,
        lr=lr or (3e-3 if moves == "lora" else 7e-4),
        seed=seed,
    )
    judge = PromotionGate(**gate or {})
    memory = Memory.open(directory, create=False, model=model)
    try:
        yield Consolidation(memory, consolidator=consolidator, gate=judge, start=start, anew=anew)
    finally:
        memory.close()


def _print(version: "Version", as_json: bool) -> None:
    assert version.gate is not None
    if as_json:
        typer.echo(json.dumps({"version": version.name, **version.gate}))
        return
    for check in version.gate["checks"]:
        sign = ">=" if check["at_least"] else "<="
        verdict = "passed" if check["passed"] else "FAILED"
        typer.echo(
            f"{check['name']:12}{check['value']:8.3f}  {sign} {check['limit']:<8g} of {check['number']:<5} {verdict}"
        )
    typer.echo(f"{version.name} {'passed the gate' if version.passed else 'was refused'}")
