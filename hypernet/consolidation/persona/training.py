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

OTHER_TOKENS = 128  # tokens of other text in a step


class PersonaTraining:
    """Steps of AdamW with a cosine to 0. A moves, from zero; B stays where the answers are told apart.

    With B free as well, a persona of the same strength made SmolLM2 forget up to half of what it says of capitals and
    opposites: steps of Adam are as long in every direction, and few of them are the answers'.

    Args:
        preference: DPO against the base model, whose log-likelihoods are those of the LoRA at zero, so that there is no
            second model; None: -log p(chosen), the mean over lines (SFT).
        steps, lr: of training. rank: of the LoRA, at most. batch_size: lines of a step.
        weight: of moving other text. seed: of the batches.

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
        weight: float = 1e3,
        seed: int = 0,
    ) -> None:
        if min(steps, rank, batch_size) < 1 or not 0 < lr < math.inf:
            raise ValueError(f"steps {steps}, lr {lr}, rank {rank} and batch_size {batch_size} should be above 0.")
        self.preference, self.steps, self.lr, self.rank = preference, steps, lr, rank
        self.batch_size, self.weight, self.seed = batch_size, weight, seed

    def train(
        self,
        block: LastBlock,
        read: tuple[Reading, Reading | None],
        *,
        shared: Shared | None = None,
        others: Reading | None = None,
    ) -> Factors:
        """The LoRA.

        Args:
            read: the answers in character and the others, a row for each line; None: B is free too, for texts that
                stand against no other.
            shared: what the LoRA leaves alone; None: what all lines share.
            others: tokens of other text, where it should move nothing: `weight` times `LastBlock.moved` is added.
        """
        shared = Shared.of(read[0].inputs) if shared is None else shared
        others_given = read[0] if read[1] is None else read[1]
        chosen, rejected = (one._replace(inputs=shared.removed(one.inputs)) for one in (read[0], others_given))
        kept = None if others is None else others._replace(inputs=shared.removed(others.inputs))
        # Answers of one token to the same prompts: their softmax cancels out, and a step takes an eighth of the time.
        is_short = torch.equal(chosen.row, rejected.row) and torch.equal(chosen.inputs, rejected.inputs)
        size = float(chosen.residual.square().mean().sqrt())  # at which a step of A moves log p by about as much
        if read[1] is None:
            drawn = torch.randn(self.rank, block.place.d_in, generator=torch.Generator().manual_seed(self.seed))
            A, B = drawn / block.place.d_in**0.5, torch.zeros(self.rank, block.place.d_out)
        else:
            B = size * block.answer_directions(*_pairs(chosen, rejected, is_short), rank=self.rank)
            A = torch.zeros(len(B), block.place.d_in)
        lora = Factors(A.requires_grad_(), B.requires_grad_(read[1] is None))
        optimizer = torch.optim.AdamW(
            [one for one in lora if one.requires_grad], lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0
        )

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
            if kept is not None:
                tokens = rng.sample(range(len(kept.inputs)), min(OTHER_TOKENS, len(kept.inputs)))
                loss = loss + self.weight * block.moved(block.some(kept, tokens), lora)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Factors(shared.removed(lora.A.detach()), B.detach())


def _pairs(chosen: Reading, rejected: Reading, is_short: bool) -> tuple[Tensor, Tensor]:
    """Tokens of both answers that stand against each other; of longer answers each token against the other's first."""
    if is_short:
        return chosen.targets, rejected.targets
    firsts = [[int((one.row == row).nonzero()[0]) for row in range(one.num_rows)] for one in (chosen, rejected)]
    own = [
        one.targets[torch.tensor(first)][other.row]
        for one, first, other in zip((chosen, rejected), firsts, (rejected, chosen), strict=True)
    ]
    return torch.cat([chosen.targets, own[0]]), torch.cat([own[1], rejected.targets])
