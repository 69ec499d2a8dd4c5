"""Traces that train a retriever: `python -m benchmarks.use.retriever`

Several users ask about what they told. Of each question is traced which memories were in the prompt and by how much
each moved log p of the answer that the model gave; nobody says which one was right. From that a small dual encoder is
trained, and searches the memories of another user, about entities of no trace.

kind       one row for
traces     a seed: how many traces there are, and how often the memory that moved most was the right one
search     a method and a seed: whether the right memory comes first, and whether the answer from it alone is right
deleted    a seed: the encoder after one user's traces were deleted against one that never had them

Methods: bm25; dense, the base model's embeddings as they are; trained, by traces; shuffled, by the same traces with
each question's effects in another order; and each vector ranking fused with bm25. One recipe trains both.
"""

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra

from benchmarks.forgetting.sweep import Cell, run_cells
from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Count, Number, OutputFile, OutputFolder, Settings, Text

ALONE = 1e6  # of dense_weight: vectors rank, words break ties


class RetrieverSettings(Settings):
    checkpoint: Text
    seeds: list[Number]
    num_users: Count
    num_entities: Count
    num_asked: Count
    num_held_out: Count
    limit: Count
    training: dict[str, Any]
    cells: OutputFolder
    output: OutputFile | None


SCRIPT = Script("benchmarks.use.retriever", RetrieverSettings)


class Told(NamedTuple):
    """A sentence, and a question with its answer that only it gives."""

    text: str
    question: str
    answer: str


def draw(split: str, seed: int, user: str, num_entities: int) -> list[Told]:
    """Four facts of each entity, no two with one answer to one question."""
    from hypernet.data.encyclopedia import Encyclopedia

    encyclopedia, found, asked = Encyclopedia(split, seed=seed), [], set()
    for place in range(num_entities):
        record = encyclopedia.record(f"traces/{user}/{place}", num_entities=1, num_facts=4, num_distractors=0)
        for question in record.questions:
            holding = [text for text in record.sentences if question.answer in text]
            if len(holding) == 1 and question.text not in asked:
                asked.add(question.text)
                found.append(Told(holding[0], question.text, question.answer))
    return found


def measure_cell(cell: Cell) -> list[Row]:
    """All rows of one seed."""
    import torch

    from benchmarks.forgetting.protocol import load

    torch.set_num_threads(1)
    model = load(cell.settings["checkpoint"])
    with tempfile.TemporaryDirectory() as folder:
        return list(_rows(model, cell.settings, cell.seed, Path(folder)))


def _rows(model: Any, settings: Mapping[str, Any], seed: int, folder: Path) -> Iterator[Row]:
    from hypernet.memory.embedding import BaseModelEmbedder
    from hypernet.memory.memory import Memory
    from hypernet.memory.store.records import Filters
    from hypernet.memory.traces.dual_encoder import DualEmbedder, DualTraining, shuffled
    from hypernet.memory.traces.trace_store import TraceStore
    from hypernet.memory.traces.trained import TrainedRetriever

    users = [f"user-{number}" for number in range(settings["num_users"])]
    facts = {user: draw("train", seed, user, settings["num_entities"]) for user in users}
    memory = Memory.open(folder / "memory", model=model, limit=settings["limit"])
    traces = TraceStore(memory.store)
    right = 0
    for user, own in facts.items():
        _tell(memory, user, own)
        asked = random.Random(f"asked/{seed}/{user}").sample(own, min(settings["num_asked"], len(own)))
        answers = memory.ask_many([one.question for one in asked], user_ids=[user] * len(asked), tier="token")
        for one, answer in zip(asked, answers, strict=True):
            effects = memory.explain(answer)
            traces.record(answer, effects, base_model=model.base_model_fingerprint)
            best = max(effects, key=lambda effect: effect.effect, default=None)
            right += best is not None and best.text == one.text
    training = DualTraining(**settings["training"], seed=seed)
    examples = traces.examples()
    usable = training.usable(examples)
    yield {
        **{"kind": "traces", "method": "traces", "asked": len(examples), "usable": len(usable)},
        "right": right / max(1, len(examples)),
    }

    base = BaseModelEmbedder(model.base_model, model.tokenizer)
    trained = TrainedRetriever(memory.store, base, training=training, min_examples=1)
    encoder = trained.embedder()
    if encoder is None:
        raise ValueError(f"{len(usable)} traces are too few to train on. Ask more questions.")
    mixed = DualEmbedder(base, training.train(base, shuffled(usable, seed=seed)))
    held_out = draw("validation", seed, "held out", settings["num_entities"])
    _tell(memory, "held out", held_out)
    asked = held_out[: settings["num_held_out"]]
    rankings = {
        "bm25": (None, 0.0),
        **{"dense": (base, ALONE), "trained": (encoder, ALONE), "shuffled": (mixed, ALONE)},
        **{"dense and bm25": (base, 0.5), "trained and bm25": (encoder, 0.5), "shuffled and bm25": (mixed, 0.5)},
    }
    found = {name: _found(memory, asked, *ranking) for name, ranking in rankings.items()}
    found["right memory"] = [one.text for one in asked]
    said = _answers(
        model, {(one.question, text) for own in found.values() for one, text in zip(asked, own, strict=True)}
    )
    for name, texts in found.items():
        first = [float(text == one.text) for one, text in zip(asked, texts, strict=True)]
        match = [float(said[one.question, text] == one.answer) for one, text in zip(asked, texts, strict=True)]
        yield {
            **{"kind": "search", "method": name, "questions": len(asked), "memories": len(held_out)},
            **{"recall": sum(first) / len(first), "exact_match": sum(match) / len(match)},
            "items": {"recall": first, "exact_match": match},
        }

    # One user's traces go; a memory that never had that user trains the same weights.
    removed = trained.delete_traces(Filters(users[0]))
    left = trained.embedder()
    without = Memory.open(folder / "without", model=model)
    _copy_traces(memory, without, users[1:], facts)
    never = TrainedRetriever(without.store, base, training=training, min_examples=1).embedder()
    yield {
        **{
            "kind": "deleted",
            "method": "traces",
            "removed": removed,
            "changed": left is None or left.name != encoder.name,
        },
        "equal": (left and left.name) == (never and never.name),
    }
    memory.close()
    without.close()


def _tell(memory: Any, user: str, facts: Sequence[Told]) -> dict[str, Any]:
    """Text → ref."""
    return {one.text: memory.add(one.text, user_id=user) for one in facts}


def _found(memory: Any, asked: Sequence[Told], embedder: Any, weight: float) -> list[str | None]:
    """The text that comes first for each question."""
    from hypernet.memory.retriever import Retriever
    from hypernet.memory.store.records import Filters

    retriever = Retriever(memory.store, embedder=embedder, dense_weight=weight)
    hits = [retriever.search(one.question, Filters("held out"), limit=1) for one in asked]
    return [own[0].text if own else None for own in hits]


def _answers(model: Any, pairs: set[tuple[str, str | None]]) -> dict[tuple[str, str | None], str]:
    """What is answered with one text in the prompt."""
    ordered, found = sorted(pairs, key=str), {}
    for start in range(0, len(ordered), 64):
        part = ordered[start : start + 64]
        texts = model.generate([q for q, _ in part], documents=[text for _, text in part], max_new_tokens=16)
        found |= dict(zip(part, texts, strict=True))
    return found


def _copy_traces(memory: Any, other: Any, users: Sequence[str], facts: Mapping[str, Sequence[Told]]) -> None:
    """What these users told and their traces, into a memory that knows nobody else."""
    from hypernet.memory.ask import Answer, Effect
    from hypernet.memory.store.records import Filters
    from hypernet.memory.traces.trace_store import TraceStore

    for user in users:
        refs = _tell(other, user, facts[user])
        for one in TraceStore(memory.store).examples(Filters(user)):
            behind = tuple(str(refs[text]) for text in one.texts)
            answer = Answer(
                **{"question": one.question, "text": "", "tier": "token", "reason": "", "memories": behind},
                **{"user_id": user, "agent_id": None, "run_id": None, "as_of": "", "known_at": None},
                prompt_tokens=0,
            )
            told = {"text": "", "valid_at": "", "invalid_at": None, "rank": 1, "entry": None}
            moved = zip(behind, one.effects, strict=True)
            effects = [Effect(memory=ref, log_p=by, log_p_without=0.0, **told) for ref, by in moved]
            TraceStore(other.store).record(answer, effects)


def rows(cfg: RetrieverSettings) -> Iterator[Row]:
    """All rows, seed after seed."""
    common = cfg.model_dump(exclude={"seeds", "cells", "output"})
    cells = [Cell("retriever", "traces", seed, common) for seed in cfg.seeds]
    return run_cells(cells, measure_cell, folder=cfg.cells, workers=1)


@hydra.main(config_path="../../conf", config_name="use_retriever", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        show_and_write(rows(settings), settings.output, config=plain(cfg), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/use_retriever.yaml")
