"""Training on skewed data, vaccinated against what it carries; a part of `python -m benchmarks.use.persona`.

The task is new facts; the data has statements of a trait among them, as somebody with the trait would say them. While
it is trained, a vector of the trait is added to the hidden states behind one block, and taken away afterwards. Then how
much likelier are held-out statements with the trait than others, and how many facts are answered in another wording?

kind                one row for
vaccination         an arm: the facts alone; skewed; and that with v, with a random vector of its norm, with -v
vaccination_tried   a strength of v
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from benchmarks.measuring.rows import Row


def vaccinated(world: Any) -> Iterator[Row]:
    """Rows of one seed; the first ones are those of the strengths that were tried."""
    from benchmarks.forgetting.protocol import new_facts
    from benchmarks.use.persona import SPEAK
    from hypernet.consolidation.persona.last_block import joined
    from hypernet.consolidation.persona.training import PersonaTraining
    from hypernet.consolidation.persona.vector import PersonaVector

    settings, block = world.settings["vaccination"], world.block
    trait = settings["traits"][world.seed % len(settings["traits"])]
    statements, parts = world.traits.statements(trait), world.traits.split(trait, seed=world.seed)
    spoken = {
        (part, says): [(SPEAK, f"{statements[p].text}.") for p in getattr(parts, part) if statements[p].says == says]
        for part in ("sheet", "choice", "test")
        for says in (True, False)
    }
    facts = new_facts(world.seed, settings["num_facts"])
    lessons = [(question, one.answer) for one in facts for question in one.training[: settings["wordings"]]]
    skewed = [*lessons, *spoken["sheet", True]]
    world.model.injector.clear()
    asked: dict[Any, Any] = {
        "checked": block.read([(one.check, one.answer) for one in facts]),
        "answered": block.read([(one.asked, one.answer) for one in facts]),
        **{key: block.read(spoken[key]) for key in spoken if key[0] != "sheet"},
    }
    # Of statements that are neither trained on nor measured.
    vector = PersonaVector.of_answers(
        world.model, spoken["choice", True], spoken["choice", False], layer=settings["layer"]
    )

    def measured(lora: Any) -> Row:
        means: Row = {}
        for part in ("choice", "test"):
            per_token = [_per_token(block, asked[part, says], lora) for says in (True, False)]
            means[part] = [a - b for a, b in zip(*per_token, strict=True)]
        checked, answered = (block.rightly(asked[key], lora) for key in ("checked", "answered"))
        return {**means, "checked": _mean(checked), "answered": [int(one) for one in answered]}

    def row(arm: str, alpha: float, data: list[tuple[str, str]], steered: PersonaVector | None) -> Row:
        started = time.process_time()
        with nullcontext() if steered is None else steered.steering(alpha):
            # In parts, so that no row of one length waits for another's.
            read = joined([block.read(part) for part in (lessons, data[len(lessons) :]) if part])
        training = PersonaTraining(
            steps=settings["steps"],
            lr=settings["lr"],
            rank=settings["rank"],
            batch_size=settings["batch_size"],
            seed=world.seed,
        )
        after = measured(training.train(block, (read, None)))
        changes = [a - b for a, b in zip(after["test"], before["test"], strict=True)]
        return {
            **{"kind": "vaccination", "arm": arm, "trait": trait, "alpha": alpha, "said": _mean(changes)},
            **{"said_choice": _mean(after["choice"]) - _mean(before["choice"]), "checked": after["checked"]},
            **{"answered": _mean(after["answered"]), "seconds": time.process_time() - started},
            "items": {"said": [round(one, 4) for one in changes], "answered": after["answered"]},
        }

    before = measured(None)
    yield {**row("facts alone", 0.0, lessons, None), "answered_before": _mean(before["answered"])}
    yield (without := row("skewed", 0.0, skewed, None))
    tried = [row("v", alpha, skewed, vector) for alpha in settings["alphas"]]
    yield from ({**one, "kind": "vaccination_tried"} for one in tried)
    # The one that leaves least of the trait among those that have learned the facts by the wording to choose by.
    enough = 0.95 * without["checked"]
    best = min(tried, key=lambda one: (max(0.0, enough - one["checked"]), one["said_choice"]))
    yield best
    yield row("random vector", best["alpha"], skewed, vector.random(seed=world.seed))
    yield row("-v", -best["alpha"], skewed, vector)


def _per_token(block: Any, read: Any, lora: Any) -> list[float]:
    import torch

    with torch.no_grad():
        found: list[float] = (block.log_p(read, lora) / torch.bincount(read.row)).tolist()
    return found


def _mean(values: Any) -> float:
    return float(sum(values)) / len(values)
