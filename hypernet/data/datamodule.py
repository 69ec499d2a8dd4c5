"""Lightning data module over datasets whose items are whole batches, addressed by step.

Training starts at the trainer's `global_step`, so a resumed run sees exactly the batches that the interrupted one had
left. With several processes or accumulated gradients each process takes its parts of every step's batch
(`hypernet.data.splitting`), so that an optimizer step stays the same step on any machine.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hypernet.data.splitting import split

CHECK_EVERY_S = 5.0  # how often a worker that owes a batch is looked after


class _Failed(NamedTuple):
    """Comes out of a dataset instead of a batch that could not be made: an exception would bring its traceback."""

    what: str
    reason: str


class _Checked(Dataset):
    """A dataset, `_Failed` where an item raises an error."""

    def __init__(self, dataset: Dataset, what: str) -> None:
        self.dataset = dataset
        self.what = what

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.item(index)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return _Failed(f"{self.what} {self.step(index)}", reason)

    def item(self, index: int) -> Any:
        return self.dataset[index]

    def step(self, index: int) -> int:
        return index


class _Parts(_Checked):
    """This process's parts of every step: item i is part i mod k of step i // k, for k parts accumulated per step."""

    def __init__(self, dataset: Dataset, trainer: L.Trainer) -> None:
        super().__init__(dataset, "step")
        self.accumulated = trainer.accumulate_grad_batches
        self.rank, self.world_size = trainer.global_rank, trainer.world_size

    def __len__(self) -> int:
        return len(self.dataset) * self.accumulated

    def step(self, index: int) -> int:
        return index // self.accumulated

    def item(self, index: int) -> Any:
        batch, num_parts = self.dataset[self.step(index)], self.accumulated * self.world_size
        if num_parts == 1:
            return batch
        number = index % self.accumulated
        part = self.rank * self.accumulated + number
        return split(batch, part, num_parts, is_last=number == self.accumulated - 1)


def _as_is(batch: Any) -> Any:
    return batch


def _start_method() -> str:
    """How worker processes begin.

    Not by forking this process, whose threads and CUDA context a child cannot use. A server that has imported what
    batches need is forked instead: spawned workers import it one after the other, 10 s each on a machine with an H100.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hypernet.data.batches", __name__])
    return "forkserver"


def _begin_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the trainer still finishes its step and saves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torch watches the process that forked it: the server, which waits for its workers. Neither would ever end after a
    # trainer that was killed.
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class _FromGlobalStep(Sampler[int]):
    """Parts of the steps from the trainer's global_step on. Its length is the whole run's: Lightning counts to it."""

    def __init__(self, parts: _Parts, trainer: L.Trainer) -> None:
        self.parts = parts
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.trainer.global_step * self.parts.accumulated, len(self.parts)))

    def __len__(self) -> int:
        return len(self.parts)


class _Loader(DataLoader):
    """Says in one line what went wrong with a batch or with the process that prepares it.

    Workers are the server's children, so no signal tells the trainer of a dead one: torch finds it when it has waited
    `timeout` for a batch. So that is short, and waiting begins again until `patience` seconds are over.
    """

    patience: float = 300

    def __iter__(self) -> Iterator[Any]:
        return self._raising(super().__iter__())

    def _raising(self, batches: Iterator[Any]) -> Iterator[Any]:
        waiting_since = time.monotonic()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                late = str(error).startswith("DataLoader timed out")
                if late and time.monotonic() - waiting_since < self.patience:
                    continue
                # RuntimeError for a worker that was killed or takes too long; the others where it dies while it hands
                # a batch over.
                if not self.num_workers:
                    raise
                reason = " ".join(str(error).split()).rstrip(".")
                raise ChildProcessError(
                    f"A data worker was lost: {reason}. A killed one was mostly out of memory; one that takes "
                    f"{self.patience:.0f} s for a batch is given up (worker_timeout_s). Lower num_workers or raise the "
                    "limit, and go on with ckpt_path=last."
                ) from error
            if isinstance(batch, _Failed):
                raise ValueError(
                    f"The batch of {batch.what} cannot be made ({batch.reason}). Mend or remove its data, and go on "
                    "with ckpt_path=last."
                )
            yield batch
            waiting_since = time.monotonic()


class _StepLoader(_Loader):
    """Its position is the trainer's global_step, which every checkpoint holds; so it saves no state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class BatchDataModule(L.LightningDataModule):
    """Train and validation batches.

    Args:
        train, validation: datasets of whole batches; item i of `train` is optimizer step i, whatever the number of
            processes and of accumulated parts.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        worker_timeout_s: how long to wait for a batch from them.
    """

    def __init__(
        self,
        *,
        train: Dataset,
        validation: Dataset | None = None,
        num_workers: int = 0,
        worker_timeout_s: float = 300,
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.num_workers = num_workers
        self.worker_timeout_s = worker_timeout_s

    def train_dataloader(self) -> DataLoader:
        """Raises ValueError if the trainer wants more steps than there are batches; it would wait for them for ever."""
        if self.trainer.max_steps > len(self.train):
            raise ValueError(
                f"max_steps is {self.trainer.max_steps}, but there are {len(self.train)} batches to train on. "
                "Lower trainer.max_steps, or give the stages more steps."
            )
        parts = _Parts(self.train, self.trainer)
        return self._loader(_StepLoader, parts, sampler=_FromGlobalStep(parts, self.trainer))

    def val_dataloader(self) -> DataLoader | list:
        if self.validation is None:
            return []
        return self._loader(_Loader, _Checked(self.validation, "validation step"), sampler=None)

    def _loader(self, loader: type[DataLoader], dataset: Dataset, *, sampler: Sampler | None) -> DataLoader:
        made = loader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            timeout=min(CHECK_EVERY_S, self.worker_timeout_s) if self.num_workers else 0,
            multiprocessing_context=_start_method() if self.num_workers else None,
            worker_init_fn=_begin_worker,
            # Its own: drawing the workers' seed would move the trainer's random numbers, by validation too.
            generator=torch.Generator(),
        )
        made.patience = self.worker_timeout_s
        return made
