"""Epochs, mixtures and length buckets: every one a function of a number."""

import random
from collections import Counter

import pytest

from hypernet.data.drawing import BLOCK, Buckets, Epochs, Mixture

# Epochs


@pytest.mark.parametrize("size", [1, 7, 100])
def test_each_epoch_has_every_row_once_in_another_order(size):
    order = Epochs(size, "data", 0)
    epochs = [[order[epoch * size + i] for i in range(size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size == 100:
        assert epochs[0] != epochs[1] != epochs[2]
        assert [Epochs(size, "data", 1)[i] for i in range(size)] != epochs[0]
    assert [Epochs(size, "data", 0)[i] for i in range(size)] == epochs[0]


# Mixtures


def test_a_mixture_draws_by_weight_and_in_each_sources_order():
    mixture = Mixture({"a": 3, "b": 1}, "seed", 0)
    drawn = [mixture[i] for i in range(2 * BLOCK + 100)]
    for name, share in (("a", 0.75), ("b", 0.25)):
        numbers = [number for drawn_name, number in drawn if drawn_name == name]
        assert numbers == list(range(len(numbers)))
        assert abs(len(numbers) / len(drawn) - share) < 0.02


@pytest.mark.parametrize("num_draws", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 77])
def test_mixture_counts_draws_so_far(num_draws):
    mixture = Mixture({"a": 0.2, "b": 0.5, "never": 0}, 1)
    assert mixture.counts(num_draws) == Counter(mixture[i][0] for i in range(num_draws))


def test_mixture_is_independent_of_access_order():
    places = [9000, 3, 4096, 17]
    first, second = Mixture({"a": 1, "b": 1}, 5), Mixture({"a": 1, "b": 1}, 5)
    assert [first[i] for i in places] == [second[i] for i in reversed(places)][::-1]
    assert [Mixture({"a": 1, "b": 1}, 6)[i] for i in range(50)] != [first[i] for i in range(50)]
    assert Mixture({"only": 0.1})[12345] == ("only", 12345)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}])
def test_mixture_refuses_invalid_weights(weights):
    with pytest.raises(ValueError, match="weights that are not negative and not all 0"):
        Mixture(weights)


# Buckets


def lengths(seed=0, low=5, high=300):
    return lambda draw: random.Random(f"{seed}/{draw}").randint(low, high)


def test_buckets_hold_similar_lengths_and_each_document_once():
    length = lengths()
    buckets = Buckets(length, "key", window=64, batch_size=8)
    steps = [buckets[i] for i in range(16)]
    assert sorted(draw for step in steps for draw in step) == list(range(128))
    assert all(len(step) == 8 for step in steps)
    padding = [8 * max(map(length, step)) - sum(map(length, step)) for step in steps]
    unsorted = [8 * max(map(length, range(i, i + 8))) - sum(map(length, range(i, i + 8))) for i in range(0, 128, 8)]
    assert sum(padding) < sum(unsorted) / 4
    # Steps do not come in the order of their lengths.
    longest = [max(map(length, step)) for step in steps[:8]]
    assert longest != sorted(longest)
    assert buckets.num_draws(1) == 64 and buckets.num_draws(8) == 64 and buckets.num_draws(9) == 128


def test_buckets_keep_and_fill_the_token_budget():
    length = lengths(high=400)
    buckets = Buckets(length, "key", window=50, batch_size=3, max_step_tokens=350)
    steps = [buckets[i] for i in range(60)]
    assert len({len(step) for step in steps}) > 4
    for step in steps:
        assert len(step) * max(map(length, step)) <= 350 or len(step) == 1
    num_draws = buckets.num_draws(60)
    whole = [buckets[i] for i in range(buckets._ends[-1])]
    assert sorted(draw for step in whole for draw in step) == list(range(num_draws))
    # Only the last step of a window can be less than half full.
    used = [len(step) * max(map(length, step)) for step in whole]
    assert sum(u <= 175 for u in used) <= num_draws // 50 + sum(175 < length(d) for d in range(num_draws)) // 5


@pytest.mark.parametrize("max_step_tokens", [None, 500])
def test_bucket_step_is_independent_of_access_order(max_step_tokens):
    settings = {"window": 40, "batch_size": 5, "max_step_tokens": max_step_tokens}
    in_order = Buckets(lengths(), 1, **settings)
    steps = [in_order[i] for i in range(25)]
    for place in (24, 7):
        assert Buckets(lengths(), 1, **settings)[place] == steps[place]
    assert Buckets(lengths(), 1, **settings).num_draws(11) == in_order.num_draws(11)
