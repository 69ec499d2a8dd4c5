"""Lightning data module over datasets whose items are whole batches, addressed by step.

Training starts at the trainer's `global_step`, so a resumed run sees exactly the batches that the interrupted one had
left.
"""

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler


def _as_is(batch: Any) -> Any:
    return batch


class _FromGlobalStep(Sampler[int]):
    """Steps from the trainer's global_step on. Its length is that of the whole run, which Lightning counts against."""

    def __init__(self, num_steps: int, trainer: L.Trainer) -> None:
        self.num_steps = num_steps
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.trainer.global_step, self.num_steps))

    def __len__(self) -> int:
        return self.num_steps


class _StepLoader(DataLoader):
    """Its position is the trainer's global_step, which every checkpoint holds; so it has no state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class BatchDataModule(L.LightningDataModule):
    """Train and validation batches.

    Args:
        train, validation: datasets of whole batches; item i of `train` is optimizer step i.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(self, *, train: Dataset, validation: Dataset | None = None, num_workers: int = 0) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Raises ValueError if the trainer wants more steps than there are batches; it would wait for them for ever."""
        if self.trainer.max_steps > len(self.train):
            raise ValueError(
                f"max_steps is {self.trainer.max_steps}, but there are {len(self.train)} batches to train on. "
                "Lower trainer.max_steps, or give the stages more steps."
            )
        return self._loader(_StepLoader, self.train, sampler=_FromGlobalStep(len(self.train), self.trainer))

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.validation is None else self._loader(DataLoader, self.validation, sampler=None)

    def _loader(self, loader: type[DataLoader], dataset: Dataset, *, sampler: Sampler | None) -> DataLoader:
        return loader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            multiprocessing_context="spawn" if self.num_workers else None,
        )
