"""MeanPool: same call and shapes as the Perceiver, against its formula for one sequence at a time."""

import torch
import torch.nn.functional as F

from hypernet.model.pooling import MeanPool


def make() -> MeanPool:
    torch.manual_seed(0)
    pool = MeanPool(feature_dim=7, num_outputs=3, latent_dim=10).double()
    with torch.no_grad():
        for norm in (pool.projection_layernorm, pool.layernorm):
            norm.weight += 0.3 * torch.randn_like(norm.weight)
    return pool


def batch():
    torch.manual_seed(1)
    mask = torch.arange(37) < torch.tensor([1, 37, 13])[:, None]
    return torch.randn(3, 37, 7, dtype=torch.float64), mask


def test_outputs_and_gradients_equal_the_formula_alone():
    pool = make()
    features, mask = batch()
    features.requires_grad_()
    outputs = pool(features, mask)
    weights = dict(pool.named_parameters())
    rows = []
    for i in range(3):
        mean = features[i][mask[i]].mean(0)
        gate, up, down = (weights[f"modality_projection.{name}_proj.weight"] for name in ("gate", "up", "down"))
        summary = F.rms_norm(down @ (F.silu(gate @ mean) * (up @ mean)), (10,), eps=1e-6)
        rows.append(
            torch.stack(
                [
                    F.rms_norm(q + summary * weights["projection_layernorm.weight"], (10,), eps=1e-6)
                    for q in weights["latents_q"]
                ]
            )
            * weights["layernorm.weight"]
        )
    expected = torch.stack(rows)
    torch.testing.assert_close(outputs, expected)
    inputs = {**weights, "features": features}
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((outputs * direction).sum(), inputs.values())
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs.values())
    for name, got, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda m, name=name: f"{name}: {m}")


def test_aggregator_ignores_nan_padding():
    pool = make()
    features, mask = batch()
    assert torch.equal(pool(features, mask), pool(features.masked_fill(~mask.unsqueeze(-1), float("nan")), mask))
