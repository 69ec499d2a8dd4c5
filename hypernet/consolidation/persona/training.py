"""Training a persona's LoRA on a character's lines: by their answers alone, or by preferring them to other answers.

trained = PersonaTraining(lr=1e-2).train(block, block.read_lines(character.lines()))          # SFT
trained = PersonaTraining(lr=1e-2, preference=Preference(beta=0.1)).train(...)                  # DPO
"""

import math
import random

import torch
from torch import Tensor

from hypernet.consolidation.persona.last_block import Factors, LastBlock, Shared
from hypernet.consolidation.private.gradients import Reading
from hypernet.consolidation.self_instruct.preference import Preference


class PersonaTraining:
    """Steps of AdamW with a cosine to 0.

    Args:
        preference: DPO against the base model, whose log-likelihoods are those of the LoRA at zero, so that there is no
            second model; None: -log p(chosen), the mean over lines (SFT).
        steps, lr: of training. rank: of the LoRA. batch_size: lines of a step. seed: of A and of the batches.

    Raises:
        ValueError: a number is not above 0.
    """

    def __init__(
        self,
        *,
        preference: Preference | None = None,
        steps: int = 60,
        lr: float = 1e-2,
        rank: int = 4,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        if min(steps, rank, batch_size) < 1 or not 0 < lr < math.inf:
            raise ValueError(f"steps {steps}, lr {lr}, rank {rank} and batch_size {batch_size} should be above 0.")
        self.preference, self.steps, self.lr, self.rank = preference, steps, lr, rank
        self.batch_size, self.seed = batch_size, seed

    def train(self, block: LastBlock, read: tuple[Reading, Reading]) -> Factors:
        """The LoRA.

        Args:
            read: the answers in character and the others, a row for each line.
        """
        shared = Shared.of(read[0].inputs)
        chosen, rejected = (one._replace(inputs=shared.removed(one.inputs)) for one in read)
        # Answers of one token to the same prompts: their softmax cancels out, and a step takes an eighth of the time.
        is_short = torch.equal(chosen.row, rejected.row) and torch.equal(chosen.inputs, rejected.inputs)
        lora = Factors(*(factor.requires_grad_() for factor in block.start(self.rank, seed=self.seed)))
        optimizer = torch.optim.AdamW(list(lora), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)

        def margins(part: list[int], own: Factors | None) -> tuple[Tensor, Tensor]:
            """Log-likelihoods of both answers, or only their difference."""
            one, other = chosen.rows(part), rejected.rows(part)
            if is_short:
                odds = block.log_odds(one, other.targets, own)
                return odds, torch.zeros_like(odds)
            return block.log_p(one, own), block.log_p(other, own)

        rng, number = random.Random(self.seed), chosen.num_rows
        for step in range(self.steps):
            part = rng.sample(range(number), min(self.batch_size, number))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            if self.preference is None:
                loss = -block.log_p(chosen.rows(part), lora).mean()
            else:
                with torch.no_grad():
                    before = margins(part, None)
                loss = self.preference(*margins(part, lora), *before)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Factors(shared.removed(lora.A.detach()), lora.B.detach())
