"""New against retained, for every method, at matched acquisition: `python -m benchmarks.forgetting.frontier`

Each method of conf/consolidation/moves, and each variant, learns the same new facts to the same target accuracy, at
the searching seeds at every learning rate of one list, at all others at the one that the tables take
(`figures.chosen`); then is measured what was known before. A method is added by its class and a YAML.

kind       one row for
before     a seed: what the base model knows, and the new facts before and with their sentence in the prompt
adapter    a seed: nothing moves; the facts' generated adapters, routed
learned    a method, a learning rate and a seed: steps, whether the target was reached, what changed, what is left
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra

from benchmarks.forgetting.sweep import Cell, part, parts_of, run_cells
from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Above0, Count, Number, OutputFile, OutputFolder, Settings, Share, Text

NOTHING_MOVES = ("before", "adapter")
GENERATED = "generated_adapter"  # all facts' adapters in one LoRA: nothing is trained, at no learning rate


class LearningSettings(Settings):
    """Of all forgetting benchmarks; the limits are those of `protocol.Limits`."""

    checkpoint: Text
    seeds: list[Number]
    target: Share
    max_steps: Count
    every: Count
    batch_size: Count
    rehearsal_size: Count
    num_replayed: Count
    cells: OutputFolder
    output: OutputFile | None
    workers: Count


class FrontierSettings(LearningSettings):
    """known: of `protocol.Sizes`. searching: those of the seeds at which all learning rates are tried. curves: methods
    that try them at every seed; the others do not choose. other_learning_rates: of methods that learn at others."""

    searching: list[Number]
    curves: list[Text]
    num_facts: Count
    known: dict[str, Any]
    methods: list[Text] | None
    variants: dict[str, dict[str, Any]]
    bases: dict[str, Text | None]
    learning_rates: list[Above0]
    other_learning_rates: dict[str, list[Above0]]


SCRIPT = Script("benchmarks.forgetting.frontier", FrontierSettings)
# What no cell's rows depend on.
ELSEWHERE = ("seeds", "cells", "output", "workers")


def arms_of(methods: Sequence[str] | None, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method → settings of its parts: each of conf/consolidation/moves by itself, and the variants.

    Args:
        methods: those that are wanted; None: all.

    Raises:
        ValueError: an unknown method or part, or a name that there is twice.
    """
    arms = {name: {"moves": name} for name in parts_of("moves")}
    arms[GENERATED]["start"] = "adapters"
    if twice := sorted({*arms, *NOTHING_MOVES} & {*variants}):
        raise ValueError(f"There is a method {twice[0]!r} already. Give the variant another name.")
    arms |= variants
    if unknown := sorted({*(methods or ())} - {*arms}):
        raise ValueError(f"There is no method {unknown[0]!r}: choose of {', '.join(arms)}.")
    return {name: parts_by_name(arm, name) for name, arm in arms.items() if methods is None or name in methods}


def parts_by_name(arm: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of a method's parts; learned from the truth and without rehearsal where it names none.

    Raises:
        ValueError: an unknown part.
    """
    arm = {"objective": "supervised", "rehearsal": "none", "remedy": "none", **arm}
    start = arm.pop("start", None)
    if unknown := sorted(set(arm) - {"moves", "objective", "rehearsal", "remedy"}):
        raise ValueError(f"{name} has no part {unknown[0]!r}: give moves, objective, rehearsal, remedy or start.")
    if "moves" not in arm or start not in (None, "adapters"):
        raise ValueError(f"{name} needs moves, and start=adapters or none; got {arm} and start={start}.")
    return {"start": start, **{group: _part(group, chosen) for group, chosen in arm.items()}}


def _part(group: str, chosen: Any) -> dict[str, Any]:
    """A part by its name, or by {name: settings that differ}."""
    if not isinstance(chosen, dict):
        return part(group, str(chosen))
    ((name, changes),) = chosen.items() if len(chosen) == 1 else ((None, None),)
    settings = part(group, str(name))
    if not isinstance(changes, dict) or (unknown := sorted(set(changes) - set(settings))):
        wrong = repr(unknown[0]) if isinstance(changes, dict) else repr(chosen)
        there = ", ".join(key for key in settings if not key.startswith("_")) or "none"
        raise ValueError(f"The {group} {name} has no setting {wrong}; there are {there}.")
    return settings | changes


def check(cfg: FrontierSettings) -> None:
    """Raises ValueError: seeds to search at that are none, or learning rates of no method."""
    if not cfg.searching or not {*cfg.searching} <= {*cfg.seeds}:
        raise ValueError(f"searching should be some of the seeds {cfg.seeds}, got {cfg.searching}.")
    if unknown := sorted({*cfg.other_learning_rates} - {*arms_of(None, cfg.variants)}):
        raise ValueError(f"other_learning_rates has no method {unknown[0]!r} to give rates to.")


def cells_of(cfg: FrontierSettings, seed: int, taken: Mapping[str, float] | None = None) -> list[Cell]:
    """Of a seed.

    Args:
        taken: method → its learning rate, but for those of `curves`; None: all of them, one after the other.
    """
    arms = arms_of(cfg.methods, cfg.variants)
    own = (*ELSEWHERE, "searching", "curves", "methods", "variants", "bases", "learning_rates", "other_learning_rates")
    common = {key: value for key, value in cfg.model_dump().items() if key not in own}
    arms = {name: arm for name, arm in arms.items() if cfg.bases.get(name, "") is not None}
    others = dict.fromkeys(str(cfg.bases[name]) for name in arms if name in cfg.bases)
    found = [Cell("frontier", name, seed, common) for name in NOTHING_MOVES]
    found += [Cell("frontier", "before", seed, {**common, "checkpoint": other}) for other in others]
    for name, arm in arms.items():
        settings = {**common, "checkpoint": cfg.bases.get(name) or cfg.checkpoint, "arm": arm}
        rates = cfg.learning_rates[:1] if name == GENERATED else cfg.other_learning_rates.get(name, cfg.learning_rates)
        rates = rates if taken is None or name in cfg.curves else [taken[name]]
        found += [Cell("frontier", name, seed, {**settings, "lr": lr}) for lr in rates]
    return found


def skipped(cfg: FrontierSettings) -> list[Row]:
    """A row for each method that needs a base model of its own and has none."""
    there = arms_of(cfg.methods, cfg.variants)
    reason = "it needs a base model of its own: name one in bases"
    return [
        {"kind": "skipped", "method": name, "reason": reason}
        for name, base in cfg.bases.items()
        if base is None and name in there
    ]


def measure_cell(cell: Cell) -> list[Row]:
    """The row of a cell."""
    import torch

    from benchmarks.forgetting import protocol

    torch.set_num_threads(1)
    settings = cell.settings
    model = protocol.load(settings["checkpoint"])
    told = protocol.new_facts(cell.seed, settings["num_facts"])
    known = protocol.Known.draw(protocol.Sizes(**settings["known"]), seed=cell.seed)
    row: Row = {"kind": "learned", "checkpoint": settings["checkpoint"]}
    if cell.method in NOTHING_MOVES:
        if cell.method == "adapter" and not has_hypernetwork(model):
            return [{"kind": "skipped", "reason": f"{settings['checkpoint']} has no hypernetwork"}]
        row["kind"] = cell.method
        texts = [one.text for one in told]
        state = protocol.State(adapter=model.internalize(texts) if cell.method == "adapter" else None)
    else:
        row["lr"] = settings["lr"]
        recipe, questions = recipe_of(settings["arm"], settings, cell.seed)
        limits = limits_of(settings)
        before = protocol.snapshot(model)
        learned = protocol.learn(model, told, recipe, seed=cell.seed, limits=limits, background=questions)
        state = learned.state
        row |= learned.row() | protocol.changed(model, learned.weights, before)
    row |= known.measure(model, state)
    scored = protocol.scores(model, state, told, match=known.sizes.match)
    if cell.method == "before":
        documents = [one.text for one in told]
        in_prompt = protocol.scores(model, state, told, match=known.sizes.match, documents=documents)
        row |= {"in_prompt": sum(in_prompt) / len(told), "skipped": dict(known.skipped)}
    row["items"] |= {"new": scored}
    return [{**row, "new": sum(scored) / len(told)}]


def has_hypernetwork(model: Any) -> bool:
    from benchmarks.measuring.measure import BaseModelAlone

    return not isinstance(model, BaseModelAlone)


def recipe_of(arm: dict[str, Any], settings: Mapping[str, Any], seed: int) -> tuple[Any, list[str]]:
    """The parts, built, and what replay takes and rows are chosen by: questions on other facts than the measured."""
    from hydra.utils import instantiate

    from benchmarks.forgetting import protocol

    questions = [question for question, _ in protocol.other_known(seed, settings["num_replayed"])]
    rehearsal = instantiate(arm["rehearsal"])
    if isinstance(rehearsal, partial):
        rehearsal = rehearsal(questions=questions)
    moves, objective = instantiate(arm["moves"]), instantiate(arm["objective"])
    remedy = instantiate(arm["remedy"])
    recipe = protocol.Recipe(moves, float(settings["lr"]), objective, rehearsal, remedy, arm["start"])
    return recipe, questions


def limits_of(settings: Mapping[str, Any]) -> Any:
    from benchmarks.forgetting.protocol import Limits

    return Limits(**{name: settings[name] for name in Limits._fields})


def rows(cfg: FrontierSettings) -> Iterator[Row]:
    """All rows, cell after cell; seed after seed, so that what is there after an hour is whole."""
    from benchmarks.forgetting.figures import chosen, rate_of

    yield from skipped(cfg)
    searched = [cell for seed in cfg.searching for cell in cells_of(cfg, seed)]
    found = []
    for row in run_cells(searched, measure_cell, folder=cfg.cells, workers=cfg.workers):
        found.append(row)
        yield row
    taken = {name: rate_of(own) for name, own in chosen(found).items() if own[0]["kind"] == "learned"}
    others = [cell for seed in cfg.seeds if seed not in cfg.searching for cell in cells_of(cfg, seed, taken)]
    yield from run_cells(others, measure_cell, folder=cfg.cells, workers=cfg.workers)


@hydra.main(config_path="../../conf", config_name="forgetting_frontier", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        check(settings)
        show_and_write(rows(settings), settings.output, config=plain(cfg), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/forgetting_frontier.yaml")
