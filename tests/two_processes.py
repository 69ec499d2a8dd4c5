"""A callback for runs of several processes; train.py takes it as +callbacks.same={_target_: ...}."""

from pathlib import Path

import lightning as L
import torch


class SameWeights(L.Callback):
    """Fails at the first step after which the processes' weights differ; says in a file what it has seen."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        own = torch.cat([p.detach().flatten() for p in module.model.hypernetwork.parameters()])
        every = [torch.empty_like(own) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(every, own)
        if not all(torch.equal(one, own) for one in every):
            raise RuntimeError(f"The processes' weights differ after step {trainer.global_step}.")
        if trainer.is_global_zero:
            Path("same_weights.txt").write_text(f"{trainer.global_step} steps, {trainer.world_size} processes")
