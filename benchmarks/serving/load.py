"""Requests a second at 1, 8 and 64 users: `python -m benchmarks.serving`

Every user has a document and asks about it, over HTTP, again and again as soon as the answer is there. In five ways, at
servers that run next to each other and in turns within each repeat:

own adapters       each user's request names the user's own adapter; one batch for all
shared adapter     the same, and all name one adapter
merged             each request's adapter is added to the weights, one request at a time
document           the document stands in each prompt, which is read for each request
kept prefix        the same, and the document's keys and values are kept from request to request

Documents are of the encyclopedia's test split. All answers have `answer_tokens` tokens, whatever the model says.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from benchmarks.measuring.rows import Row
from benchmarks.serving.process import ServerProcess
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text

log = logging.getLogger(__name__)

# way → engine of benchmarks.serving.engines
WAYS = {"own adapters": "ours", "shared adapter": "ours", "merged": "merging", "document": "ours"}
WAYS |= {"kept prefix": "kept_prefix"}
NAME = "document.txt"


class LoadSettings(Settings):
    checkpoint: Text
    base_model: Text | None
    document_tokens: Count
    answer_tokens: Count
    users: list[Count]
    ways: list[str]
    requests: Count
    repeats: Count
    threads: Count | None
    seed: Number
    output: OutputFile | None


class Asked(NamedTuple):
    """One user's document and the questions about it."""

    user: str
    document: str
    questions: list[str]


def documents(tokenizer: Any, *, num_users: int, num_tokens: int, seed: int) -> list[Asked]:
    """For each user a text of whole sentences, of at most so many tokens, and questions that it answers."""
    from hypernet.data.encyclopedia import Encyclopedia

    encyclopedia, found, index = Encyclopedia("test", seed=seed), [], 0
    for user in range(num_users):
        sentences: list[str] = []
        questions: list[str] = []
        while True:
            record = encyclopedia.record(index, num_entities=1, num_facts=4)
            longer = " ".join([*sentences, *record.sentences])
            if len(tokenizer(longer, add_special_tokens=False)["input_ids"]) > num_tokens:
                break
            sentences += record.sentences
            questions += [one.text for one in record.questions if one.kind == "document"]
            index += 1
        if not questions:
            raise ValueError(f"document_tokens={num_tokens} holds no article of the encyclopedia. Give at least 150.")
        found.append(Asked(f"user{user}", " ".join(sentences), questions))
    return found


def request_of(way: str, asked: Asked, question: str, *, answer_tokens: int) -> dict[str, Any]:
    """What the user's client sends: httpx's keyword arguments."""
    text, model = question, f"model:{NAME}"
    if way in ("document", "kept prefix"):
        text, model = f"{asked.document}\n\n{question}", "model"
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": answer_tokens}
    return {"json": body, "headers": {"X-User": asked.user}}


async def drive(url: str, requests: Sequence[Sequence[dict[str, Any]]], *, total: int) -> tuple[list[float], float]:
    """Sends `total` requests, each user the next of theirs as soon as the last is answered.

    Args:
        requests: of each user, in turns.

    Returns:
        Seconds of each request; seconds from the first one's start to the last one's end.

    Raises:
        ValueError: a request was refused.
    """
    seconds: list[float] = []
    started = 0

    async def user(client: httpx.AsyncClient, own: Sequence[dict[str, Any]]) -> None:
        nonlocal started
        turn = 0
        while started < total:
            started += 1
            before = time.perf_counter()
            response = await client.post(f"{url}/v1/chat/completions", **own[turn % len(own)])
            if response.status_code != 200:
                raise ValueError(f"A request ended with {response.status_code}: {response.text[:300]}")
            seconds.append(time.perf_counter() - before)
            turn += 1

    limits = httpx.Limits(max_connections=len(requests), max_keepalive_connections=len(requests))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        before = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for own in requests:
                group.create_task(user(client, own))
        return seconds, time.perf_counter() - before


def measure(cfg: LoadSettings) -> Iterator[Row]:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="hypernet-") as folder, ExitStack() as running:
        source = str(untrained_checkpoint(cfg.base_model, Path(folder) / "model")) if cfg.base_model else cfg.checkpoint
        tokenizer = AutoTokenizer.from_pretrained(Path(source) / "base_model")
        asked = documents(tokenizer, num_users=max(cfg.users), num_tokens=cfg.document_tokens, seed=cfg.seed)
        urls = {}
        for engine in dict.fromkeys(WAYS[way] for way in cfg.ways):
            arguments = ["-m", "benchmarks.serving.engines", engine, "--model", source]
            arguments += ["--directory", f"{folder}/{engine}", "--max-batch", str(max(cfg.users))]
            urls[engine] = running.enter_context(ServerProcess(arguments, threads=cfg.threads)).url
            for one in asked if engine != "kept_prefix" else []:
                body = {"document": one.document, "name": NAME}
                made = httpx.post(f"{urls[engine]}/v1/adapters", json=body, headers={"X-User": one.user}, timeout=600)
                if made.status_code != 201:
                    raise ValueError(f"No adapter was made: {made.text[:300]}")
        sizes = [len(tokenizer(one.document, add_special_tokens=False)["input_ids"]) for one in asked]
        log.info("%d documents of %d tokens on average.", len(asked), sum(sizes) / len(sizes))
        shared = {"model": cfg.base_model or Path(source).name, "document_tokens": sum(sizes) / len(sizes)}

        def send(way: str, users: int, total: int) -> tuple[list[float], float]:
            own = [asked[0]] * users if way == "shared adapter" else asked[:users]
            requests = [
                [request_of(way, one, question, answer_tokens=cfg.answer_tokens) for question in one.questions]
                for one in own
            ]
            return asyncio.run(drive(urls[WAYS[way]], requests, total=total))

        for way in cfg.ways:  # adapters are read from the disk, prefixes kept, threads started
            send(way, max(cfg.users), max(cfg.users))
        found: dict[tuple[str, int], list[tuple[list[float], float]]] = {}
        for repeat in range(cfg.repeats):
            for users in cfg.users:
                for way in cfg.ways if repeat % 2 else reversed(cfg.ways):
                    found.setdefault((way, users), []).append(send(way, users, max(cfg.requests, users)))
        for way in cfg.ways:
            for users in cfg.users:
                yield {"kind": "load", **shared, **summary(way, users, found[way, users], cfg.answer_tokens)}


def summary(way: str, users: int, repeats: Sequence[tuple[list[float], float]], answer_tokens: int) -> Row:
    """Median, lowest and highest of the repeats."""
    row: Row = {"way": way, "users": users, "requests": len(repeats[0][0]), "repeats": len(repeats)}
    figures = {
        "requests_per_s": [len(each) / total for each, total in repeats],
        "p50_ms": [1000 * float(np.percentile(each, 50)) for each, _ in repeats],
        "p99_ms": [1000 * float(np.percentile(each, 99)) for each, _ in repeats],
    }
    for name, values in figures.items():
        row |= {name: float(np.median(values)), f"{name}_low": min(values), f"{name}_high": max(values)}
    return row | {"tokens_per_s": row["requests_per_s"] * answer_tokens}


def untrained_checkpoint(base_model: str, folder: Path) -> Path:
    """A checkpoint with this base model, in float32, and a hypernetwork of random weights: right for speed alone."""
    import torch

    from hypernet.base.base_model import load_base_model
    from hypernet.doc_to_lora import DocToLoRA

    torch.manual_seed(0)
    model, tokenizer = load_base_model(base_model, dtype="float32")
    sizes = {"latent_dim": 64, "num_latents": 8, "num_blocks": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    DocToLoRA.build(
        base_model=model,
        tokenizer=tokenizer,
        target_modules=["down_proj"],
        hypernetwork={"rank": 8, "aggregator": {"name": "perceiver", **sizes}},
        context_encoder={"kind": "per_layer_activations"},
        max_chunk_tokens=512,
    ).save_pretrained(folder, include_base_model=True)
    return folder


def markdown(rows: Sequence[Row]) -> str:
    """A line for each number of users and way; with the throughput as a multiple of the document's in the prompt."""
    from benchmarks.report.tables import Table

    of = {(row["way"], row["users"]): row for row in rows}
    lines = []
    for row in sorted(rows, key=lambda row: row["users"]):
        others = [of.get((way, row["users"])) for way in ("document", "kept prefix")]
        times = [f"{row['requests_per_s'] / other['requests_per_s']:.2g}" if other else "–" for other in others]
        spread = 100 * (row["requests_per_s_high"] - row["requests_per_s_low"]) / row["requests_per_s"]
        label = f"{row['users']} user{'s' * (row['users'] > 1)}, {row['way']}"
        cells = [label, f"{row['requests_per_s']:.3g}", f"{spread:.0f}", *times]
        lines.append([*cells, f"{row['p50_ms']:,.0f}", f"{row['p99_ms']:,.0f}"])
    head = ["", "requests/s", "range, %", "of the document's", "of the kept prefix's", "p50, ms", "p99, ms"]
    return Table("", head, lines).markdown()
