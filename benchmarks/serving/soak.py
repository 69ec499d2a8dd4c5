"""Mixed load with clients that leave, and a kill -9: `python -m benchmarks.serving.soak`

All users ask the same question; each has a document, and a memory, in which the answer is another one: the canary. An
adapter's answer must hold the user's own canary, and no answer may hold another's. Meanwhile memories and adapters are
written and deleted; streams are closed in the middle. Halfway the server is killed and started again. At the end, what
was acknowledged must be there, and what was acknowledged as deleted must not.
"""

import asyncio
import json
import logging
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hydra
import numpy as np

from benchmarks.measuring.rows import Row, show_and_write
from benchmarks.serving.process import ServerProcess
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Above0, AtLeast0, Count, Number, OutputFile, Settings, Text

log = logging.getLogger(__name__)
_SAMPLES = 60  # of the curve of memory in a row
_MOST_KEPT = 40  # memories of a user, so that what is kept does not grow with the time


@dataclass
class User:
    """canary: the answer that only this user's document holds. live, gone: ids that the server has acknowledged.

    begun: what a request would have changed that was not answered; it may have happened or not.
    """

    name: str
    document: str
    question: str
    canary: str
    live: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)


@dataclass
class Counts:
    """What happened. outcomes: of requests, by kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    foreign: int = 0
    wrong: int = 0
    server_errors: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB
    restarts: list[float] = field(default_factory=list)  # seconds
    examples: list[str] = field(default_factory=list)  # of what went wrong

    def check(self, user: User, users: Iterable[User], text: str, *, must_hold: bool) -> None:
        if any(other.canary in text for other in users if other is not user):
            self.foreign += 1
            self.examples.append(f"{user.name} with {user.canary!r} read {text!r}")
        if must_hold and user.canary not in text:
            self.wrong += 1
            self.examples.append(f"{user.name} with {user.canary!r} read {text!r}")


def candidates(*, num: int, seed: int) -> list[User]:
    """Users with the same document but for the place of birth that it names."""
    from hypernet.data.encyclopedia import Encyclopedia

    encyclopedia, base, places, index = Encyclopedia("test", seed=seed), None, list[str](), 0
    while len(places) < num:
        record = encyclopedia.record(index, num_entities=1, num_facts=4)
        index += 1
        for one in record.questions:
            if one.text.startswith("In which place was") and one.kind == "document":
                base = base or (" ".join(record.sentences), one.text, one.answer)
                if one.answer not in places:
                    places.append(one.answer)
    assert base is not None
    document, question, answer = base
    return [
        User(f"user{number}", document.replace(answer, place), question, place) for number, place in enumerate(places)
    ]


class Soak:
    """One run; `url` of a server that is started and killed from outside."""

    def __init__(self, url: str, users: list[User], *, rng: random.Random) -> None:
        self.url, self.users, self.rng, self.counts = url, users, rng, Counts()
        self.is_down = False
        self._until = 0.0

    async def run(self, server: ServerProcess, *, seconds: float, clients: int, kills: int) -> None:
        started = time.monotonic()
        self._until = started + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(random.Random(self.rng.random()), self.users[number % len(self.users)]))
            group.create_task(self._watch(server, started))
            for number in range(kills):
                await asyncio.sleep(started + seconds * (number + 1) / (kills + 1) - time.monotonic())
                self.is_down = True
                await asyncio.to_thread(server.stop, signal.SIGKILL)
                await asyncio.to_thread(server.start)
                self.counts.restarts.append(time.monotonic() - started)
                self.is_down = False

    async def _watch(self, server: ServerProcess, started: float) -> None:
        while time.monotonic() < self._until:
            if not self.is_down:
                try:
                    self.counts.memory.append((time.monotonic() - started, server.resident_mib()))
                except (OSError, IndexError):  # killed just now
                    pass
            await asyncio.sleep(1)

    async def _client(self, rng: random.Random, user: User) -> None:
        kinds = {self.ask: 4, self.stream: 3, self.leave: 2, self.ask_memory: 2}
        kinds |= {self.add: 4, self.delete: 3, self.adapter: 1}
        async with httpx.AsyncClient(base_url=self.url, timeout=120, headers={"X-User": user.name}) as client:
            while time.monotonic() < self._until:
                if self.is_down:
                    await asyncio.sleep(0.05)
                    continue
                (work,) = rng.choices(list(kinds), weights=list(kinds.values()))
                try:
                    outcome = await work(client, user, rng)
                except httpx.TransportError:
                    outcome = "no answer: the server was killed" if self.is_down else "no answer"
                    await asyncio.sleep(0.05)
                self.counts.outcomes[f"{work.__name__.strip('_')}: {outcome}"] += 1

    # --- Kinds of request ---------------------------------------------------------------------------------------

    async def ask(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        return await self._answered(client, user, "tiny:canary.txt", {}, must_hold=True)

    async def ask_memory(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        return await self._answered(client, user, "tiny:memory", {"X-Memory-Tier": "token"}, must_hold=False)

    async def _answered(
        self, client: httpx.AsyncClient, user: User, model: str, headers: dict[str, str], *, must_hold: bool
    ) -> str:
        response = await client.post("/v1/chat/completions", json=_body(user, model), headers=headers)
        if response.status_code == 200:
            text = response.json()["choices"][0]["message"]["content"]
            self.counts.check(user, self.users, text, must_hold=must_hold)
        return self._outcome(response)

    async def stream(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        text = ""
        async with client.stream(
            "POST", "/v1/chat/completions", json=_body(user, "tiny:canary.txt") | {"stream": True}
        ) as response:
            async for line in response.aiter_lines():
                text += _content(line)
        if response.status_code == 200:
            self.counts.check(user, self.users, text, must_hold=True)
        return self._outcome(response)

    async def leave(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        """Closes the connection in the middle of a long answer, before or after it began."""
        body = {"model": "tiny:canary.txt", "prompt": user.question, "max_tokens": 300, "temperature": 1.5}
        async with httpx.AsyncClient(base_url=self.url, headers={"X-User": user.name}) as own:
            timeout = httpx.Timeout(30, read=rng.uniform(0.01, 0.5))
            streams = rng.random() < 0.5
            try:
                async with own.stream(
                    "POST", "/v1/completions", json=body | {"stream": streams}, timeout=timeout
                ) as response:
                    async for _ in response.aiter_raw():
                        if rng.random() < 0.2:
                            return "left"
            except httpx.ReadTimeout:
                return "left"
        return self._outcome(response)

    async def add(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        if len(user.live) >= _MOST_KEPT:
            return await self.delete(client, user, rng)
        body = {"content": f"{user.name} keeps note {rng.getrandbits(64):x}."}
        response = await client.post("/v1/memories", json=body)
        if response.status_code == 201:
            user.live.add(response.json()["id"])
            self.counts.acknowledged += 1
        return self._outcome(response)

    async def delete(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        if not user.live:
            return "nothing to delete"
        key = user.live.pop()
        user.begun.add(key)
        response = await client.delete(f"/v1/memories/{key}")
        if response.status_code == 200:
            user.begun.discard(key)
            user.gone.add(key)
            self.counts.acknowledged += 1
        return self._outcome(response)

    async def adapter(self, client: httpx.AsyncClient, user: User, rng: random.Random) -> str:
        """Writes an adapter of another document and deletes it."""
        document = f"{user.name} lives at number {rng.randrange(1000)}. " * 3
        made = await client.post("/v1/adapters", json={"document": document, "name": "other.txt"})
        if made.status_code != 201:
            return self._outcome(made)
        return self._outcome(await client.delete(f"/v1/adapters/{made.json()['id']}"))

    def _outcome(self, response: httpx.Response) -> str:
        if response.status_code >= 500:
            self.counts.server_errors += 1
            self.counts.examples.append(f"{response.request.url.path} ended with {response.status_code}")
        return str(response.status_code)


def _body(user: User, model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": user.question}], "max_tokens": 24}


def _content(line: str) -> str:
    """Text of one server-sent event."""
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line.removeprefix("data: ")).get("choices", [])
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def prepared(url: str, *, num_users: int, seed: int) -> list[User]:
    """Users whose adapter, made now, answers with the canary when it is asked alone; so must it later.

    Raises:
        ValueError: the model answers too few of them.
    """
    found: list[User] = []
    for user in candidates(num=4 * num_users, seed=seed):
        headers = {"X-User": user.name}
        with httpx.Client(base_url=url, timeout=120, headers=headers) as client:
            body = {"document": user.document, "name": "canary.txt"}
            client.post("/v1/adapters", json=body).raise_for_status()
            client.post("/v1/memories", json={"content": f"The place is {user.canary}."}).raise_for_status()
            answer = client.post("/v1/chat/completions", json=_body(user, "tiny:canary.txt")).json()
        if user.canary in answer["choices"][0]["message"]["content"]:
            found.append(user)
        if len(found) == num_users:
            return found
    raise ValueError(f"Only {len(found)} of {4 * num_users} documents are answered, not {num_users}. Lower users.")


def kept(url: str, users: Iterable[User]) -> tuple[int, int]:
    """Acknowledged memories that are lost; deleted ones that are back."""
    lost = back = 0
    for user in users:
        with httpx.Client(base_url=url, timeout=60, headers={"X-User": user.name}) as client:
            there = {row["id"] for row in client.get("/v1/memories", params={"limit": 1000}).json()["data"]}
        lost += len(user.live - there)
        back += len(user.gone & there)
    return lost, back


def growth(memory: list[tuple[float, float]], *, since: float = 0.0) -> float | None:
    """MiB a minute: the slope of the last half of what was measured since then; caches fill before. None: too few."""
    found = [pair for pair in memory if pair[0] >= since]
    found = found[len(found) // 2 :]
    if len(found) < 3:
        return None
    return 60 * float(np.polyfit(*np.array(found).T, 1)[0])


def measure(cfg: "SoakSettings") -> Row:
    with tempfile.TemporaryDirectory(prefix="hypernet-") as folder:
        arguments = ["-m", "hypernet", "serve", "--model", cfg.checkpoint, "--name", "tiny", "--directory", folder]
        with ServerProcess(arguments) as server:
            users = prepared(server.url, num_users=cfg.users, seed=cfg.seed)
            soak = Soak(server.url, users, rng=random.Random(cfg.seed))
            asyncio.run(soak.run(server, seconds=60 * cfg.minutes, clients=cfg.clients, kills=cfg.kills))
            lost, back = kept(server.url, users)
            printed = server.stop()
    counts = soak.counts
    curve = counts.memory[:: max(1, len(counts.memory) // _SAMPLES)]
    return {
        **{"kind": "soak", "minutes": cfg.minutes, "users": cfg.users, "clients": cfg.clients, "kills": cfg.kills},
        **{"requests": counts.outcomes.total(), "outcomes": dict(sorted(counts.outcomes.items()))},
        **{"acknowledged_writes": counts.acknowledged, "lost": lost, "back": back},
        **{"foreign_answers": counts.foreign, "wrong_answers": counts.wrong, "server_errors": counts.server_errors},
        **{"tracebacks_in_the_log": printed.count("Traceback"), "examples": counts.examples[:5]},
        "growth_mib_per_minute": growth(counts.memory, since=max(counts.restarts, default=0.0)),
        **{"restarts": counts.restarts, "memory_mib": [list(pair) for pair in curve]},
    }


class SoakSettings(Settings):
    checkpoint: Text
    minutes: Above0
    users: Count
    clients: Count
    kills: Number
    most_growth: AtLeast0
    seed: Number
    output: OutputFile | None


SCRIPT = Script("benchmarks.serving.soak", SoakSettings)


@hydra.main(config_path="../../conf", config_name="serving_soak", version_base="1.3")
@SCRIPT
def main(cfg: SoakSettings) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    show_and_write([row := measure(cfg)], cfg.output, config=cfg.model_dump())
    bad = ["lost", "back", "foreign_answers", "wrong_answers", "server_errors", "tracebacks_in_the_log"]
    if wrong := [name for name in bad if row[name]]:
        raise ValueError(f"{', '.join(wrong)} should be 0: see the figures above.")
    if (row["growth_mib_per_minute"] or 0.0) > cfg.most_growth:
        raise ValueError(f"The server's memory grew by {row['growth_mib_per_minute']:.2f} MiB a minute.")


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/serving_soak.yaml")
