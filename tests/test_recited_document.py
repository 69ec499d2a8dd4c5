"""A document that the tiny base model is made to say: cut by sentence, found by what is asked, in answers alone."""

import numpy as np
import pytest
import torch

from hypernet.doc_to_lora import DocToLoRA
from tests.recited_model import DOCUMENT, OTHERS, QUESTION, recited_model


@pytest.fixture(scope="module")
def model():
    return recited_model()


def test_a_document_is_cut_by_sentence(model):
    assert [DOCUMENT[a:b].strip() for a, b in model.chunk(DOCUMENT).spans] == [
        "Velmar Tosk was born in Korvale.",
        "The capital of Norbach is Ilda.",
        "Her employer is the Orrin Institute.",
    ]


def test_the_sentence_that_is_asked_for_is_said_word_for_word(model):
    adapter = model.internalize(DOCUMENT)
    assert model.routing_scores([QUESTION], adapter).argmax().item() == 1
    said = "The capital of Norbach is Ilda."
    assert model.generate([QUESTION], adapter, max_new_tokens=24) == [said]
    others = model.generate([QUESTION] * 2, [None, model.internalize(OTHERS)], max_new_tokens=24)
    assert said not in others


def test_a_saved_model_says_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", include_base_model=True)
    again = DocToLoRA.from_pretrained(tmp_path / "checkpoint")
    want = model.generate([QUESTION], model.internalize(DOCUMENT), max_new_tokens=24)
    assert again.generate([QUESTION], again.internalize(DOCUMENT), max_new_tokens=24) == want


def test_documents_joined_are_asked_as_each_alone(model):
    both = model.internalize([OTHERS, DOCUMENT])
    assert model.generate([QUESTION], both, max_new_tokens=24) == ["The capital of Norbach is Ilda."]


def test_a_question_that_is_not_close_is_the_base_models(model):
    adapter = model.internalize(DOCUMENT)
    plain = model.generate([QUESTION], None, max_new_tokens=8)
    recitation = model.hypernetwork.recitation
    try:
        recitation.min_match.fill_(1.01)
        assert model.generate([QUESTION], adapter, max_new_tokens=8) == plain
    finally:
        recitation.min_match.zero_()


def test_prompts_are_read_by_the_plain_base_model(model):
    """What is said changes; the keys and values of the prompt do not."""
    (prompt,) = model.layout.prompt_ids(model.tokenizer, [QUESTION])
    ids = torch.tensor([prompt])
    with torch.no_grad():
        plain = model.base_model(ids, use_cache=True)
        with model.using(model.internalize(DOCUMENT), prompts=[prompt]):
            said = model.base_model(ids, use_cache=True)
    for one, other in zip(plain.past_key_values, said.past_key_values, strict=True):
        for part, changed in zip(one[:2], other[:2], strict=True):
            assert torch.equal(part[:, :, :-1], changed[:, :, :-1])
    assert torch.equal(plain.logits[:, :-1], said.logits[:, :-1])
    assert not torch.equal(plain.logits[:, -1], said.logits[:, -1])


def test_a_server_says_the_same(model, tmp_path):
    from fastapi.testclient import TestClient

    from hypernet.serving.app import create_app
    from hypernet.serving.state import ServerSettings

    settings = ServerSettings(directory=str(tmp_path / "data"), max_new_tokens=24)
    with TestClient(create_app(model, settings), base_url="http://127.0.0.1") as client:
        for text in (OTHERS, DOCUMENT):
            stored = client.post("/v1/adapters", json={"document": text, "name": f"{len(text)}.txt"}).json()
        body = {"model": f"tiny:{stored['id']}", "messages": [{"role": "user", "content": QUESTION}]}
        answer = client.post("/v1/chat/completions", json=body).json()
        plain = client.post("/v1/chat/completions", json=body | {"model": "tiny"}).json()
    said = [one["choices"][0]["message"]["content"] for one in (answer, plain)]
    assert said == ["The capital of Norbach is Ilda.", model.generate([QUESTION], max_new_tokens=24)[0]]


def test_a_memory_says_the_same_and_leaves_what_is_far(model, tmp_path):
    from hypernet.memory.bank import AdapterBank
    from hypernet.memory.embedding import LazyModel
    from hypernet.memory.store.records import Draft, Filters
    from hypernet.memory.store.token_store import TokenStore

    store, alice = TokenStore(tmp_path / "memory"), Filters("alice")
    try:
        refs = store.add([Draft(text=text, filters=alice) for text in (OTHERS, DOCUMENT)])
        bank = AdapterBank(store, LazyModel(model), dtype="float32")
        bank.write()
        held = bank.held(alice)
        everything = np.ones(len(held.refs), bool)
        (choice,) = bank.choose([QUESTION], held, [everything])
        assert choice.refs == (str(refs[1]),) and choice.adapter.num_chunks == 1
        assert model.generate([QUESTION], choice.adapter, join="sum", max_new_tokens=24) == [
            "The capital of Norbach is Ilda."
        ]
        model.hypernetwork.recitation.min_match.fill_(1.01)
        assert bank.choose([QUESTION], held, [everything]) == [(None, ())]
    finally:
        model.hypernetwork.recitation.min_match.zero_()
        store.close()


def test_a_command_asks_it_and_says_how_it_is_used(model, tmp_path, commands):
    model.save_pretrained(tmp_path / "checkpoint", include_base_model=True)
    (tmp_path / "text.txt").write_text(DOCUMENT, encoding="utf-8")
    arguments = [
        f"checkpoint={tmp_path / 'checkpoint'}",
        f"document={tmp_path / 'text.txt'}",
        f"output_dir={tmp_path / 'adapter'}",
        f'ask="{QUESTION}"',
    ]
    result = commands.run("generate_adapter.py", arguments, cwd=tmp_path)
    assert result.code == 0, result.output
    assert "The capital of" in result.stdout
    assert "in answers alone, for each question the chunk" in result.output and "PeftModel" not in result.output
