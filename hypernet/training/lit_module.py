"""What the trainings of the base model and of the hypernetwork share, as a Lightning module.

A step is one whole batch from `hypernet.data.batches`, or with several processes or accumulated gradients a part of
it (`hypernet.data.splitting`): the parts' losses add up to the step's.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hypernet.data.splitting import StepPart
from hypernet.training.timing import PhaseTimes


class LitModule(L.LightningModule):
    """Losses that are logged for the whole step, and what callbacks ask a module.

    Args:
        output_dir: where the result is written when training ends; None: nowhere.
    """

    def __init__(self, *, output_dir: str | None = None) -> None:
        super().__init__()
        self.output_dir = output_dir
        self.phases = PhaseTimes()
        self._logged: dict[str, Tensor] = {}

    def _finish(self, part: StepPart, losses: dict[str, Tensor]) -> Tensor:
        """Logs the step's losses once its last part is done; returns what to call backward on.

        Args:
            losses: name → this part's portion of it; "loss" is what is minimised.
        """
        for name, value in losses.items():
            self._logged[name] = self._logged[name] + value.detach() if name in self._logged else value.detach()
        if part.is_last:
            logged, self._logged = self._logged, {}
            for name, value in logged.items():
                if part.num_parts > 1:
                    value = self.trainer.strategy.reduce(value, reduce_op="sum")
                self.log(f"train/{name}", value, prog_bar=name == "loss")
        self.phases.begin("backward")
        # Lightning takes the mean of the parts' gradients, over processes and accumulated batches.
        return losses["loss"] * part.num_parts

    def on_after_backward(self) -> None:
        self.phases.end("backward")

    def count_flops(self, batch: Any) -> int:
        """Floating-point operations of a training step on this batch, forward and backward. Leaves everything as is."""
        # Counted in the step itself, they would change its rounding.
        logged, self._logged, self.log = self._logged, {}, lambda *_, **__: None
        trained = [p for p in self.parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng(), torch.enable_grad(), FlopCounterMode(display=False) as counter:
                # Not backward(): several processes would exchange these gradients.
                torch.autograd.grad(self.training_step(batch, 0), trained, allow_unused=True)
        finally:
            self._logged = logged
            del self.log
        self.on_after_backward()
        self.phases.take()
        return counter.get_total_flops()

    @property
    def writes_result(self) -> bool:
        """Whether this process shall write it now: also if the run was killed between its last step and this."""
        return (
            bool(self.output_dir) and self.trainer.is_global_zero and self.trainer.global_step >= self.trainer.max_steps
        )


def beginnings(tokenizer: Any, documents: list[Tensor]) -> list[str]:
    """How each of these documents, token ids, begins."""
    return [" ".join(tokenizer.decode(ids[:16], skip_special_tokens=True).split()) for ids in documents]


def check_same_sizes(saved: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raises ValueError unless both have the same names and shapes; `what` the weights are of."""
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (saved, expected)]
    differing = sorted(name for name in saved.keys() | expected.keys() if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise ValueError(
            f"The checkpoint is of another {what}: {differing[0]} and {len(differing) - 1} more differ. "
            "Resume with the configuration it was made with."
        )
