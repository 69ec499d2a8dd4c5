"""Five tasks in sequence, without forgetting the first? `python -m benchmarks.forgetting.tasks`

A task is new facts about people, towns, companies, instruments, or secret numbers. They come one after the other, each
is learned to the target accuracy or the limit, and after each all five are asked, without naming the task.

lora             one LoRA, trained on from task to task
expert_per_task  a LoRA for each task and a shared one, with a router (`hypernet.consolidation.experts`)
adapter_bank     a generated adapter of each fact's sentence, routed; nothing is trained
on_top_*         consolidation: a LoRA merged after each task, beside each rehearsal; its teacher and what it writes
                 itself come from the weights so far, what is replayed are questions of earlier tasks
anew             consolidation as `hypernet memory sleep` does it: from the base model, on all tasks so far

BWT = 1/(T - 1) Σ_{t<T} (R[T, t] - R[t, t]) and ACC = 1/T Σ_t R[T, t], R[i, t] the accuracy on task t after task i.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra

from benchmarks.forgetting.frontier import ELSEWHERE, LearningSettings, limits_of
from benchmarks.forgetting.sweep import Cell, part, run_cells
from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Above0, Count, Text

TASKS = ("person", "town", "company", "instrument", "number")
METHODS = (
    *("lora", "expert_per_task", "adapter_bank", "on_top_none", "on_top_replay", "on_top_self_synthesised", "anew"),
)


class TasksSettings(LearningSettings):
    num_facts: Count
    num_background: Count
    methods: list[Text]
    moves: dict[str, Any]
    experts: dict[str, Any]
    learning_rates: list[Above0]


SCRIPT = Script("benchmarks.forgetting.tasks", TasksSettings)

Answer = Callable[[Sequence[str]], list[str]]


def cells_of(cfg: TasksSettings) -> list[Cell]:
    """Every method that trains at each learning rate."""
    if unknown := sorted(set(cfg.methods) - set(METHODS)):
        raise ValueError(f"There is no method {unknown[0]!r}: choose of {', '.join(METHODS)}.")
    common = {key: value for key, value in cfg.model_dump().items() if key not in (*ELSEWHERE, "methods")}
    del common["learning_rates"]
    rates = {name: [None] if name == "adapter_bank" else cfg.learning_rates for name in cfg.methods}
    return [
        Cell("tasks", name, seed, {**common, "lr": lr})
        for seed in cfg.seeds
        for name in cfg.methods
        for lr in rates[name]
    ]


def measure_cell(cell: Cell) -> list[Row]:
    """A row for each task that was learned, with all that is answered after it; and one of the whole sequence."""
    import torch

    from benchmarks.forgetting import protocol
    from benchmarks.forgetting.intervals import backward_transfer, final_average
    from hypernet.text.matching import exact_match

    torch.set_num_threads(1)
    settings, seed = cell.settings, cell.seed
    model = protocol.load(settings["checkpoint"])
    told = tasks_of(seed, settings["num_facts"])
    sizes = protocol.Sizes(num_background=settings["num_background"], num_in_context=0, num_unknown=0, num_texts=0)
    background = protocol.Known.draw(sizes, seed=seed).sets["background"]
    matrix: list[list[float]] = []
    rows: list[Row] = []

    def right(answer: Answer, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(exact_match(text, (own,))) for text, own in zip(answer(questions), answers, strict=True)]

    for task, (answer, learned) in zip(told, sequence(model, cell, told), strict=True):
        items = {
            name: right(answer, [one.asked for one in part], [one.answer for one in part])
            for name, part in told.items()
        }
        matrix.append([sum(scores) / len(scores) for scores in items.values()])
        kept = right(answer, [one.question for one in background], [one.answers[0] for one in background])
        row = {"kind": "after", "after": task, "lr": settings["lr"], **learned, "background": sum(kept) / len(kept)}
        rows.append({**row, **dict(zip(told, matrix[-1], strict=True)), "items": {**items, "background": kept}})
    done = {"kind": "sequence", "lr": settings["lr"], "background": rows[-1]["background"], "matrix": matrix}
    whole = {"bwt": backward_transfer(matrix), "final_average": final_average(matrix)}
    reached = sum(bool(row.get("reached")) for row in rows) / len(rows)
    return [*rows, {**done, **whole, "reached": None if settings["lr"] is None else reached}]


def tasks_of(seed: int, number: int) -> dict[str, Any]:
    """Task → its facts."""
    from benchmarks.forgetting.protocol import new_facts, new_numbers

    found = {kind: new_facts(seed, number, kind=kind) for kind in TASKS[:-1]}
    return {**found, TASKS[-1]: new_numbers(seed, number)}


def sequence(model: Any, cell: Cell, told: Mapping[str, Any]) -> Iterator[tuple[Answer, Row]]:
    """After each task what answers questions, and what learning it took."""
    match cell.method:
        case "adapter_bank":
            return _adapter_bank(model, told)
        case "expert_per_task":
            return _experts(model, cell, told)
        case "lora" | "anew":
            return _one_lora(model, cell, told, anew=cell.method == "anew")
        case _:
            return _on_top(model, cell, told, cell.method.removeprefix("on_top_"))


def _adapter_bank(model: Any, told: Mapping[str, Any]) -> Iterator[tuple[Answer, Row]]:
    from benchmarks.forgetting.protocol import State

    texts: list[str] = []
    for facts in told.values():
        texts += [one.text for one in facts]
        yield _answering(model, State(adapter=model.internalize(texts))), {}


def _one_lora(model: Any, cell: Cell, told: Mapping[str, Any], *, anew: bool) -> Iterator[tuple[Answer, Row]]:
    """Trained on for each task on its facts alone; or anew from the base model on all facts so far."""
    from benchmarks.forgetting.protocol import learn

    weights, so_far = None, []
    for facts in told.values():
        so_far += facts
        given = so_far if anew else facts
        learned = learn(
            model,
            given,
            _recipe(cell),
            seed=cell.seed,
            limits=limits_of(cell.settings),
            start=None if anew else weights,
        )
        weights = learned.weights
        yield _answering(model, learned.state), learned.row()


def _experts(model: Any, cell: Cell, told: Mapping[str, Any]) -> Iterator[tuple[Answer, Row]]:
    from hydra.utils import instantiate

    from benchmarks.forgetting.protocol import Recipe, learn

    experts = instantiate(cell.settings["experts"])
    for task, facts in told.items():
        moves = experts.next(seed=cell.seed)
        recipe = Recipe(moves, float(cell.settings["lr"]))
        learned = learn(model, facts, recipe, seed=cell.seed, limits=limits_of(cell.settings))
        experts.add(model, task, moves, [question for one in facts for question in one.training])
        asked = [(one.asked, name) for name, part in told.items() if name in experts.tasks for one in part]
        routed = experts.route(model, [question for question, _ in asked])
        share = sum(one == name for one, (_, name) in zip(routed, asked, strict=True)) / len(asked)
        yield (
            lambda questions: experts.generate(model, questions, max_new_tokens=16),
            {**learned.row(), "routed": share},
        )


def _on_top(model: Any, cell: Cell, told: Mapping[str, Any], rehearsal: str) -> Iterator[tuple[Answer, Row]]:
    """Each task's LoRA is merged, and the next starts there: what is rehearsed is answered by the weights so far."""
    import random

    from hydra.utils import instantiate

    from benchmarks.forgetting.protocol import State, learn
    from hypernet.consolidation.weights import installed

    tensors: Mapping[str, Any] = {}
    earlier: list[str] = []
    for facts in told.values():
        chosen = instantiate(part("rehearsal", rehearsal))
        if rehearsal == "replay":
            rng, number = random.Random(cell.seed), cell.settings["num_replayed"]
            chosen = chosen(questions=rng.sample(earlier, min(number, len(earlier)))) if earlier else None
        with installed(model.base_model, tensors):
            learned = learn(model, facts, _recipe(cell, chosen), seed=cell.seed, limits=limits_of(cell.settings))
        tensors = {**tensors, **learned.weights.tensors}
        earlier += [question for one in facts for question in one.training]
        yield _answering(model, State(tensors)), learned.row()


def _recipe(cell: Cell, rehearsal: Any = None) -> Any:
    from hydra.utils import instantiate

    from benchmarks.forgetting.protocol import Recipe
    from hypernet.consolidation.rehearsal import NoRehearsal

    moves = instantiate(cell.settings["moves"])
    return Recipe(moves, float(cell.settings["lr"]), rehearsal=rehearsal or NoRehearsal())


def _answering(model: Any, state: Any) -> Answer:
    return lambda questions: state.generate(model, questions)


def rows(cfg: TasksSettings) -> Iterator[Row]:
    """All rows, cell after cell."""
    return run_cells(cells_of(cfg), measure_cell, folder=cfg.cells, workers=cfg.workers)


@hydra.main(config_path="../../conf", config_name="forgetting_tasks", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        show_and_write(rows(settings), settings.output, config=plain(cfg), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/forgetting_tasks.yaml")
