"""Records that grow harder by stages, addressed by step, so that a run can resume anywhere.

    stages = [Stage(steps=400, batch_size=32), Stage(steps=800, num_entities=(1, 3))]
    curriculum = Curriculum(Encyclopedia("train"), stages)
    curriculum.records(step=17)                         # the same records on every machine

Stages draw from the encyclopedia, from another source (`hypernet.data.sources`) or from a weighted mixture:

    mixed = Stage(steps=9, source={"needles": 3, "encyclopedia": 1})
    Curriculum(encyclopedia, [mixed], sources={"needles": Needles(...)})

A stage can be several in turn, so that short documents are not forgotten while long ones are learned:

    Curriculum(encyclopedia, [{"steps": 900, "alternate": [Stage(steps=20), Stage(steps=30, num_entities=(1, 4))]}])
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

from hypernet.data.drawing import Buckets, Mixture
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.records import Question, Record
from hypernet.data.sources import Source

ENCYCLOPEDIA = "encyclopedia"  # the source that is always there

# Keys of stages in configurations of version 0.1 and what they are called now.
RENAMED_STAGE_KEYS = {
    "company": "num_joined_documents",
    "company_source": "distractor_source",
    "company_documents": "num_distractor_documents",
    "num_foreign": "num_cross_document",
    "restatement": "reordering",
}


class Stage(NamedTuple):
    """A run of steps with articles of similar size; a pair is an inclusive range, drawn from per step or article.

    All articles of one step share num_entities and facts_per_entity, so that rows need little padding. These, and what
    else is about articles, say nothing about records from other sources.
    """

    steps: int
    batch_size: int = 32  # articles per step
    num_entities: tuple[int, int] = (1, 1)
    facts_per_entity: tuple[int, int] = (1, 4)
    num_distractors: tuple[int, int] = (0, 2)
    max_questions: int = 8  # per article
    num_background: int = 1  # background questions per article
    num_cross_document: int = 0  # the article's questions asked about an entity it does not name (hypernetwork only)
    # Documents whose adapters are joined, the row's own among them (hypernetwork only).
    num_joined_documents: tuple[int, int] = (1, 1)
    # The joined documents come from this source and are not asked about. Their number is log-uniform, 1 as likely as
    # 20 to 40: drawn evenly up to 40, one row of 40 was alone, and 1.5 % of such needles were lost again. None: the
    # step's own, evenly.
    distractor_source: str | None = None
    num_distractor_documents: int = 8  # so many of its documents are read in a step; rows join them again and again
    num_in_prompt: int = 0  # documents that stand in the prompt, with another's adapter (hypernetwork only)
    unanswerable: float = 0.0  # chance that an article also gets a question it does not answer
    shared_relations: float = 0.0  # chance that an article's entities are of one kind and told the same relations
    shared_topic: float = 0.0  # chance that all articles of a step are about one kind and told the same relations
    reordering: float = 0.0  # chance that the article's sentences follow again in another order (base model only)
    source: str | Mapping[str, float] = ENCYCLOPEDIA  # where records come from, or name → weight of a mixture
    bucket_documents: int = 0  # so many documents are sorted by length together, so that a step's are alike; 0: none
    max_step_tokens: int | None = None  # instead of batch_size: documents of a step times its longest one's tokens
    chunk_weights: Sequence[float] | None = None  # of 1, 2, ... chunks per document; None: as few as possible
    min_chunk_tokens: int = 25  # of chunks whose number is drawn by chunk_weights


# Least value of a stage's numbers and ranges; chances are from 0 to 1.
_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "num_entities", "facts_per_entity", "num_joined_documents"), 1),
    **dict.fromkeys(("max_questions", "min_chunk_tokens"), 1),
    **dict.fromkeys(("num_distractors", "num_background", "num_cross_document", "num_in_prompt"), 0),
    **dict.fromkeys(("num_distractor_documents", "bucket_documents"), 0),
}
_CHANCES = ("unanswerable", "shared_relations", "shared_topic", "reordering")


def _check_ranges(number: int, stage: Stage) -> None:
    """Raises ValueError where a number of the stage cannot be meant."""
    for name, least in _LEAST.items():
        value = getattr(stage, name)
        if isinstance(value, Sequence):
            if len(value) != 2 or not least <= value[0] <= value[1]:
                raise ValueError(
                    f"Stage {number}: {name} should be a range [from, to], at least {least}, got {list(value)}."
                )
        elif value < least:
            raise ValueError(f"Stage {number}: {name} should be at least {least}, got {value}.")
    for name in _CHANCES:
        if not 0 <= getattr(stage, name) <= 1:
            raise ValueError(f"Stage {number}: {name} is a chance, from 0 to 1, got {getattr(stage, name)}.")


class Curriculum:
    """Stages one after the other.

    Args:
        encyclopedia: of the split and seed that everything else is of, too.
        stages: each a Stage, its fields, or {"steps": ..., "alternate": [stages]}: these in turn, for so many steps.
        sources: the other sources, by the names that stages call them.

    Raises:
        ValueError: no stages, or one that asks for what there is not.
    """

    def __init__(
        self,
        encyclopedia: Encyclopedia,
        stages: Sequence[Stage | dict],
        *,
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        self.encyclopedia = encyclopedia
        self.sources = dict(sources or {})
        self.stages = [stage for given in stages for stage in _in_turn(given)]
        if not self.stages:
            raise ValueError("A curriculum needs at least one stage; give steps and batch_size.")
        for number, stage in enumerate(self.stages):
            _check_ranges(number, stage)
        self.num_steps = sum(stage.steps for stage in self.stages)
        self._first_article = [0]
        for stage in self.stages:
            self._first_article.append(self._first_article[-1] + stage.steps * stage.batch_size)
        self._mixtures = [self._mixture(number, stage) for number, stage in enumerate(self.stages)]
        self._buckets = [self._sorted(number, stage) for number, stage in enumerate(self.stages)]
        self._drawn_before = [Counter()]  # from each source, before each stage

    def stage(self, step: int) -> tuple[int, Stage, int]:
        """(index of the stage, the stage, step within it)."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, stage, step
            step -= stage.steps
        raise IndexError(f"Step {step} is past the end of the curriculum.")

    def records(self, step: int) -> list[Record]:
        return [record for _, record in self.named_records(step)]

    def named_records(self, step: int) -> list[tuple[str, Record]]:
        """The step's records, each with the name of its source."""
        number, stage, local_step = self.stage(step)
        rng = self.encyclopedia.rng("step", step)
        num_entities = rng.randint(*stage.num_entities)
        num_facts = sum(rng.randint(*stage.facts_per_entity) for _ in range(num_entities))
        # From another random stream, and drawn only where asked for: the other stages stay what they were.
        shared = stage.shared_topic > 0 and self.encyclopedia.rng("topic", step).random() < stage.shared_topic
        buckets = self._buckets[number]
        start = local_step * stage.batch_size
        result = []
        for draw in range(start, start + stage.batch_size) if buckets is None else buckets[local_step]:
            name, index = self._find(number, draw)
            if name == ENCYCLOPEDIA:
                record = self.encyclopedia.record(
                    self._first_article[number] + draw,
                    num_entities=num_entities,
                    num_facts=num_facts,
                    num_distractors=rng.randint(*stage.num_distractors),
                    num_unanswerable=int(rng.random() < stage.unanswerable),
                    # Drawn only where asked for: the other stages' articles stay what they were.
                    shared_relations=stage.shared_relations > 0 and rng.random() < stage.shared_relations,
                    topic=f"step {step}" if shared else None,
                )
            else:
                record = self.sources[name].record(index)
            result.append((name, self._trimmed(rng, record, stage.max_questions)))
        return result

    def cross_document(self, rng: random.Random, name: str, record: Record) -> Question:
        """A question that the record's document does not answer although it sounds like one of the record's.

        Args:
            name: of the source that the record is from.
        """
        if name != ENCYCLOPEDIA:
            return self.sources[name].cross_document(rng, record)
        # The article's own relations asked about somebody else: only the name tells that the article does not answer.
        # Questions of other articles hardly ever share a relation, and the adapter learned to ignore names.
        return self.encyclopedia.asked_of_another(rng, rng.choice(record.questions), document=record.document)

    def _mixture(self, number: int, stage: Stage) -> Mixture:
        weights = {stage.source: 1.0} if isinstance(stage.source, str) else dict(stage.source)
        if stage.distractor_source not in (None, *self.sources):
            raise ValueError(
                f"Stage {number} has distractor_source={stage.distractor_source}, but the sources are "
                f"{', '.join(self.sources) or 'none'}. Enter it under sources."
            )
        if missing := set(weights) - {ENCYCLOPEDIA, *self.sources}:
            raise ValueError(
                f"Stage {number} draws from {', '.join(sorted(missing))}, but the sources are "
                f"{', '.join([ENCYCLOPEDIA, *self.sources])}. Enter it under sources."
            )
        return Mixture(weights, self.encyclopedia.seed, self.encyclopedia.split, "stage", number)

    def _sorted(self, number: int, stage: Stage) -> Buckets | None:
        if not stage.bucket_documents and stage.max_step_tokens is None:
            return None
        if ENCYCLOPEDIA in self._mixtures[number].names:
            raise ValueError(
                f"Stage {number} sorts by length (bucket_documents, max_step_tokens) and draws from the encyclopedia, "
                "whose articles of one step are alike already. Leave these out, or draw from other sources."
            )
        return Buckets(
            partial(self._length, number),  # not a lambda: workers get a pickled copy
            *(self.encyclopedia.seed, self.encyclopedia.split, "stage", number),
            window=stage.bucket_documents or 512,
            batch_size=stage.batch_size,
            max_step_tokens=stage.max_step_tokens,
        )

    def _find(self, number: int, draw: int) -> tuple[str, int]:
        """A stage's draw → source and number within it; each stage goes on where the stages before it stopped."""
        name, index = self._mixtures[number][draw]
        while len(self._drawn_before) <= number:
            n = len(self._drawn_before) - 1
            stage, buckets = self.stages[n], self._buckets[n]
            num_draws = stage.steps * stage.batch_size if buckets is None else buckets.num_draws(stage.steps)
            self._drawn_before.append(self._drawn_before[-1] + self._mixtures[n].counts(num_draws))
        return name, self._drawn_before[number][name] + index

    def _length(self, number: int, draw: int) -> int:
        name, index = self._find(number, draw)
        return self.sources[name].num_tokens(index)

    @staticmethod
    def _trimmed(rng: random.Random, record: Record, max_questions: int) -> Record:
        answerable = [q for q in record.questions if q.kind == "document"]
        others = [q for q in record.questions if q.kind != "document"]
        return record._replace(questions=(*rng.sample(answerable, min(max_questions, len(answerable))), *others))


def _in_turn(given: Stage | dict) -> list[Stage]:
    """The stages that an entry stands for."""
    if isinstance(given, Stage):
        return [given]
    if renamed := sorted(given.keys() & RENAMED_STAGE_KEYS.keys()):
        raise ValueError(f"A stage has no {renamed[0]} any more; it is called {RENAMED_STAGE_KEYS[renamed[0]]} now.")
    if "alternate" not in given:
        return [Stage(**given)]
    steps, others = given.get("steps", 0), sorted(given.keys() - {"steps", "alternate"})
    stages = [stage for entry in given["alternate"] or () for stage in _in_turn(entry)]
    if others or steps < 1 or not stages or min(stage.steps for stage in stages) < 1:
        raise ValueError(
            "A stage of several in turn needs steps, and alternate: a list of stages that have steps, and "
            f"nothing else; got {dict(given)}."
        )
    result = []
    for stage in cycle(stages):
        result.append(stage._replace(steps=min(stage.steps, steps)))
        steps -= stage.steps
        if steps <= 0:
            return result
