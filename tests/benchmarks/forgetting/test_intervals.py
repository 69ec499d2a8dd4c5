"""Intervals, probe and transfer against independent references."""

import random
from statistics import fmean

import numpy as np
import pytest

from benchmarks.forgetting.intervals import LinearProbe, backward_transfer, final_average, nested_interval


def drawn_by_hand(after, before, seeds, *, num_samples):
    """The same bootstrap, drawn one by one with Python's own generator."""
    rng, by_seed = random.Random(1), {}
    for place, seed in enumerate(seeds):
        by_seed.setdefault(seed, []).append(place)
    values = []
    for _ in range(num_samples):
        places = []
        for seed in rng.choices(list(by_seed), k=len(by_seed)):
            places += rng.choices(by_seed[seed], k=len(by_seed[seed]))
        values.append(1 - fmean(after[p] for p in places) / fmean(before[p] for p in places))
    values.sort()
    return values[int(0.025 * num_samples)], values[int(0.975 * num_samples)]


def test_nested_interval_is_the_bootstrap_over_seeds_and_facts():
    rng = random.Random(0)
    seeds = [seed for seed, size in enumerate((7, 13, 9, 3)) for _ in range(size)]
    before = [float(rng.random() < 0.9) for _ in seeds]
    after = [old * float(rng.random() < 0.3 + 0.15 * seed) for old, seed in zip(before, seeds, strict=True)]
    found = nested_interval([after, before], lambda a, b: 1 - a / b, seeds=seeds, num_samples=4000)
    assert found == pytest.approx(drawn_by_hand(after, before, seeds, num_samples=4000), abs=0.03)


def test_paired_interval_is_narrower_than_that_of_one_method():
    rng = np.random.default_rng(0)
    hard, seeds = rng.random(120), np.repeat(np.arange(4), 30)
    low, high = nested_interval([hard, hard - 0.1], lambda a, b: a - b, seeds=seeds.tolist())
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    low, high = nested_interval([hard], lambda a: a, seeds=seeds.tolist())
    assert high - low > 0.05


def test_one_seed_has_no_interval_and_lengths_must_agree():
    assert nested_interval([[1.0, 0.0]], lambda a: a, seeds=[0, 0]) is None
    assert nested_interval([[0.0] * 4, [0.0] * 4], lambda a, b: a / b, seeds=[0, 0, 1, 1]) is None
    with pytest.raises(ValueError, match=r"for each of the 2 facts, but their lengths are \[3\]"):
        nested_interval([[1.0, 0.0, 1.0]], lambda a: a, seeds=[0, 1])


def test_probe_is_least_squares_of_the_augmented_system():
    rng = np.random.default_rng(0)
    x, y, ridge = rng.normal(2.0, 3.0, (37, 5)), rng.normal(size=(37, 3)), 0.3
    scaled = np.concatenate([(x - x.mean(0)) / x.std(0), np.ones((37, 1))], axis=1)
    # One more row for each weight, whose square is the penalty; the bias has none.
    penalty = np.concatenate([np.sqrt(ridge * 37) * np.eye(5), np.zeros((5, 1))], axis=1)
    solved = np.linalg.lstsq(np.concatenate([scaled, penalty]), np.concatenate([y, np.zeros((5, 3))]), rcond=None)[0]
    np.testing.assert_allclose(LinearProbe.fit(x, y, ridge=ridge)(x), scaled @ solved, atol=1e-12)


def test_probe_reads_what_is_linear_and_no_constant_direction():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(200, 3)), np.ones((200, 1))], axis=1)
    y = x[:, :3] @ rng.normal(size=(3, 2)) + 5
    probe = LinearProbe.fit(x[:100], y[:100], ridge=1e-9)
    np.testing.assert_allclose(probe(x[100:]), y[100:], atol=1e-5)
    with pytest.raises(ValueError, match="a ridge above 0 and a target for each state; got 0, 3 states and 2 targets"):
        LinearProbe.fit(x[:3], y[:2], ridge=0)


def test_transfer_is_as_computed_by_hand():
    matrix = [[1.0, 0.0, 0.0], [0.7, 0.9, 0.1], [0.5, 0.8, 0.95]]
    assert backward_transfer(matrix) == pytest.approx(((0.5 - 1.0) + (0.8 - 0.9)) / 2)
    assert final_average(matrix) == pytest.approx(0.75)
    for wrong in ([[1.0]], [[1.0, 0.0], [1.0]]):
        with pytest.raises(ValueError, match="a square matrix of at least two tasks"):
            backward_transfer(wrong)
