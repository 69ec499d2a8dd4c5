"""The cost model against sums done by hand and what must hold at its ends."""

import pytest

from hypernet.kernels.lora_delta.cost import H100, Machine, application_cost, delta_backward_floor, delta_floor

GEMMA_DOWN = {"d_in": 9216, "d_out": 2304}


def test_cost_floors_equal_hand_computed_sums():
    """x 4096·9216, base and y 4096·2304 each, A and B of 8 adapters of rank 64; two bytes each."""
    sizes = {**GEMMA_DOWN, "num_tokens": 4096, "rank": 64, "num_adapters": 8}
    floor = delta_floor(**sizes)
    assert floor.num_bytes == 2 * (4096 * 9216 + 2 * 4096 * 2304 + 8 * 64 * 11520) == 125_042_688
    assert floor.flops == 2 * 4096 * 64 * 11520
    assert floor.seconds(H100) == pytest.approx(41.7e-6, rel=1e-3)
    backward = delta_backward_floor(**sizes)
    assert backward.num_bytes == 2 * (2 * 4096 * 9216 + 4096 * 2304 + 2 * 8 * 64 * 11520)
    assert backward.flops == 2 * floor.flops


def test_cost_floor_is_the_larger_of_bytes_and_flops():
    machine = Machine("made up", bytes_per_s=100, flops_per_s=10, launch_s=0)
    floor = delta_floor(num_tokens=1, d_in=1, d_out=1, rank=1, num_adapters=1)
    assert floor == (10, 4) and floor.seconds(machine) == 0.4


def test_merging_pays_for_one_adapter_and_many_steps():
    one = {**GEMMA_DOWN, "num_tokens": 1, "rank": 64, "num_adapters": 1}
    assert application_cost(**one, steps=1).cheapest == "apart"
    assert application_cost(**one, steps=100).cheapest == "merge"
    by_steps = [application_cost(**one, steps=steps).merge for steps in (1, 2, 10, 100)]
    assert by_steps == sorted(by_steps, reverse=True)


def test_merging_never_pays_for_many_adapters():
    many = {**GEMMA_DOWN, "num_tokens": 16, "rank": 64, "num_adapters": 16}
    cost = application_cost(**many, steps=10_000)
    assert cost.cheapest != "merge"


def test_the_product_hides_the_delta_if_bound_by_arithmetic():
    """dx of down_proj, 9216 wide: 25 of the 50 µs that adding to the output costs vanish."""
    cost = application_cost(num_tokens=4096, d_in=2304, d_out=9216, rank=8, num_adapters=8)
    assert cost.cheapest == "delta first"
    assert cost.apart - cost.delta_first == pytest.approx(2 * 4096 * 9216 / 3.0e12, rel=1e-6)


@pytest.mark.parametrize("name", ["num_tokens", "d_in", "d_out", "rank", "num_adapters", "steps"])
def test_cost_refuses_sizes_below_one(name):
    sizes = {**GEMMA_DOWN, "num_tokens": 1, "rank": 8, "num_adapters": 1, "steps": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        application_cost(**sizes)
