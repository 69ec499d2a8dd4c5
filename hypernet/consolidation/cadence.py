"""Cadence: when it is time to sleep. A policy sees when memories arrived that wait, and when it last slept.

Economic().is_due(Waiting(arrived_days=[0.2, 1.5], last_sleep_days=0.0, now_days=3.0))
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Waiting(NamedTuple):
    """Days on one clock. arrived_days: of the memories that are not in the weights, ascending."""

    arrived_days: Sequence[float]
    last_sleep_days: float
    now_days: float


class Cadence(Protocol):
    def is_due(self, waiting: Waiting) -> bool: ...


class EveryN:
    """As soon as so many memories wait."""

    def __init__(self, *, memories: int = 25) -> None:
        if memories < 1:
            raise ValueError(f"memories is {memories}. Give at least 1.")
        self.memories = memories

    def is_due(self, waiting: Waiting) -> bool:
        return len(waiting.arrived_days) >= self.memories


class Calendar:
    """So many days after the last time, if anything waits."""

    def __init__(self, *, days: float = 14.0) -> None:
        if not days > 0:
            raise ValueError(f"days is {days}. Give more than 0.")
        self.days = days

    def is_due(self, waiting: Waiting) -> bool:
        return bool(waiting.arrived_days) and waiting.now_days - waiting.last_sleep_days >= self.days


class Pressure:
    """When what waits has waited so many memory-days together: Σ (now - arrived) >= memory_days."""

    def __init__(self, *, memory_days: float = 50.0) -> None:
        if not memory_days > 0:
            raise ValueError(f"memory_days is {memory_days}. Give more than 0.")
        self.memory_days = memory_days

    def is_due(self, waiting: Waiting) -> bool:
        waited = len(waiting.arrived_days) * waiting.now_days - sum(waiting.arrived_days)
        return bool(waiting.arrived_days) and waited >= self.memory_days


class Economic:
    """When waiting has cost as much as a run: ½ λ h t² >= K, that is after τ* = √(2K / (λ h)) days; if h <= 0 never.

    λ is the rate at which memories arrived since the last sleep, t the days since then.

    Args:
        run_cost: K, of one consolidation, with forgetting and evaluation.
        waiting_cost: h, of one memory that waits for a day, in the same currency.
    """

    def __init__(self, *, run_cost: float = 50.0, waiting_cost: float = 1.0) -> None:
        self.run_cost, self.waiting_cost = run_cost, waiting_cost

    def interval(self, rate: float) -> float:
        """τ* in days at so many memories a day."""
        if self.waiting_cost <= 0 or rate <= 0:
            return math.inf
        return math.sqrt(2 * self.run_cost / (rate * self.waiting_cost))

    def is_due(self, waiting: Waiting) -> bool:
        days = waiting.now_days - waiting.last_sleep_days
        return bool(waiting.arrived_days) and days > 0 and days >= self.interval(len(waiting.arrived_days) / days)


def cost_of(
    sleeps: Sequence[float], arrived: Sequence[float], *, until: float, run_cost: float, waiting_cost: float
) -> float:
    """What a schedule costs: K for each run, h for each memory and day until the next run, or the end.

    Args:
        sleeps, arrived: days, ascending.
    """
    ends = [*sleeps, until]
    waited = sum(ends[bisect_left(sleeps, day)] - day for day in arrived)
    return run_cost * len(sleeps) + waiting_cost * waited


def clairvoyant(arrived: Sequence[float], *, until: float, run_cost: float, waiting_cost: float) -> list[float]:
    """The cheapest schedule for arrivals known beforehand, by dynamic programming over runs right after an arrival.

    best(j) = K + min over i < j of best(i) + h Σ_{i < k <= j} (t_j - t_k), whose sum is (j - i) t_j - P_j + P_i with P
    the running sums of arrivals: n steps over arrays of at most n. Where h <= 0 nothing is gained by a run: none.

    Args:
        run_cost: K, not below 0.
    """
    if waiting_cost <= 0 or not len(arrived):
        return []
    days = np.sort(np.asarray(arrived, dtype=float))
    number, sums = np.arange(len(days) + 1), np.concatenate([[0.0], np.cumsum(days - days[0])])
    # best[i]: the least cost of the first i memories, the last of which has just been taken in.
    best, previous = np.zeros(len(days) + 1), np.zeros(len(days) + 1, dtype=int)
    for end, day in enumerate(days - days[0], start=1):
        waited = (end - number[:end]) * day - (sums[end] - sums[:end])
        costs = best[:end] + run_cost + waiting_cost * waited
        previous[end] = costs.argmin()
        best[end] = costs[previous[end]]
    left = (len(days) - number) * (until - days[0]) - (sums[-1] - sums)
    end, found = int((best + waiting_cost * left).argmin()), []
    while end:
        found.append(float(days[end - 1]))
        end = previous[end]
    return found[::-1]
