"""LoRAHead: latents to the A and B of every layer, target module and rank row.

Each latent passes residual blocks with weights per layer, is scaled to unit length and multiplied by one matrix per
layer and target: the first d_in columns give a row of A, the next d_out a row of B. The head also owns the bias block,
R more rows that all documents share.

    head = LoRAHead(targets, latent_dim=128, rank=8)
    A, B = head(latents)                     # [C, L, M, R, H] -> name -> [C, L, R, d_in], [C, L, R, d_out]
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hypernet.base.targets import LoRATarget


class PerLayerLinear(nn.Module):
    """A linear map with its own weight and bias for each layer: [L, n, in_dim] -> [L, n, out_dim]."""

    def __init__(self, num_layers: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_layers, in_dim, out_dim).uniform_(-bound, bound))
        # The axes of size one stand for chunks, targets and ranks in the published format.
        self.bias = nn.Parameter(torch.zeros(1, num_layers, 1, 1, out_dim))

    def forward(self, x: Tensor, layers: slice = slice(None)) -> Tensor:
        return torch.baddbmm(self.bias[0, layers, 0], x, self.weight[layers])


class ResidualBlock(nn.Module):
    """x + norm(linear(silu(linear(norm(x))))); linear maps per layer, LayerNorms (eps 1e-5) shared by the layers."""

    def __init__(self, num_layers: int, dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim),
            PerLayerLinear(num_layers, dim, hidden_dim),
            nn.SiLU(),
            PerLayerLinear(num_layers, hidden_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor, layers: slice = slice(None)) -> Tensor:
        norm, widen, activation, narrow, out_norm = self.layers
        return x + out_norm(narrow(activation(widen(norm(x), layers)), layers))


class HeadWeight(nn.Module):
    """The head's matrix, [L, H, d] for one target or [L, M, H, d]; a module, so that the key ends in head.weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoRAHead(nn.Module):
    """Latents to LoRA matrices, one latent per chunk, layer, target and rank row.

    Args:
        targets: the modules to adapt, with the same number of layers each, in the order of the latents' M axis.
        latent_dim: H.
        rank: R, rows of A and B per chunk.
        num_pre_head_blocks: residual blocks before the head.
        pre_head_multiple: their hidden size, in units of latent_dim.

    Attributes:
        bias_A, bias_B: the bias block by target name, [L, R, d_in] and [L, R, d_out].
        scaler_A, scaler_B: factors on the rows of A and B by target name, [1, L, R, 1].

    Start: an untrained head gives B = 0 exactly, through its B columns and bias_B, so the base model is unchanged; the
    scalers are one. (The published zero start, scaler_B = 0 with a random head, passes next to no gradient to what
    depends on the document.) A's columns are normal with variance 1 / d_in: the head's input has length one, so A's
    entries are as large as the head's, and a row of A maps activations of unit rms to unit size whatever d_in and H
    are. With B zero, A and everything before the head get their first gradient in the second step.

    Source: Doc-to-LoRA, https://arxiv.org/abs/2602.15902; arithmetic of its published checkpoints.
    """

    def __init__(
        self,
        targets: Sequence[LoRATarget],
        *,
        latent_dim: int,
        rank: int,
        num_pre_head_blocks: int = 1,
        pre_head_multiple: int = 4,
    ):
        super().__init__()
        self.targets = tuple(targets)
        self.rank = rank
        num_layers = len(self.targets[0].paths)
        self.layers = nn.ModuleList(
            ResidualBlock(num_layers, latent_dim, pre_head_multiple * latent_dim) for _ in range(num_pre_head_blocks)
        )

        weight = torch.zeros(num_layers, len(self.targets), latent_dim, max(t.d_in + t.d_out for t in self.targets))
        for m, target in enumerate(self.targets):
            weight[:, m, :, : target.d_in].normal_(std=target.d_in**-0.5)
        self.head = HeadWeight(weight.squeeze(1))

        def by_name(make: Callable[[LoRATarget], Tensor]) -> nn.ParameterDict:
            return nn.ParameterDict({target.name: nn.Parameter(make(target)) for target in self.targets})

        self.scaler_A = by_name(lambda t: torch.ones(1, num_layers, rank, 1))
        self.scaler_B = by_name(lambda t: torch.ones(1, num_layers, rank, 1))

        # Small next to the chunks' rows (std d_in**-0.5): the shared block should not answer before the document does.
        def small(target: LoRATarget) -> Tensor:
            rows = torch.randn(num_layers, rank, target.d_in) * 0.2 * (target.d_in * rank) ** -0.5
            return zero_beyond_width(target, "d_in", rows)

        self.bias_A = by_name(small)
        self.bias_B = by_name(lambda t: torch.zeros(num_layers, rank, t.d_out))

    def forward(self, latents: Tensor, layers: slice = slice(None)) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """[C, L, M, R, H] -> A, B by target name, [C, L, R, d_in] and [C, L, R, d_out], without the bias block.

        The results are contiguous per layer: A[name][:, layer] needs no copy to become a matrix.

        Args:
            layers: those that the latents belong to; L is their number.
        """
        num_targets = latents.shape[2]
        # Layers first, since all weights are per layer: every product below is one batched matmul.
        x = rearrange(latents, "c l m r h -> l (m c r) h")
        for block in self.layers:
            x = block(x, layers)
        x = rearrange(F.normalize(x, dim=-1), "l (m n) h -> (l m) n h", m=num_targets)
        weight = self.head.weight[layers] if num_targets == 1 else self.head.weight[layers].flatten(0, 1)
        rows = rearrange(torch.bmm(x, weight), "(l m) (c r) d -> m l c r d", m=num_targets, r=self.rank)

        A, B = {}, {}
        for target, target_rows in zip(self.targets, rows.unbind(), strict=True):
            padding = rows.shape[-1] - target.d_in - target.d_out
            rows_A, rows_B, _ = target_rows.split([target.d_in, target.d_out, padding], dim=-1)
            rows_A = rows_A * self.scaler_A[target.name][:, layers].movedim(0, 1)
            rows_B = rows_B * self.scaler_B[target.name][:, layers].movedim(0, 1)
            A[target.name] = zero_beyond_width(target, "d_in", rows_A, layers).transpose(0, 1)
            B[target.name] = zero_beyond_width(target, "d_out", rows_B, layers).transpose(0, 1)
        return A, B


def zero_beyond_width(target: LoRATarget, width: str, rows: Tensor, layers: slice = slice(None)) -> Tensor:
    """[layers, ..., d] with zeros beyond each layer's own width, and in layers that lack the module."""
    if target.widths is None and None not in target.paths:
        return rows
    own = {module.layer: getattr(module, width) for module in target.modules()}
    widths = torch.tensor([own.get(layer, 0) for layer in range(len(target.paths))[layers]], device=rows.device)
    inside = torch.arange(rows.shape[-1], device=rows.device) < widths[:, None]
    return rows * inside.view(len(widths), *[1] * (rows.ndim - 2), -1)
