"""benchmarks.serving.load: what users send, what comes of the times, and requests to a real address."""

import asyncio
import time
from functools import partial

import httpx
import pytest
from transformers import AutoTokenizer

from benchmarks.serving.engines import endless
from benchmarks.serving.load import WAYS, documents, drive, markdown, request_of, summary
from benchmarks.serving.process import ROOT
from hypernet.doc_to_lora import DocToLoRA
from hypernet.serving.app import create_app
from hypernet.serving.state import ServerSettings
from tests.served import served


@pytest.fixture(scope="module")
def asked():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny/base_model")
    return tokenizer, documents(tokenizer, num_users=3, num_tokens=150, seed=0)


def test_each_user_has_another_document_that_fits(asked):
    tokenizer, found = asked
    assert len({one.document for one in found}) == len({one.user for one in found}) == 3
    sizes = [len(tokenizer(one.document)["input_ids"]) for one in found]
    assert max(sizes) <= 150 and min(sizes) > 60 and all(one.questions for one in found)


def test_document_stands_in_the_prompt_or_is_named(asked):
    one = asked[1][0]
    for way in WAYS:
        body = request_of(way, one, one.questions[0], answer_tokens=4)["json"]
        in_prompt = one.document in body["messages"][0]["content"]
        assert in_prompt == (body["model"] == "model") == (way in ("document", "kept prefix"))


def test_too_few_tokens_for_a_document_is_one_line(asked):
    with pytest.raises(ValueError, match="document_tokens=5 holds no article of the encyclopedia"):
        documents(asked[0], num_users=1, num_tokens=5, seed=0)


def test_summary_is_the_median_of_the_repeats():
    row = summary("merged", 2, [([0.1, 0.3], 0.4), ([0.2, 0.2], 0.2), ([1.0, 1.0], 1.0)], 8)
    assert (row["requests_per_s"], row["requests_per_s_low"], row["requests_per_s_high"]) == (5, 2, 10)
    assert (row["p50_ms"], row["tokens_per_s"]) == (200, 40)
    rows = [{"model": "tiny", "document_tokens": 9, **row}, {"model": "tiny", "document_tokens": 9, **row}]
    rows[1]["way"], rows[1]["requests_per_s"] = "kept prefix", 2.5
    assert "| 2 users, merged | 5 | 160 | – | 2 | 200 | 298 |" in markdown(rows)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The shipped model served by a thread of this process."""
    settings = ServerSettings(directory=str(tmp_path_factory.mktemp("load")), model_name="model")
    model = DocToLoRA.from_pretrained(ROOT / "assets/tiny").eval().requires_grad_(False)
    app = create_app(model, settings, engine=partial(endless, "ours"))
    with served(app) as address:
        yield address


def test_every_request_of_every_user_is_answered_and_timed(asked, address):
    found = asked[1]
    for one in found:
        body = {"document": one.document, "name": "document.txt"}
        httpx.post(f"{address}/v1/adapters", json=body, headers={"X-User": one.user}, timeout=60).raise_for_status()
    requests = [[request_of("own adapters", one, q, answer_tokens=3) for q in one.questions] for one in found]
    before = time.perf_counter()
    seconds, total = asyncio.run(drive(address, requests, total=7))
    assert len(seconds) == 7 and max(seconds) <= total <= time.perf_counter() - before
    answer = httpx.post(f"{address}/v1/chat/completions", **requests[0][0], timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(drive(address, [[{"json": {}}]], total=1))
    assert "ended with 400" in str(raised.value.exceptions[0])
