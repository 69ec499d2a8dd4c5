"""CharacterWriter: a hypernetwork that reads a character's sheet and writes the persona's LoRA in one forward pass.

writer = CharacterWriter(block, Shared.of(inputs))
lora = writer(features, marks)                        # sentences of C sheets [C, T, D], ±1 [C, T] → factors of C LoRAs

A sentence's features are what the last block's projection reads where the base model is asked whether it would say it.
Trained on characters of some traits, it writes those of others: what it learns is how a sheet's sentences are compared
with what is asked.
"""

import torch
from torch import Tensor, nn

from hypernet.consolidation.persona.last_block import Factors, LastBlock, Shared
from hypernet.model.hypernetwork import HyperNetwork

WRITERS = ("ridge", "mean", "perceiver")
PERCEIVER = {
    **{"name": "perceiver", "latent_dim": 96, "num_latents": 8, "num_blocks": 2, "num_self_attention_blocks": 0},
    **{"num_heads": 4, "num_kv_heads": 4, "head_dim": 24, "mlp_multiple": 2, "projection_multiple": 2},
}


class CharacterWriter(nn.Module):
    """Sheets to LoRAs; untrained it writes B = 0, the base model as it is.

    Sentences are z = (1 + W) x, W learned, of rank `inner_dim`. A is one row, as B, which is a learned multiple of the
    answers' directions and the same for all characters:

        ridge       A = (1 + W)ᵀ Σ_t a_t z_t, a = (Z Zᵀ / d + λ)⁻¹ marks: the regression of a sheet's marks on its
                    sentences, λ learned
        mean        A = (1 + W)ᵀ Σ_t marks_t z_t / T
        perceiver   A and B of rank `rank` by this package's `HyperNetwork`, whose tokens are the sentences

    Args:
        block: where the LoRA goes. shared: removed from sentences and, by A, from what is asked.
        answers: rows that B is made of, [K, d_out], as of `LastBlock.answer_directions`.
        seed: of the start.

    Raises:
        ValueError: an unknown kind.

    Source: a closed form behind learned features: Bertinetto et al. 2019, https://arxiv.org/abs/1805.08136
    """

    def __init__(
        self,
        block: LastBlock,
        shared: Shared,
        answers: Tensor,
        *,
        kind: str = "ridge",
        rank: int = 4,
        inner_dim: int = 64,
        ridge: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in WRITERS:
            raise ValueError(f"kind is {kind!r}. Choose of {', '.join(WRITERS)}.")
        self.kind, self.shared, self.answers = kind, shared, answers
        d_in = block.place.d_in
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down = nn.Parameter(torch.randn(d_in, inner_dim) / d_in**0.5)
            if kind == "perceiver":
                self.network = HyperNetwork(
                    targets=block.targets,
                    feature_dim=2 * inner_dim,
                    num_maps=1,
                    rank=rank,
                    scaling=1.0,
                    aggregator=PERCEIVER,
                    bias_block=False,
                )
                return
            self.up = nn.Parameter(torch.zeros(inner_dim, d_in))
            self.log_ridge = nn.Parameter(torch.tensor(ridge).log())
            self.gain = nn.Parameter(torch.zeros(1, len(answers)))

    def forward(self, features: Tensor, marks: Tensor) -> Factors:
        """LoRAs of C characters.

        Args:
            features: of their sheets' sentences, [C, T, d_in]. marks: 1 of what one says, -1 of what one never says,
                [C, T].

        Returns:
            A [C, R, d_in], B [C, R, d_out].
        """
        told = self.shared.removed(features)
        if self.kind == "perceiver":
            seen = told @ self.down
            tokens = torch.cat([seen, marks[..., None] * seen], -1)
            A, B = self.network(tokens[:, None], torch.ones_like(marks, dtype=torch.bool))
            (name,) = A
            # Of B what lies in the answers' directions.
            unit = self.answers / self.answers.norm(dim=-1, keepdim=True)
            return Factors(self.shared.removed(A[name][:, 0]), B[name][:, 0] @ unit.T @ self.answers)
        z = told + told @ self.down @ self.up
        weights = marks[..., None] / marks.shape[-1]
        if self.kind == "ridge":
            gram = z @ z.mT / z.shape[-1]
            weights = torch.linalg.solve(gram + self.log_ridge.exp() * torch.eye(gram.shape[-1]), marks[..., None])
        total = weights.mT @ z  # [C, 1, d_in]
        A_row = (total + total @ self.up.T @ self.down.T) / z.shape[-1] ** 0.5
        return Factors(self.shared.removed(A_row), (self.gain @ self.answers).expand(len(told), 1, -1))
