"""The token tier of the memory: speed and recall, kill -9 at random points, random schedules.

python -m benchmarks.memory.store
python -m benchmarks.memory.store num_kills=0 num_schedules=0 memory.model=null

Users' memories are facts of the encyclopedia's test split, one sentence each that names its subject; a question is
answered if that sentence is among the first five. The controls are another user's memory and random hits. A killed
writer has told its parent what was acknowledged: all of that must be there, and nothing deleted may be back.
"""

import logging
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from benchmarks.measuring.rows import Row, describe_run, write_rows
from hypernet.cli.scripts import Script, check_targets
from hypernet.cli.settings import Count, Number, Open, OutputFile, Settings
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.token_store import TokenStore

log = logging.getLogger(__name__)
_OPENED = "opened"  # a writer's first line


class UserFacts(NamedTuple):
    """sentences and questions: one of each per memory, in the same order."""

    user_id: str
    sentences: list[str]
    questions: list[str]


def user_facts(*, num_users: int, memories_per_user: int) -> Iterator[UserFacts]:
    """Facts of the encyclopedia whose sentence names what its question asks about."""
    from hypernet.data.encyclopedia import Encyclopedia

    encyclopedia, index = Encyclopedia("test", seed=0), 0
    for user in range(num_users):
        found = UserFacts(f"user{user}", [], [])
        while len(found.sentences) < memories_per_user:
            record = encyclopedia.record(index, num_entities=1, num_facts=4)
            index += 1
            for question in record.questions:
                holding = [sentence for sentence in record.sentences if question.answer in sentence]
                names = [word for word in question.text.rstrip("?").split()[1:] if word[:1].isupper()]
                if question.kind == "document" and len(holding) == 1 and any(name in holding[0] for name in names):
                    if holding[0] not in found.sentences and len(found.sentences) < memories_per_user:
                        found.sentences.append(holding[0])
                        found.questions.append(question.text)
        yield found


def measure(cfg: DictConfig) -> Iterator[Row]:
    """Ingest, search and deletion of all users' memories."""
    from hydra.utils import instantiate

    users = list(user_facts(num_users=cfg.num_users, memories_per_user=cfg.memories_per_user))
    rng = random.Random(cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**cfg.memory, "folder": cfg.memory.folder or folder}
        memory = instantiate(settings, _convert_="all")
        start = time.perf_counter()
        for user in users:
            memory.store.add([Draft(text=text, filters=Filters(user.user_id)) for text in user.sentences])
        number = sum(len(user.sentences) for user in users)
        yield {"kind": "ingest", "memories": number, "per_second": number / (time.perf_counter() - start)}
        start = time.perf_counter()
        for user in users:
            memory.search(user.questions[0], user_id=user.user_id)
        yield {"kind": "first_searches", "users": len(users), "seconds": time.perf_counter() - start}
        yield searched(memory, users, rng, num_searches=cfg.num_searches)
        start = time.perf_counter()
        memory.profile(user_id=users[0].user_id)
        yield {"kind": "profile", "ms": 1e3 * (time.perf_counter() - start)}
        memory.store.add([Draft(text=f"fact number {n}", filters=Filters("full")) for n in range(10_000)])
        start = time.perf_counter()
        memory.delete_all(user_id="full")
        yield {"kind": "delete_all", "memories": 10_000, "seconds": time.perf_counter() - start}
        start = time.perf_counter()
        memory.purge()
        yield {"kind": "purge", "memories": 10_000, "seconds": time.perf_counter() - start}
        memory.close()


def searched(memory: Any, users: list[UserFacts], rng: random.Random, *, num_searches: int) -> Row:
    seconds, own, others, wrong = [], 0, 0, 0
    for _ in range(num_searches):
        user, other = rng.sample(users, 2)
        which = rng.randrange(len(user.questions))
        start = time.perf_counter()
        hits = memory.search(user.questions[which], user_id=user.user_id, limit=5)
        seconds.append(time.perf_counter() - start)
        own += user.sentences[which] in [hit.text for hit in hits]
        wrong += sum(hit.user_id != user.user_id for hit in hits)
        elsewhere = memory.search(user.questions[which], user_id=other.user_id, limit=5)
        others += user.sentences[which] in [hit.text for hit in elsewhere]
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {
        **{"kind": "search", "searches": num_searches, "p50_ms": p50, "p99_ms": p99, "wrong_user_hits": wrong},
        **{"recall_at_5": own / num_searches, "recall_in_anothers_memory": others / num_searches},
    }


# --- Kills ----------------------------------------------------------------------------------------------------------


def kill_writers(folder: Path, *, num_kills: int, rng: random.Random, seconds: float = 0.2) -> Row:
    """Forks writers of one memory and kills each after a random time; checks the memory after each.

    Returns:
        How often something acknowledged was lost, something deleted was back, or `verify` found damage.
    """
    TokenStore(folder).close()
    live: set[str] = set()
    deleted: set[str] = set()
    lost = resurrected = damaged = acknowledged = 0
    for _ in range(num_kills):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns where other threads run; the child takes no lock of theirs and ends by _exit.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                _write_until_killed(folder, sorted(live), rng.getrandbits(32), writer)
            finally:
                os._exit(1)
        os.close(writer)
        if rng.random() < 0.8:  # the others may be killed while they open the memory
            os.read(reader, len(_OPENED) + 1)
        time.sleep(rng.random() * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as pipe:
            lines = [line.split() for line in pipe.read().split("\n")[:-1]]  # the last one may be cut
        acknowledged += sum(what in ("add", "delete", "purge") for what, *_ in lines)
        begun: set[str] = set()
        for what, *keys in lines:
            if what == "add":
                live |= set(keys)
            elif what == "begin":
                begun = set(keys)
            elif what == "delete":
                live -= set(keys)
                deleted |= set(keys)
                begun = set()
            elif what == "purge":
                deleted |= set(keys)
        store = TokenStore(folder)
        damaged += bool(store.verify().damage)
        there = {memory.ref for memory in store.statements()}
        # What was being written when it was killed may have happened or not.
        lost += len(live - there - begun)
        resurrected += len(deleted & there)
        live = there
        store.close()
    return {
        **{"kind": "kills", "kills": num_kills, "acknowledged": acknowledged},
        **{"lost": lost, "resurrected": resurrected, "damaged": damaged},
    }


def _write_until_killed(folder: Path, live: list[str], seed: int, pipe: int) -> None:
    rng, store = random.Random(seed), TokenStore(folder)

    def tell(*words: object) -> None:
        os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

    tell(_OPENED)
    while True:
        kind = rng.choice(["add", "add", "update", "delete", "rollback", "purge"])
        if kind == "add":
            refs = store.add([Draft(text=f"text {rng.random()}") for _ in range(rng.choice([1, 1, 20]))])
            live += map(str, refs)
            tell("add", *refs)
        elif kind == "update" and live:
            ref = store.update(rng.choice(live).partition("@")[0], f"text {rng.random()}")
            live.append(str(ref))
            tell("add", ref)
        elif kind == "delete" and live:
            key = live.pop(rng.randrange(len(live)))
            tell("begin", key)
            store.delete(key)
            tell("delete", key)
        elif kind == "rollback":
            (ref,) = store.add([Draft(text="a mistake")])
            tell("begin", ref)
            store.rollback(ref.batch)
            tell("delete", ref)
        elif kind == "purge" and rng.random() < 0.3:
            tell("purge", *store.purge().memories)


# --- Schedules ------------------------------------------------------------------------------------------------------


def random_schedules(folder: Path, *, num_schedules: int, rng: random.Random, num_steps: int = 12) -> Row:
    """Random steps on one memory, compared with a dict after each. Returns how often they differed."""
    store, live, deleted, wrong = TokenStore(folder), {}, {}, 0
    for schedule in range(num_schedules):
        for step in range(num_steps):
            kind = rng.choice(
                ["add", "add", "update", "delete", "restore", "rollback", "purge", "reopen", "delete_all"]
            )
            whose = Filters(rng.choice(["alice", "bob", "carol"]))
            if kind == "add":
                (ref,) = store.add([Draft(text=f"{schedule}.{step}", filters=whose)])
                live[str(ref)] = whose.user_id
            elif kind == "update" and live:
                key = rng.choice(sorted(live))
                live[str(store.update(key.partition("@")[0], f"{schedule}.{step}"))] = live[key]
            elif kind == "delete" and live:
                store.delete(key := rng.choice(sorted(live)))
                deleted[key] = live.pop(key)
            elif kind == "restore" and deleted:
                store.restore(key := rng.choice(sorted(deleted)))
                live[key] = deleted.pop(key)
            elif kind == "delete_all":
                deleted |= {key: live.pop(key) for key in store.delete_all(whose).memories}
            elif kind == "rollback":
                (ref,) = store.add([Draft(text="a mistake", filters=whose)])
                store.rollback(ref.batch)
            elif kind == "purge" and rng.random() < 0.2:
                store.purge()
                deleted = {}
            elif kind == "reopen":
                store.close()
                store = TokenStore(folder)
            wrong += {memory.ref: memory.user_id for memory in store.statements()} != live
    damage = store.verify().damage
    store.close()
    return {"kind": "schedules", "schedules": num_schedules, "wrong": wrong, "damage": len(damage)}


class MemorySettings(Open):
    folder: str | None  # null: a temporary one
    model: str | None


def markdown(rows: Sequence[Row]) -> str:
    """What was measured, a line for each figure."""
    from benchmarks.report.tables import Table

    of = {row["kind"]: row for row in rows}
    search, kills = of["search"], of["kills"]
    lines = {
        f"memories stored per second, {of['ingest']['memories']:,} in all": f"{of['ingest']['per_second']:,.0f}",
        "search, median ms": f"{search['p50_ms']:.1f}",
        "search, 99th percentile ms": f"{search['p99_ms']:.1f}",
        f"Recall@5 of {search['searches']:,} searches": f"{search['recall_at_5']:.2f}",
        "the same in another user's memory": f"{search['recall_in_anothers_memory']:.2f}",
        "hits of another user": str(search["wrong_user_hits"]),
        f"deleting {of['delete_all']['memories']:,} memories of one user, s": f"{of['delete_all']['seconds']:.2f}",
        "erasing them from the disk, s": f"{of['purge']['seconds']:.2f}",
        f"lost of {kills['acknowledged']:,} writes, {kills['kills']} writers killed with kill -9": str(kills["lost"]),
        "deleted memories that were back": str(kills["resurrected"]),
        f"wrong answers after {of['schedules']['schedules']:,} random schedules": str(of["schedules"]["wrong"]),
    }
    return Table("", ["what", "figure"], [list(line) for line in lines.items()]).markdown()


class StoreSettings(Settings):
    memory: MemorySettings
    num_users: Annotated[int, Field(ge=2, description="a whole number, at least 2")]
    memories_per_user: Count
    num_searches: Count
    num_kills: Number
    num_schedules: Number
    seed: Number
    output: OutputFile | None


SCRIPT = Script("benchmarks.memory.store", StoreSettings)


@hydra.main(config_path="../../conf", config_name="memory_store", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with SCRIPT.errors():
        memory = SCRIPT.check(cfg).memory.model_dump()
        check_targets({"memory": {**memory, "folder": memory["folder"] or ""}})
        run_all(cfg)


def run_all(cfg: DictConfig) -> None:
    rows = []

    def note(row: Row) -> None:
        rows.append(row)
        log.info(
            " ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
            )
        )

    # First: writers are forked, which a process of many threads should not be.
    for num, run in ((cfg.num_kills, kill_writers), (cfg.num_schedules, random_schedules)):
        if num:
            with tempfile.TemporaryDirectory() as folder:
                counted = {"num_kills": num} if run is kill_writers else {"num_schedules": num}
                note(run(Path(folder) / "memory", rng=random.Random(cfg.seed), **counted))
    for row in measure(cfg):
        note(row)
    if cfg.output:
        write_rows(cfg.output, rows, run=describe_run(OmegaConf.to_container(cfg, resolve=True)))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/memory_store.yaml")
