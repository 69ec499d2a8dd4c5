"""Small trainings that several test files run: their settings, their trainer, and what watches them."""

import lightning as L
from torch.utils.data import Dataset

from hypernet.training.losses import AnswerNLL, ContextDistillation, Locality, LossTerm
from hypernet.training.run_state import RunCheckpoint, SafetensorsCheckpointIO

OPTIMIZER = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "warmup_steps": 2,
    "decay_ratio": 1,
    "min_lr_ratio": 0.1,
}
STAGES = [
    {
        **{"steps": 6, "batch_size": 2, "facts_per_entity": [2, 3], "num_cross_document": 1},
        **{"unanswerable": 0.5, "reordering": 0.5},
    }
]


def objective(
    *, kl: float = 1.0, locality_kl: float = 0.5, nll: float = 0.0, **others: LossTerm
) -> dict[str, LossTerm]:
    """The terms of most trainings by their weights, and others as they are."""
    terms = {"kl": ContextDistillation(weight=kl), "locality_kl": Locality(weight=locality_kl)}
    return {**terms, "nll": AnswerNLL(weight=nll), **others}


class Losses(L.Callback):
    """Notes every step's loss, and stops the run before step `crash_at` like a crash would."""

    def __init__(self, crash_at: int | None = None):
        self.losses = []
        self.crash_at = crash_at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.crash_at:
            raise RuntimeError("crash")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Few(Dataset):
    """The first items of a dataset."""

    def __init__(self, dataset, number):
        self.dataset, self.number = dataset, number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return self.dataset[index]


def make_trainer(folder, *callbacks, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_steps": 6}
    quiet |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0}
    callbacks = [*callbacks, RunCheckpoint(folder / "checkpoints", every_n_train_steps=1)]
    return L.Trainer(**{**quiet, **settings}, callbacks=callbacks, plugins=[SafetensorsCheckpointIO()])


def quietly(module):
    """Logging needs a trainer; steps called by themselves go without."""
    module.log = lambda *_, **__: None
    return module
