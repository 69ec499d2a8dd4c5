"""Realignment: a few steps towards the base model, after the lessons are learned."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hypernet.consolidation.rehearsal import Rehearsal, SelfSynthesised
from hypernet.consolidation.remedies.base import Remedy


class Realignment(Remedy):
    """Steps of AdamW on KL(base ‖ student) alone, with a cosine to 0, once the lessons are learned.

    Args:
        steps: that are made.
        lr: peak learning rate.
        rehearsal: what the student is compared with the base model on; None: what the base model writes.

    Raises:
        ValueError: steps is below 1, or lr not above 0 or not finite.
    """

    def __init__(self, *, steps: int = 20, lr: float = 1e-3, rehearsal: Rehearsal | None = None) -> None:
        if steps < 1 or not 0 < lr < math.inf:
            raise ValueError(f"steps is {steps} and lr {lr}. Give at least one step, and a finite lr above 0.")
        self.steps, self.lr, self.rehearsal = steps, lr, rehearsal or SelfSynthesised()

    def after(self, parameters: Iterable[Tensor], loss: Callable[[int], Tensor]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
