"""lora_delta against a float64 loop over tokens and slots: values, every gradient by name, odd sizes, and the plan.

Every test runs with both implementations. Where there is no GPU, Triton's interpreter runs the kernels on the CPU;
there bf16 is widened to float32 after each load, because interpreted bf16 arithmetic is wrong.
"""

import pytest
import torch

from hypernet.kernels.lora_delta import Capacity, Plan, lora_delta
from hypernet.kernels.lora_delta import kernels as triton_kernels
from hypernet.kernels.lora_delta.op import _backward, _forward, chosen_implementation
from hypernet.kernels.lora_delta.plan import DECODE_TOKENS, PIECE_TOKENS, TILE_TOKENS

DEVICE = "cpu" if triton_kernels.interpreted() else "cuda"


@pytest.fixture(autouse=True, params=["reference", "triton"])
def implementation(request, monkeypatch):
    """What D2L_LORA_DELTA asks for; and uninitialised memory holds NaN, so that what is not written shows."""
    monkeypatch.setenv("D2L_LORA_DELTA", request.param)
    empty = torch.empty

    def poisoned(*size, **settings):
        tensor = empty(*size, **settings)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    if request.param == "triton":
        monkeypatch.setattr(torch, "empty", poisoned)
    return request.param


def plan_of(lengths, slots, *, num_slots, capacity=None):
    return Plan.from_lists(lengths, slots, num_slots=num_slots, device=DEVICE, capacity=capacity)


SCALING = 1.7
NAMES = ("base", "x", "A", "B", "slot_scale")

# (segment lengths, slot lists, pool size)
CASES = {
    "one_run": ([37], [[0]], 1),
    "single_token": ([1], [[2, 0]], 3),
    "uniform": ([3, 3, 3], [[0, 3], [1, 3], [2, 3]], 4),
    "ragged": ([1, 37, 3], [[0], [4, 1, 2], [3, 0]], 5),
    "same_list_twice": ([3, 2, 37, 3], [[0, 1], [0, 1], [2], [0, 1]], 3),
    "empty_segments": ([0, 3, 0, 1, 0], [[0], [1], [], [0, 1], [1]], 2),
    "segments_without_slots": ([3, 37, 1, 3], [[], [1, 0], [], [2]], 3),
    "slot_repeated_in_list": ([3, 1], [[0, 0, 1], [1, 1]], 2),
    "unused_slots": ([3, 1], [[5], [2]], 7),
    "no_slots_at_all": ([3, 1], [[], []], 2),
    "no_tokens": ([0], [[0]], 1),
    "no_segments": ([], [], 1),
    "one_run_in_two_places": ([2, 3, 2], [[1, 0], [2], [1, 0]], 3),
    "many_chunks": ([3, 2], [[*range(39), 40], [40]], 41),
    "more_tokens_than_one_tile": ([70, 90], [[0, 1], [1]], 2),
}
SIZES = [(1, 1, 1), (3, 37, 1), (37, 3, 8), (100, 37, 3)]  # d_in, d_out, R
LARGEST = pytest.param(SIZES[3], marks=pytest.mark.overflow_is_checked)


def make_inputs(num_tokens, num_slots, d_in, d_out, rank, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "base": normal(num_tokens, d_out).to(dtype),
        "x": normal(num_tokens, d_in).to(dtype),
        "A": normal(num_slots, rank, d_in) / d_in**0.5,
        "B": normal(num_slots, rank, d_out),
        "slot_scale": 0.5 + torch.rand(num_slots, generator=generator),
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def loop_float64(base, x, A, B, lengths, slots, slot_scale, gate=0.0):
    """One token and one slot at a time."""
    rows, token = [], 0
    for length, ids in zip(lengths, slots, strict=True):
        for _ in range(length):
            row = base[token].double()
            S = [A[slot].double() @ x[token].double() for slot in ids]
            scores = [(values * values).sum() for values in S]
            for slot, values, score in zip(ids, S, scores, strict=True):
                weight = (score / max(scores)) ** gate if gate else 1.0
                row = row + SCALING * weight * slot_scale[slot].double() * values @ B[slot].double()
            rows.append(row)
            token += 1
    return torch.stack(rows) if rows else base.double()


def values_and_gradients(function, inputs):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(**leaves)
    # Of few bits: what arrives at a 16-bit y is then what arrives at a float64 one.
    weights = ((7 * torch.arange(y.numel(), device=y.device) % 17 - 8) / 8).double().view(y.shape)
    (y.double() * weights).sum().backward()
    zero_if_unused = {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}
    return y.detach(), zero_if_unused


def op_and_loop(case, sizes, dtype, gate):
    """What the op gives for a case, and the loop in float64, whose sums must not be rounded either: (y, gradients)."""
    lengths, slots, num_slots = CASES[case]
    inputs = make_inputs(sum(lengths), num_slots, *sizes, dtype=dtype)
    plan = plan_of(lengths, slots, num_slots=num_slots)
    y, grads = values_and_gradients(lambda **kw: lora_delta(plan=plan, scaling=SCALING, gate=gate, **kw), inputs)
    assert y.dtype == dtype
    assert all(grads[name].dtype == inputs[name].dtype for name in NAMES)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    loop = lambda **kw: loop_float64(lengths=lengths, slots=slots, gate=gate, **kw)  # noqa: E731
    return (y, grads), values_and_gradients(loop, wide)


def assert_matches_loop(case, sizes, dtype=torch.float32, tolerance=1e-5, y_tolerance=None, gate=0.0):
    (y, grads), (expected, expected_grads) = op_and_loop(case, sizes, dtype, gate)
    y_tolerance = y_tolerance or tolerance
    torch.testing.assert_close(y.double(), expected, rtol=y_tolerance, atol=y_tolerance)
    for name in NAMES:
        scale = max(1.0, expected_grads[name].abs().max().item() if expected_grads[name].numel() else 1.0)
        torch.testing.assert_close(
            grads[name].double() / scale,
            expected_grads[name] / scale,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


def assert_matches_loop_but_for_rounding(case, sizes, dtype, gate=0.0):
    """For compiled kernels, which round A, B and S to 16 bits as the frozen layer's weights are.

    However small a sum of many products comes out, each of them brings a rounding of its size. So the errors are
    taken together, as a share of all values, and the largest as a share of the largest value.
    """
    rounding = torch.finfo(dtype).eps
    (y, grads), (expected, expected_grads) = op_and_loop(case, sizes, dtype, gate)
    for name, got, wanted in [("y", y, expected), *((name, grads[name], expected_grads[name]) for name in NAMES)]:
        error = got.double() - wanted
        assert error.norm() <= rounding * wanted.norm(), (name, float(error.norm() / wanted.norm()) / rounding)
        assert error.abs().max() <= 2 * rounding * wanted.abs().max(), (name, float(error.abs().max()))


@pytest.mark.parametrize("sizes", [*SIZES[:3], LARGEST])
@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient_match_a_float64_loop(case, sizes):
    """Every case with every size; every case, and every size, with a gate and without one."""
    place = [*CASES].index(case) + SIZES.index(sizes)
    if place % 2:
        assert_matches_loop(case, sizes)
    else:
        # More is rounded than in a plain sum: a quotient, its power and the product with it.
        assert_matches_loop(case, sizes, gate=(2.0, 0.5)[place // 2 % 2], tolerance=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(
    "case, gates", [("uniform", (0.0, 1.5)), ("ragged", (1.5, 0.0)), ("segments_without_slots", (0.0, 1.5))]
)
def test_half_precision_matches_and_A_B_gradients_are_float32(case, gates, dtype, tolerance, implementation):
    gate = gates[dtype == torch.float16]
    if implementation == "triton" and DEVICE == "cuda":
        assert_matches_loop_but_for_rounding(case, (37, 100, 8), dtype, gate)
    else:
        assert_matches_loop(case, (37, 100, 8), dtype, tolerance, gate=gate)


@pytest.mark.parametrize("case", ["uniform", "ragged"])
def test_half_precision_result_is_float32_rounded_once(case, implementation):
    if implementation == "triton" and DEVICE == "cuda":
        pytest.skip("compiled kernels multiply in the 16-bit type, which rounds A, B and S too")
    lengths, slots, num_slots = CASES[case]
    # The interpreter cuts bf16 off instead of rounding it.
    dtype = torch.float16 if implementation == "triton" else torch.bfloat16
    inputs = make_inputs(sum(lengths), num_slots, 100, 37, 8, dtype=dtype)
    plan = plan_of(lengths, slots, num_slots=num_slots)
    y = lora_delta(plan=plan, scaling=SCALING, **inputs)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    assert torch.equal(y, lora_delta(plan=plan, scaling=SCALING, **wide).to(dtype))


def test_autocast_does_not_round_A_and_B():
    inputs = make_inputs(6, 2, 37, 3, 8)
    plan = plan_of([3, 3], [[0], [1]], num_slots=2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = lora_delta(plan=plan, scaling=SCALING, **inputs)
    assert torch.equal(inside, lora_delta(plan=plan, scaling=SCALING, **inputs))


@pytest.mark.parametrize("gate", [0.0, 1.5])
def test_lora_delta_passes_gradcheck_in_float64(gate, implementation):
    if implementation == "triton":
        pytest.skip("the kernels sum up in float32; float64 is the reference's")
    inputs = {n: t.double().requires_grad_() for n, t in make_inputs(6, 3, 3, 2, 2).items()}
    plan = plan_of([2, 1, 3], [[0, 2], [], [2, 1, 1]], num_slots=3)
    settings = {"scaling": SCALING, "gate": gate}
    function = lambda base, x, A, B, s: lora_delta(base, x, A, B, plan, slot_scale=s, **settings)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in NAMES))


def test_rows_without_slots_are_the_base_and_nan_stays_there():
    lengths, slots = [3, 37, 1, 3], [[], [1, 0], [], [2]]
    inputs = make_inputs(sum(lengths), 4, 37, 3, 8)
    plan = plan_of(lengths, slots, num_slots=4)
    without = torch.zeros(sum(lengths), dtype=torch.bool)
    without[:3] = without[40] = True
    clean, clean_grads = values_and_gradients(lambda **kw: lora_delta(plan=plan, scaling=SCALING, **kw), inputs)
    assert torch.equal(clean[without], inputs["base"][without])

    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    poisoned["x"][without] = torch.nan
    poisoned["A"][3] = poisoned["B"][3] = poisoned["slot_scale"][3] = torch.nan  # a slot nobody uses
    y, grads = values_and_gradients(lambda **kw: lora_delta(plan=plan, scaling=SCALING, **kw), poisoned)
    assert torch.equal(y, clean)
    for name in NAMES:
        assert torch.equal(grads[name], clean_grads[name]), name
    assert not grads["x"][without].any() and not grads["A"][3].any() and not grads["B"][3].any()


def test_a_high_gate_power_leaves_the_top_slot_alone():
    inputs = make_inputs(40, 4, 37, 100, 8)
    alone = plan_of([40], [[2]], num_slots=4)
    ungated = lora_delta(plan=alone, scaling=SCALING, **inputs)
    assert torch.equal(lora_delta(plan=alone, scaling=SCALING, gate=1.5, **inputs), ungated)
    scores = torch.einsum("srd,td->tsr", inputs["A"], inputs["x"]).square().sum(-1)
    runs, ids = [1] * 40, [[slot] for slot in scores.argmax(1).tolist()]
    top = lora_delta(plan=plan_of(runs, ids, num_slots=4), scaling=SCALING, **inputs)
    sharp = lora_delta(plan=plan_of([40], [[0, 1, 2, 3]], num_slots=4), scaling=SCALING, gate=1e4, **inputs)
    close = scores.topk(2, dim=1).values
    apart = close[:, 1] < 0.99 * close[:, 0]
    assert apart.sum() > 30
    torch.testing.assert_close(sharp[apart], top[apart], rtol=1e-5, atol=1e-5)


def test_gate_handles_slots_with_zero_scores():
    inputs = make_inputs(5, 3, 37, 3, 8)
    inputs["A"][:2] = 0
    plan = plan_of([3, 2], [[0, 1, 2], [0, 1]], num_slots=3)
    y, grads = values_and_gradients(lambda **kw: lora_delta(plan=plan, scaling=SCALING, gate=0.5, **kw), inputs)
    assert torch.equal(y[3:], inputs["base"][3:])
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("gate", [-0.1, float("nan"), float("inf")])
def test_gate_refuses_invalid_power(gate):
    with pytest.raises(ValueError, match=f"gate should be a number of at least 0, got {gate}"):
        lora_delta(plan=plan_of([4], [[0]], num_slots=2), scaling=1.0, gate=gate, **make_inputs(4, 2, 3, 3, 1))


def test_plan_without_any_slot_returns_the_base_tensor_itself():
    inputs = make_inputs(4, 2, 3, 3, 1)
    assert lora_delta(plan=plan_of([3, 1], [[], []], num_slots=2), scaling=1.0, **inputs) is inputs["base"]


@pytest.mark.parametrize("gate", [0.0, 1.5])
@pytest.mark.parametrize(
    "lengths, slots", [([100], [[0, 1, 2]]), ([3, 3], [[0, 1, 2], [3, 4, 1]]), ([1, 37], [[0, 1], [2]])]
)
def test_order_of_chunks_does_not_matter(lengths, slots, gate):
    inputs = make_inputs(sum(lengths), 5, 37, 3, 8)
    forward = plan_of(lengths, slots, num_slots=5)
    backward = plan_of(lengths, [ids[::-1] for ids in slots], num_slots=5)
    settings = {"scaling": SCALING, "gate": gate}
    torch.testing.assert_close(
        lora_delta(plan=forward, **settings, **inputs), lora_delta(plan=backward, **settings, **inputs)
    )


@pytest.mark.parametrize("uniform", [True, False])
def test_one_rank_64_slot_equals_eight_rank_8_slots(uniform):
    wide = make_inputs(38, 2, 37, 100, 64)
    del wide["slot_scale"]
    narrow = wide | {"A": wide["A"].view(16, 8, 37), "B": wide["B"].view(16, 8, 100)}
    lengths = [19, 19] if uniform else [1, 37]
    one = plan_of(lengths, [[0], [1]], num_slots=2)
    eight = plan_of(lengths, [list(range(8)), list(range(8, 16))], num_slots=16)
    assert torch.equal(lora_delta(plan=one, scaling=SCALING, **wide), lora_delta(plan=eight, scaling=SCALING, **narrow))


def test_strided_pools_give_the_same_result_and_gradients():
    torch.manual_seed(0)
    pool_A, pool_B = (torch.randn(3, 2, 8, 37) / 37**0.5).to(DEVICE), torch.randn(3, 2, 8, 100).to(DEVICE)
    pool_A.requires_grad_(), pool_B.requires_grad_()
    base, x = torch.randn(5, 100).to(DEVICE), torch.randn(37, 5).to(DEVICE).T
    plan = plan_of([2, 3], [[0, 2], [1]], num_slots=3)
    y = lora_delta(base, x, pool_A[:, 1], pool_B[:, 1], plan, scaling=SCALING)
    expected = loop_float64(base, x, pool_A[:, 1], pool_B[:, 1], [2, 3], [[0, 2], [1]], torch.ones(3, device=DEVICE))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert not pool_A.grad[:, 0].any() and pool_A.grad[:, 1].abs().sum() > 0


def test_plan_merges_equal_neighbours_and_drops_empty_segments():
    plan = plan_of([5, 0, 7, 2, 1], [[0, 2], [1], [0, 2], [], [0, 2]], num_slots=3)
    assert plan.token_bounds == [0, 12, 14, 15]
    assert plan.slot_bounds == [0, 2, 2, 4]
    assert plan.slot_ids == [0, 2, 0, 2]
    assert (plan.num_runs, plan.num_tokens, plan.num_slots) == (3, 15, 3)


@pytest.mark.parametrize(
    "lengths, slots, message",
    [
        ([3], [[0], [1]], "got 1 segment lengths and 2 slot lists"),
        ([3, -1], [[0], [1]], "Segment 1 has length -1"),
        ([3], [[0, 2]], r"Segment 0 asks for slots \[0, 2\], but the pool has 2: ids must be in 0..1"),
        ([3], [[-1]], "Segment 0 asks for slots"),
        ([0], [[7]], "Segment 0 asks for slots"),
    ],
)
def test_malformed_plans_are_refused(lengths, slots, message):
    with pytest.raises(ValueError, match=message):
        plan_of(lengths, slots, num_slots=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 5, device=DEVICE)}, r"Expected base \[T, d_out\].* x \[4, 5\]"),
        ({"x": torch.zeros(5, 3, device=DEVICE)}, r"x \[5, 3\]"),
        ({"B": torch.zeros(2, 7, 6, device=DEVICE)}, r"B \[2, 7, 6\]"),
        ({"B": torch.zeros(2, 8, 5, device=DEVICE)}, r"B \[2, 8, 5\]"),
        ({"A": torch.zeros(2, 3, device=DEVICE)}, r"A \[2, 3\]"),
        ({"slot_scale": torch.zeros(3, device=DEVICE)}, r"slot_scale \[3\]"),
        ({"plan": plan_of([3], [[0]], num_slots=2)}, "plan is for 3 tokens and 2 slots, but x has 4 tokens"),
        ({"plan": plan_of([4], [[0]], num_slots=3)}, "plan is for 4 tokens and 3 slots.*2 slots"),
        ({"A": torch.zeros(2, 8, 3, device="meta")}, "A on meta"),
    ],
)
def test_lora_delta_refuses_mismatched_inputs(change, message):
    inputs = make_inputs(4, 2, 3, 6, 8) | {"plan": plan_of([4], [[0]], num_slots=2)} | change
    with pytest.raises(ValueError, match=message):
        lora_delta(scaling=SCALING, **inputs)


def test_override_chooses_an_available_implementation(monkeypatch):
    inputs = make_inputs(4, 2, 3, 6, 8) | {"plan": plan_of([4], [[0]], num_slots=2)}
    monkeypatch.delenv("D2L_LORA_DELTA")
    assert chosen_implementation(inputs["x"]) == ("triton" if DEVICE == "cuda" else "reference")
    assert chosen_implementation(inputs["x"].double()) == "reference"
    monkeypatch.setenv("D2L_LORA_DELTA", "reference")
    assert chosen_implementation(inputs["x"]) == "reference"
    monkeypatch.setenv("D2L_LORA_DELTA", "cutlass")
    with pytest.raises(ValueError, match="D2L_LORA_DELTA=cutlass is not available; this version has reference, triton"):
        lora_delta(scaling=SCALING, **inputs)
    monkeypatch.setenv("D2L_LORA_DELTA", "triton")
    assert chosen_implementation(inputs["x"]) == "triton"
    with pytest.raises(ValueError, match="D2L_LORA_DELTA=triton sums up in float32, but x is float64"):
        chosen_implementation(inputs["x"].double())
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="D2L_LORA_DELTA=triton needs CUDA tensors, got x on cpu"):
        chosen_implementation(inputs["x"].cpu())


# Determinism, order, and what a row's result may depend on


SHARED = ([5, 70, 3, 40], [[0, 3], [1, 3, 0], [], [3, 2, 1]], 4)


@pytest.mark.parametrize("gate", [0.0, 1.5])
def test_two_runs_are_bit_equal_in_values_and_every_gradient(gate):
    lengths, slots, num_slots = SHARED
    inputs = make_inputs(sum(lengths), num_slots, 37, 100, 8)
    plan = plan_of(lengths, slots, num_slots=num_slots)
    function = lambda **kw: lora_delta(plan=plan, scaling=SCALING, gate=gate, **kw)  # noqa: E731
    (y, grads), (again, grads_again) = values_and_gradients(function, inputs), values_and_gradients(function, inputs)
    assert torch.equal(y, again)
    for name in NAMES:
        assert torch.equal(grads[name], grads_again[name]), name


def test_order_of_segments_does_not_change_a_bit(implementation):
    if implementation == "reference":
        pytest.skip("one product per run, and a library may sum runs of other sizes in another order")
    lengths, slots, num_slots = SHARED
    inputs = make_inputs(sum(lengths), num_slots, 37, 100, 8)
    y = lora_delta(plan=plan_of(lengths, slots, num_slots=num_slots), scaling=SCALING, **inputs)
    order = [2, 0, 3, 1]
    parts = {name: inputs[name].split(lengths) for name in ("base", "x")}
    moved = inputs | {name: torch.cat([parts[name][i] for i in order]) for name in parts}
    plan = plan_of([lengths[i] for i in order], [slots[i] for i in order], num_slots=num_slots)
    again = lora_delta(plan=plan, scaling=SCALING, **moved)
    assert torch.equal(torch.cat([y.split(lengths)[i] for i in order]), again)


@pytest.mark.parametrize("gate", [0.0, 1.5])
def test_decoding_a_row_is_independent_of_the_batch(gate, implementation):
    if implementation == "reference":
        pytest.skip("a library's products may depend on the number of rows")
    inputs = make_inputs(40, 20, 1500, 37, 8)
    alone = {**inputs, "base": inputs["base"][:1], "x": inputs["x"][:1]}
    settings = {"scaling": SCALING, "gate": gate}
    y = lora_delta(plan=plan_of([1], [[3, 19]], num_slots=20), **settings, **alone)
    for lengths, slots in [([1, 39], [[3, 19], [*range(20)]]), ([1, 1, 38], [[3, 19], [], [0]]), ([40], [[3, 19]])]:
        batch = lora_delta(plan=plan_of(lengths, slots, num_slots=20), **settings, **inputs)
        if DEVICE == "cuda":
            assert torch.equal(batch[:1], y)
        else:  # numpy multiplies, whose rounding depends on a tile's rows: equal on Zen 4, 1e-6 apart on Zen 5
            torch.testing.assert_close(batch[:1], y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gate", [0.0, 1.5])
@pytest.mark.parametrize("sizes", [(2049, 3, 8), (3, 2049, 8), (1100, 1100, 5)])
def test_wide_layers_match(sizes, gate, monkeypatch):
    """Over 1,024 wide, the reduction is split between programs while decoding; over 2,048 always."""
    monkeypatch.setitem(CASES, "decoding", ([1, 1, 3], [[0, 2], [1], [2, 1]], 3))
    assert_matches_loop("decoding", sizes, gate=gate)


def test_wide_layers_match_with_many_tokens(monkeypatch):
    monkeypatch.setitem(CASES, "many tokens", ([100, 37], [[0, 2], [1]], 3))
    # Sums of 2,049 products in float32: the plain torch way is within 1e-5 on an AMD EPYC, 1.7e-5 off on an Intel Xeon.
    assert_matches_loop("many tokens", (2049, 2100, 8), y_tolerance=2e-5)


def test_three_hundred_chunks_and_one_in_a_batch_match(monkeypatch):
    monkeypatch.setitem(CASES, "long document", ([2, 1], [[*range(299, -1, -1), 300], [300]], 301))
    for gate in (0.0, 1.5):
        assert_matches_loop("long document", (37, 3, 2), tolerance=1e-4, gate=gate)


def test_runs_longer_than_a_piece_match(monkeypatch, implementation):
    """Gradients of A and B are summed up piece by piece; shorter pieces make that quick to test."""
    if implementation == "reference":
        pytest.skip("has no pieces")
    monkeypatch.setattr("hypernet.kernels.lora_delta.plan.PIECE_TOKENS", 16)
    monkeypatch.setitem(CASES, "long", ([100, 37, 30], [[0, 3], [1, 3], [2]], 5))
    assert_matches_loop("long", (37, 3, 8))
    assert PIECE_TOKENS == 1024


def test_gradients_of_shared_slots_are_those_of_copies():
    lengths, num_slots = [20, 30, 10], 3
    inputs = make_inputs(60, num_slots, 37, 3, 8)
    shared = plan_of(lengths, [[0, 2], [1, 2], [2]], num_slots=num_slots)
    _, grads = values_and_gradients(lambda **kw: lora_delta(plan=shared, scaling=SCALING, **kw), inputs)
    copies = {n: torch.cat([t, t[2:], t[2:]]) if n in ("A", "B", "slot_scale") else t for n, t in inputs.items()}
    apart = plan_of(lengths, [[0, 2], [1, 3], [4]], num_slots=5)
    _, grads_apart = values_and_gradients(lambda **kw: lora_delta(plan=apart, scaling=SCALING, **kw), copies)
    for name in ("A", "B", "slot_scale"):
        torch.testing.assert_close(grads[name][2], grads_apart[name][2:].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.overflow_is_checked
def test_offsets_past_two_to_the_31_elements():
    """The slots lie 2^31 elements apart, in memory of which only the touched pages exist."""
    stride = 2**31 + 64
    storage = torch.UntypedStorage(2 * (stride + 4096), device=DEVICE)
    far = lambda d: torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (2, 2, d), (stride, d, 1))  # noqa: E731
    inputs = make_inputs(5, 2, 37, 37, 2)
    A = far(37).copy_(inputs["A"])
    y = lora_delta(inputs["base"], inputs["x"], A, inputs["B"], plan_of([5], [[0, 1]], num_slots=2), scaling=SCALING)
    near = lora_delta(
        inputs["base"], inputs["x"], A.clone(), inputs["B"], plan_of([5], [[0, 1]], num_slots=2), scaling=SCALING
    )
    assert A.stride(0) > 2**31 and torch.equal(y, near)


# Plans that replace each other


@pytest.mark.parametrize("gate", [0.0, 1.5])
def test_plan_copies_another_of_equal_capacity(gate):
    capacity = Capacity(max_runs=4, max_slots=3)
    cases = [([20, 30, 100], [[0, 3], [1], [2, 1, 0]]), ([150], [[]]), ([3, 147], [[3], [0, 1]])]
    inputs = make_inputs(150, 4, 37, 100, 8)
    captured = plan_of(*cases[0], num_slots=4, capacity=capacity)
    tables = set()
    for lengths, slots in cases:
        captured.copy_(plan_of(lengths, slots, num_slots=4, capacity=capacity))
        tables.add((captured.table.data_ptr(), captured.table.shape, captured.sizes[3:]))
        exact = plan_of(lengths, slots, num_slots=4)
        settings = {"scaling": SCALING, "gate": gate}
        y, grads = values_and_gradients(lambda s=settings, **kw: lora_delta(plan=captured, **s, **kw), inputs)
        expected, expected_grads = values_and_gradients(
            lambda exact=exact, s=settings, **kw: lora_delta(plan=exact, **s, **kw), inputs
        )
        # The tiles differ, so the sums are in another order.
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        for name in NAMES:
            torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-4, atol=1e-3)
    assert len(tables) == 1  # what a captured kernel was given never moves


def test_a_plan_beyond_its_capacity_is_refused():
    capacity = Capacity(max_runs=2, max_slots=1)
    with pytest.raises(ValueError, match="3 runs of at most 1 slots, more than its capacity of 2 runs of 1"):
        plan_of([1, 1, 1], [[0], [1], [0]], num_slots=2, capacity=capacity)
    with pytest.raises(ValueError, match="1 runs of at most 2 slots"):
        plan_of([3], [[0, 1]], num_slots=2, capacity=capacity)


def test_a_plan_of_another_capacity_is_not_copied():
    capacity = Capacity(max_runs=2, max_slots=1)
    plan = plan_of([3], [[0]], num_slots=2, capacity=capacity)
    for other in (plan_of([3], [[0]], num_slots=2), plan_of([4], [[0]], num_slots=2, capacity=capacity)):
        with pytest.raises(ValueError, match="Only plans of one capacity"):
            plan.copy_(other)


# The custom op


@pytest.mark.parametrize("tokens, gate", [(6, 1.5), (DECODE_TOKENS + 40, 0.0)])
def test_lora_delta_passes_opcheck(tokens, gate):
    lengths, slots = [2, 1, tokens - 3], [[0, 2], [], [2, 1, 1]]
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(tokens, 3, 3, 2, 2).items()}
    plan = plan_of(lengths, slots, num_slots=3)
    arguments = [inputs[name] for name in NAMES] + [SCALING, gate, plan.table, plan.pairs, plan.host]
    torch.library.opcheck(_forward, arguments)
    with torch.no_grad():
        y, S = _forward(*arguments)
    without = [inputs[name].detach() for name in NAMES[1:]]
    arguments = [y, without[0], S, *without[1:], SCALING, gate, plan.table, plan.host, [True, True, False, True]]
    torch.library.opcheck(_backward, arguments)


def test_lora_delta_compiles_without_graph_breaks():
    torch._dynamo.reset()
    function = lambda base, x, A, B, plan: lora_delta(base * 2, x, A, B, plan, scaling=SCALING).sin()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (TILE_TOKENS + 70, TILE_TOKENS + 90, 3):
        inputs = make_inputs(tokens, 3, 3, 2, 2)
        del inputs["slot_scale"]
        plan = plan_of([2, tokens - 2], [[0, 2], [1]], num_slots=3)
        y, grads = values_and_gradients(lambda plan=plan, **kw: compiled(plan=plan, **kw), inputs)
        expected, expected_grads = values_and_gradients(lambda plan=plan, **kw: function(plan=plan, **kw), inputs)
        torch.testing.assert_close(y, expected)
        for name in inputs:
            torch.testing.assert_close(grads[name], expected_grads[name], msg=name)


# On a GPU


@pytest.mark.requires_gpu
@pytest.mark.parametrize("gate", [0.0, 1.5])
@pytest.mark.parametrize("sizes", [(9216, 2304, 8), (100, 37, 3), (2560, 9728, 16)])
@pytest.mark.parametrize("case", ["uniform", "ragged", "segments_without_slots", "many_chunks"])
def test_bf16_on_a_gpu_matches_reference(case, sizes, gate):
    assert_matches_loop_but_for_rounding(case, sizes, torch.bfloat16, gate)


@pytest.fixture
def compiled(implementation):
    if implementation == "reference":
        pytest.skip("plain torch reads the plan on the host, and waits for the device")


@pytest.mark.requires_gpu
@pytest.mark.usefixtures("compiled")
def test_captured_cuda_graph_replays_other_plans():
    capacity = Capacity(max_runs=4, max_slots=3)
    for tokens in (64, 300):
        inputs = {n: t.bfloat16() for n, t in make_inputs(tokens, 4, 512, 256, 8).items() if n != "slot_scale"}
        make = lambda lengths, slots: plan_of(lengths, slots, num_slots=4, capacity=capacity)  # noqa: E731
        plan = make([tokens], [[0]])
        lora_delta(plan=plan, scaling=SCALING, **inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_delta(plan=plan, scaling=SCALING, **inputs)
        for lengths, slots in [
            ([20, tokens - 20], [[0, 3], [2, 1, 0]]),
            ([tokens], [[]]),
            ([9, tokens - 9], [[3], [1]]),
        ]:
            plan.copy_(make(lengths, slots))
            graph.replay()
            expected = lora_delta(plan=plan_of(lengths, slots, num_slots=4), scaling=SCALING, **inputs)
            torch.testing.assert_close(y, expected)


@pytest.mark.requires_gpu
@pytest.mark.usefixtures("compiled")
def test_lora_delta_never_synchronizes_the_device():
    inputs = {n: t.bfloat16() for n, t in make_inputs(300, 4, 512, 256, 8).items() if n != "slot_scale"}
    lora_delta(plan=plan_of([300], [[0]], num_slots=4), scaling=SCALING, **inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = plan_of([100, 200], [[0, 3], [2, 1, 0]], num_slots=4)
        y = lora_delta(plan=plan, scaling=SCALING, **inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.isfinite().all()


@pytest.mark.requires_gpu
def test_two_streams_give_same_result_as_one():
    inputs = {n: t.bfloat16() for n, t in make_inputs(300, 4, 512, 256, 8).items() if n != "slot_scale"}
    plan = plan_of([100, 200], [[0, 3], [2, 1, 0]], num_slots=4)
    expected = lora_delta(plan=plan, scaling=SCALING, **inputs)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream(), torch.cuda.Stream()]:
        with torch.cuda.stream(stream):
            results += [lora_delta(plan=plan, scaling=SCALING, **inputs) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.requires_gpu
def test_inductor_compiles_lora_delta():
    inputs = make_inputs(300, 4, 512, 256, 8)
    plan = plan_of([100, 200], [[0, 3], [2, 1, 0]], num_slots=4)
    function = lambda **kw: lora_delta(plan=plan, scaling=SCALING, **kw).sin()  # noqa: E731
    y, grads = values_and_gradients(torch.compile(function, fullgraph=True), inputs)
    expected, expected_grads = values_and_gradients(function, inputs)
    torch.testing.assert_close(y, expected)
    for name in NAMES:
        torch.testing.assert_close(grads[name], expected_grads[name], msg=name)
