"""benchmarks.serving.engines: what the server is compared with gives the server's own answers."""

from pathlib import Path

import pytest
import torch

from benchmarks.serving.engines import ENGINES, endless
from hypernet.doc_to_lora import DocToLoRA
from hypernet.serving.engine import Generation, Sampling

ROOT = Path(__file__).parents[3]
DOCUMENTS = [(ROOT / f"examples/{name}.txt").read_text("utf-8") for name in ("fenda_elfax", "corbaford")]
QUESTIONS = ["Who was the teacher of Fenda Elfax?", "Who is the mayor of Corbaford?"]


@pytest.fixture(scope="module")
def model():
    return DocToLoRA.from_pretrained(ROOT / "assets/tiny").eval().requires_grad_(False)


def answers(engine, model, *, adapters, documents) -> list[list[int]]:
    """Token ids of the answers; sequences join while others run."""
    prompts = [ids for ids in model.layout.prompt_ids(model.tokenizer, QUESTIONS, documents)]
    waiting = [
        Generation(prompt=ids, sampling=Sampling(max_new_tokens=5 + place), emit=lambda delta: None, adapter=adapter)
        for place, (ids, adapter) in enumerate(list(zip(prompts, adapters, strict=True)) * 3)
    ]
    everything = list(waiting)
    with torch.no_grad():
        while waiting or engine.running:
            arrivals = [waiting.pop(0) for _ in range(min(2, engine.room, len(waiting)))]
            engine.admit(arrivals)
            engine.step()
    return [one.ids for one in everything]


@pytest.mark.parametrize("name", ["merging", "kept_prefix"])
def test_other_engine_gives_the_same_answers(model, name):
    weights = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    with torch.no_grad():
        joined = [model.joined(model.internalize(text)) for text in DOCUMENTS] if name == "merging" else [None, None]
    documents = [None, None] if name == "merging" else DOCUMENTS
    ours, other = (endless(one, model, max_batch=4) for one in ("ours", name))
    expected = answers(ours, model, adapters=joined, documents=documents)
    assert answers(other, model, adapters=joined, documents=documents) == expected
    assert len({*map(tuple, expected)}) > 2 and [len(ids) for ids in expected] == [5, 6, 7, 8, 9, 10]
    assert all(torch.equal(value, weights[key]) for key, value in model.base_model.state_dict().items())
    if name == "kept_prefix":
        assert other.num_hits == 4  # of six: the first of each document was read


def test_kept_prompts_stay_few(model):
    engine = ENGINES["kept_prefix"](model, max_batch=4, max_kept=1)
    answers(engine, model, adapters=[None, None], documents=DOCUMENTS)
    assert len(engine._kept) == 1
