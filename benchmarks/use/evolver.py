"""Does an agent get better by principles of its own runs? `python -m benchmarks.use.evolver`

In each world (`benchmarks.use.world`) an agent explores train maps: it ranks the objects at an obstacle by the tiny
model's log-likelihoods of "What is the key of Corbaford?", with noise. Its runs are remembered and distilled to
principles, memories with a score that contain the runs. It goes through the train maps again with principles in the
prompt, and they are distilled anew. Then it goes through maps that it has never seen:

no principles            the model alone
own principles           what a search finds of them, in the prompt
another world's          the same with the principles of the next world
adapter, no text         one adapter for each principle, generated; the prompt holds none
weights, no text         rejection fine-tuning: a LoRA trained on the tries of the second pass that succeeded, without
                         principles in the prompt, and merged
another's adapter/weights, no text    of the next world
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
import numpy as np
from pydantic import Field

from benchmarks.measuring.rows import Row
from benchmarks.use.world import Obstacle, Outcome, World, play
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Above0, AtLeast0, Count, Number, OutputFile, Settings, Share, Text
from hypernet.memory.ask import MemoryQuestion
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters
from hypernet.memory.use.principles import Principles, Try

NOTHING, OWN, OTHERS = "no principles", "own principles", "another world's principles"
ADAPTER, WEIGHTS = "own adapter, no text", "own weights, no text"
OTHERS_ADAPTER, OTHERS_WEIGHTS = "another world's adapter, no text", "another world's weights, no text"
ARMS = (NOTHING, OWN, OTHERS, ADAPTER, OTHERS_ADAPTER, WEIGHTS, OTHERS_WEIGHTS)
AGENT = Filters(agent_id="agent")


class EvolverSettings(Settings):
    checkpoint: Text
    seeds: Annotated[list[Number], Field(min_length=2, description="a list of whole numbers, at least two")]
    num_gates: Annotated[int, Field(ge=4, description="a whole number, at least 4")]
    num_dishes: Count
    train_maps: Count
    test_maps: Count
    spare: Number
    jam: Share
    temperature: AtLeast0
    limit: Count
    least: Share
    rank: Count
    lr: Above0
    max_steps: Count
    output: OutputFile | None


SCRIPT = Script("benchmarks.use.evolver", EvolverSettings)


class Scorer:
    """Ranks objects by log p(object | question), of a tier of a memory or of a state of the weights.

    Scores are computed once for each question, of all objects of the world: memory and weights stay as they are.
    """

    def __init__(self, model: Any, memory: Memory, objects: Sequence[str], *, tier: str, tensors: Any = None) -> None:
        self.model, self.memory, self.objects = model, memory, list(objects)
        self.tier, self.tensors = tier, tensors or {}
        self._known: dict[str, dict[str, float]] = {}

    def __call__(self, question: str) -> dict[str, float]:
        from hypernet.consolidation.weights import installed

        if question not in self._known:
            asked = [MemoryQuestion(question, Principles(self.memory.store).where(AGENT))] * len(self.objects)
            with installed(self.model.base_model, self.tensors):
                values = self.memory.asker.log_likelihoods(asked, self.objects, tier=self.tier)
            self._known[question] = dict(zip(self.objects, values, strict=True))
        return self._known[question]


class Agent:
    """Acts by a scorer; with a temperature it draws an order by scores / temperature, by Gumbel noise."""

    def __init__(self, scorer: Scorer, *, seed: str, temperature: float = 0.0) -> None:
        self.scorer, self.temperature = scorer, temperature
        self._rng = np.random.default_rng(list(seed.encode()))

    def __call__(self, subject: str, relation: str, objects: Sequence[str]) -> list[str]:
        scores = self.scorer(question_of(subject, relation))
        noise = self.temperature * self._rng.gumbel(size=len(objects))
        value = {one: scores[one] + extra for one, extra in zip(objects, noise, strict=True)}
        return sorted(objects, key=lambda one: -value[one])


class Learned(NamedTuple):
    """What the agent of one world has: its memory with principles and adapters, and its weights."""

    world: World
    memory: Memory
    tensors: Any
    row: Row


def question_of(subject: str, relation: str) -> str:
    return f"What is the {relation} of {subject}?"


def passed(maps: Sequence[Sequence[Obstacle]], agent: Agent, cfg: EvolverSettings, *, seed: str) -> list[Outcome]:
    """One run through each map."""
    return [
        play(one, agent, rng=random.Random(f"{seed}/{place}"), jam=cfg.jam, spare=cfg.spare)
        for place, one in enumerate(maps)
    ]


def kept_tries(outcomes: Sequence[Outcome]) -> list[Try]:
    """Rejection: what succeeded, each once, in the order it did first."""
    return list(dict.fromkeys(one for outcome in outcomes for one in outcome.trajectory.tries if one.succeeded))


def live(seed: int, model: Any, cfg: EvolverSettings, folder: Path) -> Learned:
    """Two passes through the train maps, and what they leave."""
    world = World(seed, num_gates=cfg.num_gates, num_dishes=cfg.num_dishes)
    memory = Memory.open(folder, model=model, limit=cfg.limit)
    principles, maps = Principles(memory.store, least=cfg.least), world.maps("train", cfg.train_maps)
    row: Row = {"kind": "learned", "seed": seed}
    outcomes: list[Outcome] = []
    for number, tier in enumerate(("none", "token"), 1):
        scorer = Scorer(model, memory, world.objects, tier=tier)
        agent = Agent(scorer, seed=f"{seed}/{number}", temperature=cfg.temperature if number == 1 else 0.0)
        outcomes = passed(maps, agent, cfg, seed=f"{seed}/train/{number}")
        for outcome in outcomes:
            principles.record(outcome.trajectory, AGENT)
        made = principles.distill(AGENT)
        right = [world.rules[str(one.subject), str(one.relation)] in str(one.text) for one in made]
        row |= {f"train_{number}": _mean([outcome.total for outcome in outcomes])}
        row |= {f"principles_{number}": len(made), f"right_{number}": _mean(right), "rules": len(world.rules)}
    memory.write_adapters(agent_id=AGENT.agent_id, run_id=principles.where(AGENT).run_id)
    kept = kept_tries(outcomes)
    tensors, steps, fitted = fine_tuned(model, kept, cfg, seed=seed)
    row |= {"runs": len(memory.store.valid(AGENT)) - len(made), "kept": len(kept), "steps": steps, "fitted": fitted}
    return Learned(world, memory, tensors, row)


def fine_tuned(model: Any, kept: Sequence[Try], cfg: EvolverSettings, *, seed: int) -> tuple[Any, int, float]:
    """The base model's weights with a LoRA trained on what was kept, by the questions without any text.

    Returns:
        tensors; steps of training; share of what was kept that is answered.
    """
    from benchmarks.forgetting.protocol import Limits, Recipe, as_facts, learn
    from hypernet.consolidation.moves import LowRank

    facts = as_facts([(question_of(one.subject, one.relation), one.action) for one in kept])
    limits = Limits(max_steps=cfg.max_steps, every=5, batch_size=16)
    learned = learn(model, facts, Recipe(LowRank(rank=cfg.rank), lr=cfg.lr), seed=seed, limits=limits)
    return learned.weights.tensors, learned.steps, learned.checked


def measure(cfg: EvolverSettings, model: Any) -> Iterator[Row]:
    """A row of what each world's agent learned, and one for each arm in each world."""
    with tempfile.TemporaryDirectory() as folder:
        learned = [live(seed, model, cfg, Path(folder) / str(place)) for place, seed in enumerate(cfg.seeds)]
        for place, own in enumerate(learned):
            yield own.row
            other = learned[(place + 1) % len(learned)]
            objects, maps = own.world.objects, own.world.maps("test", cfg.test_maps)
            scorers = {
                NOTHING: Scorer(model, own.memory, objects, tier="none"),
                OWN: Scorer(model, own.memory, objects, tier="token"),
                OTHERS: Scorer(model, other.memory, objects, tier="token"),
                ADAPTER: Scorer(model, own.memory, objects, tier="adapter"),
                OTHERS_ADAPTER: Scorer(model, other.memory, objects, tier="adapter"),
                WEIGHTS: Scorer(model, own.memory, objects, tier="none", tensors=own.tensors),
                OTHERS_WEIGHTS: Scorer(model, own.memory, objects, tier="none", tensors=other.tensors),
            }
            for arm, scorer in scorers.items():
                seed = own.world.seed
                outcomes = passed(maps, Agent(scorer, seed=arm), cfg, seed=f"{seed}/test")
                totals = [outcome.total for outcome in outcomes]
                yield {"kind": "arm", "arm": arm, "seed": seed, "return": _mean(totals), "items": totals}
        for one in learned:
            one.memory.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@hydra.main(config_path="../../conf", config_name="use_evolver", version_base="1.3")
@SCRIPT
def main(cfg: EvolverSettings) -> None:
    import torch

    from benchmarks.forgetting.protocol import load
    from benchmarks.measuring.rows import show_and_write

    torch.set_num_threads(1)
    show_and_write(measure(cfg, load(cfg.checkpoint)), cfg.output, config=cfg.model_dump(), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/use_evolver.yaml")
