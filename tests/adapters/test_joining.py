"""joining: ridge against inverses in float64 and its gradients, routing against a float64 loop, settings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.composition import average, compress, concatenate, select_chunks, weight
from hypernet.adapters.joining import (
    SETTINGS,
    WAYS,
    Joining,
    decorrelate_,
    decorrelated,
    distinct,
    highest,
    last_inputs,
    routing_scores,
    separated,
    separated_slots,
)
from hypernet.adapters.merging import merged
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.vllm import export_vllm
from hypernet.text.documents import Document
from hypernet.text.matching import exact_match
from tests.adapters.test_adapter import assert_one_line_value_error, make_adapter, targets  # noqa: F401
from tests.adapters.test_adapter import document as entry_of

# Chunks, rank and width: rows fewer than the width, as many, and more (where the smaller system is solved).
SIZES = [(4, 3, 29), (5, 2, 10), (7, 3, 5), (1, 1, 1)]


def draw(num_chunks, rank, width, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(num_chunks, rank, width, generator=generator, dtype=torch.float64)
    documents = torch.randint(3, (num_chunks,), generator=generator)
    return (3 * A).to(dtype), documents


def by_inverse(A, documents, ridge):
    """The same from its formula, entry by entry and with inverses."""
    rows = A.double().flatten(0, 1)
    of = [int(document) for document in documents for _ in range(A.shape[1])]
    unit = torch.stack([row / row.norm() for row in rows])
    gram = torch.tensor([[float(a @ b) for b in unit] for a in unit], dtype=torch.float64)
    size = range(len(of))
    own = [[float(gram[i, j]) if of[i] == of[j] else 0.0 for j in size] for i in size]
    own = torch.tensor(own, dtype=torch.float64)
    ridge = ridge * torch.eye(len(of), dtype=torch.float64)
    mixed = (own + ridge) @ torch.linalg.inv(gram + ridge) @ unit
    return (mixed * rows.norm(dim=1, keepdim=True)).view(A.shape)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_decorrelated_equals_formula(sizes, ridge):
    A, documents = draw(*sizes)
    expected = by_inverse(A, documents, ridge)
    torch.testing.assert_close(decorrelated(A, documents, ridge=ridge), expected, rtol=0, atol=1e-9)
    single = decorrelated(A.float(), documents, ridge=ridge)
    assert single.dtype == torch.float32
    # Each chunk by itself; and documents in a batch, which takes another way through the code.
    apart = decorrelated(A, ridge=ridge)
    torch.testing.assert_close(apart, by_inverse(A, torch.arange(len(A)), ridge), rtol=0, atol=1e-9)
    batch = decorrelated(A.expand(2, *A.shape), documents.expand(2, len(A)), ridge=ridge)
    torch.testing.assert_close(batch, expected.expand(2, *A.shape), rtol=0, atol=1e-9)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sizes", [*SIZES, (29, 3, 7), (5, 8, 3), (12, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decorrelated_in_place_and_in_pieces_agree(sizes, dtype):
    A, _ = draw(*sizes, dtype=dtype)
    pool = torch.stack([A, torch.zeros_like(A)], dim=1)  # as an adapter's layers lie
    expected = decorrelated(A, ridge=0.7)
    assert decorrelate_(pool[:, 0], ridge=0.7).data_ptr() == pool.data_ptr()
    torch.testing.assert_close(pool[:, 0], expected, rtol=0 if dtype == torch.float64 else 1e-2, atol=1e-9)
    assert not pool[:, 1].any()


@pytest.mark.parametrize("sizes", SIZES)
def test_decorrelated_leaves_orthogonal_documents_unchanged(sizes):
    A, documents = draw(*sizes)
    torch.testing.assert_close(decorrelated(A, torch.ones_like(documents), ridge=0.5), A, rtol=0, atol=1e-9)
    torch.testing.assert_close(decorrelated(A, documents, ridge=1e9), A, rtol=0, atol=1e-6)
    apart = torch.zeros(3, 2, 12, dtype=torch.float64)
    for chunk in range(3):
        apart[chunk, :, 4 * chunk : 4 * chunk + 4] = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(decorrelated(apart, torch.arange(3), ridge=0.5), apart, rtol=0, atol=1e-9)


def test_tiny_ridge_removes_all_cross_talk():
    A, _ = draw(5, 2, 31)
    documents = torch.tensor([0, 1, 1, 2, 0])
    out = decorrelated(A, documents, ridge=1e-9)
    for document in range(3):
        own = documents == document
        x = torch.randn(int(own.sum()) * 2, dtype=torch.float64) @ A[own].flatten(0, 1)
        torch.testing.assert_close(out[own] @ x, A[own] @ x, rtol=0, atol=1e-4)
        assert (A[~own] @ x).abs().max() > 1
        assert (out[~own] @ x).abs().max() < 1e-4


def test_decorrelated_ignores_order_padding_and_batching():
    A, documents = draw(5, 2, 9)
    expected = decorrelated(A, documents, ridge=0.7)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(decorrelated(A[order], documents[order], ridge=0.7), expected[order], rtol=0, atol=1e-9)
    padded = torch.cat([A, torch.zeros(2, 2, 9).double()])
    for number in (-1, int(documents[0])):
        out = decorrelated(padded, torch.cat([documents, torch.tensor([number] * 2)]), ridge=0.7)
        torch.testing.assert_close(out[:5], expected, rtol=0, atol=1e-9)
        assert not out[5:].any()
    other, its_documents = draw(5, 2, 9, seed=1)
    both = decorrelated(torch.stack([A, other]), torch.stack([documents, its_documents]), ridge=0.7)
    torch.testing.assert_close(both[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(both[1], decorrelated(other, its_documents, ridge=0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [(3, 2, 11), (4, 2, 5)])
def test_decorrelated_gradients_equal_formula(sizes):
    A, documents = draw(*sizes)
    A = torch.cat([A, torch.zeros_like(A[:1])]).requires_grad_()  # padding must not make them infinite
    documents = torch.cat([documents, documents.new_tensor([-1])])
    out = decorrelated(A, documents, ridge=0.3)
    (gradient,) = torch.autograd.grad(out[:-1].sin().sum(), A)
    assert gradient.isfinite().all() and not gradient[-1].any()
    real = A.detach()[:-1].requires_grad_()
    assert torch.autograd.gradcheck(lambda a: decorrelated(a, documents[:-1], ridge=0.3), (real,))
    (expected,) = torch.autograd.grad(decorrelated(real, documents[:-1], ridge=0.3).sin().sum(), real)
    torch.testing.assert_close(gradient[:-1], expected, rtol=0, atol=1e-9)


def test_decorrelated_half_precision_computes_in_float32():
    A, documents = draw(4, 3, 29, dtype=torch.bfloat16)
    out = decorrelated(A, documents, ridge=0.5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, decorrelated(A.float(), documents, ridge=0.5).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under = decorrelated(A.float(), documents, ridge=0.5)
    assert under.dtype == torch.float32 and torch.equal(under, decorrelated(A.float(), documents, ridge=0.5))


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan")])
def test_ridge_must_be_positive(ridge):
    A, documents = draw(2, 1, 3)
    assert_one_line_value_error(lambda: decorrelated(A, documents, ridge=ridge), "a ridge above 0")


# route

DOCUMENTS = (
    "The mayor of Velmar is Ilda Renwick. Velmar has 311 houses. The river Tosk flows through Velmar. " * 2,
    "Korvale was founded in 1788. Its colours are grey and red.",
)
QUESTIONS = ["Who leads Velmar?", "In which year was the old town of Korvale founded, and by whom?", "Which river?"]


def prompts_of(model, questions=QUESTIONS):
    return [model.tokenizer(model.layout.prompt(q), add_special_tokens=False)["input_ids"] for q in questions]


def scores_by_hand(model, adapter, ids):
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
def test_routing_scores_equal_a_float64_loop(make_doc_to_lora, bias_block) -> None:
    model = make_doc_to_lora(bias_block=bias_block)
    adapter = model.internalize(DOCUMENTS)
    prompts = prompts_of(model)
    assert len({len(ids) for ids in prompts}) == 3
    scores = routing_scores(model.base_model, adapter.targets, adapter.A, prompts)
    assert scores.shape == (3, adapter.num_chunks) and adapter.num_chunks > 3
    expected = torch.tensor([scores_by_hand(model, adapter, ids) for ids in prompts])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_highest_picks_weights_and_keeps_document_order() -> None:
    scores = torch.full((2, 5), 0.5)
    scores[0, [3, 1]] = torch.tensor([4.0, 1.0])
    scores[1, [0, 4]] = torch.tensor([3.0, 3.0])
    for power, lower in ((2.0, 1 / 16), (0.5, 1 / 2), (0.0, 1.0)):
        chunks, weights = highest(scores, top_k=2, weight_power=power)
        assert chunks == [[1, 3], [0, 4]] and weights == [[lower, 1.0], [1.0, 1.0]]
    assert highest(scores[:1], top_k=99)[0] == [[0, 1, 2, 3, 4]]
    for power in (0.0, 1.0):  # of a recitation that no chunk is close to
        assert highest(torch.zeros(1, 3), top_k=1, weight_power=power)[1] == [[1.0]]


def routed(model, adapter, prompts=None, **settings):
    prompts = prompts_of(model) if prompts is None else prompts
    return model._routed([adapter] * len(prompts), prompts, Joining("route", **settings))


def test_routed_adapters_hold_weighted_chunks_and_the_bias_block(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS)
    scores = routing_scores(model.base_model, adapter.targets, adapter.A, prompts_of(model))
    for chosen, chunks, weights in zip(routed(model, adapter), *highest(scores, top_k=2), strict=True):
        for name in adapter.A:
            assert torch.equal(chosen.A[name], adapter.A[name][chunks])
            expected = adapter.B[name][chunks] * torch.tensor(weights).view(2, 1, 1, 1)
            torch.testing.assert_close(chosen.B[name], expected)
        assert chosen.rank == 2 * adapter.rank_per_chunk + adapter.bias_rank


def test_chunks_without_any_score_are_routed_without_harm(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS)
    for rows in adapter.A.values():
        rows[:] = 0
    scores = routing_scores(model.base_model, adapter.targets, adapter.A, prompts_of(model))
    assert scores.isfinite().all() and (scores > 0).all()
    assert all(a.num_chunks == 2 for a in routed(model, adapter))
    empty = select_chunks(adapter, [])
    assert routed(model, empty) == [empty] * 3


def test_a_chunk_made_of_a_questions_own_inputs_is_found(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS)
    inputs = last_inputs(model.base_model, adapter.targets, prompts_of(model))
    for chunk, question in ((2, 0), (0, 1), (3, 2)):
        for (name, layer), x in inputs.items():
            adapter.A[name][chunk, layer] = 0
            adapter.A[name][chunk, layer, 0, : x.shape[1]] = 1e3 * torch.linalg.pinv(x)[:, question]
    places = [
        [i for i in range(adapter.num_chunks) if torch.equal(adapter.A["down_proj"][i], c.A["down_proj"][0])]
        for c in routed(model, adapter, top_k=1)
    ]
    assert places == [[2], [0], [3]]


def test_routing_reads_the_plain_model_whatever_is_active(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS)
    before = routed(model, adapter)
    with model.injector.using(adapter):
        inside = routed(model, adapter)
        assert model.injector._active is not None
    assert [a.content_id() for a in before] == [a.content_id() for a in inside]


def test_routed_answers_equal_those_of_each_questions_chunks(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS)
    documents = [DOCUMENTS[1], None, None]
    prompts = [model.layout.prompt(q, d) for q, d in zip(QUESTIONS, documents, strict=True)]
    ids = model.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    chosen = routed(model, adapter, ids, top_k=1)
    expected = [
        model.generate([q], a, join="sum", documents=[d], max_new_tokens=5)[0]
        for q, a, d in zip(QUESTIONS, chosen, documents, strict=True)
    ]
    answers = model.generate(QUESTIONS, adapter, join="route", top_k=1, documents=documents, max_new_tokens=5)
    assert answers == expected
    mixed = model.generate(QUESTIONS, [adapter, None, adapter], join="route", top_k=1, max_new_tokens=5)
    assert mixed[1] == model.generate(QUESTIONS[1:2], max_new_tokens=5)[0]


# Copies


def test_distinct_equals_a_loop_over_all_pairs(targets) -> None:  # noqa: F811
    adapter = make_adapter(targets, 11, rank=1)
    A, B = adapter.A, adapter.B
    documents = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4]
    passages = ["a", "b", "c", "d", "a", "e", "a", "a", "e", "e", "f"]
    for copy, of in ((4, 0), (6, 0), (7, 4), (8, 5), (9, 5), (10, 5)):
        for name in A:
            A[name][copy] = 3 * A[name][of] + 0.001 * torch.randn_like(A[name][of])  # a copy whatever its length
            B[name][copy] = B[name][of] + 0.001 * torch.randn_like(B[name][of])
    A["q_proj"][6] *= -1
    B["down_proj"][8, 1] *= -1  # the values of one module differ
    B["down_proj"][9] = 0
    vectors = [
        [w[t.name][c, p.layer].flatten().double() for t in targets for p in t.modules() for w in (A, B)]
        for c in range(11)
    ]
    left: list[int] = []
    for c in range(11):
        agreeing = [
            e
            for e in left
            if documents[e] != documents[c]
            and passages[e] == passages[c]
            and all(x @ y >= 0.9 * x.norm() * y.norm() > 0 for x, y in zip(vectors[c], vectors[e], strict=True))
        ]
        left += [] if agreeing else [c]
    assert left == [0, 1, 2, 3, 5, 6, 8, 9, 10]  # 10 agrees with 5, and has another wording
    chosen = distinct(A, B, targets, passages=passages, documents=documents, weights=[1.0] * 5)
    assert chosen == left
    unknown = distinct(A, B, targets, passages=[None] * 11, documents=documents, weights=[1.0] * 5)
    assert unknown == list(range(11))


def saying(adapter, *passages):
    """The adapter with the wording of its documents' chunks."""
    entries = [{**e, "passages": p} for e, p in zip(adapter.provenance["documents"], passages, strict=True)]
    return replace(adapter, provenance={**adapter.provenance, "documents": entries})


def test_passages_repeated_in_one_document_are_copies_if_asked(targets) -> None:  # noqa: F811
    one = make_adapter(targets, 1)
    entry = {**entry_of("d", 3), "passages": ["a"] * 3}
    three = replace(
        one,
        A={name: rows.expand(3, -1, -1, -1) for name, rows in one.A.items()},
        B={name: rows.expand(3, -1, -1, -1) for name, rows in one.B.items()},
        provenance={**one.provenance, "documents": [entry]},
    )
    assert three.without_copies() is three
    once = three.without_copies(within=True)
    assert once.num_chunks == 1
    assert once.provenance["documents"] == [{**entry, "chunks": entry["chunks"][:1], "passages": ["a"]}]
    assert (three + saying(one, ["a"])).without_copies().num_chunks == 3
    assert (three + one).without_copies(within=True).num_chunks == 2  # whose wording is unknown


@pytest.mark.parametrize(
    "weights, left",
    [
        ([1.0, 1.0, 1.0], [0]),
        ([1 / 3, 1 / 3, 1 / 3], [0, 1, 2]),
        ([0.5, 1.0, 0.25], [1]),
        ([2.0, 0.5, 1.0], [0]),
        ([1.0, -1.0, 1.0], [0, 1]),
        ([0.25, 0.75, 0.0], [0, 1, 2]),
    ],
)
def test_copies_of_weighted_documents_add_up_to_one(targets, weights, left) -> None:  # noqa: F811
    one = saying(make_adapter(targets, 1), ["a"])
    joined = concatenate([one, one, one])
    for number, factor in enumerate(weights):
        joined = weight(joined, factor, document=number)
    expected = joined.of_chunks(left)
    found = joined.without_copies()
    assert all(torch.equal(found.B[name], expected.B[name]) for name in found.B)
    assert [len(entry["chunks"]) for entry in found.provenance["documents"]] == [int(i in left) for i in range(3)]


def test_average_of_equal_adapters_is_one_of_them(make_doc_to_lora) -> None:
    model = make_doc_to_lora()
    adapter = model.internalize(DOCUMENTS[0])
    logits = []
    for given in (adapter, average([adapter] * 3)):
        with model.using(given):
            logits.append(model.base_model(torch.arange(7)[None]).logits)
    torch.testing.assert_close(*logits)


def test_without_copies_nothing_changes(make_doc_to_lora) -> None:
    adapter = make_doc_to_lora().internalize(DOCUMENTS)
    assert adapter.without_copies() is adapter and adapter.fused("sum") is adapter


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained_ridge", [None, 2.0])
def test_copied_documents_change_no_logit(make_doc_to_lora, way, trained_ridge) -> None:
    model = make_doc_to_lora()
    model.trained_joining = Joining() if trained_ridge is None else Joining("ridge", ridge=trained_ridge)
    once, twice = (model.internalize(DOCUMENTS + more) for more in ((), DOCUMENTS[::-1]))
    many = concatenate([twice, once, once])
    joining = model.joining(way, ridge=2.0 if way == "ridge" else None, top_k=2 if way == "route" else None)
    prompts = model.tokenizer([model.layout.prompt(q) for q in QUESTIONS], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt[:6] for prompt in prompts])
    logits = []
    for adapter in (once, many):
        with model.using(adapter, joining, prompts=prompts):
            logits.append(model.base_model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    plain = model.base_model(ids).logits
    assert (logits[0] - plain).abs().max() > 0.01
    if way in ("sum", "ridge"):  # what is exported agrees with what is injected
        fused = many.fused(way, ridge=joining.ridge)
        assert fused.num_chunks == once.num_chunks and len(fused.provenance["documents"]) == 4 * len(DOCUMENTS)
        assert fused.is_fused and fused.fused() is fused
        with merged(model.base_model, fused):
            torch.testing.assert_close(model.base_model(ids).logits, logits[0], rtol=1e-4, atol=1e-4)


def test_copies_of_a_passage_in_other_documents_answer_right() -> None:
    """Before, four copies were answered .44 by the sum, .58 gated."""
    model = DocToLoRA.from_pretrained("assets/tiny")
    fenda = Path("examples/fenda_elfax.txt").read_text()
    town = "Halvawold is led by Vornia Walmoor. "
    question = ["Who taught Fenda Elfax?"]
    (right,) = model.generate(question, model.internalize(fenda))
    copies = model.internalize([fenda, fenda + town, fenda, fenda + "\n" + town])
    for way in WAYS:
        assert model.generate(question, copies, join=way) == [right], way


def test_documents_given_several_times_are_named_once(make_doc_to_lora, caplog) -> None:
    model = make_doc_to_lora()
    texts = ["Ada was born.", "Rain fell.", "Ada was born.\n", "Rain fell."]
    docs = [Document(f"{n}.txt", text, str(n) * 64) for n, text in zip("abcd", texts, strict=True)]
    adapter = model.internalize(docs)
    (message,) = caplog.messages
    assert "count once: 3 (c.txt) is 1 (a.txt); 4 (d.txt) is 2 (b.txt). " in message
    caplog.clear()
    joined = adapter + model.internalize("Snow fell.")
    assert caplog.messages == []  # nothing new
    joined + model.internalize(docs[1])
    (message,) = caplog.messages
    assert "count once: 6 (b.txt) is 2 (b.txt). " in message
    caplog.clear()
    model.internalize(["Rain fell."] * 9)
    (message,) = caplog.messages
    assert "6 (text) is 1 (text); and 3 more." in message


# Settings


def test_joining_fills_in_each_ways_own_settings() -> None:
    assert Joining() == Joining("sum") and Joining().plain() == {"way": "sum"}
    assert Joining("ridge", ridge=8).plain() == {"way": "ridge", "ridge": 8}
    assert Joining("gate").plain() == {"way": "gate", "gate_power": 1.25}
    assert Joining("route", top_k=3).plain() == {"way": "route", "top_k": 3, "weight_power": 1.0}
    assert [Joining(way, **({"ridge": 1.0} if way == "ridge" else {})).is_plain_lora for way in WAYS] == [1, 1, 0, 0]
    assert set(SETTINGS) == set(WAYS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"way": "add"}, "Unknown way to join 'add'. Use one of sum, ridge, gate, route."),
        ({"way": "ridge"}, "join=ridge needs a ridge, such as 8.0"),
        ({"way": "sum", "ridge": 1.0}, "ridge is a setting of join=ridge, but join is sum. Leave it out."),
        ({"way": "gate", "top_k": 2}, "top_k is a setting of join=route, but join is gate"),
        ({"way": "route", "gate_power": 1.0}, "gate_power is a setting of join=gate, but join is route"),
        ({"way": "ridge", "ridge": 0}, "ridge should be a number above 0, got 0"),
        ({"way": "ridge", "ridge": float("nan")}, "ridge should be a number above 0, got nan"),
        ({"way": "ridge", "ridge": "8"}, "ridge should be a number above 0, got '8'"),
        ({"way": "gate", "gate_power": True}, "gate_power should be a number above 0, got True"),
        ({"way": "route", "top_k": 0}, "top_k should be a whole number, at least 1, got 0"),
        ({"way": "route", "top_k": 1.5}, "top_k should be a whole number, at least 1, got 1.5"),
        ({"way": "route", "weight_power": -1}, "weight_power should be a number, at least 0, got -1"),
    ],
)
def test_joining_refuses_what_a_way_cannot_take(arguments, message) -> None:
    assert_one_line_value_error(lambda: Joining(**arguments), message)


# Fused: one plain LoRA


def with_ridge(make_doc_to_lora, ridge=2.0):
    model = make_doc_to_lora()
    model.trained_joining = Joining("ridge", ridge=ridge)
    return model


def test_internalized_chunks_stay_as_generated_and_say_the_ridge(make_doc_to_lora) -> None:
    plain = make_doc_to_lora().internalize(DOCUMENTS)
    adapter = with_ridge(make_doc_to_lora).internalize(DOCUMENTS)
    assert adapter.provenance["joining"] == {"way": "ridge", "ridge": 2.0}
    assert plain.provenance["joining"] == {"way": "sum"}
    assert all(torch.equal(adapter.A[name], plain.A[name]) for name in plain.A)


def test_fused_by_ridge_separates_chunks_then_documents(make_doc_to_lora) -> None:
    adapter = with_ridge(make_doc_to_lora).internalize(DOCUMENTS)
    fused = adapter.fused()
    counts = [len(entry["chunks"]) for entry in adapter.provenance["documents"]]
    of = torch.repeat_interleave(torch.tensor(counts))
    for name, rows in adapter.A.items():
        for layer in range(rows.shape[1]):
            own = [by_inverse(part, torch.arange(len(part)), 2.0) for part in rows[:, layer].split(counts)]
            expected = by_inverse(torch.cat(own), of, 2.0)
            torch.testing.assert_close(fused.A[name][:, layer].double(), expected, rtol=0, atol=1e-4)
        assert fused.B[name] is adapter.B[name]
    (entry,) = fused.provenance["operations"]
    assert (entry["operation"], entry["way"], entry["ridge"]) == ("fused", "ridge", 2.0)


def test_fused_adapters_answer_as_their_way_did_before(make_doc_to_lora) -> None:
    model = with_ridge(make_doc_to_lora)
    adapter = model.internalize(DOCUMENTS)
    answers = {}
    for way in ("sum", "ridge"):
        answers[way] = model.generate(QUESTIONS, adapter, join=way, max_new_tokens=8)
        assert model.generate(QUESTIONS, adapter.fused(way), max_new_tokens=8) == answers[way]
    assert model.generate(QUESTIONS, adapter, max_new_tokens=8) == answers["ridge"] != answers["sum"]


def test_fused_follows_rows_that_change_in_place(make_doc_to_lora) -> None:
    model = with_ridge(make_doc_to_lora)
    adapter = model.internalize(DOCUMENTS)
    before = model._as_joined(adapter, model.trained_joining)
    assert model._as_joined(adapter, model.trained_joining) is before  # made once
    assert model._as_joined(adapter, Joining("ridge", ridge=0.5)) is not before
    for rows in adapter.A.values():
        rows[0] *= -2
    after = model._as_joined(adapter, model.trained_joining)
    assert all(torch.equal(after.A[name], adapter.fused().A[name]) for name in adapter.A)


def test_fused_adapters_are_final(make_doc_to_lora) -> None:
    model = with_ridge(make_doc_to_lora)
    adapter = model.internalize(DOCUMENTS)
    fused = adapter.fused()
    assert fused.is_fused and not adapter.is_fused and fused.fused() is fused
    for action, call in {
        "added to others": lambda: concatenate([fused, adapter]),
        "fused": lambda: fused.fused("ridge", ridge=1.0),
        "gated": lambda: model.generate(QUESTIONS, fused, join="gate"),
        "routed": lambda: model.generate(QUESTIONS, fused, join="route"),
    }.items():
        assert_one_line_value_error(call, f"cannot be {action}: fused\\(\\) joined its chunks for good")
    for way in ("gate", "route"):
        assert_one_line_value_error(lambda way=way: adapter.fused(way), f"join={way} chooses chunks for every question")


def test_fusing_what_is_plain_already_returns_it(make_doc_to_lora) -> None:
    plain = make_doc_to_lora().internalize(DOCUMENTS)
    assert plain.fused() is plain and plain.fused("sum") is plain
    single = with_ridge(make_doc_to_lora).internalize(DOCUMENTS[1][:29])
    assert single.num_chunks == 1 and single.fused() is single
    assert_one_line_value_error(lambda: plain.fused("ridge"), "join=ridge needs a ridge")


def test_plain_outputs_join_as_the_hypernetwork_was_trained(make_doc_to_lora, tmp_path) -> None:
    model = with_ridge(make_doc_to_lora)
    adapter = model.internalize(DOCUMENTS)
    summed, separated_ = adapter.fused("sum"), adapter.fused()
    small, wanted, other = (compress(each, 8)[0] for each in (adapter, separated_, summed))
    exported, exported_wanted = (
        LoRAAdapter.load(export_vllm(each, tmp_path / name).directory)
        for name, each in {"one": adapter, "two": separated_}.items()
    )
    for name in adapter.A:
        assert torch.equal(small.bias_A[name], wanted.bias_A[name])
        assert not torch.equal(small.bias_A[name], other.bias_A[name])
        assert torch.equal(exported.bias_A[name], exported_wanted.bias_A[name])
    answers = {}
    for name, each in {"generated": adapter, "fused": separated_, "sum": summed}.items():
        with merged(model.base_model, each):
            answers[name] = model.generate(QUESTIONS, max_new_tokens=8)
    assert answers["generated"] == answers["fused"] != answers["sum"]


def test_adapters_of_version_0_1_are_used_as_they_were(make_doc_to_lora, tmp_path) -> None:
    """Their chunks were separated when they were generated, and a document's entry says with which ridge."""
    model = with_ridge(make_doc_to_lora)
    adapter = model.internalize(DOCUMENTS)
    counts = [len(entry["chunks"]) for entry in adapter.provenance["documents"]]
    old_A = {
        name: torch.cat([separated(part, [len(part)], ridge=2.0) for part in rows.split(counts)])
        for name, rows in adapter.A.items()
    }
    entries = [{**entry, "ridge": 2.0} for entry in adapter.provenance["documents"]]
    provenance = {key: value for key, value in adapter.provenance.items() if key != "joining"}
    old = replace(adapter, A=old_A, provenance={**provenance, "documents": entries})
    old.save(tmp_path / "old")
    old = LoRAAdapter.load(tmp_path / "old")
    assert old.is_fused
    assert model.generate(QUESTIONS, old) == model.generate(QUESTIONS, old, join="sum")
    for name, rows in old.fused("ridge", ridge=2.0).A.items():  # its documents can still be separated
        torch.testing.assert_close(rows, adapter.fused().A[name], rtol=0, atol=1e-5)
    for way, action in (("gate", "gated"), ("route", "routed")):
        message = f"cannot be {action}: version 0.1 separated its chunks when it made it. Internalize"
        assert_one_line_value_error(lambda way=way: model.generate(QUESTIONS, old, join=way), message)


# Training


def test_training_slots_without_a_ridge_are_chunks_by_address() -> None:
    A = {"m": torch.randn(4, 2, 3, 5)}
    B = {"m": torch.randn(4, 2, 3, 6)}
    pool_A, pool_B, slots = separated_slots(A, B, [2, 1, 1], [[0, 2], [1]], ridge=None)
    assert pool_A is A and pool_B is B and slots == [[0, 1, 3], [2]]


def test_training_slots_hold_what_separated_gives() -> None:
    A = {"m": torch.randn(6, 2, 3, 31, dtype=torch.float64)}
    B = {"m": torch.randn(6, 2, 3, 7, dtype=torch.float64)}
    counts, members = [2, 1, 3], [[0, 2], [1], [2, 0, 1], [0]]
    first = [0, 2, 3]
    pool_A, pool_B, slots = separated_slots(A, B, counts, members, ridge=0.7)
    for row, documents in enumerate(members):
        chunks = [first[i] + chunk for i in documents for chunk in range(counts[i])]
        expected = separated(A["m"][chunks], [counts[i] for i in documents], ridge=0.7)
        torch.testing.assert_close(pool_A["m"][slots[row]], expected, rtol=0, atol=1e-10)
        assert torch.equal(pool_B["m"][slots[row]], B["m"][chunks])


# The shipped model


def test_shipped_model_routes_to_the_document_asked_about() -> None:
    model = DocToLoRA.from_pretrained(Path(__file__).parents[2] / "assets/tiny")
    encyclopedia = Encyclopedia("test", seed=4)
    records = [encyclopedia.record(index, num_entities=1, num_facts=3, num_distractors=1) for index in range(8)]
    adapters = [model.internalize(record.document) for record in records]
    adapter = concatenate(adapters)
    asked = [(i, question) for i, record in enumerate(records) for question in record.questions]
    questions = [question.text for _, question in asked]
    chosen = routed(model, adapter, prompts_of(model, questions))
    shas = [adapters[i].provenance["documents"][0]["sha256"] for i, _ in asked]
    found = [
        sha in {entry["sha256"] for entry in a.provenance["documents"]} for sha, a in zip(shas, chosen, strict=True)
    ]
    assert sum(found) >= 0.9 * len(found)  # by chance .25 at most
    answers = model.generate(questions, adapter, join="route")
    right = [exact_match(answer, [question.answer]) for answer, (_, question) in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.8 * len(right)
