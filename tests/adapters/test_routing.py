"""routing: energies against a float64 loop, the choice, and what is refused; on the shipped model what it is worth."""

from pathlib import Path

import pytest
import torch

from benchmarks.metrics import exact_match
from hypernet.adapters.composition import take
from hypernet.adapters.routing import chunk_energies, last_inputs, routed
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.doc_to_lora import DocToLoRA

DOCUMENTS = (
    "The mayor of Velmar is Ilda Renwick. Velmar has 311 houses. The river Tosk flows through Velmar. " * 2,
    "Korvale was founded in 1788. Its colours are grey and red.",
)
QUESTIONS = ["Who leads Velmar?", "In which year was the old town of Korvale founded, and by whom?", "Which river?"]


def prompts_of(model, questions=QUESTIONS):
    return [model.tokenizer(model.layout.prompt(q), add_special_tokens=False)["input_ids"] for q in questions]


def energies_by_hand(model, adapter, ids):
    """One prompt, one chunk and one row at a time, in float64: [C]."""
    entering = {}
    modules = {place.path: (t.name, place.layer) for t in adapter.targets for place in t.modules()}
    hooks = [
        model.base_model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: entering.update({path: args[0][0, -1].double()})
        )
        for path in modules
    ]
    with torch.no_grad():
        model.base_model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    result = []
    for chunk in range(adapter.num_chunks):
        product = 1.0
        for path, (name, layer) in modules.items():
            rows = adapter.A[name][chunk, layer].double()
            product *= sum(float(row[: len(entering[path])] @ entering[path]) ** 2 for row in rows)
        result.append(product ** (1 / len(modules)))
    return result


@pytest.mark.parametrize("bias_block", [True, False])
def test_energies_are_those_of_a_loop_and_padding_changes_nothing(make_doc_to_lora, bias_block) -> None:
    model = make_doc_to_lora(bias_block=bias_block)
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    prompts = prompts_of(model)
    assert len({len(ids) for ids in prompts}) == 3
    energies = chunk_energies(model.base_model, adapter, prompts)
    assert energies.shape == (3, adapter.num_chunks) and adapter.num_chunks > 3
    expected = torch.tensor([energies_by_hand(model, adapter, ids) for ids in prompts])
    torch.testing.assert_close(energies, expected, rtol=1e-4, atol=1e-6)


def test_every_question_gets_its_loudest_chunks_weighted_and_in_the_document_s_order(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    energies = torch.full((2, adapter.num_chunks), 0.5)
    energies[0, [3, 1]] = torch.tensor([4.0, 1.0])
    energies[1, [0, 4]] = torch.tensor([3.0, 3.0])
    for sharpness, quieter in ((2.0, 1 / 16), (0.5, 1 / 2), (0.0, 1.0)):
        first, second = routed(adapter, energies, num_chunks=2, sharpness=sharpness)
        for chosen, chunks, weights in ((first, [1, 3], [quieter, 1.0]), (second, [0, 4], [1.0, 1.0])):
            for name in adapter.A:
                assert torch.equal(chosen.A[name], adapter.A[name][chunks])
                expected = adapter.B[name][chunks] * torch.tensor(weights).view(2, 1, 1, 1)
                torch.testing.assert_close(chosen.B[name], expected)
            assert chosen.rank == 2 * adapter.rank_per_chunk + adapter.bias_rank
    (everything,) = routed(adapter, energies[:1], num_chunks=99)
    assert everything.num_chunks == adapter.num_chunks
    with pytest.raises(ValueError, match="num_chunks of at least 1, got 0. Leave routing out"):
        routed(adapter, energies, num_chunks=0)
    with pytest.raises(ValueError, match="sharpness of at least 0, got -1"):
        routed(adapter, energies, sharpness=-1)


def test_chunks_that_answer_nothing_are_no_harm(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    for rows in adapter.A.values():
        rows[:] = 0
    energies = chunk_energies(model.base_model, adapter, prompts_of(model))
    assert energies.isfinite().all() and (energies > 0).all()
    assert all(a.num_chunks == 2 for a in routed(adapter, energies))
    empty = take(adapter, [])
    assert model.route(QUESTIONS, empty) == [empty] * 3


def test_a_chunk_whose_rows_are_the_question_s_own_inputs_is_found(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    inputs = last_inputs(model.base_model, adapter.targets, prompts_of(model))
    for chunk, question in ((2, 0), (0, 1), (3, 2)):
        for (name, layer), x in inputs.items():
            adapter.A[name][chunk, layer] = 0
            adapter.A[name][chunk, layer, 0, : x.shape[1]] = 1e3 * torch.linalg.pinv(x)[:, question]
    chosen = model.route(QUESTIONS, adapter, num_chunks=1)
    places = [
        [i for i in range(adapter.num_chunks) if torch.equal(adapter.A["down_proj"][i], c.A["down_proj"][0])]
        for c in chosen
    ]
    assert places == [[2], [0], [3]]


def test_routing_is_the_plain_model_s_whatever_is_in_force(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    before = model.route(QUESTIONS, adapter, documents=[DOCUMENTS[1], None, None])
    with model.injector.using(adapter):
        inside = model.route(QUESTIONS, adapter, documents=[DOCUMENTS[1], None, None])
        assert model.injector._active is not None
    assert [a.content_id() for a in before] == [a.content_id() for a in inside]
    answers = model.generate(QUESTIONS, before, max_new_tokens=5)
    assert answers == [model.generate([q], a, max_new_tokens=5)[0] for q, a in zip(QUESTIONS, before, strict=True)]


def test_questions_and_documents_come_in_lists(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    assert model.route([], adapter) == []
    with pytest.raises(ValueError, match="questions must be a list of texts, got one text"):
        model.route(QUESTIONS[0], adapter)
    with pytest.raises(ValueError, match="Got 1 documents for 3 questions"):
        model.route(QUESTIONS, adapter, documents=[None])


def test_chunks_that_are_no_keys_any_more_are_refused(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    model.hypernetwork.join_ridge = 2.0
    adapter = model.internalize(DOCUMENTS, decorrelate=False)
    assert not any("ridge" in entry for entry in adapter.provenance["documents"])
    model.route(QUESTIONS, adapter)
    told_apart = model.internalize(DOCUMENTS)
    assert [entry["ridge"] for entry in told_apart.provenance["documents"]] == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"cannot be routed: its chunks were told apart.*decorrelate=False"):
        model.route(QUESTIONS, told_apart)
    with pytest.raises(ValueError, match="cannot be routed: decorrelate"):
        model.route(QUESTIONS, model.join(adapter))
    model.route(QUESTIONS, model.internalize(DOCUMENTS[1][:29]))  # of a single chunk there is nothing to tell apart
    other = make_doc_to_lora(seed=1)
    other.base_model_fingerprint = "f" * 64
    with pytest.raises(ValueError, match="base model"):
        other.route(QUESTIONS, adapter)


def test_of_eight_documents_the_shipped_model_finds_the_one_that_is_asked_about() -> None:
    model = DocToLoRA.from_pretrained(Path(__file__).parents[2] / "assets/tiny")
    encyclopedia = Encyclopedia("test", seed=4)
    records = [encyclopedia.record(index, num_entities=1, num_facts=3, num_distractors=1) for index in range(8)]
    adapters = [model.internalize(record.document, decorrelate=False) for record in records]
    adapter = adapters[0].joined(adapters[1:])
    asked = [(i, question) for i, record in enumerate(records) for question in record.questions]
    chosen = model.route([question.text for _, question in asked], adapter)
    shas = [adapters[i].provenance["documents"][0]["sha256"] for i, _ in asked]
    found = [
        sha in {entry["sha256"] for entry in a.provenance["documents"]} for sha, a in zip(shas, chosen, strict=True)
    ]
    assert sum(found) >= 0.9 * len(found)  # by chance .25 at most
    answers = model.generate([question.text for _, question in asked], chosen)
    right = [exact_match(answer, [question.answer]) for answer, (_, question) in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.8 * len(right)
