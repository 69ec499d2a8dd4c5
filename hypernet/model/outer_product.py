"""OuterProduct: a chunk's features straight to A and B of every layer, by sums over its tokens, without latents.

The fast-weight way: every token writes its value under its key, and the delta is the sum of those outer products,
projected onto R directions so that it is a LoRA block. No attention, no layer after another.

    network = OuterProduct(targets, feature_dim=192, rank=8, inner_dim=128)
    A, B = network(features, mask)         # [C, L, T, D], [C, T] -> name -> [C, L, R, d_in], [C, L, R, d_out]
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernet.base.targets import LoRATarget
from hypernet.model.lora_head import zero_beyond_width


class OuterProduct(nn.Module):
    """A = a W_A and B = unit(a Kᵀ V) W_B with the directions a = unit(Q + Gᵀ K).

    Keys K and values V, [T, H], and gates G, [T, R], are linear in a token's features, Q is learned; each layer and
    target has its own weights. But for the unit length in B the delta is W_Bᵀ (Vᵀ K) aᵀ a W_A: the sum over the
    tokens of the outer products v kᵀ, projected onto R directions of keys.

    Why not an SVD, which gives the best projection: its gradient grows without bound where two singular values meet,
    and a chunk of fewer tokens than R has several that are zero. Here the directions are those that training finds
    (Q), moved by sums of the chunk's own keys (Gᵀ K, as in the range finder of a randomized SVD, with learned in place
    of random numbers); length one stands for orthogonality. So the rank is R at most, whatever the chunk, and every
    gradient exists. B's rows have length one before W_B, as if all singular values were one: the delta does not grow
    with the number of tokens, and its size is learned.

    Chunks are joined by concatenating their ranks, which adds their deltas.

    Args:
        targets: the modules to adapt, with the same number of layers each.
        feature_dim: D, size of a token's features.
        rank: R, rows of A and B per chunk.
        inner_dim: H, size of keys and values.

    Attributes:
        bias_A, bias_B: the bias block by target name, [L, R, d_in] and [L, R, d_out].

    Start: W_B and bias_B are zero, so an untrained one gives B = 0 exactly and the base model is unchanged; A and
    what W_B reads are not zero, so W_B has a gradient in the first step and everything else from the second on. The
    gates are zero: at first all chunks share one A, and values are all there is to learn. A's entries have variance
    1 / d_in, as in `LoRAHead`.

    Source: after the idea of Generative Adapter, https://arxiv.org/abs/2411.05877, which adds up outer products of
    hidden states and normalizes them by an SVD. The projection, the gates and the start are ours.
    """

    def __init__(self, targets: Sequence[LoRATarget], *, feature_dim: int, rank: int, inner_dim: int = 128):
        super().__init__()
        if inner_dim < 1:
            raise ValueError(f"inner_dim must be at least 1, got {inner_dim}.")
        self.targets = tuple(targets)
        self.num_layers = num_layers = len(self.targets[0].paths)

        def by_name(make: Callable[[LoRATarget], Tensor]) -> nn.ParameterDict:
            return nn.ParameterDict({target.name: nn.Parameter(make(target)) for target in self.targets})

        def reader(dim: int) -> nn.ParameterDict:
            return by_name(lambda t: torch.randn(num_layers, feature_dim, dim) * feature_dim**-0.5)

        self.keys, self.values = reader(inner_dim), reader(inner_dim)
        self.gates = by_name(lambda t: torch.zeros(num_layers, feature_dim, rank))
        self.queries = by_name(lambda t: torch.randn(num_layers, rank, inner_dim))
        self.out_A = by_name(lambda t: torch.randn(num_layers, inner_dim, t.d_in) * t.d_in**-0.5)
        self.out_B = by_name(lambda t: torch.zeros(num_layers, inner_dim, t.d_out))

        # Small next to the chunks' rows, as in LoRAHead.
        def small(target: LoRATarget) -> Tensor:
            rows = torch.randn(num_layers, rank, target.d_in) * 0.2 * (target.d_in * rank) ** -0.5
            return zero_beyond_width(target, "d_in", rows)

        self.bias_A = by_name(small)
        self.bias_B = by_name(lambda t: torch.zeros(num_layers, rank, t.d_out))

    def forward(
        self, features: Tensor, mask: Tensor, layers: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A, B by target name, [C, L, R, d_in] and [C, L, R, d_out], without the bias block, contiguous per layer.

        Args:
            features: [C, L, T, D], or [C, 1, T, D] if one map serves all layers. What stands where the mask is False is
                never read, it may be NaN.
            mask: [C, T] bool, True where there is a token.
            layers: those that the features belong to; L is their number.
        """
        tokens = features.masked_fill(~mask[:, None, :, None], 0)  # a token of zeros adds nothing to any sum
        tokens = tokens.expand(-1, len(range(self.num_layers)[layers]), -1, -1)
        A, B = {}, {}
        for target in self.targets:
            gates, keys, values = (
                torch.einsum("cltd, ldh -> lcth", tokens, weights[target.name][layers])
                for weights in (self.gates, self.keys, self.values)
            )
            mixed = torch.einsum("lctr, lcth -> lcrh", gates, keys)
            directions = F.normalize(self.queries[target.name][layers, None] + mixed, dim=-1)
            strengths = torch.einsum("lcrh, lcth -> lcrt", directions, keys)
            written = F.normalize(torch.einsum("lcrt, lcth -> lcrh", strengths, values), dim=-1)
            rows_A = torch.einsum("lcrh, lhd -> lcrd", directions, self.out_A[target.name][layers])
            rows_B = torch.einsum("lcrh, lhd -> lcrd", written, self.out_B[target.name][layers])
            A[target.name] = zero_beyond_width(target, "d_in", rows_A, layers).transpose(0, 1)
            B[target.name] = zero_beyond_width(target, "d_out", rows_B, layers).transpose(0, 1)
        return A, B
