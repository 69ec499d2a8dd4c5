"""lora_delta against a float64 loop over tokens and slots: values, every gradient by name, odd sizes, and the plan."""

import pytest
import torch

from hypernet.kernels.lora_delta import Plan, lora_delta, lora_delta_reference
from hypernet.kernels.lora_delta.op import chosen_implementation

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
}
SIZES = [(1, 1, 1), (3, 37, 1), (37, 3, 8), (100, 37, 3)]  # d_in, d_out, R


def make_inputs(num_tokens, num_slots, d_in, d_out, rank, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "base": normal(num_tokens, d_out).to(dtype),
        "x": normal(num_tokens, d_in).to(dtype),
        "A": normal(num_slots, rank, d_in) / d_in**0.5,
        "B": normal(num_slots, rank, d_out),
        "slot_scale": 0.5 + torch.rand(num_slots, generator=generator),
    }


def loop_float64(base, x, A, B, lengths, slots, slot_scale):
    """One token and one slot at a time."""
    rows, token = [], 0
    for length, ids in zip(lengths, slots, strict=True):
        for _ in range(length):
            row = base[token].double()
            for slot in ids:
                S = A[slot].double() @ x[token].double()
                row = row + SCALING * slot_scale[slot].double() * S @ B[slot].double()
            rows.append(row)
            token += 1
    return torch.stack(rows) if rows else base.double()


def values_and_gradients(function, inputs):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(**leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    zero_if_unused = {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}
    return y.detach(), zero_if_unused


def assert_matches_loop(case, sizes, dtype=torch.float32, tolerance=1e-5):
    lengths, slots, num_slots = CASES[case]
    inputs = make_inputs(sum(lengths), num_slots, *sizes, dtype=dtype)
    plan = Plan.from_lists(lengths, slots, num_slots=num_slots)
    y, grads = values_and_gradients(lambda **kw: lora_delta(plan=plan, scaling=SCALING, **kw), inputs)
    expected, expected_grads = values_and_gradients(
        lambda **kw: loop_float64(lengths=lengths, slots=slots, **kw), inputs
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for name in NAMES:
        assert grads[name].dtype == inputs[name].dtype
        scale = max(1.0, expected_grads[name].abs().max().item() if expected_grads[name].numel() else 1.0)
        torch.testing.assert_close(
            grads[name].double() / scale,
            expected_grads[name].double() / scale,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient_match_a_float64_loop(case, sizes):
    assert_matches_loop(case, sizes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("case", ["uniform", "ragged", "segments_without_slots"])
def test_half_precision_activations_match_and_A_B_gradients_stay_float32(case, dtype, tolerance):
    assert_matches_loop(case, (37, 100, 8), dtype, tolerance)


@pytest.mark.parametrize("case", ["uniform", "ragged"])
def test_half_precision_result_is_the_float32_result_rounded_once(case):
    lengths, slots, num_slots = CASES[case]
    inputs = make_inputs(sum(lengths), num_slots, 100, 37, 8, dtype=torch.bfloat16)
    plan = Plan.from_lists(lengths, slots, num_slots=num_slots)
    y = lora_delta(plan=plan, scaling=SCALING, **inputs)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    assert torch.equal(y, lora_delta(plan=plan, scaling=SCALING, **wide).bfloat16())


def test_autocast_does_not_round_A_and_B():
    inputs = make_inputs(6, 2, 37, 3, 8)
    plan = Plan.from_lists([3, 3], [[0], [1]], num_slots=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lora_delta(plan=plan, scaling=SCALING, **inputs)
    assert torch.equal(inside, lora_delta(plan=plan, scaling=SCALING, **inputs))


def test_gradcheck_in_float64():
    inputs = {n: t.double().requires_grad_() for n, t in make_inputs(6, 3, 3, 2, 2).items()}
    plan = Plan.from_lists([2, 1, 3], [[0, 2], [], [2, 1, 1]], num_slots=3)
    function = lambda base, x, A, B, s: lora_delta(base, x, A, B, plan, scaling=SCALING, slot_scale=s)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in NAMES))


def test_rows_without_slots_are_exactly_the_base_and_poison_there_does_not_leak():
    lengths, slots = [3, 37, 1, 3], [[], [1, 0], [], [2]]
    inputs = make_inputs(sum(lengths), 4, 37, 3, 8)
    plan = Plan.from_lists(lengths, slots, num_slots=4)
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


def test_plan_without_any_slot_returns_the_base_tensor_itself():
    inputs = make_inputs(4, 2, 3, 3, 1)
    assert lora_delta(plan=Plan.from_lists([3, 1], [[], []], num_slots=2), scaling=1.0, **inputs) is inputs["base"]


@pytest.mark.parametrize(
    "lengths, slots", [([100], [[0, 1, 2]]), ([3, 3], [[0, 1, 2], [3, 4, 1]]), ([1, 37], [[0, 1], [2]])]
)
def test_order_of_chunks_does_not_matter(lengths, slots):
    inputs = make_inputs(sum(lengths), 5, 37, 3, 8)
    forward = Plan.from_lists(lengths, slots, num_slots=5)
    backward = Plan.from_lists(lengths, [ids[::-1] for ids in slots], num_slots=5)
    torch.testing.assert_close(
        lora_delta(plan=forward, scaling=SCALING, **inputs), lora_delta(plan=backward, scaling=SCALING, **inputs)
    )


@pytest.mark.parametrize("uniform", [True, False])
def test_one_rank_64_slot_equals_eight_rank_8_slots(uniform):
    wide = make_inputs(38, 2, 37, 100, 64)
    del wide["slot_scale"]
    narrow = wide | {"A": wide["A"].view(16, 8, 37), "B": wide["B"].view(16, 8, 100)}
    lengths = [19, 19] if uniform else [1, 37]
    one = Plan.from_lists(lengths, [[0], [1]], num_slots=2)
    eight = Plan.from_lists(lengths, [list(range(8)), list(range(8, 16))], num_slots=16)
    assert torch.equal(lora_delta(plan=one, scaling=SCALING, **wide), lora_delta(plan=eight, scaling=SCALING, **narrow))


def test_batched_products_for_equal_runs_match_the_loop_over_runs():
    inputs = make_inputs(9, 4, 37, 3, 8)
    batched = Plan.from_lists([3, 3, 3], [[0, 3], [1, 3], [2, 3]], num_slots=4)
    looped = Plan.from_lists([3, 3, 3], [[0, 3], [1, 3], [2, 3]], num_slots=4)
    vars(looped)["uniform"] = False
    assert batched.uniform
    torch.testing.assert_close(
        lora_delta_reference(plan=batched, scaling=SCALING, **inputs),
        lora_delta_reference(plan=looped, scaling=SCALING, **inputs),
    )


def test_strided_pools_of_one_layer_give_the_same_result_and_gradients():
    torch.manual_seed(0)
    pool_A, pool_B = torch.randn(3, 2, 8, 37) / 37**0.5, torch.randn(3, 2, 8, 100)
    pool_A.requires_grad_(), pool_B.requires_grad_()
    base, x = torch.randn(5, 100), torch.randn(37, 5).T
    plan = Plan.from_lists([2, 3], [[0, 2], [1]], num_slots=3)
    y = lora_delta(base, x, pool_A[:, 1], pool_B[:, 1], plan, scaling=SCALING)
    expected = loop_float64(base, x, pool_A[:, 1], pool_B[:, 1], [2, 3], [[0, 2], [1]], torch.ones(3))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert not pool_A.grad[:, 0].any() and pool_A.grad[:, 1].abs().sum() > 0


def test_plan_merges_equal_neighbours_and_drops_empty_segments():
    plan = Plan.from_lists([5, 0, 7, 2, 1], [[0, 2], [1], [0, 2], [], [0, 2]], num_slots=3)
    assert plan.token_bounds == (0, 12, 14, 15)
    assert plan.slot_bounds == (0, 2, 2, 4)
    assert plan.slot_ids == (0, 2, 0, 2)
    assert (plan.num_runs, plan.num_tokens, plan.num_slots) == (3, 15, 3)
    for tensor, ints in [
        (plan.cu_tokens, plan.token_bounds),
        (plan.cu_slots, plan.slot_bounds),
        (plan.slots, plan.slot_ids),
    ]:
        assert tensor.dtype == torch.int32 and tuple(tensor.tolist()) == ints


@pytest.mark.parametrize(
    "lengths, slots, expected",
    [
        ([3, 3], [[0], [1]], True),
        ([3, 2], [[0], [1]], False),
        ([3, 3], [[0], [1, 0]], False),
        ([3, 3], [[], []], False),
        ([], [], False),
    ],
)
def test_plan_knows_when_all_runs_have_one_shape(lengths, slots, expected):
    assert Plan.from_lists(lengths, slots, num_slots=2).uniform is expected


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
        Plan.from_lists(lengths, slots, num_slots=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 5)}, r"Expected base \[T, d_out\].* x \[4, 5\]"),
        ({"x": torch.zeros(5, 3)}, r"x \[5, 3\]"),
        ({"B": torch.zeros(2, 7, 6)}, r"B \[2, 7, 6\]"),
        ({"B": torch.zeros(2, 8, 5)}, r"B \[2, 8, 5\]"),
        ({"A": torch.zeros(2, 3)}, r"A \[2, 3\]"),
        ({"slot_scale": torch.zeros(3)}, r"slot_scale \[3\]"),
        ({"plan": Plan.from_lists([3], [[0]], num_slots=2)}, "plan is for 3 tokens and 2 slots, but x has 4 tokens"),
        ({"plan": Plan.from_lists([4], [[0]], num_slots=3)}, "plan is for 4 tokens and 3 slots.*2 slots"),
        ({"A": torch.zeros(2, 8, 3, device="meta")}, "A on meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = make_inputs(4, 2, 3, 6, 8) | {"plan": Plan.from_lists([4], [[0]], num_slots=2)} | change
    with pytest.raises(ValueError, match=message):
        lora_delta(scaling=SCALING, **inputs)


def test_override_chooses_the_implementation_and_refuses_what_is_not_there(monkeypatch):
    inputs = make_inputs(4, 2, 3, 6, 8) | {"plan": Plan.from_lists([4], [[0]], num_slots=2)}
    monkeypatch.delenv("D2L_LORA_DELTA", raising=False)
    assert chosen_implementation(inputs["x"]) == "reference"
    monkeypatch.setenv("D2L_LORA_DELTA", "reference")
    assert chosen_implementation(inputs["x"]) == "reference"
    for name in ("triton", "cutlass"):
        monkeypatch.setenv("D2L_LORA_DELTA", name)
        with pytest.raises(ValueError, match=f"D2L_LORA_DELTA={name} is not available.*reference"):
            lora_delta(scaling=SCALING, **inputs)
