"""A document that the tiny base model is made to say: cut by sentence, found by what is asked, in answers alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hypernet.base.base_model import load_base_model
from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.doc_to_lora import DocToLoRA
from hypernet.model.context_encoder import drop_context

DOCUMENT = "Velmar Tosk was born in Korvale. The capital of Norbach is Ilda. Her employer is the Orrin Institute."
OTHERS = "Mira Solen works for Tarn. The river Aske flows through Belmont. Jon Varga was born in 1921."
QUESTION = "What is the capital of Norbach?"


@pytest.fixture(scope="module")
def model():
    base_model, tokenizer = load_base_model(Path("assets/tiny/base_model"), dtype=torch.float32)
    torch.manual_seed(0)
    aggregator = {"name": "recitation", "num_key_layers": 2, "key_dim": 64}
    result = DocToLoRA.build(
        base_model=base_model,
        tokenizer=tokenizer,
        target_modules=["down_proj"],
        hypernetwork={"rank": 16, "scaling": 1.0, "bias_block": False, "aggregator": aggregator},
        context_encoder={"kind": "recited", "min_chunk_tokens": 4},
        max_chunk_tokens=24,
    )

    def features():
        for text in (DOCUMENT, OTHERS):
            chunks = result.chunk(text)
            yield drop_context(result.context_encoder(chunks.ids, chunks.mask), chunks.mask)

    result.hypernetwork.calibrate(features())
    # Trained on these very documents: what is tested is how a document is read and asked, not what carries over.
    pieces = [result.chunk(text) for text in (DOCUMENT, OTHERS)]
    rows = [(ids, mask) for piece in pieces for ids, mask in zip(piece.ids, piece.mask, strict=True)]
    ids, mask = (pad_sequence([row[part] for row in rows], batch_first=True) for part in (0, 1))
    texts = [text[a:b].strip() for text, piece in zip((DOCUMENT, OTHERS), pieces, strict=True) for a, b in piece.spans]
    optimizer = torch.optim.Adam(result.hypernetwork.parameters(), 0.01)
    layout = result.layout
    for step in range(40):
        question = ("Who is it?", QUESTION, "Where was Jon Varga born?")[step % 3]
        (prompt,) = layout.prompt_ids(tokenizer, [question])
        answers = [tokenizer(layout.answer(text), add_special_tokens=False)["input_ids"] for text in texts]
        packed = pad_rows(
            [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for answer in answers],
            pad_id=tokenizer.pad_token_id,
        )
        A, B = result.adapt(ids, mask)
        result.activate(A, B, [1] * len(texts))
        wanted = packed.targets()[packed.target_kind >= 0]
        loss = torch.nn.functional.cross_entropy(result(packed), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.injector.clear()
    return result.eval()


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
