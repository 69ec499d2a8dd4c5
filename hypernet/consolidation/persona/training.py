"""Training a persona's LoRA on a character's lines: by their answers alone, or by preferring them to other answers.

trained = PersonaTraining(lr=1e-2).train(block, block.read_lines(character.lines()))          # SFT
trained = PersonaTraining(lr=1e-2, preference=Preference(beta=0.1)).train(...)                  # DPO
"""

import math
import random

import torch

from hypernet.consolidation.persona.last_block import Factors, LastBlock
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
        chosen, rejected = read
        lora = block.start(self.rank, seed=self.seed)
        optimizer = torch.optim.AdamW(list(lora), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        with torch.no_grad():
            before = [block.log_p(one) for one in read] if self.preference else []
        rng, number = random.Random(self.seed), chosen.num_rows
        for step in range(self.steps):
            part = rng.sample(range(number), min(self.batch_size, number))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            likely = block.log_p(chosen.rows(part), lora)
            if self.preference is None:
                loss = -likely.mean()
            else:
                others = block.log_p(rejected.rows(part), lora)
                loss = self.preference(likely, others, *(one[part] for one in before))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return Factors(*(factor.detach() for factor in lora))
