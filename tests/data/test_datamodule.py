"""The data module hands out whole batches, from the trainer's step on."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.data.datamodule import BatchDataModule

ROOT = Path(__file__).parents[2]


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


def fake_trainer(**changes):
    alone = {"global_step": 0, "max_steps": 5, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
    return SimpleNamespace(**{**alone, **changes})


def make_trainer(folder, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_checkpointing": False}
    return L.Trainer(**{**quiet, **settings})


@pytest.mark.parametrize("start", [0, 3, 5])
def test_training_batches_begin_at_the_trainers_step(start):
    data = BatchDataModule(train=Squares(5))
    data.trainer = fake_trainer(global_step=start, max_steps=5)
    loader = data.train_dataloader()
    assert len(loader) == 5
    assert [(int(square), extra) for square, extra in loader] == [(i**2, [i]) for i in range(start, 5)]
    data.trainer.global_step = 4
    assert [extra for _, extra in loader] == [[4]]


def test_validation_uses_all_batches():
    data = BatchDataModule(train=Squares(5), validation=Squares(3))
    data.trainer = fake_trainer(global_step=2, max_steps=5)
    assert [extra for _, extra in data.val_dataloader()] == [[0], [1], [2]]


def test_datamodule_without_validation_has_no_batches():
    assert BatchDataModule(train=Squares(5)).val_dataloader() == []


def test_resumed_run_sees_each_remaining_batch_once(tmp_path):
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


def test_datamodule_refuses_more_steps_than_batches(tmp_path):
    """Otherwise the run would go round for ever without a batch."""
    module = Counting()
    with pytest.raises(ValueError, match=r"max_steps is 10.*3 batches"):
        make_trainer(tmp_path, max_steps=10).fit(module, BatchDataModule(train=Squares(3)))
    assert module.seen == []


def test_datamodule_prepares_batches_in_a_worker(tmp_path):
    data = BatchDataModule(train=Squares(4), num_workers=1)
    data.trainer = fake_trainer(global_step=1, max_steps=4)
    assert data.train_dataloader().num_workers == 1
    assert data.train_dataloader().multiprocessing_context.get_start_method() == "forkserver"


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 1, 0, 1]), (1, [2, 3, 2, 3])])
def test_each_rank_takes_its_parts_of_every_step(rank, expected):
    rows = pad_rows([pack_row([], [Segment([7, i, 3], 1, False, 0)]) for i in range(4)], pad_id=0)
    data = BatchDataModule(train=[rows] * 5)
    data.trainer = fake_trainer(global_step=3, accumulate_grad_batches=2, global_rank=rank, world_size=2)
    loader = data.train_dataloader()
    assert len(loader) == 10  # what Lightning counts to
    parts = list(loader)
    assert [int(part.batch.ids[0, 1]) for part in parts] == expected
    assert [part.is_last for part in parts] == [False, True] * 2 and {part.num_parts for part in parts} == {4}


# What goes wrong


class Corrupt(Squares):
    """Its third item is damaged, or ends the process that makes it, or never comes."""

    def __init__(self, size, kind):
        super().__init__(size)
        self.kind = kind

    def __getitem__(self, step):
        if step == 2 and self.kind == "corrupt":
            raise KeyError("question\nanswer")
        if step == 2 and self.kind == "killed":
            time.sleep(2)  # until the batches before are handed over: nothing but a look at the worker tells then
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and self.kind == "stuck":
            time.sleep(600)
        return super().__getitem__(step)


def run_into(kind, **settings):
    data = BatchDataModule(train=Corrupt(5, kind), **settings)
    data.trainer = fake_trainer()
    seen = []
    with pytest.raises((ValueError, OSError)) as error:
        for _, (step,) in data.train_dataloader():
            seen.append(step)
    assert "\n" not in str(error.value) and "ckpt_path=last" in str(error.value)
    return seen, error.value


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failing_batch_is_named_by_its_step(num_workers):
    seen, error = run_into("corrupt", num_workers=num_workers)
    assert seen == [0, 1]
    assert "The batch of step 2 cannot be made (KeyError: 'question\\nanswer')" in str(error)


LOST = """
from hypernet.data import datamodule
from tests.data.test_datamodule import run_into

if __name__ == "__main__":  # which its workers import
    datamodule.CHECK_EVERY_S = 1
    print(repr(run_into("killed", num_workers=1)[1]))
    print(repr(run_into("stuck", num_workers=1, worker_timeout_s=3)[1]))
"""
KILLED = """
import os, signal
from hypernet.data.datamodule import BatchDataModule
from tests.data.test_datamodule import Squares

if __name__ == "__main__":  # which its workers import
    batches = iter(BatchDataModule(train=Squares(1), validation=Squares(9), num_workers=2).val_dataloader())
    next(batches)
    own = []
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            parents = [pid]
            while parents[-1] > 1:
                parents.append(int(open(f"/proc/{parents[-1]}/stat").read().rpartition(")")[2].split()[1]))
            own += [pid] if os.getpid() in parents[1:] else []
        except OSError:
            pass
    print(*own, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def printed(script, commands, folder, *, code):
    """Lines of a script in another process: torch raises from a signal handler, whatever the main thread is doing."""
    (path := folder / "script.py").write_text(script)
    done = commands.run(str(path), [], cwd=ROOT)
    assert done.code == code, done.output
    return done.stdout.splitlines()


@pytest.mark.story(20)
def test_lost_worker_raises_instead_of_hanging(commands, tmp_path):
    killed, stuck = printed(LOST, commands, tmp_path, code=0)
    assert killed.startswith("ChildProcessError('A data worker was lost: "), killed
    assert stuck.startswith("ChildProcessError('A data worker was lost: "), stuck
    assert "timed out" in stuck and "timed out" not in killed


def test_workers_end_when_the_trainer_is_killed(commands, tmp_path):
    (line,) = printed(KILLED, commands, tmp_path, code=-signal.SIGKILL)
    left = [int(pid) for pid in line.split()]
    assert len(left) >= 4, left  # a resource tracker, the server and two workers
    deadline = time.monotonic() + 30
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
        time.sleep(0.1)
    assert not left


class Slow(Squares):
    def __getitem__(self, step):
        time.sleep(0.4)
        return super().__getitem__(step)


def test_slow_worker_is_waited_for(monkeypatch):
    monkeypatch.setattr("hypernet.data.datamodule.CHECK_EVERY_S", 0.1)
    data = BatchDataModule(train=Slow(5), num_workers=1)
    data.trainer = fake_trainer()
    seen = list(data.train_dataloader())
    data = BatchDataModule(train=Squares(5), num_workers=0)
    data.trainer = fake_trainer()
    assert seen == list(data.train_dataloader()) and len(seen) == 5


def test_failing_validation_batch_is_named_by_its_step():
    data = BatchDataModule(train=Squares(5), validation=Corrupt(5, "corrupt"))
    with pytest.raises(ValueError, match="The batch of validation step 2 cannot be made"):
        list(data.val_dataloader())


def test_preparing_batches_leaves_the_trainers_rng():
    data = BatchDataModule(train=Squares(2), validation=Squares(2))
    data.trainer = fake_trainer(max_steps=2)
    before = torch.get_rng_state()
    assert len(list(data.train_dataloader())) == len(list(data.val_dataloader())) == 2
    assert torch.equal(torch.get_rng_state(), before)
