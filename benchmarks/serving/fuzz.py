"""Malformed requests to a real server: no 500, no traceback, no file's place: `python -m benchmarks.serving.fuzz`

Each error is one line in OpenAI's shape. One request of twenty is not even HTTP. Afterwards the server still answers.
"""

import json
import logging
import random
import socket
import string
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import hydra

from benchmarks.measuring.rows import Row, show_and_write
from benchmarks.serving.process import ServerProcess
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text

_QUESTION = [{"role": "user", "content": "Who taught Fenda Elfax?"}]
_PATHS = [
    *("/v1/chat/completions", "/v1/completions", "/v1/adapters", "/v1/memories", "/v1/memories/search"),
    *("/v1/memories/ask", "/v1/memories/rollback", "/v1/memories/import", "/v1/memories/explain", "/v1/memories/x@0"),
    *("/v1/memories/x/forget", "/v1/models/%00", "/v1/adapters/..", "/v1/memories/%ff%fe", "/v1/memories/purge"),
]
_NAMES = [
    *("model", "messages", "prompt", "stream", "stop", "temperature", "seed", "document", "name", "content"),
    *("question", "limit", "tier", "as_of", "valid_at", "metadata", "rows", "version", "key", "max_tokens"),
    *("agent_id", "logprobs"),
]


class Malformed(NamedTuple):
    """One request, as httpx takes it."""

    method: str
    url: str
    content: bytes
    headers: dict[str, str]
    params: dict[str, str] | None


def any_request(rng: random.Random) -> Malformed:
    return Malformed(
        rng.choice(["POST", "POST", "POST", "GET", "PATCH", "DELETE", "PUT"]),
        rng.choice(_PATHS),
        _any_body(rng),
        {"Content-Type": rng.choice(["application/json"] * 4 + ["text/plain", "multipart/form-data", "\x7f"])},
        {rng.choice(_NAMES): rng.choice(["", "-1", "x" * 200, "\x00", "2026"])} if rng.random() < 0.3 else None,
    )


def mistake_in(response: httpx.Response, *, directory: str) -> str:
    """What is wrong with an answer to a malformed request; "": nothing."""
    if response.status_code >= 500:
        return f"status {response.status_code}"
    if "Traceback" in response.text or directory in response.text:
        return "it shows the server's inside"
    if response.status_code < 400 or not response.content:
        return ""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return "the error is not in OpenAI's shape"
    if set(error) != {"message", "type", "param", "code"} or not error["message"] or "\n" in error["message"]:
        return "the error is not one line in OpenAI's shape"
    return ""


def _any_value(rng: random.Random, depth: int = 0) -> Any:
    scalars = [None, True, -1, 0, 2**70, 1e308, "", "tiny", "tiny:memory", "\u0000", "\ud800", "\u202e", "a" * 3000]
    scalars += ["' OR 1=1 --", "../../../etc/passwd", "9999-99-99", "{{7*7}}", rng.choice(string.printable), _QUESTION]
    if depth < 3 and rng.random() < 0.3:
        return [_any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.3:
        return {rng.choice([*_NAMES, "role", "x"]): _any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(scalars)


def _any_body(rng: random.Random) -> bytes:
    body = json.dumps({rng.choice(_NAMES): _any_value(rng) for _ in range(rng.randrange(6))}).encode()
    match rng.randrange(8):
        case 0:
            return body[: rng.randrange(len(body) + 1)]
        case 1:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        case 2:
            return b"[" * rng.choice([10, 20_000])
        case 3:
            return b'{"limit": NaN, "temperature": -Infinity}'
    return body


def send_no_http(url: str, rng: random.Random) -> bytes:
    """Sends bytes that are no request, and returns what came back before the server closed or 2 s passed."""
    address = urlsplit(url)
    lines = [
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/adapters HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"\x16\x03\x01\x00",
    ]
    lines += [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"GET /" + b"a" * 70_000 + b"\r\n\r\n"]
    lines += [bytes(rng.randrange(256) for _ in range(rng.randrange(1, 300)))]
    with socket.create_connection((address.hostname, address.port), timeout=2) as connection:
        try:
            connection.sendall(rng.choice(lines))
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(65536)
        except OSError:  # it has hung up, or waits for the rest
            return b""


def measure(cfg: "FuzzSettings") -> Row:
    rng, statuses, mistakes = random.Random(cfg.seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="hypernet-") as folder:
        arguments = ["-m", "hypernet", "serve", "--model", cfg.checkpoint, "--directory", folder]
        with ServerProcess([*arguments, "--name", "tiny", "--max-new-tokens", "16"]) as server:
            started = time.perf_counter()
            with httpx.Client(base_url=server.url, timeout=120) as client:
                for number in range(cfg.requests):
                    if number % 20 == 19:
                        answered = send_no_http(server.url, rng)
                        statuses["no HTTP"] += 1
                        if b"Traceback" in answered or answered.startswith(b"HTTP/1.1 5"):
                            mistakes["an answer to what is no HTTP"] += 1
                        continue
                    response = client.request(**any_request(rng)._asdict())
                    statuses[str(response.status_code)] += 1
                    if mistake := mistake_in(response, directory=folder):
                        mistakes[mistake] += 1
                healthy = client.get("/healthz").json()["status"] == "ok"
            seconds = time.perf_counter() - started
            printed = server.stop()
    return {
        **{"kind": "fuzz", "requests": cfg.requests, "seconds": seconds, "statuses": dict(sorted(statuses.items()))},
        **{"server_errors": sum(n for status, n in statuses.items() if status.startswith("5"))},
        **{"mistakes": dict(mistakes), "tracebacks_in_the_log": printed.count("Traceback"), "healthy": healthy},
    }


class FuzzSettings(Settings):
    checkpoint: Text
    requests: Count
    seed: Number
    output: OutputFile | None


SCRIPT = Script("benchmarks.serving.fuzz", FuzzSettings)


@hydra.main(config_path="../../conf", config_name="serving_fuzz", version_base="1.3")
@SCRIPT
def main(cfg: FuzzSettings) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    show_and_write([row := measure(cfg)], cfg.output, config=cfg.model_dump())
    if row["server_errors"] or row["mistakes"] or row["tracebacks_in_the_log"] or not row["healthy"]:
        raise ValueError("A malformed request was not refused as it should be: see the figures above.")


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/serving_fuzz.yaml")
