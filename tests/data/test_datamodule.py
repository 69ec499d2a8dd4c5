"""The data module hands out whole batches, from the trainer's step on."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from hypernet.data.datamodule import BatchDataModule


class Squares(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, step):
        return (torch.tensor(step**2), [step])


class Counting(L.LightningModule):
    """Notes the batches it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1][0])
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[1][0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_checkpointing": False}
    return L.Trainer(**{**quiet, **settings})


@pytest.mark.parametrize("start", [0, 3, 5])
def test_training_batches_begin_at_the_trainer_s_step_and_count_for_the_whole_run(start):
    data = BatchDataModule(train=Squares(5))
    data.trainer = SimpleNamespace(global_step=start, max_steps=5)
    loader = data.train_dataloader()
    assert len(loader) == 5
    assert [(int(square), extra) for square, extra in loader] == [(i**2, [i]) for i in range(start, 5)]
    data.trainer.global_step = 4
    assert [extra for _, extra in loader] == [[4]]


def test_validation_batches_are_always_all_of_them():
    data = BatchDataModule(train=Squares(5), validation=Squares(3))
    data.trainer = SimpleNamespace(global_step=2, max_steps=5)
    assert [extra for _, extra in data.val_dataloader()] == [[0], [1], [2]]


def test_without_validation_there_is_none():
    assert BatchDataModule(train=Squares(5)).val_dataloader() == []


def test_a_run_sees_each_batch_once_and_a_resumed_one_the_rest(tmp_path):
    module = Counting()
    trainer = make_trainer(tmp_path, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module, BatchDataModule(train=Squares(9), validation=Squares(2)))
    assert module.seen == [0, 1, 2, 3] and module.validated == [0, 1, 0, 1]
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    resumed = Counting()
    trainer = make_trainer(tmp_path, max_steps=9, val_check_interval=2, check_val_every_n_epoch=None)
    data = BatchDataModule(train=Squares(9), validation=Squares(2))
    trainer.fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert resumed.seen == [4, 5, 6, 7, 8]
    assert resumed.validated == [0, 1, 0, 1]  # after steps 6 and 8


def test_more_steps_than_batches_are_refused_before_training(tmp_path):
    """Otherwise the run would go round for ever without a batch."""
    module = Counting()
    with pytest.raises(ValueError, match=r"max_steps is 10.*3 batches"):
        make_trainer(tmp_path, max_steps=10).fit(module, BatchDataModule(train=Squares(3)))
    assert module.seen == []


def test_batches_can_be_prepared_in_another_process(tmp_path):
    data = BatchDataModule(train=Squares(4), num_workers=1)
    data.trainer = SimpleNamespace(global_step=1, max_steps=4)
    assert data.train_dataloader().num_workers == 1
    assert data.train_dataloader().multiprocessing_context.get_start_method() == "spawn"
