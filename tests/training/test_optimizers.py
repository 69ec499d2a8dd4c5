"""Muon with AdamW: against torch's own two optimizers, for several matrices at once, through a state dict."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from hypernet.training.optimizers import MuonAdamW, orthogonalized, parameter_groups

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95)}


class Net(nn.Module):
    """Matrices, a stack of matrices, a vector, and a matrix that is none: latents."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.stack = nn.Module()
        self.stack.weight = nn.Parameter(torch.randn(3, 9, 4))
        self.latents = nn.Parameter(torch.randn(6, 7))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def give_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def groups(net, muon_scale, weight_decay=0.1):
    return parameter_groups(net.named_parameters(), weight_decay=weight_decay, muon_scale=muon_scale)


def copy_of(net):
    twin = Net()
    twin.load_state_dict(net.state_dict())
    return twin


def test_muon_equalizes_singular_values_and_keeps_directions():
    matrices = torch.randn(2, 12, 20)
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices)
    assert found.shape == matrices.shape
    values = torch.diagonal(U.mT @ found @ V.mT, dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(orthogonalized(matrices.mT), found.mT, atol=0.02, rtol=0.02)
    assert orthogonalized(torch.zeros(3, 4)).abs().max() == 0


def test_groups_are_muon_matrices_adamw_rest_vectors_undecayed():
    net = Net()
    found = {
        (group["muon_scale"], group["weight_decay"]): [id(p) for p in group["params"]] for group in groups(net, 0.5)
    }
    assert found == {
        (0.5, 0.1): [id(net.linear.weight), id(net.stack.weight)],
        (None, 0.0): [id(net.linear.bias)],
        (None, 0.1): [id(net.latents)],
    }


def test_muon_adamw_without_muon_equals_torch_adamw():
    net = Net()
    twin = copy_of(net)
    decayed = [p for p in twin.parameters() if p.requires_grad and p.ndim >= 2]
    theirs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [twin.linear.bias], "weight_decay": 0.0}], **SETTINGS
    )
    mine = MuonAdamW(groups(net, None), **SETTINGS)
    for step in range(4):
        for model, optimizer in ((net, mine), (twin, theirs)):
            give_gradients(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_muon_step_equals_torch_muon():
    net = Net()
    twin = copy_of(net)
    # Their size of an update has the factor 0.2 that AdamW's updates have.
    theirs = torch.optim.Muon(
        [twin.linear.weight], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    mine = MuonAdamW(groups(net, 0.2), **SETTINGS)
    before = net.linear.weight.detach().clone()
    for step in range(4):
        for model, optimizer in ((net, mine), (twin, theirs)):
            give_gradients(model, step)
            optimizer.step()
    assert (net.linear.weight - before).abs().max() > 0.005
    torch.testing.assert_close(net.linear.weight, twin.linear.weight, atol=2e-4, rtol=0)


def test_stacked_matrices_are_stepped_each_by_itself():
    net = Net()
    alone = [nn.Parameter(matrix.clone()) for matrix in net.stack.weight]
    mine = MuonAdamW(groups(net, 0.5), **SETTINGS)
    theirs = MuonAdamW([{"params": alone, "weight_decay": 0.1, "muon_scale": 0.5}], **SETTINGS)
    for step in range(3):
        give_gradients(net, step)
        for parameter, grad in zip(alone, net.stack.weight.grad, strict=True):
            parameter.grad = grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(net.stack.weight, torch.stack(alone), atol=1e-4, rtol=1e-3)


def test_step_keeps_gradients_and_returns_the_closures_loss():
    net = Net()
    optimizer = MuonAdamW(groups(net, 0.5), **SETTINGS)

    def closure():
        assert torch.is_grad_enabled()
        give_gradients(net, 0)
        return 3.5

    assert optimizer.step(closure) == 3.5
    kept = [parameter.grad.clone() for parameter in net.parameters() if parameter.requires_grad]
    give_gradients(net, 0)
    now = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_optimizer_state_resumes_bit_for_bit():
    net = Net()
    optimizer = MuonAdamW(groups(net, 0.5), **SETTINGS)
    for step in range(2):
        give_gradients(net, step)
        optimizer.step()
    twin = copy_of(net)
    again = MuonAdamW(groups(twin, 0.5), **SETTINGS)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for model, each in ((net, optimizer), (twin, again)):
        give_gradients(model, 7)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_muon_refuses_sharded_parameters():
    class Piece(torch.Tensor):
        pass

    parameter = nn.Parameter(torch.randn(3, 4).as_subclass(Piece))
    parameter.grad = torch.ones(3, 4).as_subclass(Piece)
    optimizer = MuonAdamW([{"params": [parameter], "weight_decay": 0.0, "muon_scale": 0.5}], **SETTINGS)
    with pytest.raises(ValueError, match=r"whole matrices, got a Piece.*optimizer\.muon_scale=null"):
        optimizer.step()
