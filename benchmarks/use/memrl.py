"""Does a memory learn which of its texts are worth acting upon? `python -m benchmarks.use.memrl`

A world has rules, facts of the encyclopedia's test split, and of each several statements are remembered, all in its
words: one says the rule, the others contradict it. An episode asks about one rule. A search in the words finds
candidates, one of them is put into the prompt, the tiny model answers, and the world says whether that was right, some
of the time wrongly. Nothing but utilities is learned; the weights' hash is the same before and after.

utility                  similarity and utility rank the candidates; the one acted upon learns of the outcome
utility alone            as above, similarity only finds the candidates
all credited             as the first, but every candidate learns of the outcome
shuffled utilities       as the first, each memory ranked by the utility of another
similarity, no memory    without utilities; without a memory in the prompt
the rules themselves     the statement that says the rule is in the prompt

Then the utilities of the first arm are left as they are, most memories are deleted (the least useful, the oldest, or at
random), and other episodes follow; with the most useful ones left, also ranked by similarity alone.
"""

import hashlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
from pydantic import Field

from benchmarks.measuring.rows import Row
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Share, Text
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Draft, Filters, Hit
from hypernet.memory.use.utilities import Utilities, mixed
from hypernet.text.matching import exact_match

UTILITY, ALONE, CREDITED, SHUFFLED = "utility", "utility alone", "all credited", "shuffled utilities"
SIMILARITY, NOTHING, ORACLE = "similarity", "no memory", "the rules themselves"
ARMS = (UTILITY, ALONE, CREDITED, SHUFFLED, SIMILARITY, NOTHING, ORACLE)
MOST_USEFUL, BY_SIMILARITY = "the most useful", "the most useful, ranked by similarity"
KEPT = ("all", MOST_USEFUL, BY_SIMILARITY, "the newest", "some at random")
AGENT = Filters(agent_id="agent")


class MemrlSettings(Settings):
    checkpoint: Text
    seeds: Annotated[list[Number], Field(min_length=1, description="a list of whole numbers, at least one")]
    num_rules: Count
    num_statements: Annotated[int, Field(ge=2, description="a whole number, at least 2")]
    episodes: Count
    num_candidates: Count
    rate: Share
    weight: Share
    noise: Share
    kept: Count
    num_after: Count
    arms: list[Text] | None
    output: OutputFile | None


SCRIPT = Script("benchmarks.use.memrl", MemrlSettings)


class Rule(NamedTuple):
    """questions: wordings. answers: of each statement, the first is right."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    statements: tuple[str, ...]


def rules(seed: int, number: int, *, num_statements: int) -> list[Rule]:
    """Each about an entity of its own; statements of one rule are in wordings drawn for each."""
    from hypernet.data.encyclopedia import Encyclopedia, relations

    encyclopedia, found, names = Encyclopedia("test", seed=seed), list[Rule](), set[str]()
    rng = encyclopedia.rng("rules")
    while len(found) < number:
        relation = rng.choice(relations())
        entity = encyclopedia.entity(rng, relation.entity_kind)
        if entity.name in names:
            continue
        names.add(entity.name)
        answers: dict[str, None] = {}
        while len(answers) < num_statements:
            answers.setdefault(encyclopedia.value(rng, relation.value_kind))
        texts = [rng.choice(relation.sentences).format(s=entity.name, n=entity.name, v=value) for value in answers]
        questions = tuple(form.format(n=entity.name) for form in relation.questions)
        found.append(Rule(questions, tuple(answers), tuple(text[0].upper() + text[1:] for text in texts)))
    return found


class Reader:
    """The model with one text, or none, in its prompt. It never changes, so each prompt is answered once."""

    def __init__(self, model: Any) -> None:
        self._model, self._known = model, dict[tuple[str, str | None], str]()

    def __call__(self, question: str, document: str | None) -> str:
        key = question, document
        if key not in self._known:
            (self._known[key],) = self._model.generate([question], documents=[document], max_new_tokens=16)
        return self._known[key]


class Episode(NamedTuple):
    """misreported: whether the world says the opposite of what was so."""

    rule: Rule
    question: str
    misreported: bool


def episodes(found: Sequence[Rule], number: int, *, seed: str, noise: float) -> list[Episode]:
    rng = random.Random(seed)
    drawn = [rng.choice(found) for _ in range(number)]
    return [Episode(rule, rng.choice(rule.questions), rng.random() < noise) for rule in drawn]


class Agent:
    """One arm in one world, with a memory of its own.

    Args:
        arm: one of `ARMS`.
        folder: of the memory.
    """

    def __init__(self, arm: str, found: Sequence[Rule], reader: Reader, cfg: MemrlSettings, *, seed: int, folder: Path):
        self.arm, self.reader, self.num_candidates = arm, reader, cfg.num_candidates
        self.memory = Memory.open(folder)
        texts = [text for rule in found for text in rule.statements]
        random.Random(f"{seed}/told").shuffle(texts)  # in the order of age nothing says which is right
        refs = self.memory.store.add([Draft(text=text, filters=AGENT) for text in texts])
        weight = {ALONE: 1.0, SIMILARITY: 0.0}.get(arm, cfg.weight)
        self.utilities = Utilities(self.memory.store, rate=cfg.rate, weight=weight)
        others = [str(ref) for ref in refs]
        random.Random(f"{seed}/shuffled").shuffle(others)
        self._other = dict(zip(map(str, refs), others, strict=True))
        self._found: dict[str, list[Hit]] = {}

    @property
    def texts(self) -> set[str]:
        """Of what is remembered."""
        return {str(memory.text) for memory in self.memory.store.valid(AGENT)}

    def act(self, episode: Episode, *, learns: bool = True) -> bool:
        """Whether the answer was right."""
        if self.arm in (NOTHING, ORACLE):
            text = episode.rule.statements[0] if self.arm == ORACLE else None
            return self._is_right(episode, text)
        hits = self.search(episode.question)
        ranked = self._shuffled(hits) if self.arm == SHUFFLED else self.utilities.ranked(hits)
        right = self._is_right(episode, ranked[0].text if ranked else None)
        if learns and self.arm != SIMILARITY:
            credited = ranked if self.arm == CREDITED else ranked[:1]
            self.utilities.credit([hit.ref for hit in credited], float(right != episode.misreported))
        return right

    def search(self, question: str) -> list[Hit]:
        if question not in self._found:
            self._found[question] = list(self.memory.search(question, agent_id="agent", limit=self.num_candidates))
        return self._found[question]

    def evict(self, kept: str, number: int, *, seed: int) -> str:
        """Deletes all but so many. Returns the batch that takes it back."""
        self._found.clear()
        if kept in (MOST_USEFUL, BY_SIMILARITY):
            return self.utilities.evict(AGENT, keep=number).version
        held = [memory.ref for memory in self.memory.store.valid(AGENT)]
        if kept == "some at random":
            random.Random(f"{seed}/evicted").shuffle(held)
        return self.memory.store.delete_versions(held[: len(held) - number], reason=f"kept: {kept}").version

    def take_back(self, batch: str) -> None:
        self.memory.rollback(batch)
        self._found.clear()

    def _shuffled(self, hits: Sequence[Hit]) -> list[Hit]:
        values = [self.utilities.get(self._other[hit.ref]).value for hit in hits]
        scores = mixed([hit.score for hit in hits], values, weight=self.utilities.weight)
        return [hits[place] for place in sorted(range(len(hits)), key=lambda place: (-round(scores[place], 9), place))]

    def _is_right(self, episode: Episode, text: str | None) -> bool:
        return bool(exact_match(self.reader(episode.question, text), (episode.rule.answers[0],)))


def weights_hash(model: Any) -> str:
    """SHA-256 of every parameter's name and bytes."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def measure(cfg: MemrlSettings, model: Any) -> Iterator[Row]:
    """A row for each arm and seed, each way to evict, and of the weights.

    Raises:
        ValueError: an unknown arm, or more memories to be kept than there are.
    """
    arms = list(ARMS) if cfg.arms is None else cfg.arms
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"There is no arm {unknown[0]!r}: choose of {', '.join(ARMS)}.")
    if cfg.kept > cfg.num_rules * cfg.num_statements:
        raise ValueError(
            f"kept is {cfg.kept}, and there are {cfg.num_rules * cfg.num_statements} memories. Keep fewer."
        )
    before = weights_hash(model)
    for seed in cfg.seeds:
        found, reader = rules(seed, cfg.num_rules, num_statements=cfg.num_statements), Reader(model)
        told = episodes(found, cfg.episodes, seed=f"{seed}/episodes", noise=cfg.noise)
        after = episodes(found, cfg.num_after, seed=f"{seed}/after", noise=0.0)
        for arm in arms:
            with tempfile.TemporaryDirectory() as folder:
                agent = Agent(arm, found, reader, cfg, seed=seed, folder=Path(folder) / "memory")
                yield {"kind": "arm", "arm": arm, "seed": seed, **_scored(told, agent.act)}
                for kept in KEPT if arm == UTILITY else ():
                    batch = "" if kept == "all" else agent.evict(kept, cfg.kept, seed=seed)
                    number = len(agent.memory.store.valid(AGENT))
                    agent.utilities.weight = 0.0 if kept == BY_SIMILARITY else cfg.weight
                    scores = _scored(after, partial(agent.act, learns=False))
                    right = sum(rule.statements[0] in agent.texts for rule in found)
                    yield {"kind": "evicted", "kept": kept, "seed": seed, "memories": number, "right": right, **scores}
                    if batch:
                        agent.take_back(batch)
                agent.memory.close()
    yield {"kind": "weights", "sha256": before, "unchanged": weights_hash(model) == before}


def _scored(asked: Sequence[Episode], act: Callable[[Episode], bool]) -> Row:
    """success: share of right answers. outcomes: a digit for each episode, in their order."""
    right = [act(episode) for episode in asked]
    return {"success": sum(right) / len(right), "outcomes": "".join(str(int(one)) for one in right)}


@hydra.main(config_path="../../conf", config_name="use_memrl", version_base="1.3")
@SCRIPT
def main(cfg: MemrlSettings) -> None:
    import torch

    from benchmarks.forgetting.protocol import load
    from benchmarks.measuring.rows import show_and_write

    torch.set_num_threads(1)
    show_and_write(measure(cfg, load(cfg.checkpoint)), cfg.output, config=cfg.model_dump(), quiet=("outcomes",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/use_memrl.yaml")
