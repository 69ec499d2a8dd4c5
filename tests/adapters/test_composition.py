"""composition: every operation against dense float64 matrices, what the provenance says, and what is refused."""

import math

import pytest
import torch

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.composition import (
    average,
    compress,
    concatenate,
    find_document,
    pad,
    remove_document,
    scale,
    select_chunks,
    weight,
)
from hypernet.adapters.injection import LoRAInjector
from hypernet.adapters.merging import merge, merged, unmerge
from hypernet.base.targets import LoRATarget
from hypernet.interop.vllm import export_vllm
from tests.adapters.test_adapter import assert_one_line_value_error, assert_same, make_adapter, make_base_model, targets  # noqa: F401
from tests.adapters.test_joining import by_inverse

# Layers of different widths, one of them without the module, as hybrid models have them.
UNEVEN = (
    LoRATarget("up", ("a.0.up", None, "a.2.up"), 7, 5, ((7, 5), None, (3, 4))),
    LoRATarget("down", ("a.0.down", "a.1.down", "a.2.down"), 5, 6, ((5, 6), (4, 6), (2, 1))),
)


def uneven_adapter(num_chunks=2, *, rank=3, seed=1, dtype=torch.float32, **kwargs):
    """Like an adapter from a file: zero where a layer is narrower or has no such module."""
    adapter = make_adapter(UNEVEN, num_chunks, rank=rank, seed=seed, dtype=dtype, **kwargs)
    for field in ("A", "B", "bias_A", "bias_B"):
        for target in UNEVEN:
            blocks = getattr(adapter, field)[target.name]
            place = 0 if "A" in field else 1
            for layer, widths in enumerate(target.widths):
                blocks[..., layer, :, (widths or (0, 0))[place] :] = 0
    return adapter


def deltas(adapter):
    """Module path to its dense delta, in float64, from chunks and bias block one by one."""
    found = {}
    for target in adapter.targets:
        for module in target.modules():
            blocks = [
                (adapter.A[target.name][c, module.layer], adapter.B[target.name][c, module.layer])
                for c in range(adapter.num_chunks)
            ]
            blocks.append((adapter.bias_A[target.name][module.layer], adapter.bias_B[target.name][module.layer]))
            delta = sum(B.double()[:, : module.d_out].T @ A.double()[:, : module.d_in] for A, B in blocks)
            found[module.path] = adapter.scaling * delta
    return found


def bias_deltas(adapter):
    return deltas(
        LoRAAdapter(
            adapter.targets,
            {n: A[:0] for n, A in adapter.A.items()},
            {n: B[:0] for n, B in adapter.B.items()},
            adapter.bias_A,
            adapter.bias_B,
            adapter.scaling,
            adapter.provenance,
        )
    )


def assert_deltas(actual, expected, **tolerance):
    actual = deltas(actual) if isinstance(actual, LoRAAdapter) else actual
    assert actual.keys() == expected.keys()
    for path in expected:
        torch.testing.assert_close(actual[path], expected[path], **tolerance)


def three(num_chunks=(2, 0, 3), **kwargs):
    return [uneven_adapter(n, seed=seed, **kwargs) for seed, n in enumerate(num_chunks, 1)]


# Concatenate, average, weight


def test_concatenate_equals_repeated_addition():
    adapters = three()
    joined = concatenate(adapters)
    assert_same_weights(joined, adapters[0] + adapters[1] + adapters[2])
    assert [d["name"] for d in joined.provenance["documents"]] == ["d1.txt", "d2.txt", "d3.txt"]
    bias = bias_deltas(joined)
    expected = {path: sum(deltas(a)[path] - bias[path] for a in adapters) + bias[path] for path in bias}
    assert_deltas(joined, expected, rtol=1e-6, atol=1e-6)
    assert_same_weights(concatenate(adapters[:1]), adapters[0])
    assert "operations" not in joined.provenance


def assert_same_weights(a, b):
    for field in ("A", "B", "bias_A", "bias_B"):
        for name, tensor in getattr(a, field).items():
            assert torch.equal(tensor, getattr(b, field)[name])


@pytest.mark.parametrize("join", [concatenate, average])
def test_list_without_adapters_is_refused(join):
    assert_one_line_value_error(lambda: join([]), "There is no adapter to concatenate: the list is empty.")


@pytest.mark.parametrize("adapters", [make_adapter(UNEVEN), "outputs/fenda", None, 3])
def test_concatenate_refuses_what_is_no_list(adapters):
    with pytest.raises(TypeError, match="^Expected a list of adapters to concatenate, got "):
        concatenate(adapters)


ON_ONE = {
    "concatenate": lambda adapter: concatenate([make_adapter(UNEVEN), adapter]),
    "with_chunks_of": lambda adapter: make_adapter(UNEVEN).with_chunks_of([adapter]),
    "weight": lambda adapter: weight(adapter, 0.5),
    "remove_document": lambda adapter: remove_document(adapter, "a"),
    "find_document": lambda adapter: find_document(adapter, "a"),
    "select_chunks": lambda adapter: select_chunks(adapter, [0]),
    "scale": lambda adapter: scale(adapter, 2),
    "compress": lambda adapter: compress(adapter, 2),
    "pad": lambda adapter: pad(adapter, 2),
    "merge": lambda adapter: merge(torch.nn.Linear(1, 1), adapter),
    "unmerge": lambda adapter: unmerge(torch.nn.Linear(1, 1), adapter),
    "merged": lambda adapter: merged(torch.nn.Linear(1, 1), adapter).__enter__(),
    "export_vllm": lambda adapter: export_vllm(adapter, "outputs/served"),
}


@pytest.mark.parametrize("name", ON_ONE)
def test_what_is_no_adapter_is_refused(name):
    for wrong in ("outputs/fenda", None, 3):
        with pytest.raises(TypeError, match="^Expected a LoRAAdapter, got .*LoRAAdapter.load") as error:
            ON_ONE[name](wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_average_equals_mean_of_deltas(dtype, rtol):
    adapters = three(dtype=dtype)
    mean = average(adapters)
    dense = [deltas(a) for a in adapters]
    expected = {path: sum(d[path] for d in dense) / 3 for path in dense[0]}
    size = max(delta.norm() for delta in expected.values())  # a small module's documents can cancel out
    for path, delta in deltas(mean).items():
        assert (delta - expected[path]).norm() <= rtol * size
    assert [d["weight"] for d in mean.provenance["documents"]] == [1 / 3] * 3
    assert all(torch.equal(mean.bias_B[n], adapters[0].bias_B[n]) for n in mean.bias_B)


def test_weight_scales_chunks_of_one_document_only():
    both = concatenate(three((2, 1, 2)))
    halved = weight(both, 0.5, document="d2.txt")
    for name in both.B:
        assert torch.equal(halved.B[name][2], both.B[name][2] / 2)
        for rows in (slice(0, 2), slice(3, 5)):
            assert torch.equal(halved.B[name][rows], both.B[name][rows])
        assert torch.equal(halved.bias_B[name], both.bias_B[name]) and torch.equal(halved.A[name], both.A[name])
    assert [d.get("weight") for d in halved.provenance["documents"]] == [None, 0.5, None]
    assert "weight" not in both.provenance["documents"][1]  # the original is untouched
    again = weight(halved, 3)
    assert [d["weight"] for d in again.provenance["documents"]] == [3.0, 1.5, 3.0]
    assert concatenate([again, halved]).num_chunks == 10  # weighted adapters can still be added


def test_document_weights_survive_save_and_removal(tmp_path):
    both = weight(concatenate(three((2, 1, 2))), 2.0, document=2)
    both.save(tmp_path / "a")
    kept = remove_document(LoRAAdapter.load(tmp_path / "a"), "d1.txt")
    assert [(d["name"], d.get("weight")) for d in kept.provenance["documents"]] == [("d2.txt", None), ("d3.txt", 2.0)]


@pytest.mark.parametrize("factor", [math.nan, math.inf, "2", None, True])
def test_weight_refuses_nonfinite_factor(factor):
    assert_one_line_value_error(lambda: weight(uneven_adapter(), factor), "Expected a finite number as factor")


# Remove a document


@pytest.mark.parametrize("document", [0, 1, 2, "d1.txt", "d2.txt", "d3d3", "d2" * 8])
def test_remove_document_equals_never_adding_it(document):
    adapters = three((2, 1, 3))
    joined = concatenate(adapters)
    index = find_document(joined, document)
    without = concatenate([a for place, a in enumerate(adapters) if place != index])
    removed = remove_document(joined, document)
    assert_same_weights(removed, without)
    assert removed.provenance["documents"] == without.provenance["documents"]
    assert removed.content_id() == without.content_id()


def test_removing_last_document_leaves_bias_block():
    adapter = uneven_adapter(1)
    alone = remove_document(adapter, 0)
    assert alone.num_chunks == 0 and alone.provenance["documents"] == []
    assert_deltas(alone, bias_deltas(adapter), rtol=0, atol=0)
    assert concatenate([alone, adapter]).num_chunks == 1


@pytest.mark.parametrize(
    "document, message",
    [
        ("nobody.txt", r"No document 'nobody.txt' .* holds 0: d1.txt \(d1d1d1d1d1d1\), 1: d2.txt"),
        (7, "No document 7"),
        (-1, "No document -1"),
        (True, "No document True"),
        ("", "No document ''"),
        (None, "No document None"),
        ("d", r"'d' could be 3 documents: 0: d1.txt .*Give the index"),
        ("d1.txt", r"'d1.txt' could be 2 documents: 0: d1.txt \(d1d1d1d1d1d1\), 2: d1.txt"),
    ],
)
def test_unknown_or_ambiguous_document_is_refused_with_list(document, message):
    one, two = uneven_adapter(1, seed=1), uneven_adapter(1, seed=2)
    assert_one_line_value_error(lambda: remove_document(concatenate([one, two, one]), document), message)


def test_remove_document_refuses_chunks_without_owner():
    adapter = uneven_adapter(2)
    adapter.provenance["documents"][0]["chunks"].pop()
    message = "counts 1 chunks in 1 documents, the weights hold 2"
    assert_one_line_value_error(lambda: remove_document(adapter, 0), message)


# Take


def test_select_chunks_keeps_weights_and_documents():
    joined = concatenate(three((2, 1, 3)))
    taken = select_chunks(joined, [1, 2, 5])
    for field in ("A", "B"):
        for name, rows in getattr(taken, field).items():
            assert torch.equal(rows, getattr(joined, field)[name][[1, 2, 5]])
    before, after = joined.provenance["documents"], taken.provenance["documents"]
    assert [d["name"] for d in after] == ["d1.txt", "d2.txt", "d3.txt"]
    assert [d["chunks"] for d in after] == [before[0]["chunks"][1:], before[1]["chunks"], before[2]["chunks"][2:]]
    assert_same_weights(remove_document(taken, "d1.txt"), select_chunks(joined, [2, 5]))
    assert select_chunks(joined, [3]).provenance["documents"] == [{**before[2], "chunks": before[2]["chunks"][:1]}]
    assert_deltas(select_chunks(joined, []), bias_deltas(joined), rtol=0, atol=0)
    halved = select_chunks(joined, [1, 5], [0.5, 2.0])
    for name, rows in halved.B.items():
        assert torch.equal(rows[0], joined.B[name][1] * 0.5) and torch.equal(rows[1], joined.B[name][5] * 2)
    assert halved.provenance["operations"][-1]["weights"] == [0.5, 2.0]


@pytest.mark.parametrize("chunks", [[2], [-1], [1, 0], [1, 1]])
def test_select_chunks_refuses_missing_indices(chunks):
    message = r"ascending numbers from 0 to 1, each once, got \["
    assert_one_line_value_error(lambda: select_chunks(uneven_adapter(2), chunks), message)


def test_select_chunks_wants_one_finite_weight_per_chunk():
    adapter = uneven_adapter(2)
    assert_one_line_value_error(lambda: select_chunks(adapter, [0, 1], [1.0]), "a weight for each of 2 chunks, got 1")
    assert_one_line_value_error(lambda: select_chunks(adapter, [0], [math.nan]), "Expected a finite number as weight")


# Scale


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_scale_is_linear_per_layer_and_includes_bias_block(dtype, rtol):
    adapter = uneven_adapter(2, dtype=dtype)
    factors = [0.5, 2.0, -3.0]
    scaled = scale(adapter, factors)
    for path, delta in deltas(scaled).items():
        expected = factors[int(path.split(".")[1])] * deltas(adapter)[path]
        assert (delta - expected).norm() <= rtol * expected.norm()
    (entry,) = scaled.provenance["operations"]
    assert entry == {"operation": "scale", "factor": factors, "documents": ["d1" * 8]}
    assert scaled.A["up"] is adapter.A["up"] and scaled.B["up"].dtype == dtype
    twice = deltas(scale(adapter, 2))
    assert_deltas(twice, {path: 2 * delta for path, delta in deltas(adapter).items()}, rtol=0, atol=0)


@pytest.mark.parametrize(
    "factor, message",
    [
        ([1.0, 2.0], "one for each of 3 layers, got 2"),
        ([], "got 0"),
        (math.nan, "finite number as factor, got nan"),
        ([1, 2, "x"], "finite number as factor, got 'x'"),
    ],
)
def test_scale_refuses_invalid_factors(factor, message):
    assert_one_line_value_error(lambda: scale(uneven_adapter(), factor), message)


def test_add_refuses_differently_scaled_adapters():
    one, two = uneven_adapter(seed=1), uneven_adapter(seed=2)
    both = scale(one, 2) + scale(two, 2)
    assert_same_weights(both, scale(one + two, 2))
    assert [entry["documents"] for entry in both.provenance["operations"]] == [["d1" * 8], ["d2" * 8]]
    assert_one_line_value_error(lambda: scale(one, 2) + two, "been scaled differently")


# Compress


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 12, 20])
@pytest.mark.parametrize("num_chunks, own_rank", [(0, 1), (0, 3), (1, 1), (1, 3), (5, 3)])
def test_compress_matches_dense_svd_and_reports_errors(num_chunks, own_rank, rank):
    adapter = uneven_adapter(num_chunks, rank=own_rank)
    small, report = compress(adapter, rank)
    assert (small.num_chunks, small.rank, report.rank, report.rank_before) == (0, rank, rank, adapter.rank)
    before, after = deltas(adapter), deltas(small)
    assert [module.path for module in report.modules] == list(before)
    for module in report.modules:
        sigma = torch.linalg.svdvals(before[module.path])
        tail = sigma[rank:]
        difference = before[module.path] - after[module.path]
        slack = 1e-6 * sigma.norm().item()  # of float32
        assert abs(module.norm - sigma.norm()) < slack
        assert abs(module.optimal_error - tail.norm()) < slack
        assert abs(module.error - difference.norm()) < 1e-9 * sigma.norm()  # measured, so it has the rounding too
        assert module.error <= module.optimal_error + slack  # Eckart-Young: it cannot be better, and it is as good
        assert abs(module.spectral_bound - (tail[0] if len(tail) else 0)) < slack
        assert torch.linalg.matrix_norm(difference, 2) <= module.spectral_bound + slack
        assert module.relative_error == module.error / module.norm
    total = math.sqrt(sum((before[p] - after[p]).norm() ** 2 for p in before))
    assert report.relative_error == pytest.approx(total / math.sqrt(sum(d.norm() ** 2 for d in before.values())))
    assert report.worst.relative_error == max(m.relative_error for m in report.modules)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 1e-3)])
def test_compress_at_full_rank_restores_delta(dtype, rounding):
    adapter = uneven_adapter(2, dtype=dtype)
    for rank in (adapter.rank, adapter.rank + 4):
        small, report = compress(adapter, rank)
        assert report.relative_error < rounding and report.worst.optimal_error < 1e-9
        assert small.A["up"].dtype == small.bias_B["up"].dtype == dtype
        for path, delta in deltas(small).items():
            assert (delta - deltas(adapter)[path]).norm() < rounding * deltas(adapter)[path].norm()


def test_compress_avoids_dense_matrix_and_balances_factors(monkeypatch):
    adapter = make_adapter((LoRATarget("up", ("up",), 700, 900),), 2)
    largest = 0
    original = torch.linalg.svd

    def watched(matrix, **kwargs):
        nonlocal largest
        largest = max(largest, *matrix.shape)
        return original(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    small, _ = compress(adapter, 4)
    assert largest == adapter.rank
    gram_A, gram_B = (rows["up"][0] @ rows["up"][0].T for rows in (small.bias_A, small.bias_B))
    torch.testing.assert_close(gram_A, gram_B, rtol=1e-4, atol=1e-5)
    assert gram_A.diagonal().diff().max() < 0  # largest first


def test_compress_of_zero_delta_is_zero():
    adapter = uneven_adapter(1)
    zero = scale(adapter, 0.0)
    small, report = compress(zero, 2)
    assert report.relative_error == 0 and all(not B.any() for B in small.bias_B.values())


def test_compressed_adapter_keeps_answers_but_has_no_chunks(targets, tmp_path):  # noqa: F811
    base_model, ids = make_base_model(), torch.arange(2, 16).view(2, 7)
    adapter = make_adapter(targets, 3, scaling=8.0)
    same, _ = compress(adapter, adapter.rank)
    with torch.no_grad():
        injector = LoRAInjector(base_model, targets)
        logits = []
        for one in (adapter, same):
            with injector.using(one):
                logits.append(base_model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    small, report = compress(adapter, 4)
    small.save(tmp_path / "small")
    again = LoRAAdapter.load(tmp_path / "small")
    assert_same(again, small)
    (entry,) = again.provenance["operations"]
    assert entry["operation"] == "compress" and entry["relative_error"] == report.relative_error
    assert (entry["rank_before"], entry["rank"]) == (12, 4)
    assert [d["name"] for d in again.provenance["documents"]] == ["d1.txt"]
    for refused in (
        lambda: remove_document(again, 0),
        lambda: weight(again, 2.0),
        lambda: again + again,
        lambda: adapter + again,
        lambda: average([again, again]),
    ):
        assert_one_line_value_error(refused, r"cannot be .*: compress\(\) made one block")
    smaller, _ = compress(scale(again, 2.0), 2)
    assert [e["operation"] for e in smaller.provenance["operations"]] == ["compress", "scale", "compress"]


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", True])
def test_compress_refuses_rank_below_one(rank):
    for operation in (compress, pad):
        assert_one_line_value_error(lambda: operation(uneven_adapter(), rank), "Expected a rank of 1 or more")  # noqa: B023


def test_compress_refuses_nonfinite_weights():
    adapter = uneven_adapter()
    adapter.A["down"][0, 1, 0, 0] = math.nan
    assert_one_line_value_error(lambda: compress(adapter, 2), "a.1.down are not all finite")


# Decorrelate


def test_decorrelated_rows_match_inverse_per_module(tmp_path):
    """Module by module as the rows themselves; bias block and B as they were; saved like any other adapter."""
    joined = concatenate(three((2, 1, 3)))
    result = joined.fused("ridge", ridge=0.8)
    documents = torch.tensor([0, 0, 1, 2, 2, 2])
    for target in UNEVEN:
        name = target.name
        for module in target.modules():
            rows = joined.A[name][:, module.layer, :, : module.d_in]  # of this module alone, at its own width
            own = [by_inverse(rows[documents == i], torch.arange((documents == i).sum()), 0.8) for i in range(3)]
            expected = by_inverse(torch.cat(own), documents, 0.8).float()
            torch.testing.assert_close(result.A[name][:, module.layer, :, : module.d_in], expected, rtol=0, atol=1e-4)
            assert not result.A[name][:, module.layer, :, module.d_in :].any()
        assert torch.equal(result.B[name], joined.B[name])
        assert torch.equal(result.bias_A[name], joined.bias_A[name])
        assert torch.equal(result.bias_B[name], joined.bias_B[name])
    (entry,) = result.provenance["operations"]
    assert (entry["operation"], entry["ridge"], len(entry["documents"])) == ("fused", 0.8, 3)
    result.save(tmp_path / "joined")
    assert_same(LoRAAdapter.load(tmp_path / "joined"), result)


def test_fused_documents_can_not_change_any_more():
    (alone,) = three((1,))
    assert alone.fused("ridge", ridge=2.0) is alone
    result = concatenate(three((2, 1, 3))).fused("ridge", ridge=2.0)
    for refused in (
        lambda: remove_document(result, 0),
        lambda: weight(result, 2.0),
        lambda: result + alone,
        lambda: alone + result,
        lambda: result.fused("ridge", ridge=2.0),
    ):
        assert_one_line_value_error(refused, r"cannot be .*: fused\(\) joined its chunks for good")
    assert [e["operation"] for e in scale(result, 2.0).provenance["operations"]] == ["fused", "scale"]
    small, _ = compress(result, 2)
    assert_one_line_value_error(lambda: small.fused("ridge", ridge=2.0), r"cannot be fused: fused\(\) joined")
    for ridge in (0, -1.0, math.inf, "2", True):
        assert_one_line_value_error(lambda: concatenate(three()).fused("ridge", ridge=ridge), "ridge")  # noqa: B023


# Pad


@pytest.mark.parametrize("num_chunks, extra", [(0, 0), (0, 5), (1, 0), (3, 1)])
def test_pad_keeps_delta_and_adds_zero_rows(num_chunks, extra):
    adapter = uneven_adapter(num_chunks, dtype=torch.bfloat16)
    padded = pad(adapter, adapter.rank + extra)
    assert padded.rank == adapter.rank + extra and padded.num_chunks == 0
    for name, (A, B) in adapter.concatenated().items():
        assert torch.equal(padded.bias_A[name][:, : adapter.rank], A)
        assert torch.equal(padded.bias_B[name][:, : adapter.rank], B)
        assert not padded.bias_A[name][:, adapter.rank :].any() and not padded.bias_B[name][:, adapter.rank :].any()
    if (num_chunks, extra) != (0, 0):
        assert_one_line_value_error(lambda: remove_document(padded, 0), r"pad\(\) made one block")


def test_pad_refuses_smaller_rank():
    assert_one_line_value_error(lambda: pad(uneven_adapter(2), 8), "a rank of 9 or more to pad to, got 8")
