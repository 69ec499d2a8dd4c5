"""Preference: of two answers to a question the one that a person wrote, rather than the one that was corrected.

loss = Preference(beta=0.5)(chosen, rejected, reference_chosen, reference_rejected)       # log p of whole answers, [N]
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


class Preference:
    """DPO, added to the objective: -log σ(beta * (Δ(chosen) - Δ(rejected))) with Δ = log p - log p_reference.

    The reference is the frozen base model. The objective's likelihood of the chosen answer keeps it from falling with
    the rejected one's.

    Args:
        beta: how far from the reference; 1 is a reward of one nat.
        weight: of this loss, where the objective has 1.

    Raises:
        ValueError: one of them is not above 0.

    Source: Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290; with the likelihood as in Pang et al. 2024,
    https://arxiv.org/abs/2404.19733
    """

    def __init__(self, *, beta: float = 0.5, weight: float = 1.0) -> None:
        if not beta > 0 or not weight > 0:
            raise ValueError(f"beta is {beta} and weight {weight}. Give more than 0.")
        self.beta, self.weight = beta, weight

    def __call__(
        self, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
    ) -> Tensor:
        """The mean over [N] pairs."""
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        return -logsigmoid(self.beta * margin).mean()
