"""CharacterWriter: a hypernetwork that reads a character's sheet and writes the persona's LoRA in one forward pass.

writer = CharacterWriter(block, Shared.of(inputs))
lora = writer(features, marks)                        # sentences of C sheets [C, T, D], ±1 [C, T] → factors of C LoRAs

A sentence's features are what the last block's projection reads where the base model is asked whether it would say it.
Trained on characters of some traits, it writes those of others: what it learns is how a sheet's sentences are compared
with what is asked.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from hypernet.consolidation.persona.last_block import Factors, LastBlock
from hypernet.model.hypernetwork import HyperNetwork


class Shared(NamedTuple):
    """What all inputs have in common: direction [d_in], of length 1; scale: of what is left, one over its rms.

    Of SmolLM2's inputs where it answers yes or no the mean is twelve times as long as what tells two statements apart:
    trained on them as they are, a LoRA moves all answers alike first.
    """

    direction: Tensor
    scale: float

    @classmethod
    def of(cls, inputs: Tensor) -> Self:
        """Of inputs [N, d_in]."""
        mean = inputs.mean(0)
        direction = mean / mean.norm().clamp(min=1e-12)
        left = inputs - (inputs @ direction)[:, None] * direction
        return cls(direction, float(1 / left.square().mean().sqrt().clamp(min=1e-12)))

    def removed(self, inputs: Tensor) -> Tensor:
        """scale (x - (x·u) u), over the last axis."""
        return self.scale * (inputs - (inputs @ self.direction)[..., None] * self.direction)

    # The map is symmetric: a LoRA of what it gives is one of the inputs with the same map on A's rows.


class CharacterWriter(nn.Module):
    """Sheets to LoRAs; untrained it writes B = 0, the base model as it is.

    Args:
        block: where the LoRA goes. shared: removed from sentences and, by A, from what is asked.
        inner_dim: rank of W in A = (1 + W) Σ, with Σ the mean of a sheet's sentences, each times its mark; B is learned
            and the same for all characters, rank 1.
        aggregator: of a `HyperNetwork` that reads sentences as tokens and writes A and B of this rank; None: that mean.
        rank: with an aggregator. seed: of the start.
    """

    def __init__(
        self,
        block: LastBlock,
        shared: Shared,
        *,
        rank: int = 4,
        inner_dim: int = 64,
        aggregator: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shared = shared
        d_in, d_out = block.place.d_in, block.place.d_out
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: HyperNetwork | None = None
            if aggregator is not None:
                self.network = HyperNetwork(
                    targets=block.targets,
                    feature_dim=2 * d_in,
                    num_maps=1,
                    rank=rank,
                    scaling=1.0,
                    aggregator=aggregator,
                    bias_block=False,
                )
                return
            self.down = nn.Parameter(torch.randn(d_in, inner_dim) / d_in**0.5)
            self.up = nn.Parameter(torch.zeros(inner_dim, d_in))
            self.B = nn.Parameter(torch.zeros(1, d_out))

    def forward(self, features: Tensor, marks: Tensor) -> Factors:
        """LoRAs of C characters.

        Args:
            features: of their sheets' sentences, [C, T, d_in]. marks: 1 of what one says, -1 of what one never says,
                [C, T].

        Returns:
            A [C, R, d_in], B [C, R, d_out].
        """
        told = self.shared.removed(features)
        marked = told * marks[..., None]
        if self.network is not None:
            mask = torch.ones_like(marks, dtype=torch.bool)
            A, B = self.network(torch.cat([told, marked], -1)[:, None], mask)
            (name,) = A
            return Factors(self.shared.removed(A[name][:, 0]), B[name][:, 0])
        total = marked.mean(1)
        A_row = total + total @ self.down @ self.up
        return Factors(self.shared.removed(A_row)[:, None] / features.shape[-1] ** 0.5, self.B.expand(len(told), 1, -1))
