"""What both trainings do alike: the learning rate over a run, and going on from a checkpoint."""

import math

import lightning as L
import pytest
import torch

from hypernet.base.base_model import fingerprint
from hypernet.training.run_state import find_checkpoint
from tests.small_trainings import OPTIMIZER, Losses, make_trainer


@pytest.mark.parametrize("decay_ratio", [1, 0.5])
@pytest.mark.parametrize("task", ["doc_to_lora", "base_model"])
def test_learning_rate_warms_up_stays_and_falls(tmp_path, make_module, make_data, task, decay_ratio):
    class Rates(L.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = Rates()
    module = make_module(task, optimizer={**OPTIMIZER, "decay_ratio": decay_ratio})
    trainer = make_trainer(tmp_path, rates, limit_val_batches=0)
    trainer.fit(module, make_data(task))
    # Two steps of warm-up, then half a cosine down to a tenth over the four others, or over the last half of the six.
    falling = [
        0.001 + 0.009 * (1 + math.cos(math.pi * i / n)) / 2 for n in [4 if decay_ratio == 1 else 3] for i in range(n)
    ]
    expected = [0.005, 0.01, *[0.01] * (4 - len(falling)), *falling]
    assert rates.rates == [pytest.approx([rate] * 2) for rate in expected]
    for group in trainer.optimizers[0].param_groups:
        decays = {p.ndim >= 2 for p in group["params"]}
        assert decays == {group["weight_decay"] == 0.1}
    trained = sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"])
    assert trained == sum(
        p.numel() for p in (module.model.hypernetwork if task == "doc_to_lora" else module).parameters()
    )


@pytest.mark.parametrize("task", ["doc_to_lora", "base_model"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, make_module, make_data, task):
    whole = Losses()
    straight = make_module(task)
    make_trainer(tmp_path / "whole", whole).fit(straight, make_data(task))
    assert len(set(whole.losses)) == 6

    first = Losses(crash_at=3)
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(tmp_path / "parts", first).fit(make_module(task), make_data(task))
    assert first.losses == whole.losses[:3]
    # Another start, so that everything must come from the checkpoint.
    resumed = make_module(task)
    with torch.no_grad():
        for parameter in (resumed.model.hypernetwork if task == "doc_to_lora" else resumed).parameters():
            parameter.mul_(1.5)
    torch.manual_seed(99)
    second = Losses()
    trainer = make_trainer(tmp_path / "parts", second)
    trainer.fit(resumed, make_data(task), ckpt_path=find_checkpoint("last", tmp_path / "parts" / "checkpoints"))
    assert second.losses == whole.losses[3:]
    assert trainer.global_step == 6
    assert fingerprint(resumed) == fingerprint(straight)
