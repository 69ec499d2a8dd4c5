"""ChunkMatch: questions and the chunks that answer them, against loops over single prompts."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from hypernet.adapters.joining import prompt_inputs
from hypernet.base.packed_rows import question_places
from hypernet.data.batches import DistillationBatches
from hypernet.data.records import Question
from hypernet.data.splitting import StepPart
from hypernet.model.closeness import Closeness, fit_closeness
from hypernet.training import lit_doc_to_lora
from hypernet.training.lit_doc_to_lora import LitDocToLoRA
from hypernet.training.losses import ChunkMatch, WeightL1
from tests.recited_model import calibrated_model

DOCUMENTS = (
    "Velmar Tosk was born in Korvale. The capital of Norbach is Ilda. Her employer is the Orrin Institute.",
    "Mira Solen works for Tarn. The river Aske flows through Belmont.",
    "Jon Varga was born in 1921. He lives in 1921 rooms.",
)
ASKED = (
    [Question("What is the capital of Norbach?", "Ilda"), Question("Who employs her?", "Orrin Institute")],
    [Question("Where does the Aske flow?", "Belmont"), Question("Is it late?", "unknown", kind="background")],
    [Question("When was he born?", "1921")],  # in two chunks
)
CHUNKS = [[1, 2], [1], [None]]


@pytest.fixture
def model():
    reader = {"width": 32, "num_blocks": 1, "dropout": 0.0}
    model = calibrated_model(DOCUMENTS, key_dim=48, key_reader=reader)
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def batch(model, documents=DOCUMENTS, asked=ASKED):
    batches = DistillationBatches(
        None,
        model.tokenizer,
        max_chunk_tokens=model.max_chunk_tokens,
        frame=model.context_encoder.frame(model.tokenizer),
        min_chunk_tokens=model.context_encoder.min_chunk_tokens,
    )
    return batches.batch(documents, asked)


def test_the_questions_own_tokens_are_found_in_packed_rows(model):
    rows = batch(model).student
    before, after = model.around_question
    places = question_places(rows, before=before, after=after)
    found = [model.tokenizer.decode([int(rows.ids[row, c]) for c in columns]).strip() for row, columns, _ in places]
    assert found == [question.text for asked in ASKED for question in asked]
    assert [row for row, _, _ in places] == [0, 0, 1, 1, 2]
    for row, _, first in places:
        assert rows.target_kind[row, first] >= 0 and rows.target_kind[row, first - 1] < 0


@pytest.mark.parametrize(("among_all", "apart"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.7)])
def test_chunk_match_equals_loops_over_single_prompts(model, among_all, apart):
    term = ChunkMatch(
        weight=1.0,
        sharpness=2.0,
        among_all=among_all,
        closeness=apart,
        closeness_bound=0.3,
        closeness_sharpness=5.0,
    )
    module = LitDocToLoRA(model=model, objective={"match": term}, optimizer={})
    got = module.training_step(StepPart.of(batch(model)), 0)
    recitation = model.hypernetwork.recitation
    adapters = [model.internalize(text).A["down_proj"] for text in DOCUMENTS]
    everything, first, expected = torch.cat(adapters), 0, []
    before, after = model.around_question
    for own, asked, chunks in zip(adapters, ASKED, CHUNKS, strict=True):
        losses = []
        for question, chunk in zip(asked, chunks, strict=False):
            if chunk is None:
                continue
            prompts = model.layout.prompt_ids(model.tokenizer, [question.text])
            with torch.no_grad():
                inputs = prompt_inputs(model.base_model, model.hypernetwork.targets, prompts, layers=2)
            place = torch.arange(len(prompts[0]))
            is_own = ((place >= before) & (place < len(place) - after))[None]
            among_own = 2.0 * recitation.match(inputs, is_own, own)[0][0]
            among = 2.0 * recitation.match(inputs, is_own, everything)[0][0]
            loss = -among_own.log_softmax(0)[chunk] - among_all * among.log_softmax(0)[first + chunk]
            near = [5.0 * (recitation.match(inputs, is_own, one)[1][0] - 0.3) for one in adapters]
            others = [(1 + value.exp()).log() for one, value in zip(adapters, near, strict=True) if one is not own]
            (mine,) = [(1 + (-value).exp()).log() for one, value in zip(adapters, near, strict=True) if one is own]
            losses.append(loss + apart * (mine + torch.stack(others).mean()))
        expected += [torch.stack(losses).mean()] if losses else []  # a document without such a question is left out
        first += len(own)
    torch.testing.assert_close(got.detach(), torch.stack(expected).mean().detach(), rtol=1e-3, atol=1e-4)


def test_chunk_match_trains_what_finds_and_nothing_else(model):
    module = LitDocToLoRA(model=model, objective={"match": ChunkMatch(weight=1.0)}, optimizer={})
    module.training_step(StepPart.of(batch(model)), 0).backward()
    recitation = model.hypernetwork.recitation
    for name, parameter in recitation.named_parameters():
        trained = name.startswith(("key_reader.", "key_maps", "token_weights", "log_key_gain"))
        if trained and name != "key_reader.places":
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        elif not trained:
            assert parameter.grad is None or not parameter.grad.any(), name


def asked_alone(model, question, document) -> float:
    """Closeness of a question to a document's own adapter, from a prompt by itself."""
    (prompt,) = model.layout.prompt_ids(model.tokenizer, [question])
    inputs = prompt_inputs(model.base_model, model.hypernetwork.targets, [prompt], layers=2)
    place, (before, after) = torch.arange(len(prompt)), model.around_question
    mine = ((place >= before) & (place < len(prompt) - after))[None]
    return model.hypernetwork.recitation.match(inputs, mine, model.internalize(document).A["down_proj"])[1].item()


@pytest.mark.parametrize("closeness", [None, {"hidden": 4}])
def test_training_ends_with_a_bound_that_others_seldom_reach(model, closeness, monkeypatch):
    # The bound is that of whatever was fitted; 1,500 steps take 8 s.
    monkeypatch.setattr(lit_doc_to_lora, "fit_closeness", partial(fit_closeness, steps=100))
    recitation = model.hypernetwork.recitation
    if closeness is not None:
        recitation.closeness = Closeness(num_layers=2, key_dim=48, **closeness)
    module = LitDocToLoRA(model=model, objective={"match": ChunkMatch(weight=1.0)}, optimizer={})
    module.fit_closeness([batch(model)], [batch(model)])
    found = {"own": [], "other": []}
    for asked, own in zip(ASKED[:2], DOCUMENTS[:2], strict=True):  # the third has no question with one chunk
        question = asked[0].text
        found["own"].append(asked_alone(model, question, own))
        found["other"] += [asked_alone(model, question, other) for other in DOCUMENTS if other is not own]
    found["own"].append(asked_alone(model, ASKED[0][1].text, DOCUMENTS[0]))
    found["other"] += [asked_alone(model, ASKED[0][1].text, other) for other in DOCUMENTS[1:]]
    allowed = [value for value in found["own"] if value > max(found["other"])]
    want = min(allowed) if allowed else max(found["own"] + found["other"])
    assert recitation.min_match.item() == pytest.approx(want, abs=1e-4)
    assert closeness is None or recitation.closeness.common_weight.any()


def test_closeness_is_fitted_to_messages_about_no_document_too(model, monkeypatch):
    model.hypernetwork.recitation.closeness = Closeness(num_layers=2, key_dim=48, hidden=4)
    module = LitDocToLoRA(model=model, objective={"match": ChunkMatch(weight=1.0)}, optimizer={})
    monkeypatch.setattr(lit_doc_to_lora, "written_messages", lambda engine, number: ["Hello there", "What is love?"])
    own, none = module._asked([batch(model)])
    assert sorted(own.row.unique().tolist()) == [0, 1] and none.row.tolist() == [-1, -1]
    assert none.chunk_counts == own.chunk_counts and none.best.shape[-1] == sum(own.chunk_counts)
    asked_texts = random.Random(0).sample(["Hello there", "What is love?"], 2)
    A = torch.cat([model.internalize(document).A["down_proj"] for document in DOCUMENTS])
    for text, best, weight in zip(asked_texts, none.best, none.weight, strict=True):
        inputs, asked = model.read_questions(model.layout.prompt_ids(model.tokenizer, [text]))
        want, own_weight, _ = model.hypernetwork.recitation.compared(inputs, asked, A)
        length = asked.shape[1]
        torch.testing.assert_close(best[:length] * asked[0, :, None], want[0] * asked[0, :, None], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(weight[:length], own_weight[0], atol=1e-4, rtol=1e-3)


def test_pieces_of_the_step_before_are_about_no_document(model, monkeypatch):
    model.hypernetwork.recitation.closeness = Closeness(num_layers=2, key_dim=48, hidden=4)
    module = LitDocToLoRA(model=model, objective={"match": ChunkMatch(weight=1.0)}, optimizer={})
    monkeypatch.setattr(lit_doc_to_lora, "written_messages", lambda engine, number: [])
    asked, find = [], module._found_by
    monkeypatch.setattr(module, "_found_by", lambda texts, *rest: (asked.append(texts), find(texts, *rest))[1])
    found = module._asked([batch(model), batch(model, DOCUMENTS[:2], ASKED[:2])])
    assert [(one.row < 0).all().item() for one in found] == [False, False, True]
    (pieces,) = asked
    assert len(pieces) == 3
    for piece, document in zip(pieces, DOCUMENTS, strict=True):
        assert piece and piece.replace(" ", "") in document.replace(" ", "")
    assert found[-1].chunk_counts == found[-2].chunk_counts


@pytest.mark.parametrize("given", [True, False])
def test_closeness_is_fitted_to_its_own_steps_where_given(model, monkeypatch, given):
    steps = ["a", "b", "c"] if given else None
    settings = {"objective": {"match": ChunkMatch(weight=1.0)}, "optimizer": {}, "closeness_steps": steps}
    module = LitDocToLoRA(model=model, **settings)
    data = SimpleNamespace(train=[str(step) for step in range(100)], validation=["v", "w"])
    monkeypatch.setattr(LitDocToLoRA, "trainer", SimpleNamespace(datamodule=data))
    monkeypatch.setattr(LitDocToLoRA, "writes_result", False)
    seen = []
    monkeypatch.setattr(module, "fit_closeness", lambda *steps: seen.append(steps))
    module.on_fit_end()
    ((train, validation),) = seen
    assert validation == ["v", "w"]
    assert train == steps if given else (train[0], train[-1], len(train)) == ("0", "99", 40)


def test_other_documents_are_of_another_batch_where_there_is_one(model):
    module = LitDocToLoRA(model=model, objective={"match": ChunkMatch(weight=1.0)}, optimizer={})
    seen = []
    recitation = model.hypernetwork.recitation
    find = recitation.compared
    recitation.compared = lambda inputs, asked, A: (seen.append(A), find(inputs, asked, A))[1]
    module.fit_closeness([], [batch(model), batch(model, DOCUMENTS[:2], ASKED[:2])])
    first, second, third = (model.internalize(text).A["down_proj"][:, :2] for text in DOCUMENTS)
    one, other = torch.cat([first, second, third]), torch.cat([first, second])
    # Each batch's own chunks, and then those of the other batch.
    for got, want in zip(seen, (one, other, other, one), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_chunk_match_needs_a_recitation(make_doc_to_lora):
    module = LitDocToLoRA(model=make_doc_to_lora(), objective={"match": ChunkMatch(weight=1.0)}, optimizer={})
    model = module.model
    batches = DistillationBatches(None, model.tokenizer, max_chunk_tokens=model.max_chunk_tokens)
    with pytest.raises(ValueError, match="Leave objective.match out"):
        module.training_step(StepPart.of(batches.batch(DOCUMENTS, ASKED)), 0)


def test_chunk_match_beside_another_term_makes_every_layer(model):
    objective = {"match": ChunkMatch(weight=1.0), "l1": WeightL1(weight=0.1)}
    module = LitDocToLoRA(model=model, objective=objective, optimizer={})
    module.training_step(StepPart.of(batch(model)), 0).backward()
    assert model.hypernetwork.recitation.values.grad.any()
