"""Epsilons against values computed by hand, an exact formula, opacus and dp-accounting."""

import math
from itertools import product

import pytest

from hypernet.consolidation.private.accounting import (
    OpacusAccountant,
    RenyiAccountant,
    Spending,
    has_opacus,
    noise_for,
    renyi,
    tree_nodes,
    tree_sensitivity,
)

needs_opacus = pytest.mark.skipif(not has_opacus(), reason="needs opacus, the extra `private`")
CASES = [
    Spending(noise, rounds, rate)
    for noise, rounds, rate in ((0.8, 60, 0.05), (1.0, 60, 0.25), (2.0, 60, 0.25), (4.0, 100, 0.25), (1.5, 1, 1.0))
]


def exact_delta(epsilon, noise):
    """Of one Gaussian release, Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8."""
    below = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    return below(0.5 / noise - epsilon * noise) - math.exp(epsilon) * below(-0.5 / noise - epsilon * noise)


def test_renyi_divergences_are_those_computed_by_hand():
    assert renyi(2, noise=1.0, sampling_rate=1.0) == 1.0
    assert renyi(3.5, noise=2.0, sampling_rate=1.0) == 3.5 / 8
    # Order 2: log((1 - q)² + 2 q (1 - q) + q² e^(1/σ²)).
    assert renyi(2, noise=1.0, sampling_rate=0.5) == pytest.approx(math.log(0.75 + 0.25 * math.e), rel=1e-12)
    # Between 2 and 3, and between 1 and 2, a straight line of (α - 1) R.
    assert renyi(1.5, noise=1.0, sampling_rate=0.5) == pytest.approx(math.log(0.75 + 0.25 * math.e), rel=1e-12)
    halfway = (renyi(2, noise=1.0, sampling_rate=0.5) + 2 * renyi(3, noise=1.0, sampling_rate=0.5)) / 2 / 1.5
    assert renyi(2.5, noise=1.0, sampling_rate=0.5) == pytest.approx(halfway, rel=1e-12)
    # Order 3, q = 1/2, σ² = 2: 1/2 log of 1/8 (1 + 3 + 3 e^(1/2) + e^(3/2)).
    by_hand = math.log((4 + 3 * math.exp(0.5) + math.exp(1.5)) / 8) / 2
    assert renyi(3, noise=math.sqrt(2), sampling_rate=0.5) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.7])
def test_epsilon_of_one_release_bounds_the_exact_one(noise):
    epsilon = RenyiAccountant().epsilon(Spending(noise, 1, 1.0), delta=1e-3)
    assert exact_delta(epsilon, noise) <= 1e-3 <= exact_delta(0.8 * epsilon, noise)


def test_rounds_of_everybody_are_one_with_less_noise():
    accountant = RenyiAccountant()
    many = accountant.epsilon(Spending(6.0, 9, 1.0), delta=1e-3)
    assert many == pytest.approx(accountant.epsilon(Spending(2.0, 1, 1.0), delta=1e-3), rel=1e-12)


@needs_opacus
@pytest.mark.parametrize("spending", CASES)
def test_opacus_agrees_with_the_formula(spending):
    """Ours is a bound on fractional orders where users are sampled, theirs a series: ours is not below, and near."""
    ours = RenyiAccountant().epsilon(spending, delta=1e-3)
    assert 0.95 * ours < OpacusAccountant("rdp").epsilon(spending, delta=1e-3) < 1.005 * ours


@needs_opacus
def test_numerical_accountant_of_opacus_is_tighter():
    spending = CASES[1]
    rdp, prv = (OpacusAccountant(kind).epsilon(spending, delta=1e-3) for kind in ("rdp", "prv"))
    assert 0.7 * rdp < prv < rdp


@pytest.mark.parametrize("spending", CASES)
def test_dp_accounting_agrees_with_the_formula(spending):
    rdp = pytest.importorskip("dp_accounting.rdp", reason="needs dp-accounting")
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    accountant = rdp.RdpAccountant()
    of_round = PoissonSampledDpEvent(spending.sampling_rate, GaussianDpEvent(spending.noise))
    accountant.compose(SelfComposedDpEvent(of_round, spending.rounds))
    ours = RenyiAccountant().epsilon(spending, delta=1e-3)
    assert 0.95 * ours < accountant.get_epsilon(1e-3) < 1.005 * ours


def test_noise_is_the_least_that_stays_within_epsilon():
    spending, accountant = Spending(1.0, 60, 0.25), RenyiAccountant()
    for epsilon in (8.0, 1.0):
        noise = noise_for(epsilon, spending, accountant, delta=1e-3)
        assert accountant.epsilon(spending._replace(noise=noise), delta=1e-3) <= epsilon
        assert accountant.epsilon(spending._replace(noise=0.99 * noise), delta=1e-3) > epsilon


@pytest.mark.parametrize(
    ("step", "nodes"),
    [(0, []), (1, [(1, 1)]), (4, [(1, 4)]), (6, [(1, 4), (5, 6)]), (7, [(1, 4), (5, 6), (7, 7)])],
)
def test_nodes_of_a_prefix_are_those_of_its_bits(step, nodes):
    assert tree_nodes(step) == nodes


@pytest.mark.parametrize(
    ("rounds_of_user", "squared"),
    # Nodes that prefixes of 4 rounds use: 1, 1-2, 3, 1-4.
    [([1], 3), ([2], 2), ([3], 2), ([4], 1), ([1, 3], 1 + 1 + 1 + 4), ([1, 2, 3, 4], 1 + 4 + 1 + 16)],
)
def test_tree_sensitivity_is_that_counted_by_hand(rounds_of_user, squared):
    assert tree_sensitivity([rounds_of_user, [4]], rounds=4) == pytest.approx(math.sqrt(squared))


def test_no_contributions_change_more_than_the_sensitivity():
    turns = [1, 3, 6]
    nodes = {node for step in range(1, 8) for node in tree_nodes(step)}
    lengths = [
        sum(sum(s for s, t in zip(signs, turns, strict=True) if a <= t <= b) ** 2 for a, b in nodes)
        for signs in product((-1, 0, 1), repeat=3)
    ]
    assert max(lengths) == pytest.approx(tree_sensitivity([turns], rounds=7) ** 2)


def test_tree_of_one_turn_spends_less_than_its_height():
    tree = Spending.of_tree(noise=4.0, participations=[[1], [2], [3], [4]], rounds=4)
    assert tree == Spending(4.0 / math.sqrt(3), 1, 1.0)


def test_impossible_spending_is_an_error():
    accountant = RenyiAccountant()
    with pytest.raises(ValueError, match="needs finite noise above 0"):
        accountant.epsilon(Spending(0.0, 1, 0.5), delta=1e-3)
    with pytest.raises(ValueError, match="delta is 1.5"):
        accountant.epsilon(Spending(1.0, 1, 0.5), delta=1.5)
    with pytest.raises(ValueError, match="infinite is training without noise"):
        noise_for(math.inf, Spending(1.0, 1, 0.5), accountant, delta=1e-3)
    with pytest.raises(ValueError, match=r"a user is in \[5\]"):
        tree_sensitivity([[5]], rounds=4)
    with pytest.raises(ValueError, match="Nobody takes part"):
        tree_sensitivity([[]], rounds=4)


def test_missing_opacus_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("hypernet.consolidation.private.accounting.has_opacus", lambda: False)
    with pytest.raises(ValueError, match=r"doc-to-lora\[private\]"):
        OpacusAccountant()
