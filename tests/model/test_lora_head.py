"""The LoRA head against a loop over chunks, layers, targets and rows; its zero start and its layout."""

import pytest
import torch
import torch.nn.functional as F

from hypernet.base.targets import LoRATarget
from hypernet.model.lora_head import LoRAHead

LAYERS, RANK, LATENT_DIM, CHUNKS = 3, 2, 5, 2
TARGETS = [
    LoRATarget("down_proj", ("a", "b", "c"), 11, 7),
    LoRATarget("up_proj", ("d", "e", "f"), 7, 13),
]


def make(targets, *, num_pre_head_blocks=2, start=False) -> LoRAHead:
    torch.manual_seed(0)
    head = LoRAHead(
        targets, latent_dim=LATENT_DIM, rank=RANK, num_pre_head_blocks=num_pre_head_blocks, pre_head_multiple=3
    ).double()
    if not start:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return head


def make_latents(targets) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(CHUNKS, LAYERS, len(targets), RANK, LATENT_DIM, dtype=torch.float64)


def slow_row(head: LoRAHead, latent, layer, m):
    """One latent [H] to one row of [A | B], before the scalers."""
    x = latent
    for block in head.layers:
        norm, first, _, second, last_norm = block.layers
        y = F.layer_norm(x, x.shape, norm.weight, norm.bias, 1e-5)
        y = F.silu(y @ first.weight[layer] + first.bias[0, layer, 0, 0])
        y = y @ second.weight[layer] + second.bias[0, layer, 0, 0]
        x = x + F.layer_norm(y, x.shape, last_norm.weight, last_norm.bias, 1e-5)
    weight = head.head.weight[layer] if len(head.targets) == 1 else head.head.weight[layer, m]
    return (x / x.square().sum().sqrt()) @ weight


@pytest.mark.parametrize("targets", [TARGETS[:1], TARGETS], ids=["one target", "two targets"])
def test_lora_head_and_gradients_equal_loop_over_rows(targets):
    head = make(targets)
    latents = make_latents(targets).requires_grad_()
    A, B = head(latents)
    got, expected = [], []
    for m, target in enumerate(targets):
        for name, matrix, scaler, columns in (
            ("A", A, head.scaler_A, slice(0, target.d_in)),
            ("B", B, head.scaler_B, slice(target.d_in, target.d_in + target.d_out)),
        ):
            rows = [
                slow_row(head, latents[c, layer, m, r], layer, m)[columns] * scaler[target.name][0, layer, r, 0]
                for c in range(CHUNKS)
                for layer in range(LAYERS)
                for r in range(RANK)
            ]
            got.append(matrix[target.name])
            expected.append(torch.stack(rows).unflatten(0, (CHUNKS, LAYERS, RANK)))
            torch.testing.assert_close(got[-1], expected[-1], msg=lambda t, name=name: f"{name}: {t}")
    inputs = {k: v for k, v in head.named_parameters() if not k.startswith("bias_")} | {"latents": latents}
    directions = [torch.randn_like(x) for x in got]
    gradients, expected_gradients = (
        torch.autograd.grad(sum((x * d).sum() for x, d in zip(xs, directions, strict=True)), inputs.values())
        for xs in (got, expected)
    )
    for name, got_gradient, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got_gradient, wanted, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("targets", [TARGETS[:1], TARGETS], ids=["one target", "two targets"])
def test_b_starts_at_zero_and_a_at_lora_scale(targets):
    head = make(targets, start=True)
    A, B = head(make_latents(targets))
    for target in targets:
        assert A[target.name].shape == (CHUNKS, LAYERS, RANK, target.d_in)
        assert B[target.name].shape == (CHUNKS, LAYERS, RANK, target.d_out)
        assert not B[target.name].any() and not head.bias_B[target.name].any()
        assert 0.5 < A[target.name].std() * target.d_in**0.5 < 2
        assert 0 < head.bias_A[target.name].std() < 0.5 * A[target.name].std()
        assert (head.scaler_A[target.name] == 1).all() and (head.scaler_B[target.name] == 1).all()


def test_lora_head_gets_a_gradient_at_zero_start():
    head = make(TARGETS, start=True)
    A, B = head(make_latents(TARGETS))
    name = TARGETS[0].name
    (A[name].mT @ B[name]).sum().backward()
    d_in, d_out = TARGETS[0].d_in, TARGETS[0].d_out
    assert head.head.weight.grad[:, 0, :, d_in : d_in + d_out].all()
    assert not head.head.weight.grad[:, 0, :, :d_in].any()


def test_generated_matrices_of_a_layer_are_contiguous():
    A, B = make(TARGETS)(make_latents(TARGETS))
    assert all(matrices[name][:, 1].is_contiguous() for matrices in (A, B) for name in matrices)


def test_lora_head_without_pre_head_blocks_reads_latents():
    head = make(TARGETS[:1], num_pre_head_blocks=0)
    latents = make_latents(TARGETS[:1])
    A, _ = head(latents)
    expected = slow_row(head, latents[0, 1, 0, 1], 1, 0)[:11] * head.scaler_A["down_proj"][0, 1, 1, 0]
    torch.testing.assert_close(A["down_proj"][0, 1, 1], expected)
