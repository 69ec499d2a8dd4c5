"""Numbers of the forgetting benchmarks: intervals over seeds and facts, a linear probe, backward transfer.

nested_interval([after, before], lambda a, b: 1 - a / b, seeds=seeds)
probe = LinearProbe.fit(states, targets, ridge=1.0); probe(states)
backward_transfer(matrix), final_average(matrix)
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np


def nested_interval(
    columns: Sequence[Sequence[float]],
    statistic: Callable[..., np.ndarray],
    *,
    seeds: Sequence[Hashable],
    confidence: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval over seeds and facts of a function of several methods' mean scores.

    Every resample draws seeds, and in each drawn seed as many of its facts as it has, both with replacement and the
    same ones for all columns, so what makes a seed or a fact hard for all methods does not widen a difference.

    Args:
        columns: one list of scores per method, all in the same order of facts.
        statistic: of the methods' means, called once with one array [num_samples] per column: lambda a, b: a - b.
        seeds: one per fact: the seed it was measured in.
        confidence, num_samples, seed: as for `benchmarks.measuring.metrics.bootstrap_interval`.

    Returns:
        (low, high); None if the statistic is not finite in more than one resample of twenty, or with fewer than two
        seeds.

    Raises:
        ValueError: the columns or seeds differ in length.

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8, both levels resampled.
    """
    table = np.asarray([np.asarray(column, dtype=np.float64) for column in columns if len(column) == len(seeds)])
    if len(table) != len(columns):
        raise ValueError(
            f"Every column should have a score for each of the {len(seeds)} facts, but their lengths are "
            f"{[len(column) for column in columns]}. Pass the methods' scores on the same facts."
        )
    groups = [np.flatnonzero([one == name for one in seeds]) for name in dict.fromkeys(seeds)]
    if len(groups) < 2:
        return None
    weights, counts = _resamples(tuple(map(len, groups)), num_samples, seed)
    totals = sum(table[:, group] @ drawn for group, drawn in zip(groups, weights, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(statistic(*(totals / counts)), dtype=np.float64)
    finite = values[np.isfinite(values)]
    if len(finite) < 0.95 * num_samples:
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@lru_cache(maxsize=16)  # a page has a hundred intervals over seeds of the same sizes, and drawing is most of the time
def _resamples(sizes: tuple[int, ...], num_samples: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """How often each fact is drawn in each resample, [facts, num_samples] for each seed, and facts altogether."""
    generator = np.random.default_rng(seed)
    times = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=num_samples)
    weights, counts = [], np.zeros(num_samples)
    for size, drawn in zip(sizes, times.T, strict=True):
        # A seed that was drawn n times has its facts drawn n times over, each time anew.
        weights.append(generator.multinomial(drawn * size, np.full(size, 1 / size)).T.astype(np.float64))
        counts += drawn * size
    return weights, counts


class LinearProbe(NamedTuple):
    """y = (x - mean) / scale · weights + bias, in float64; weights: [D, E]."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, states: np.ndarray, targets: np.ndarray, *, ridge: float) -> Self:
        """argmin Σ_i ‖y_i - f(x_i)‖² + ridge · N ‖weights‖², x of mean 0 and deviation 1 in every direction.

        Args:
            states: x, [N, D]. targets: y, [N, E]. ridge: above 0.

        Raises:
            ValueError: ridge is not above 0, or the numbers of rows differ.
        """
        if not ridge > 0 or len(states) != len(targets):
            raise ValueError(
                f"A probe needs a ridge above 0 and a target for each state; got {ridge}, {len(states)} states and "
                f"{len(targets)} targets."
            )
        states, targets = np.asarray(states, dtype=np.float64), np.asarray(targets, dtype=np.float64)
        mean, scale, bias = states.mean(0), states.std(0), targets.mean(0)
        scale = np.where(scale > 0, scale, 1.0)
        x = (states - mean) / scale
        gram = x.T @ x + ridge * len(x) * np.eye(x.shape[1])
        return cls(mean, scale, np.linalg.solve(gram, x.T @ (targets - bias)), bias)

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """[N, D] → [N, E]."""
        return (np.asarray(states, dtype=np.float64) - self.mean) / self.scale @ self.weights + self.bias


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float:
    """BWT = 1/(T - 1) Σ_{t<T} (R[T, t] - R[t, t]); R[i, t]: accuracy on task t after task i.

    Raises:
        ValueError: the matrix is not square, or has fewer than two tasks.

    Source: Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840, section 2
    """
    _check_square(matrix)
    last = len(matrix) - 1
    return sum(matrix[last][task] - matrix[task][task] for task in range(last)) / last


def final_average(matrix: Sequence[Sequence[float]]) -> float:
    """ACC = 1/T Σ_t R[T, t], the mean over all tasks after the last one; errors and source as `backward_transfer`."""
    _check_square(matrix)
    return sum(matrix[-1]) / len(matrix)


def _check_square(matrix: Sequence[Sequence[float]]) -> None:
    if len(matrix) < 2 or {len(row) for row in matrix} != {len(matrix)}:
        raise ValueError(
            f"Transfer is of a square matrix of at least two tasks; got {len(matrix)} rows of lengths "
            f"{sorted({len(row) for row in matrix})}. Measure every task after every task."
        )
