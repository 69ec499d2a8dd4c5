"""Muon for the matrices of a hypernetwork, AdamW for everything else, as one optimizer; and its learning rate.

    make_optimizer(hypernetwork.named_parameters(), num_steps=6500, **settings)     # conf/optimizer/adamw.yaml
    optimizer = MuonAdamW(parameter_groups(hypernetwork.named_parameters(), weight_decay=0.01, muon_scale=0.5), lr=1e-3)

Muon orthogonalizes a matrix's momentum (all singular values become 1, by Newton-Schulz), so that directions
with small gradients, such as what tells one name from another, are learned as fast as the large ones that all documents
share. The hypernetwork's keys learned in 140 steps what took AdamW more than 260
(docs/experiments/2026-11-26-keys-first-muon-three-layers.md).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """[..., n, m] → about U Vᵀ of each matrix's singular value decomposition U S Vᵀ: singular values of .7 to 1.2.

    Computed in bfloat16. Source: the quintic Newton-Schulz iteration of Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        # One rounding to bfloat16 per product and sum.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, muon_scale: float | None
) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW`: matrices by Muon unless muon_scale is None; weight decay on all that is no vector.

    A matrix is a parameter named weight with two axes, or with one for the layers before these; not latents or scales.
    """
    groups: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.rpartition(".")[2] == "weight"
            kind = (muon_scale if is_matrix else None, weight_decay if parameter.ndim >= 2 else 0.0)
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "muon_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with a `muon_scale` are stepped by Muon with Nesterov momentum .95.

    Args:
        groups: as of `parameter_groups`. muon_scale: the root mean square of an update of a square matrix, in units of
            lr; at 0.2 that of AdamW's. Axes before the last two count several matrices.

    Raises:
        ValueError: a parameter is divided among processes (FSDP): Muon needs whole matrices.

    Source: Jordan et al. 2024 (above); the size of an update after Liu et al. 2025, https://arxiv.org/abs/2502.16982
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(groups, lr=lr, betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_muon = [
            (group, parameter)
            for group in self.param_groups
            if group["muon_scale"] is not None
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        grads = [parameter.grad for _, parameter in by_muon]
        for group, parameter in by_muon:
            self._muon(group, parameter)
            parameter.grad = None  # AdamW passes over it
        super().step()
        for (_, parameter), grad in zip(by_muon, grads, strict=True):
            parameter.grad = grad
        return loss

    def _muon(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"Muon needs whole matrices, got a {type(parameter.data).__name__}. With trainer=fsdp set "
                "optimizer.muon_scale=null."
            )
        state = self.state[parameter]
        if not state:
            # "step": AdamW looks for it when a state is loaded.
            state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(parameter))
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
        update = orthogonalized(parameter.grad.lerp(momentum, MOMENTUM))
        size = group["muon_scale"] * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    num_steps: int,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    warmup_steps: int,
    decay_ratio: float,
    min_lr_ratio: float,
    muon_scale: float | None = None,
) -> dict[str, Any]:
    """AdamW, or Muon for the matrices, with a learning rate that warms up, stays, and falls along half a cosine.

    Args:
        named: parameters with their names; those that need no gradient are left out.
        num_steps: optimizer steps of the whole run.
        weight_decay, muon_scale: as of `parameter_groups`.
        warmup_steps: in which the rate rises linearly to lr. decay_ratio: share of the steps, at the end, in which it
            falls. min_lr_ratio: of lr, at the last step.

    Returns:
        What Lightning's `configure_optimizers` returns.
    """
    groups = parameter_groups(named, weight_decay=weight_decay, muon_scale=muon_scale)
    optimizer = MuonAdamW(groups, lr=lr, betas=(betas[0], betas[1]))
    last = max(num_steps, 1)
    start = max(warmup_steps, last * (1 - decay_ratio))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(max(step - start, 0) / max(last - start, 1), 1.0)
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
