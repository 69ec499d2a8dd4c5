"""What the student, which sees no memory, learns from the teacher, the frozen base model with the memory in its prompt.

loss = TeacherKL()(DistilledTokens(student=..., teacher=..., targets=...))       # a mean over answer tokens, in nats
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistilledTokens:
    """The answer tokens of a batch, [N] of them.

    Attributes:
        student, teacher: logits, [N, V]. targets: the tokens themselves, [N].
        student_hidden, teacher_hidden: outputs of the blocks there, [L, N, D]; None where no objective wants them.
    """

    student: Tensor
    teacher: Tensor
    targets: Tensor
    student_hidden: Tensor | None = None
    teacher_hidden: Tensor | None = None


class Objective(Protocol):
    """on_policy: answers are drawn from the student as it is. needs_hidden: hidden states are given."""

    on_policy: bool
    needs_hidden: bool

    def __call__(self, tokens: DistilledTokens) -> Tensor: ...


class Supervised:
    """-log p(answer): cross-entropy on the teacher's written answers."""

    on_policy = needs_hidden = False

    def __call__(self, tokens: DistilledTokens) -> Tensor:
        return torch.nn.functional.cross_entropy(tokens.student, tokens.targets)


class TeacherKL:
    """KL(teacher ‖ student) on the teacher's answers: prompt distillation.

    Source: Snell et al. 2022, https://arxiv.org/abs/2209.15189
    """

    on_policy = needs_hidden = False

    def __call__(self, tokens: DistilledTokens) -> Tensor:
        return kl(tokens.teacher, tokens.student)


class OnPolicy:
    """KL(student ‖ teacher) on answers that the student draws itself.

    Source: Shenfeld et al. 2026, https://arxiv.org/abs/2601.19897
    """

    on_policy, needs_hidden = True, False

    def __call__(self, tokens: DistilledTokens) -> Tensor:
        return kl(tokens.student, tokens.teacher)


class Deep:
    """KL(teacher ‖ student) + weight * the mean over blocks of |h_student - h_teacher|² / |h_teacher|².

    Args:
        weight: of the hidden states.

    Raises:
        ValueError: it is below 0.

    Source: Kujanpää et al. 2024, https://arxiv.org/abs/2412.14964, and hidden states as in
    https://arxiv.org/abs/2503.08727
    """

    on_policy, needs_hidden = False, True

    def __init__(self, *, weight: float = 1.0) -> None:
        if not weight >= 0:
            raise ValueError(f"weight is {weight}. Give a number from 0 on.")
        self.weight = weight

    def __call__(self, tokens: DistilledTokens) -> Tensor:
        assert tokens.student_hidden is not None and tokens.teacher_hidden is not None
        difference = (tokens.student_hidden - tokens.teacher_hidden).square().sum((1, 2))
        relative = difference / tokens.teacher_hidden.square().sum((1, 2))
        return kl(tokens.teacher, tokens.student) + self.weight * relative.mean()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q), the mean over rows [N, V], in nats."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
