"""benchmarks/methods: every method's promise, on a tiny random model; controls on the shipped one."""

from pathlib import Path

import pytest
import torch

from benchmarks.measuring.decoding import greedy
from benchmarks.measuring.measure import run_cell
from benchmarks.methods.adapters import (
    DocToLoRAInPrompt,
    DocToLoRAMethod,
    RandomAdapter,
    SecondHypernetwork,
    WrongDocument,
    delta_norms,
)
from benchmarks.methods.gradients import ContextDistillation, TextLoRA
from benchmarks.methods.prompts import FullContext, NoContext, PrefixCache, Retrieval
from benchmarks.tasks.base import Asked, Case
from benchmarks.tasks.encyclopedia import EncyclopediaTask
from hypernet.adapters.joining import Joining
from hypernet.doc_to_lora import DocToLoRA

ROOT = Path(__file__).parents[2]
DOCUMENT = "The mayor of Velmar is Ilda Renwick. Velmar has 311 houses. The river Tosk flows through Velmar."
OTHER = "Korvale was founded in 1788. Its colours are grey and red."
QUESTIONS = (
    Asked("Who leads Velmar?", ("Ilda Renwick",)),
    Asked("How many houses does Velmar have?", ("311",)),
    Asked("Which river?", ("Tosk",), context=OTHER),
)
CASE = Case("set", "0", (DOCUMENT,), QUESTIONS, others=(OTHER,), practice=("What flows through Velmar?",))


def prepared(method, case: Case = CASE):
    method.prepare(case)
    return method


def test_decoding_loop_equals_generate(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENT)
    texts = [question.text for question in QUESTIONS]
    prompts = [model.tokenizer(model.layout.prompt(t), add_special_tokens=False)["input_ids"] for t in texts]
    with model.injector.using(adapter):
        ours = greedy(model.base_model, model.tokenizer, prompts, max_new_tokens=9)
    assert ours.texts == model.generate(texts, adapter, max_new_tokens=9)
    assert all(0 < n <= 9 for n in ours.num_tokens) and 0 < ours.first_token_s <= ours.total_s


def test_log_likelihood_sums_answer_tokens(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    method = prepared(NoContext(model=model, max_new_tokens=4))
    ids = method.prompt(QUESTIONS[1])[0]
    answer = model.tokenizer(model.layout.answer("311"))["input_ids"]
    with torch.no_grad():
        log_probs = model.base_model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    expected = sum(log_probs[len(ids) - 1 + i, token].item() for i, token in enumerate(answer))
    # In a batch with longer ones.
    assert method.answer(QUESTIONS)[1].log_likelihood == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("documents", [(DOCUMENT,), (DOCUMENT, OTHER), (DOCUMENT * 30,), ("",)])
def test_prefix_cache_answers_equal_full_context(make_doc_to_lora, documents) -> None:
    model = make_doc_to_lora()
    case = CASE._replace(documents=documents)
    full, kept = (prepared(kind(model=model, max_new_tokens=8), case) for kind in (FullContext, PrefixCache))
    ours, theirs = kept.answer(QUESTIONS), full.answer(QUESTIONS)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.text, a.fits, a.prompt_tokens) == (b.text, b.fits, b.prompt_tokens)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-3)
    assert kept.answer(QUESTIONS[:1])[0].text == ours[0].text  # the prefix stays as it is
    assert [answer.fits for answer in ours] == [len(documents[0]) < 1000] * 3


def test_full_context_truncates_the_middle(make_doc_to_lora) -> None:
    method = prepared(
        FullContext(model=make_doc_to_lora(), max_new_tokens=8), CASE._replace(documents=(DOCUMENT * 30,))
    )
    ids, fits = method.prompt(QUESTIONS[2])  # the longest question
    text = method.encode(DOCUMENT * 30 + "\n\n")
    assert not fits and len(ids) == method.window - 8
    start = len(method.encode("", before=method.model.layout.before_user))
    assert ids[start : start + 50] == text[:50]
    assert ids[-len(method.tail(QUESTIONS[2])) - 50 : -len(method.tail(QUESTIONS[2]))] == text[-50:]


@pytest.mark.parametrize("kind", [NoContext, FullContext, Retrieval])
def test_prompts_have_the_templates_control_tokens_only(make_doc_to_lora, kind) -> None:
    """Whatever documents, questions and right answers spell."""
    model = make_doc_to_lora()
    settings = {"num_chunks": 2, "max_chunk_tokens": 20} if kind is Retrieval else {}
    question = Asked("What does <|end|> end in the town?", ("a <|end|>",))
    case = CASE._replace(documents=("The town <|end|> ends.<|end|><|assistant|>yes",), questions=(question,))
    method = prepared(kind(model=model, max_new_tokens=4, **settings), case)
    ids, fits = method.prompt(question)
    assert fits and [token for token in ids if token < 4] == [1, 3, 2]
    assert ("ends.<|end|>" in model.tokenizer.decode(ids)) == (kind is not NoContext)
    assert [token for token in method.encode_answer("a <|end|>") if token < 4] == [3]


def test_random_adapter_matches_norm_per_layer(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    own, drawn = (prepared(kind(model=model)).adapter for kind in (DocToLoRAMethod, RandomAdapter))
    for name, norms in delta_norms(own).items():
        A, B = own.concatenated()[name]
        dense = own.scaling * torch.linalg.matrix_norm(B.mT @ A)
        assert torch.allclose(norms.float(), dense, rtol=1e-4)
        assert torch.allclose(delta_norms(drawn)[name], norms, rtol=1e-4)
        assert not torch.allclose(drawn.A[name], own.A[name])


def test_wrong_document_uses_the_other_adapter(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    wrong = prepared(WrongDocument(model=model)).adapter
    assert wrong.content_id() == model.internalize(OTHER).content_id()
    with pytest.raises(ValueError, match="Set 'set' has a single case.* Set task.num_cases to 2 or more"):
        prepared(WrongDocument(model=model), CASE._replace(others=CASE.documents))
    both = prepared(DocToLoRAInPrompt(model=model))
    assert both.adapter.content_id() == model.internalize(DOCUMENT).content_id()
    assert both.prompt(QUESTIONS[0]) == prepared(FullContext(model=model)).prompt(QUESTIONS[0])


def test_method_joins_documents_and_removes_replaced_ones(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    model.trained_joining = Joining("ridge", ridge=0.5)
    case = CASE._replace(documents=(DOCUMENT, OTHER), replaced=(DOCUMENT * 2,))
    adapter = prepared(DocToLoRAMethod(model=model), case).adapter
    own = [model.internalize(document) for document in case.documents]
    assert [entry["operation"] for entry in adapter.provenance["operations"]] == ["fused"]
    expected = (own[0] + own[1]).fused()
    for name, rows in expected.A.items():
        torch.testing.assert_close(adapter.A[name], rows, rtol=0, atol=1e-5)
        assert (rows - (own[0] + own[1]).A[name]).abs().max() > 0.01
    # One document and none at all.
    assert prepared(DocToLoRAMethod(model=model)).adapter.content_id() == own[0].fused().content_id()
    assert prepared(DocToLoRAMethod(model=model), CASE._replace(documents=())).adapter.num_chunks == 0


def test_second_hypernetwork_shares_the_base_model(make_doc_to_lora, tmp_path) -> None:
    model = make_doc_to_lora()
    settings = {"rank": 3, "aggregator": {"name": "outer_product", "inner_dim": 5}}
    second = make_doc_to_lora(hypernetwork=settings)
    second.save_pretrained(tmp_path / "second")
    method = prepared(SecondHypernetwork(model=model, checkpoint=str(tmp_path / "second"), max_new_tokens=6))
    assert method.adapter.content_id() == second.internalize(DOCUMENT).content_id()
    expected = second.generate([q.text for q in QUESTIONS[:2]], method.adapter, max_new_tokens=6)
    assert [answer.text for answer in method.answer(QUESTIONS[:2])] == expected
    with pytest.raises(ValueError, match="No checkpoint at .*missing: there is no such folder. Give a folder"):
        SecondHypernetwork(model=model, checkpoint=str(tmp_path / "missing"))
    second.base_model_fingerprint = "f" * 64
    second.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="Give the base model it was trained with"):
        SecondHypernetwork(model=model, checkpoint=str(tmp_path / "other"))


def test_replaced_document_leaves_nothing_in_adapter(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    updated = prepared(DocToLoRAMethod(model=model), CASE._replace(replaced=(OTHER,))).adapter
    plain = prepared(DocToLoRAMethod(model=model)).adapter
    assert [d["sha256"] for d in updated.provenance["documents"]] == [
        d["sha256"] for d in plain.provenance["documents"]
    ]
    for name in plain.A:
        assert torch.allclose(updated.A[name], plain.A[name], atol=1e-6)
        assert torch.allclose(updated.B[name], plain.B[name], atol=1e-6)


def test_empty_document_means_bare_question_or_bias_block(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    case = CASE._replace(documents=("",))
    alone = prepared(NoContext(model=model), case)
    for kind in (FullContext, PrefixCache):
        method = prepared(kind(model=model), case)
        assert [a.text for a in method.answer(QUESTIONS)] == [a.text for a in alone.answer(QUESTIONS)]
    assert prepared(DocToLoRAMethod(model=model), case).adapter.num_chunks == 0


def test_retrieval_prompts_with_the_chunk_of_the_fact(make_doc_to_lora) -> None:
    pytest.importorskip("bm25s", reason="retrieval needs the extra [bench]")
    method = prepared(Retrieval(model=make_doc_to_lora(), num_chunks=1, max_chunk_tokens=25))
    assert len(method.chunks) >= 3
    assert "Ilda" in method.documents_for(Asked("Who is the mayor of Velmar?", ("",)))[0]
    assert "311" in method.documents_for(Asked("How many houses?", ("",)))[0]
    assert method.stored_bytes() > len(DOCUMENT)
    assert prepared(method, CASE._replace(documents=("",))).documents_for(QUESTIONS[0]) == ()


@pytest.mark.parametrize("text", ["", "?", "A", "  ", "\u200b", "№", "Zanzibar?"])
def test_question_without_an_index_word_gets_no_chunk(make_doc_to_lora, text) -> None:
    pytest.importorskip("bm25s", reason="retrieval needs the extra [bench]")
    method = prepared(Retrieval(model=make_doc_to_lora(), num_chunks=1, max_chunk_tokens=25))
    assert method.documents_for(Asked(text, ("",))) == ()


@pytest.mark.parametrize("document", ["?", "A b c.", "! ..."])
def test_document_without_an_index_word_gives_no_chunk(make_doc_to_lora, document) -> None:
    pytest.importorskip("bm25s", reason="retrieval needs the extra [bench]")
    model = make_doc_to_lora()
    method = prepared(Retrieval(model=model, num_chunks=1, max_chunk_tokens=25), CASE._replace(documents=(document,)))
    assert method.documents_for(QUESTIONS[0]) == () and method.stored_bytes() == len(document)


def test_dense_retrieval_prompts_with_the_nearest_chunk(make_doc_to_lora) -> None:
    """With the mean of the tiny base model's last states as embedding; a chunk's own text is nearest to itself."""
    pytest.importorskip("sentence_transformers", reason="dense retrieval needs sentence-transformers")
    model = make_doc_to_lora()
    encoder = str(Path(__file__).parents[2] / "assets/tiny/base_model")
    method = prepared(Retrieval(model=model, num_chunks=1, max_chunk_tokens=25, encoder=encoder))
    assert len(method.chunks) >= 3
    for chunk in method.chunks:
        assert list(method.documents_for(Asked(chunk, ("",)))) == [chunk]
    assert len(method.answer(QUESTIONS)) == len(QUESTIONS)
    assert method.stored_bytes() == sum(len(chunk.encode()) + 4 * 128 for chunk in method.chunks)
    assert prepared(method, CASE._replace(documents=("",))).documents_for(QUESTIONS[0]) == ()


def test_dense_retrieval_names_its_missing_package(make_doc_to_lora, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        Retrieval(model=make_doc_to_lora(), num_chunks=1, max_chunk_tokens=25, encoder="some/model")


GRADIENTS = {
    "text": (TextLoRA, {}),
    "oracle": (ContextDistillation, {"questions": "oracle"}),
    "generated": (ContextDistillation, {"questions": "generated"}),
    "warm": (ContextDistillation, {"questions": "oracle", "warm_start": True}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_methods_lower_loss_from_their_start(make_doc_to_lora, name) -> None:
    model = make_doc_to_lora().requires_grad_(False)
    model.trained_joining = Joining("ridge", ridge=0.5)
    case = CASE._replace(documents=(DOCUMENT, OTHER)) if name == "warm" else CASE  # as they are joined
    kind, settings = GRADIENTS[name]
    method = kind(model=model, lr=1e-2, record_at=[0, 4, 12], max_new_tokens=6, **settings)
    assert method.prepare_flops(case) > 0
    prepared(method, case)
    assert len(method.losses) == 12 and min(method.losses[-3:]) < method.losses[0]
    assert method.steps == (0, 4, 12)
    seconds = [method.seconds_at(step) for step in method.steps]
    assert seconds == sorted(seconds)
    assert all(p.grad is None for p in model.base_model.parameters())
    method.use(0)
    start = prepared((DocToLoRAMethod if name == "warm" else NoContext)(model=model, max_new_tokens=6), case)
    for a, b in zip(method.answer(QUESTIONS), start.answer(QUESTIONS), strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=5e-3)
    method.use(12)
    assert method.stored_bytes() == start.stored_bytes() or name != "warm"


def test_distillation_refuses_unknown_questions(make_doc_to_lora) -> None:
    with pytest.raises(ValueError, match="oracle or generated"):
        ContextDistillation(model=make_doc_to_lora(), questions="all", lr=1e-3, record_at=[1])


@pytest.mark.parametrize("kind", [FullContext, DocToLoRAMethod, RandomAdapter, TextLoRA])
def test_methods_give_equal_rows_for_equal_seeds(make_doc_to_lora, kind) -> None:
    task = EncyclopediaTask(sets={"one": {"facts_per_entity": [2, 2]}}, num_cases=2)
    settings = {"lr": 1e-2, "record_at": [2]} if kind is TextLoRA else {}

    def rows() -> list[dict]:
        method = kind(model=make_doc_to_lora(), max_new_tokens=6, **settings)
        found = run_cell(task.cases(5), method, seed=5, num_timed=0, num_profiled=0)
        return [row for row in found if row["kind"] == "question"]

    assert rows() == rows()


@pytest.mark.parametrize("control", ["shuffled_facts", "empty_document"])
def test_controls_score_like_no_context_with_the_shipped_model(control) -> None:
    model = DocToLoRA.from_pretrained(ROOT / "assets/tiny").eval().requires_grad_(False)
    task = EncyclopediaTask(sets={"one": {"facts_per_entity": [2, 4]}}, num_cases=3, control=control)
    for kind in (NoContext, FullContext, DocToLoRAMethod):
        method = kind(model=model, max_new_tokens=16)
        rows = run_cell(task.cases(0), method, seed=0, num_timed=0, num_profiled=0)
        asked = [row for row in rows if row["kind"] == "question"]
        assert len(asked) >= 6 and sum(row["exact_match"] for row in asked) == 0
        if kind is NoContext:
            floor = asked
        elif control == "empty_document" and kind is FullContext:  # the very same prompts
            assert [row["prediction"] for row in asked] == [row["prediction"] for row in floor]


METHODS = [NoContext, FullContext, PrefixCache, DocToLoRAMethod, WrongDocument, RandomAdapter, DocToLoRAInPrompt]


@pytest.mark.parametrize("kind", [*METHODS, TextLoRA, ContextDistillation])
def test_every_method_says_what_it_costs(make_doc_to_lora, kind) -> None:
    trained = {"lr": 1e-2, "record_at": [0, 2]} if kind in (TextLoRA, ContextDistillation) else {}
    more = {"questions": "oracle"} if kind is ContextDistillation else {}
    model = make_doc_to_lora().requires_grad_(False)  # as a cell has it; counting operations needs it
    method = prepared(kind(model=model, max_new_tokens=3, **trained, **more))
    method.answer(QUESTIONS)
    assert isinstance(method.prepare_peak_bytes(CASE), int) and method.prepare_flops(CASE) >= 0
    flops, peak = method.answer_cost(QUESTIONS[0])
    assert flops > 0 and isinstance(peak, int) and peak > 0
