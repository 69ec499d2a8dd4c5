"""MeanPool: the plain baseline for the Perceiver, same call, same shapes.

A chunk is the mean of its tokens' features; an MLP brings it to the latent size and one learned vector per output tells
the outputs apart. Whatever the order of the words carries is lost, except for what the context encoder has put into the
features.

    pool = MeanPool(feature_dim=192, num_outputs=8, latent_dim=128)
    outputs = pool(features, mask)           # [(C L), T, D], [(C L), T] -> [(C L), num_outputs, H]
"""

import torch
from torch import Tensor, nn

from hypernet.model.perceiver import GatedMLP, RMSNorm


class MeanPool(nn.Module):
    """norm(query + mlp(mean of the tokens)) for each learned output query.

    Args:
        feature_dim: D, size of a token's features.
        num_outputs: output queries; one per target module and rank row (and per layer if one map serves all layers).
        latent_dim: H, size of an output.
        projection_multiple: hidden size of the MLP, in units of feature_dim.
    """

    def __init__(self, *, feature_dim: int, num_outputs: int, latent_dim: int = 512, projection_multiple: int = 4):
        super().__init__()
        self.feature_dim = feature_dim
        self.latent_dim = latent_dim
        self.modality_projection = GatedMLP(feature_dim, projection_multiple * feature_dim, latent_dim)
        self.latents_q = nn.Parameter(torch.randn(num_outputs, latent_dim))
        self.projection_layernorm = RMSNorm(latent_dim)
        self.layernorm = RMSNorm(latent_dim)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """[(C L), T, D] and [(C L), T] bool -> [(C L), num_outputs, H]; where the mask is False nothing is read."""
        tokens = features.masked_fill(~mask.unsqueeze(-1), 0)
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        summary = self.projection_layernorm(self.modality_projection(mean.to(features.dtype)))
        return self.layernorm(self.latents_q + summary.unsqueeze(1))
