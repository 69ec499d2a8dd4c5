"""Noise of rounds: independent, and a tree's, whose sum stays small."""

import pytest
import torch

from hypernet.consolidation.private.noise import IndependentNoise, TreeNoise

SIZE = 20_000


def test_independent_noise_adds_up_with_the_rounds():
    noise = IndependentNoise(std=2.0, size=SIZE, seed=0)
    total = sum(noise.at(step) for step in range(1, 10))
    assert total.std().item() == pytest.approx(2.0 * 3, rel=0.02)
    assert torch.equal(noise.at(4), noise.at(4)) and not torch.equal(noise.at(4), noise.at(5))


def test_tree_noise_of_a_sum_is_that_of_its_bits():
    noise = TreeNoise(std=2.0, size=SIZE, seed=0)
    total = torch.zeros(SIZE)
    for step in range(1, 10):
        total += noise.at(step)
        assert torch.allclose(total, noise.prefix(step), atol=1e-4)
        assert total.std().item() == pytest.approx(2.0 * step.bit_count() ** 0.5, rel=0.03)


def test_prefixes_share_the_noise_of_their_nodes():
    noise = TreeNoise(std=1.0, size=SIZE, seed=0)
    # 4 and 6 share the node 1-4; 3 and 4 none.
    assert (noise.prefix(6) - noise.prefix(4)).std().item() == pytest.approx(1.0, rel=0.03)
    assert (noise.prefix(3) - noise.prefix(4)).std().item() == pytest.approx(3**0.5, rel=0.03)


def test_another_seed_is_other_noise():
    one, other = (TreeNoise(std=1.0, size=SIZE, seed=seed).at(3) for seed in (0, 1))
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.03
