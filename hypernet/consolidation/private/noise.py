"""Noise of the rounds of pooled training: drawn anew each time, or a tree's, whose sum grows with the logarithm.

noise = TreeNoise(std=3.0, size=3072, seed=0)
total = clipped.sum(0) + noise.at(1)                      # rounds from 1 on, one after the other
"""

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
    """Of a node, the same whenever it is asked for. `first` and `last` are below 2^20."""
    generator = torch.Generator().manual_seed((seed << 40) + (first << 20) + last)
    return torch.randn(size, generator=generator)
