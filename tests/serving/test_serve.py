"""`hypernet serve` in a process of its own: OpenAI's client, many users at once, clients that leave, and its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.serving.process import ROOT, ServerProcess
from hypernet.memory.memory import Memory
from hypernet.serving.app import serve
from hypernet.serving.state import ServerSettings

DOCUMENTS = {
    "person.txt": (ROOT / "examples/fenda_elfax.txt").read_text(encoding="utf-8"),
    "town.txt": (ROOT / "examples/corbaford.txt").read_text(encoding="utf-8"),
}
QUESTIONS = [
    "Who was the teacher of Fenda Elfax?",
    "In which place was Fenda Elfax born?",
    "Who is the mayor of Corbaford?",
    "What is the capital of France?",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with ServerProcess(["-m", "hypernet", "serve", "--directory", str(folder), "--max-queue", "64"]) as found:
        found.folder = folder
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def adapters(server):
    """Each document's adapter, made over HTTP; document name → id."""
    ids = {}
    for name, document in DOCUMENTS.items():
        made = httpx.post(f"{server.url}/v1/adapters", json={"document": document, "name": name}, timeout=60)
        ids[name] = made.json()["id"]
    return ids


@pytest.fixture(scope="module")
def expected():
    """(document name or None, question) → what the library answers in this process."""
    from hypernet.doc_to_lora import DocToLoRA
    from hypernet.text.documents import Document

    model = DocToLoRA.from_pretrained(ROOT / "assets/tiny")
    made = {name: model.internalize(Document(name, text, "0" * 64)) for name, text in DOCUMENTS.items()}
    pairs = [(name, question) for name in (None, *DOCUMENTS) for question in QUESTIONS]
    answers = [model.generate([question], [name and made[name]])[0] for name, question in pairs]
    return dict(zip(pairs, answers, strict=True))


def ask(client, question: str, name: str | None = None, **settings):
    model = "tiny" if name is None else f"tiny:{name}"
    settings = {"max_tokens": 32} | settings
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **settings)


def test_concurrent_users_get_the_librarys_answers(server, client, adapters, expected):
    """48 requests at once, of three models in one batch, and each answer is the one of that document alone."""
    assert len(set(expected.values())) > 4
    pairs = list(expected) * 4
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda pair: ask(client, pair[1], pair[0]).choices[0].message.content, pairs)
        assert list(found) == [expected[pair] for pair in pairs]
    values = dict(re.findall(r"^hypernet_(\w+) ([0-9.]+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE))
    # Tokens after the first ones of each answer, and the steps that they took: more than two a step.
    assert float(values["completion_tokens_total"]) - len(pairs) > 2 * float(values["decode_steps"])


def test_streamed_answer_is_the_whole_one_in_parts(client, adapters, expected):
    question = QUESTIONS[0]
    chunks = list(ask(client, question, "person.txt", stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(parts) > 2 and "".join(parts) == expected["person.txt", question]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    whole = ask(client, question, "person.txt")
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens > 2


def test_completion_with_logprobs_seed_and_stop(client):
    settings = {"model": "tiny", "prompt": "Fenda Elfax was", "max_tokens": 8, "temperature": 1.0, "seed": 4}
    one, two = (client.completions.create(**settings, logprobs=2).choices[0] for _ in range(2))
    assert one.text == two.text and len(one.logprobs.token_logprobs) == 8
    assert all(value <= 0 for value in one.logprobs.token_logprobs)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))
    assert streamed == one.text
    stop = one.text[3:6]
    stopped = client.completions.create(**settings, stop=[stop]).choices[0]
    assert stopped.text == one.text[: one.text.find(stop)] and stopped.finish_reason == "stop"
    top = ask(client, QUESTIONS[3], logprobs=True, top_logprobs=3).choices[0].logprobs.content[0]
    assert top.logprob == pytest.approx(top.top_logprobs[0].logprob) and len(top.top_logprobs) == 3


def test_conversation_of_several_turns_is_answered(client):
    turns = [("user", QUESTIONS[3]), ("assistant", "Paris"), ("user", "What is the capital of Italy?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    alone = client.chat.completions.create(model="tiny", messages=messages[-1:], max_tokens=8)
    assert found.usage.prompt_tokens > alone.usage.prompt_tokens and found.choices[0].message.content


def test_each_users_memory_answers_that_user_alone(server, client):
    """`user` names whose memory is asked; each one's answer carries what only that user said."""
    towns = {"ann": "Gronmaburg", "ben": "Halvawold", "cara": "Norbach"}
    for user, town in towns.items():
        body = {"content": f"Fenda Elfax was born in {town}."}
        httpx.post(f"{server.url}/v1/memories", json=body, headers={"X-User": user}).raise_for_status()

    def answer(user: str):
        headers = {"X-Memory-Tier": "token"}
        return ask(client, "In which place was Fenda Elfax born?", "memory", user=user, extra_headers=headers)

    with ThreadPoolExecutor(6) as pool:
        for user, found in zip([*towns] * 4, pool.map(answer, [*towns] * 4), strict=True):
            assert found.model_extra["memory"]["tier"] == "token"
            text = found.choices[0].message.content
            assert not any(text == town for other, town in towns.items() if other != user)
            assert text[:4] == towns[user][:4]


def test_errors_are_those_of_openais_client(client):
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "?"}])
    with pytest.raises(openai.BadRequestError, match="does not fit"):
        ask(client, "word " * 900)


@pytest.mark.parametrize("stream", [False, True])
def test_sequence_of_a_client_that_left_leaves_the_batch(server, stream):
    def running() -> int:
        return httpx.get(f"{server.url}/healthz").json()["running"]

    body = {"model": "tiny", "prompt": "The", "max_tokens": 480, "temperature": 2.0, "seed": 1, "stream": stream}
    with httpx.Client(timeout=0.5) as http, pytest.raises(httpx.TimeoutException):
        with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            for _ in response.iter_raw():
                assert running() == 1
                raise httpx.ReadTimeout("enough")
    deadline = time.monotonic() + 10
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.05)


PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(sh|py)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_examples_of_the_page_run_and_print_what_it_says(server, tmp_path):
    """In their order, against this server; a comment `# -> text` is what the command or `print` above it prints."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert {language for language, _ in EXAMPLES} == {"sh", "py"}
    for language, block in EXAMPLES:
        code = block.replace("http://127.0.0.1:8000", server.url).replace("outputs/", f"{tmp_path}/")
        if "hypernet serve" in code:  # the server that runs; its options are those of the command
            continue
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for said in re.findall(r"# -> (.*)", block):
            assert said in done.stdout


def test_address_in_use_is_an_error_before_the_model_is_loaded(server, tmp_path):
    with pytest.raises(ValueError, match="Cannot listen at 127.0.0.1:.* Give another --port"):
        serve("no/such/checkpoint", ServerSettings(directory=str(tmp_path / "none")), port=server.port)
    assert not (tmp_path / "none").exists()


def test_stopping_keeps_every_acknowledged_write(server):
    """SIGTERM while four users write: what was answered with 201 is there. The last test of this server."""
    acknowledged, stop = {user: [] for user in "abcd"}, threading.Event()

    def write(user: str) -> None:
        with httpx.Client(timeout=30) as http:
            for number in range(10_000):
                if stop.is_set():
                    return
                try:
                    body = {"content": f"Note {number} of {user}."}
                    made = http.post(f"{server.url}/v1/memories", json=body, headers={"X-User": user})
                except httpx.TransportError:
                    return
                if made.status_code == 201:
                    acknowledged[user].append(made.json()["id"])

    threads = [threading.Thread(target=write, args=(user,)) for user in acknowledged]
    for thread in threads:
        thread.start()
    while min(map(len, acknowledged.values())) < 5:
        time.sleep(0.05)
    output = server.stop(signal.SIGTERM)
    stop.set()
    for thread in threads:
        thread.join()
    assert server.process.returncode == 0 and "Traceback" not in output
    kept = set()
    for folder in server.folder.glob("users/*/memory"):
        memory = Memory.open(folder, create=False)
        kept |= {(found.user_id, found.id) for found in memory.list()}
        memory.close()
    assert {(user, ref) for user, ids in acknowledged.items() for ref in ids} <= kept
