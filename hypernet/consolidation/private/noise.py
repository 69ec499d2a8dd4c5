"""Noise of the rounds of pooled training: drawn anew each time, or a tree's, whose sum grows with the logarithm.

noise = TreeNoise(std=3.0, size=3072, seed=0)
total = clipped.sum(0) + noise.at(1)                      # rounds from 1 on, one after the other

The same seed gives the same noise, so that a run can be repeated; whoever knows the seed can take the noise off. Where
weights are given away, draw the seed from the system (`secrets.randbits(64)`) and keep it nowhere.
"""

import numpy as np
import torch
from torch import Tensor

from hypernet.consolidation.private.accounting import tree_nodes


class IndependentNoise:
    """Gaussian noise of each round by itself: DP-SGD. Over t rounds its sum has variance t std².

    Source: Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1
    """

    def __init__(self, *, std: float, size: int, seed: int) -> None:
        self.std, self.size, self.seed = std, size, seed

    def at(self, step: int) -> Tensor:
        """[size] of round `step`."""
        return self.std * _normal(self.size, self.seed, step, step)


class TreeNoise:
    """What a tree's noise adds to each round: the sum of rounds 1 to t has the noise of its nodes alone, one for each
    bit of t, so variance at most (1 + log2 t) std². Needs no sampling of users: DP-FTRL.

    Source: Kairouz et al. 2021, https://arxiv.org/abs/2103.00039, algorithm 1
    """

    def __init__(self, *, std: float, size: int, seed: int) -> None:
        self.std, self.size, self.seed = std, size, seed

    def prefix(self, step: int) -> Tensor:
        """[size], noise of the sum of rounds 1 to `step`; 0 of none."""
        found = torch.zeros(self.size)
        for first, last in tree_nodes(step):
            found += _normal(self.size, self.seed, first, last)
        return self.std * found

    def at(self, step: int) -> Tensor:
        """[size], prefix(step) - prefix(step - 1)."""
        return self.prefix(step) - self.prefix(step - 1)


def _normal(size: int, seed: int, first: int, last: int) -> Tensor:
    """Of a node, the same whenever it is asked for. Not torch's generator, which reads 32 bits of a seed: two nodes
    could share their noise."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, first, last]))
    return torch.from_numpy(generator.standard_normal(size, np.float32))
