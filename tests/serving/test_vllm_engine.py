"""`hypernet serve --engine vllm` against a stand-in for vLLM (tests/stand_ins/vllm): our engine's answers."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.serving.process import ROOT, ServerProcess
from hypernet.adapters.joining import Joining
from hypernet.serving.engine import BatchEngine, Generation, Sampling
from hypernet.serving.vllm_engine import VLLMEngine, vllm_engine

STAND_INS = str(Path(__file__).parents[1] / "stand_ins")
DOCUMENTS = {
    "person.txt": (ROOT / "examples/fenda_elfax.txt").read_text(encoding="utf-8"),
    "town.txt": (ROOT / "examples/corbaford.txt").read_text(encoding="utf-8"),
    "note.txt": "The lighthouse of Norbach hums in a storm.",
}
QUESTIONS = ["Who was the teacher of Fenda Elfax?", "Who is the mayor of Corbaford?", "What is the capital of France?"]


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, as `import vllm` finds it."""
    monkeypatch.syspath_prepend(STAND_INS)
    import vllm

    assert vllm.__file__.startswith(STAND_INS)
    yield vllm
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model():
    from hypernet.doc_to_lora import DocToLoRA

    return DocToLoRA.from_pretrained(ROOT / "assets/tiny").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapters(model):
    return {name: model.internalize(text) for name, text in DOCUMENTS.items()}


def generation(model, question, adapter=None, **sampling) -> Generation:
    deltas = []
    (prompt,) = model.layout.prompt_ids(model.tokenizer, [question])
    settings = Sampling(**({"max_new_tokens": 12} | sampling))
    one = Generation(prompt=prompt, sampling=settings, adapter=model.joined(adapter), emit=deltas.append)
    one.deltas = deltas
    return one


def finish(engine, generations) -> list[tuple[str, str]]:
    """Text and end of each, decoded together."""
    left = list(generations)
    while left or engine.running:
        arrivals, left = left[: engine.room], left[engine.room :]
        engine.admit(arrivals)
        engine.step()
    assert not any(delta.error for one in generations for delta in one.deltas)
    return [("".join(delta.text for delta in one.deltas), one.deltas[-1].finish) for one in generations]


# --- Over HTTP, started as a user starts it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("served"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", STAND_INS)
        arguments = ["-m", "hypernet", "serve", "--engine", "vllm", "--directory", folder, "--max-loras", "2"]
        process = ServerProcess(arguments)
    with process as found:
        yield found


def test_vllm_answers_over_http_are_those_of_our_engine(server, model, adapters):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for name, text in DOCUMENTS.items():
        httpx.post(f"{server.url}/v1/adapters", json={"document": text, "name": name}, timeout=60).raise_for_status()
    pairs = [(name, question) for name in (None, *DOCUMENTS) for question in QUESTIONS]
    expected = [model.generate([question], [name and adapters[name]])[0] for name, question in pairs]
    assert len(set(expected)) > 3

    def asked(pair, **settings):
        messages = [{"role": "user", "content": pair[1]}]
        named = "tiny" if pair[0] is None else f"tiny:{pair[0]}"
        return client.chat.completions.create(model=named, messages=messages, max_tokens=32, **settings)

    with ThreadPoolExecutor(6) as pool:
        assert [found.choices[0].message.content for found in pool.map(asked, pairs)] == expected
    stream = asked(pairs[3], stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(parts) > 2 and "".join(parts) == expected[3]


def test_vllm_answers_from_a_users_memory(server):
    """The adapters that a question is routed to are weighted into one LoRA of its own, or their texts are asked."""
    body = {"content": "Fenda Elfax was born in Gronmaburg."}
    httpx.post(f"{server.url}/v1/memories", json=body).raise_for_status()
    httpx.post(f"{server.url}/v1/memories/write_adapters", timeout=60).raise_for_status()
    for tier in ("token", "adapter"):
        body = {"question": "In which place was Fenda Elfax born?", "tier": tier}
        found = httpx.post(f"{server.url}/v1/memories/ask", json=body, timeout=60).json()
        assert (found["text"], found["tier"]) == ("Gronmaburg", tier)


def test_without_vllm_one_line_names_the_package(commands, tmp_path):
    done = commands.run("hypernet", ["serve", "--engine", "vllm", "--model", "no/such/model"], cwd=tmp_path)
    assert done.code == 1
    assert done.stderr == "hypernet: --engine vllm needs the package vllm: pip install vllm.\n"


# --- The engine -----------------------------------------------------------------------------------------------------


def test_vllm_texts_ends_and_logprobs_are_our_engines(vllm, model, adapters):
    settings = [{}, {"max_new_tokens": 3}, {"stop": ("or",)}, {"logprobs": 2}, {"logprobs": 0}]
    asked = [
        (question, adapter, more)
        for question in QUESTIONS
        for adapter in (None, adapters["person.txt"])
        for more in settings
    ]
    found = []
    for engine in (BatchEngine(model, max_batch=4), vllm_engine(max_loras=1)(model, max_batch=4)):
        made = [generation(model, question, adapter, **more) for question, adapter, more in asked]
        for one in made:
            engine.check(one)
        found.append((finish(engine, made), made))
    (ours, mine), (theirs, others) = found
    assert theirs == ours and {end for _, end in ours} == {"stop", "length"}
    for one, other in zip(mine, others, strict=True):
        pairs = [[p for delta in each.deltas for p in delta.logprobs] for each in (one, other)]
        assert [p.text for p in pairs[0]] == [p.text for p in pairs[1]]
        for p, q in zip(*pairs, strict=True):
            assert q.logprob == pytest.approx(p.logprob, abs=1e-3)
            assert [text for text, _ in q.top] == [text for text, _ in p.top]


@pytest.mark.parametrize("max_loras", [1, 2])
def test_vllm_steps_hold_max_loras_adapters(vllm, model, adapters, max_loras):
    engine = vllm_engine(max_loras=max_loras)(model, max_batch=8)
    finish(engine, [generation(model, QUESTIONS[0], adapter) for adapter in [None, *adapters.values()] * 2])
    assert vllm.MADE[-1].most_loras == max_loras and not engine.running


def test_adapter_above_max_lora_rank_is_one_line(vllm, model, adapters):
    engine = vllm_engine(max_lora_rank=8)(model)
    with pytest.raises(ValueError, match=r"has rank \d+, and vLLM was started with at most 8.*--max-lora-rank") as told:
        engine.check(generation(model, "Who?", adapters["person.txt"]))
    assert "\n" not in str(told.value)


def test_modules_that_vllm_lacks_are_one_line(vllm, model, adapters, monkeypatch):
    monkeypatch.setattr(vllm, "_MODULES", {"q_proj"})
    engine = vllm_engine()(model)
    with pytest.raises(ValueError, match=r"^vLLM does not take the adapter: expected target modules .*down_proj$"):
        engine.check(generation(model, "Who?", adapters["note.txt"]))
    assert not list(Path(engine._folder.name).iterdir())


@pytest.mark.parametrize("settings", [{"max_lora_rank": 24}, {"max_lora_rank": 0}, {"max_loras": 0}])
def test_settings_that_vllm_lacks_are_refused(vllm, settings):
    with pytest.raises(ValueError, match=r"^max_lora\w+ is \d+\. .*[Gg]ive"):
        vllm_engine(**settings)


@pytest.mark.parametrize("way", ["gate", "route"])
def test_vllm_refuses_a_joining_that_is_no_one_lora(vllm, model, monkeypatch, way):
    monkeypatch.setattr(model, "trained_joining", Joining(way))
    with pytest.raises(ValueError, match=f"chunks are joined by {way}. Serve it with --engine hypernet"):
        VLLMEngine(model)


def test_adapter_leaves_vllm_and_disk_when_unused(vllm, model):
    engine = vllm_engine()(model)
    adapter = model.internalize("Norbach was founded by Ilda Renwick.")
    finish(engine, [generation(model, "Who founded Norbach?", adapter)])
    folder = Path(engine._folder.name)
    assert vllm.MADE[-1].list_loras() and list(folder.iterdir())
    finish(engine, [generation(model, "Who?")])
    assert vllm.MADE[-1].list_loras()  # still held by `adapter`
    del adapter
    gc.collect()
    assert not list(folder.iterdir())
    finish(engine, [generation(model, "Who?")])
    assert not vllm.MADE[-1].list_loras()


def test_cancelled_sequence_leaves_vllm(vllm, model, adapters):
    engine = vllm_engine()(model)
    one, other = (generation(model, QUESTIONS[0], a, max_new_tokens=50) for a in (None, adapters["person.txt"]))
    engine.admit([one, other])
    engine.step()
    one.cancelled = True
    engine.step()
    assert engine.running == [other] and [r.lora is not None for r in vllm.MADE[-1].running] == [True]
    assert engine.clear() == [other] and not engine.running and not vllm.MADE[-1].has_unfinished_requests()


def test_request_that_vllm_refuses_ends_alone(vllm, model):
    engine = vllm_engine()(model)
    bad, good = generation(model, "Who?", logprobs=21), generation(model, QUESTIONS[2])
    engine.admit([bad, good])
    assert "max_logprobs" in str(bad.deltas[-1].error) and engine.running == [good]
    assert finish(engine, []) == [] and good.deltas[-1].finish
