"""This memory and Mem0's library on the same memories, in one run, offline: `python -m benchmarks.memory.peers`

Users' memories are facts of the encyclopedia, as in `benchmarks.memory.store`. Each system stores them one by one,
answers the same questions, deletes the same memories, and is closed and opened again. Mem0 runs with its default vector
store (Qdrant's local mode, a folder), without telemetry, without a language model (`infer=False`) and with our embedder
in place of its own. Its keyword search and its entities need models that it downloads, so they are off: to compare like
with like, one row of ours ranks by vectors.

Mem0 is no dependency: it wants an older protobuf than the one pinned here. Install it beside, in a folder:

    .venv/bin/pip install --target outputs/mem0 mem0ai
    PYTHONPATH=outputs/mem0 .venv/bin/python -m benchmarks.memory.peers

Without it, its row says why there are no figures.
"""

import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import hydra
import numpy as np

from benchmarks.measuring.rows import Row
from benchmarks.memory.store import UserFacts, user_facts
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text
from hypernet.memory.embedding import Embedder, open_embedder
from hypernet.memory.memory import Memory

LIMIT = 5
_VECTORS_FIRST = 1e6  # a weight at which words only order memories of equal rank
# What mem0ai does with a network or models from one, and does not do here.
MEM0_WITHOUT = (
    "extraction and updates by a language model (infer=True)",
    "keyword search (fastembed downloads its model)",
    "entities and lemmas (spaCy's model is downloaded)",
    "its own embedder (OpenAI's API by default)",
)


class Peer(Protocol):
    """A memory of several users in one folder."""

    name: str

    def open(self) -> None: ...
    def close(self) -> None: ...
    def add(self, user_id: str, text: str) -> str: ...
    def search(self, user_id: str, question: str) -> list[tuple[str, str]]:
        """(user, text) of up to `LIMIT` memories, the best first."""
        ...

    def delete(self, key: str) -> None: ...
    def erase(self) -> None:
        """What the system has for content of deleted memories on the disk, if anything."""
        ...


class Ours:
    """`hypernet.Memory`."""

    def __init__(self, name: str, folder: Path, **settings: Any) -> None:
        self.name, self._folder, self._settings = name, folder, settings

    def open(self) -> None:
        self._memory = Memory.open(self._folder, **self._settings)

    def close(self) -> None:
        self._memory.close()

    def add(self, user_id: str, text: str) -> str:
        return self._memory.add(text, user_id=user_id).id

    def search(self, user_id: str, question: str) -> list[tuple[str, str]]:
        return [(hit.user_id, hit.text) for hit in self._memory.search(question, user_id=user_id, limit=LIMIT)]

    def delete(self, key: str) -> None:
        self._memory.delete(key)

    def erase(self) -> None:
        self._memory.purge()


class Mem0:
    """mem0ai's `Memory`, offline.

    Raises:
        ValueError: it is not installed.
    """

    def __init__(self, name: str, folder: Path, *, embedder: Embedder) -> None:
        if find_spec("mem0") is None:
            raise ValueError("mem0ai is not installed; benchmarks/memory/peers.py says how to")
        # Read when it is imported. It keeps a file of its own, which is not to be the user's.
        os.environ |= {"MEM0_TELEMETRY": "False", "MEM0_DIR": str(folder / "own")}
        self.name, self._folder, self._embedder = name, folder, embedder

    def open(self) -> None:
        import mem0
        from mem0.memory.telemetry import MEM0_TELEMETRY

        if MEM0_TELEMETRY:
            raise ValueError("mem0 was imported before with its telemetry on. Run this in a process of its own.")
        for logger in ("mem0", "qdrant_client"):  # told once for each memory: that there is no spaCy, no fastembed
            logging.getLogger(logger).setLevel(logging.ERROR)
        dims = self._embedder.embed(["dims"]).shape[1]
        nobody = {"api_key": "none", "openai_base_url": "http://127.0.0.1:9"}  # whoever calls it, fails
        store = {"collection_name": "memories", "path": str(self._folder / "qdrant"), "on_disk": True}
        self._memory = mem0.Memory.from_config(
            {
                "vector_store": {"provider": "qdrant", "config": {**store, "embedding_model_dims": dims}},
                "embedder": {"provider": "openai", "config": {**nobody, "embedding_dims": dims}},
                "llm": {"provider": "openai", "config": nobody},
                "history_db_path": str(self._folder / "history.db"),
            }
        )
        self._memory.embedding_model = _Mem0Embedder(self._memory.embedding_model.config, self._embedder)

    def close(self) -> None:
        self._memory.close()
        self._memory.vector_store.client.close()

    def add(self, user_id: str, text: str) -> str:
        return self._memory.add(text, user_id=user_id, infer=False)["results"][0]["id"]

    def search(self, user_id: str, question: str) -> list[tuple[str, str]]:
        found = self._memory.search(question, filters={"user_id": user_id}, top_k=LIMIT, threshold=0.0)
        return [(hit["user_id"], hit["memory"]) for hit in found["results"]]

    def delete(self, key: str) -> None:
        self._memory.delete(key)

    def erase(self) -> None:
        """It has nothing but `reset`, which deletes everybody."""


class _Mem0Embedder:
    def __init__(self, config: Any, embedder: Embedder) -> None:
        self.config, self._embedder = config, embedder

    def embed(self, text: str, memory_action: str | None = None) -> list[float]:
        return self._embedder.embed([text])[0].tolist()

    def embed_batch(self, texts: Sequence[str], memory_action: str | None = None) -> list[list[float]]:
        return self._embedder.embed(list(texts)).tolist()


def systems(folder: Path, embedder: Embedder) -> dict[str, Callable[[], Peer]]:
    """Name → what makes it, in a folder of its own."""

    def ours(name: str, **settings: Any) -> Callable[[], Peer]:
        return lambda: Ours(name, folder / name.replace(" ", "_"), **settings)

    return {
        "words alone": ours("words alone"),
        "words and vectors": ours("words and vectors", embedder=embedder),
        "vectors": ours("vectors", embedder=embedder, dense_weight=_VECTORS_FIRST),
        "mem0": lambda: Mem0("mem0", folder / "mem0", embedder=embedder),
    }


def measured(
    peer: Peer, users: Sequence[UserFacts], *, seed: int, num_searches: int, num_deleted: int, folder: Path
) -> Row:
    """One system's row. Ingest ends when everything has been found once: ours computes vectors at the first search."""
    rng, keys = random.Random(seed), {}
    peer.open()
    start = time.perf_counter()
    for user in users:
        for number, text in enumerate(user.sentences):
            keys[user.user_id, number] = peer.add(user.user_id, text)
    for user in users:
        peer.search(user.user_id, user.questions[0])
    row: Row = {"kind": "peer", "system": peer.name, "seed": seed, "users": len(users), "memories": len(keys)}
    row["ingest_per_s"] = len(keys) / (time.perf_counter() - start)
    seconds, own, elsewhere, wrong_user = [], 0, 0, 0
    for _ in range(num_searches):
        user, other = rng.sample(users, 2)
        number = rng.randrange(len(user.questions))
        start = time.perf_counter()
        hits = peer.search(user.user_id, user.questions[number])
        seconds.append(time.perf_counter() - start)
        own += user.sentences[number] in [text for _, text in hits]
        wrong_user += sum(whose != user.user_id for whose, _ in hits)
        others = peer.search(other.user_id, user.questions[number])
        wrong_user += sum(whose != other.user_id for whose, _ in others)
        elsewhere += user.sentences[number] in [text for _, text in others]
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    row |= {"searches": num_searches, "p50_ms": p50, "p99_ms": p99, "recall_at_5": own / num_searches}
    row |= {"recall_in_anothers_memory": elsewhere / num_searches, "wrong_user_hits": wrong_user}
    places = {(user.user_id, number): (user, number) for user in users for number in range(len(user.sentences))}
    deleted = rng.sample(sorted(keys), min(num_deleted, len(keys)))
    for place in deleted:
        peer.delete(keys[place])
    back = 0
    for opened_again in (False, True):
        if opened_again:
            peer.close()
            peer.open()
        for user, number in map(places.__getitem__, deleted):
            found = [text for _, text in peer.search(user.user_id, user.questions[number])]
            back += user.sentences[number] in found
    peer.erase()
    peer.close()
    texts = [user.sentences[number] for user, number in map(places.__getitem__, deleted)]
    return row | {"deleted": len(deleted), "resurrected": back, "deleted_left_on_disk": _on_disk(folder, texts)}


def _on_disk(folder: Path, texts: Sequence[str]) -> int:
    """How many of the texts stand in the bytes of the folder's files."""
    content = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return sum(any(text.encode() in held for held in content) for text in texts)


def markdown(rows: Sequence[Row]) -> str:
    """A line for each system that ran."""
    from benchmarks.report.tables import Table, number, scaled

    shown = [row for row in rows if row["kind"] == "peer"]
    (deleted,) = {row["deleted"] for row in shown}
    cells = {
        "system": lambda row: f"mem0ai {row['version']}" if "version" in row else f"this memory, {row['system']}",
        "stored per second": lambda row: f"{row['ingest_per_s']:.0f}",
        "search, median ms": scaled("p50_ms"),
        "search, 99th percentile ms": scaled("p99_ms"),
        "Recall@5": number("recall_at_5"),
        f"found again of {deleted} deleted": lambda row: str(row["resurrected"]),
        "of them left on the disk": lambda row: str(row["deleted_left_on_disk"]),
    }
    return Table.of("", shown, cells).markdown()


class PeersSettings(Settings):
    model: Text
    num_users: Count
    memories_per_user: Count
    num_searches: Count
    num_deleted: Number
    systems: list[Text] | None
    seed: Number
    output: OutputFile | None


def measure(cfg: PeersSettings) -> Iterator[Row]:
    """A row for each system, of those that cannot run the reason.

    Raises:
        ValueError: an unknown system, or fewer than two users.
    """
    if cfg.num_users < 2:
        raise ValueError("num_users is 1. Give at least 2: another user's memory is the control.")
    embedder = open_embedder(cfg.model)
    users = list(user_facts(num_users=cfg.num_users, memories_per_user=cfg.memories_per_user))
    with tempfile.TemporaryDirectory() as folder:
        made = systems(Path(folder), embedder)
        if unknown := set(cfg.systems or ()) - set(made):
            raise ValueError(f"systems has {sorted(unknown)}; there are {', '.join(made)}.")
        for name in cfg.systems or made:
            try:
                peer = made[name]()
            except ValueError as error:
                yield {"kind": "skipped", "system": name, "reason": str(error)}
                continue
            own = Path(folder) / name.replace(" ", "_")
            own.mkdir()
            sizes = {"num_searches": cfg.num_searches, "num_deleted": cfg.num_deleted}
            row = measured(peer, users, seed=cfg.seed, folder=own, **sizes)
            yield row | ({"version": version("mem0ai"), "not_run": list(MEM0_WITHOUT)} if name == "mem0" else {})


SCRIPT = Script("benchmarks.memory.peers", PeersSettings)


@hydra.main(config_path="../../conf", config_name="memory_peers", version_base="1.3")
@SCRIPT
def main(cfg: PeersSettings) -> None:
    from benchmarks.measuring.rows import show_and_write

    show_and_write(measure(cfg), cfg.output, config=cfg.model_dump())


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/memory_peers.yaml")
