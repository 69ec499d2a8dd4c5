"""Is what was forgotten gone? `python -m benchmarks.forgetting.spurious`

New facts are learned to a target accuracy by each method. Then the weights that came out are trained on k samples of
other content: facts that the base model knew, none of them among the old facts that are asked, before and after. What
comes back without having been shown was not gone (spurious forgetting: Zheng et al. 2025,
https://arxiv.org/abs/2501.13453). After every k all weights move, whatever the method was.

Two controls: facts that nobody told the base model, of the same kinds, which no training on other content can bring
back; and a linear probe on frozen hidden states of the last two blocks, which reads the embedding of an answer's first
token before any of it is written, on old facts and on those that nobody told. It is fitted on other known facts and
takes the nearest of all first tokens that its relation has.

kind       one row for
base       a seed: the base model, before anything is learned
recovery   a method, a seed and a k
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra

from benchmarks.forgetting.frontier import ELSEWHERE, LearningSettings, limits_of, parts_by_name, recipe_of
from benchmarks.forgetting.sweep import Cell, run_cells
from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Above0, Count, Number

BASE = "base"
_PROBED_BLOCKS = 2


class SpuriousSettings(LearningSettings):
    num_facts: Count
    num_old: Count
    num_probed: Count
    ridge: Above0
    samples: list[Number]
    recovery_steps: Count
    recovery_lr: Above0
    methods: dict[str, dict[str, Any]]


SCRIPT = Script("benchmarks.forgetting.spurious", SpuriousSettings)


class OldFact(NamedTuple):
    question: str
    answer: str
    relation: str


def old_facts(seed: int, number: int) -> list[OldFact]:
    """That the base model knows, of invented entities; none of them is ever trained on here."""
    from hypernet.data.encyclopedia import Encyclopedia, background_questions

    asked = [OldFact(one.text, one.answer, one.group) for one in background_questions(held_out=True)]
    asked = [one for one in asked if one.relation in _kinds()]
    return Encyclopedia("known", seed=seed).rng("old facts").sample(asked, min(number, len(asked)))


def probed_facts(seed: int, number: int) -> list[OldFact]:
    """Other ones that it knows, by which the probe is fitted."""
    from hypernet.data.encyclopedia import Encyclopedia, background_questions

    asked = [OldFact(one.text, one.answer, one.group) for one in background_questions(held_out=False)]
    asked = [one for one in asked if one.relation in _kinds()]
    return Encyclopedia("known", seed=seed).rng("probed facts").sample(asked, min(number, len(asked)))


def untold_facts(seed: int, number: int) -> list[OldFact]:
    """The same about entities that no model was trained on, with values drawn as theirs were."""
    from hypernet.data.encyclopedia import Encyclopedia, known_facts, relations

    encyclopedia, known = Encyclopedia("known", seed=seed), {fact.entity.name for fact in known_facts()}
    rng, found, names = encyclopedia.rng("untold facts"), [], set(known)
    while len(found) < number:
        relation = rng.choice(relations())
        entity = encyclopedia.entity(rng, relation.entity_kind)
        if entity.name not in names:
            names.add(entity.name)
            question = rng.choice(relation.questions).format(n=entity.name)
            found.append(OldFact(question, encyclopedia.value(rng, relation.value_kind), relation.name))
    return found


def _kinds() -> set[str]:
    from hypernet.data.encyclopedia import relations

    return {relation.name for relation in relations()}


def probe(
    model: Any,
    state: Any,
    fitted: Sequence[OldFact],
    asked: Sequence[Sequence[OldFact]],
    *,
    ridge: float,
) -> tuple[list[list[float]], float]:
    """Of each fact of each list whether the probe finds its answer's first token; and by chance: 1 / tokens to find."""
    import numpy as np

    from benchmarks.forgetting.intervals import LinearProbe
    from benchmarks.forgetting.protocol import hidden_states

    def states(facts: Sequence[OldFact]) -> Any:
        found = hidden_states(model, state, [one.question for one in facts])[:, -_PROBED_BLOCKS:]
        return found.flatten(1).cpu().numpy()

    everything = [*fitted, *(one for part in asked for one in part)]
    first = dict(zip(everything, _first_tokens(model, [one.answer for one in everything]), strict=True))
    table = model.base_model.get_input_embeddings().weight.detach().double().cpu().numpy()
    of_relation = {
        name: sorted({first[one] for one in everything if one.relation == name})
        for name in {one.relation for one in everything}
    }
    fit = LinearProbe.fit(states(fitted), table[[first[one] for one in fitted]], ridge=ridge)
    found = []
    for part in asked:
        scores = []
        for one, vector in zip(part, fit(states(part)), strict=True):
            there = of_relation[one.relation]
            nearest = np.linalg.norm(table[there] - vector, axis=1).argmin()
            scores.append(float(there[int(nearest)] == first[one]))
        found.append(scores)
    last = [one for part in asked for one in part]
    return found, sum(1 / len(of_relation[one.relation]) for one in last) / len(last)


def _first_tokens(model: Any, answers: Sequence[str]) -> list[int]:
    """As the chat template has them."""
    from hypernet.text.tokens import framed_ids

    frame = model.layout.before_answer, model.layout.after_answer
    return [row[0] for row in framed_ids(model.tokenizer, [(frame[0], answer, frame[1]) for answer in answers])]


def cells_of(cfg: SpuriousSettings) -> list[Cell]:
    common = {key: value for key, value in cfg.model_dump().items() if key not in (*ELSEWHERE, "methods")}
    arms = {name: dict(arm) for name, arm in cfg.methods.items()}
    found = []
    rates = {name: _rate(arm, name) for name, arm in arms.items()}
    parts = {name: parts_by_name(arm, name) for name, arm in arms.items()}
    for seed in cfg.seeds:
        found.append(Cell("spurious", BASE, seed, common))
        found += [Cell("spurious", name, seed, {**common, "arm": parts[name], "lr": rates[name]}) for name in parts]
    return found


def _rate(arm: dict[str, Any], name: str) -> float:
    rate = arm.pop("lr", None)
    if not isinstance(rate, int | float) or not rate > 0:
        raise ValueError(f"methods.{name}.lr should be a number above 0, got {rate!r}.")
    return float(rate)


def measure_cell(cell: Cell) -> list[Row]:
    """A row for each k."""
    import torch

    from benchmarks.forgetting import protocol
    from hypernet.consolidation.moves import Everything

    torch.set_num_threads(1)
    settings, seed = cell.settings, cell.seed
    model = protocol.load(settings["checkpoint"])
    told = protocol.new_facts(seed, settings["num_facts"])
    sets = [old_facts(seed, settings["num_old"]), untold_facts(seed, settings["num_old"])]
    fitted = probed_facts(seed, settings["num_probed"])

    def measured(state: Any) -> Row:
        row: Row = {"new": _mean(protocol.scores(model, state, told)), "items": {}}
        found, row["chance"] = probe(model, state, fitted, sets, ridge=settings["ridge"])
        for name, part, read in zip(("old", "untold"), sets, found, strict=True):
            facts = protocol.as_facts([(one.question, one.answer) for one in part])
            row["items"] |= {name: protocol.scores(model, state, facts), f"probe_{name}": read}
        return row | {name: _mean(values) for name, values in row["items"].items()}

    if cell.method == BASE:
        return [{"kind": BASE, **measured(protocol.State())}]
    recipe, questions = recipe_of(settings["arm"], settings, seed)
    limits = limits_of(settings)
    learned = protocol.learn(model, told, recipe, seed=seed, limits=limits, background=questions)
    rows = []
    for k in settings["samples"]:
        state = learned.state
        if k:
            shown = protocol.as_facts(protocol.other_known(seed, k))
            again = protocol.Recipe(Everything(), settings["recovery_lr"])
            # Never reached: so many steps for each k.
            steps = limits._replace(target=2.0, max_steps=settings["recovery_steps"], every=settings["recovery_steps"])
            state = protocol.learn(model, shown, again, seed=seed, limits=steps, start=learned.weights).state
        rows.append({"kind": "recovery", "k": k, "lr": settings["lr"], **learned.row(), **measured(state)})
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rows(cfg: SpuriousSettings) -> Iterator[Row]:
    """All rows, cell after cell."""
    return run_cells(cells_of(cfg), measure_cell, folder=cfg.cells, workers=cfg.workers)


@hydra.main(config_path="../../conf", config_name="forgetting_spurious", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        show_and_write(rows(settings), settings.output, config=plain(cfg), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/forgetting_spurious.yaml")
