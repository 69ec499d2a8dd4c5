"""Cadence against the formula, and the clairvoyant against every schedule of a few arrivals."""

import itertools
import math
import random

import pytest

from hypernet.consolidation.cadence import Calendar, Economic, EveryN, Pressure, Waiting, clairvoyant, cost_of

COSTS = {"run_cost": 4.0, "waiting_cost": 1.5}


@pytest.mark.parametrize("seed", range(5))
def test_clairvoyant_is_the_cheapest_of_all_schedules(seed):
    rng = random.Random(seed)
    arrived = sorted(rng.uniform(0, 10) for _ in range(7))
    found = cost_of(clairvoyant(arrived, until=12, **COSTS), arrived, until=12, **COSTS)
    subsets = itertools.chain.from_iterable(itertools.combinations(arrived, size) for size in range(8))
    assert found == pytest.approx(min(cost_of(days, arrived, until=12, **COSTS) for days in subsets))


@pytest.mark.parametrize("seed", range(3))
def test_clairvoyant_costs_what_the_programme_over_pairs_finds(seed):
    rng = random.Random(seed)
    arrived = sorted(20_000 + rng.uniform(0, 60) for _ in range(101))  # days as `Sleep` counts them, since 1970
    best = [0.0]
    for end in range(1, 102):
        waits = [sum(arrived[end - 1] - day for day in arrived[start:end]) for start in range(end)]
        best.append(min(best[start] + 4.0 + 1.5 * waits[start] for start in range(end)))
    left = [1.5 * sum(20_061 - day for day in arrived[start:]) for start in range(102)]
    found = clairvoyant(arrived, until=20_061, **COSTS)
    assert cost_of(found, arrived, until=20_061, **COSTS) == pytest.approx(min(map(sum, zip(best, left, strict=True))))
    assert 5 < len(found) < 60 and set(found) <= set(arrived)


def test_clairvoyant_never_runs_where_waiting_costs_nothing():
    assert clairvoyant([1.0, 2.0], until=3, run_cost=1, waiting_cost=0) == []
    assert clairvoyant([1.0, 2.0], until=3, run_cost=1, waiting_cost=-2) == []
    assert clairvoyant([], until=3, run_cost=1, waiting_cost=2) == []


def test_cost_is_runs_and_waiting_by_hand():
    assert cost_of([2.0], [1.0, 1.5, 3.0], until=5.0, run_cost=10, waiting_cost=2) == 10 + 2 * (1 + 0.5 + 2)


def test_economic_interval_has_the_least_cost_a_day():
    rate = 3.0
    policy = Economic(**COSTS)
    interval = policy.interval(rate)
    per_day = lambda days: COSTS["run_cost"] / days + rate * COSTS["waiting_cost"] * days / 2  # noqa: E731
    assert all(per_day(interval) <= per_day(interval * factor) for factor in (0.9, 0.99, 1.01, 1.1))
    days = [number / rate for number in range(1, 100)]
    due = next(day for day in days if policy.is_due(Waiting([one for one in days if one <= day], 0.0, day)))
    assert due == pytest.approx(interval, abs=1 / rate)


def test_nothing_is_due_while_nothing_waits():
    for policy in (EveryN(memories=1), Calendar(days=1), Pressure(memory_days=1), Economic()):
        assert not policy.is_due(Waiting([], 0.0, 100.0))
    assert not Economic(waiting_cost=0).is_due(Waiting([1.0], 0.0, 1e6)) and math.isinf(
        Economic(waiting_cost=-1).interval(1)
    )


def test_policies_are_due_at_their_limits():
    assert EveryN(memories=2).is_due(Waiting([1, 2], 0, 2)) and not EveryN(memories=3).is_due(Waiting([1, 2], 0, 2))
    assert Calendar(days=14).is_due(Waiting([1], 3, 17)) and not Calendar(days=14).is_due(Waiting([1], 3, 16.9))
    assert Pressure(memory_days=5).is_due(Waiting([1, 2], 0, 4)) and not Pressure(memory_days=6).is_due(
        Waiting([1, 2], 0, 4)
    )
    for make in (lambda: EveryN(memories=0), lambda: Calendar(days=0), lambda: Pressure(memory_days=0)):
        with pytest.raises(ValueError, match="Give"):
            make()
