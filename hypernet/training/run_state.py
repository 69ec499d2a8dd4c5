"""Training checkpoints as one safetensors file: tensors as tensors, everything else as JSON in its header. No pickle.

    Trainer(plugins=[SafetensorsCheckpointIO()], callbacks=[RunCheckpoint(..., every_n_train_steps=100)])
    trainer.fit(module, data, ckpt_path=find_checkpoint("last", "outputs/encyclopedia_tiny/checkpoints"))

A file appears under its name only when it is complete and on the disk: it is written to a temporary name and renamed.
"""

import json
import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError, safe_open

from hypernet.io.files import replaced, save_tensors
from hypernet.training.metrics_file import MetricsFile

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
PREFIX = "step-"


class RunCheckpoint(Checkpoint):
    """Writes step-000100.safetensors after every so many optimizer steps and at the end, and keeps the newest ones.

    In addition to what Lightning puts into a checkpoint (weights, optimizer, scheduler, loops, callbacks) it holds the
    random states of every process and the configuration, so that a resumed run is the uninterrupted one bit for bit.

    Args:
        dirpath: the run's checkpoints folder.
        every_n_train_steps: optimizer steps.
        keep: files; the second newest is what remains if the newest cannot be read.
        replaces: the files that are there are an earlier run's, and go once this one has its first; its metrics go when
            this one begins.
        config: the resolved configuration, of plain values; resuming with another one says what differs.
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        every_n_train_steps: int,
        keep: int = 2,
        replaces: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        if every_n_train_steps < 1 or keep < 1:
            raise ValueError(
                f"every_n_train_steps and keep must be at least 1, got {every_n_train_steps} and {keep}. "
                "Raise checkpoint_every or keep_checkpoints."
            )
        self.dirpath = Path(dirpath)
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.replaces = replaces
        self.config = config
        self._saved_step: int | None = None
        self._random_states: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            # What a killed process was writing; nobody will finish it. safetensors writes to .tmp… first, then renames.
            for pattern in (f".{PREFIX}*{SUFFIX}.*", ".tmp*"):
                for path in self.dirpath.glob(pattern):
                    path.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                # What was logged after the checkpoint, before a kill, comes again; an earlier run's is not this one's.
                logger.begin(0 if self.replaces else trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._random_states is not None:
            # As late as this, because setting up draws random numbers too.
            _set_random_states(self._random_states)
            self._random_states = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx) and trainer.global_step % self.every_n_train_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Writes a checkpoint of this step if there is none yet. To be called by every process.

        Raises:
            OSError: it cannot be written; older ones are intact.
        """
        step = trainer.global_step
        if self._saved_step == step:
            return
        try:
            trainer.save_checkpoint(self.dirpath / f"{PREFIX}{step:06d}{SUFFIX}")
        except OSError as error:
            raise OSError(
                error.errno,
                f"Cannot write the checkpoint of step {step} to {self.dirpath}: {error.strerror or error}. Older "
                "checkpoints are intact: make room there, and go on with ckpt_path=last",
            ) from error
        self._saved_step = step
        if trainer.is_global_zero:
            # By age: the files of an abandoned continuation may have higher numbers.
            keep, self.replaces = 1 if self.replaces else self.keep, False
            for path in _newest_first(self.dirpath.glob(f"{PREFIX}*{SUFFIX}"))[keep:]:
                path.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [_random_states()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_states"] = states
        checkpoint["config"] = self.config

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("random_states", [])
        if trainer.global_rank < len(states):
            self._random_states = states[trainer.global_rank]
        self._saved_step = checkpoint["global_step"]
        before, now = _flat(checkpoint.get("config") or {}), _flat(self.config or {})
        differing = [
            f"{key} (was {before.get(key)}, is {now.get(key)})"
            for key in sorted(before.keys() | now.keys())
            if before and now and before.get(key) != now.get(key) and key.split(".")[0] not in _FREE
        ]
        if differing:
            log.warning("This run goes on with other settings than it began with: %s", "; ".join(differing))


_FREE = {"ckpt_path", "output_dir", "logger", "threads", "name", "callbacks"}  # nothing that is computed depends on it


def at_step_end(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this batch was the last part of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _random_states() -> dict[str, Any]:
    version, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": [version, torch.tensor(python), gauss],
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    version, python, gauss = states["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    numpy = states["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    if not isinstance(config, dict):
        return {prefix: config}
    result = {}
    for key, value in config.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result


class SafetensorsCheckpointIO(CheckpointIO):
    """Saves and loads what Lightning puts into a checkpoint: nested containers of tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Raises TypeError for a value that is neither a tensor nor plain; it names where the value stands."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _encode(checkpoint, "", tensors)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replaced(Path(path)) as temporary:
            save_tensors(tensors, temporary, metadata={"checkpoint": json.dumps(tree)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut may leave the new name with old or no bytes

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises ValueError if the file is missing, cut off or of another kind."""
        try:
            with safe_open(path, framework="pt") as file:
                tree = json.loads(file.metadata()["checkpoint"])
                return _decode(tree, file)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"Cannot resume from {path} ({type(error).__name__}: {reason}). Give a checkpoint that train.py wrote."
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def find_checkpoint(name: str | None, directory: str | Path) -> Path | None:
    """The file to resume from.

    Args:
        name: a file; "last" for the newest one in `directory` that can be read; "auto" for the same, or None if the
            folder holds none yet, so that one command both starts and restarts a run; None for None.

    Raises:
        ValueError: there is none, or none that can be read.
    """
    if name is None:
        return None
    directory = Path(directory)
    if name not in ("last", "auto"):
        if not Path(name).is_file():
            raise ValueError(f"No checkpoint {name}. Give a file from a run's checkpoints folder, or ckpt_path=last.")
        return Path(name)
    found = _newest_first(directory.glob(f"*{SUFFIX}"))
    if not found and name == "auto":
        return None
    if not found:
        raise ValueError(f"ckpt_path=last, but {directory} holds no checkpoint yet. Leave ckpt_path out to start anew.")
    damaged = []
    for path in found:
        try:
            # The header says how long the file must be, so this sees one that was cut off.
            with safe_open(path, framework="pt") as file:
                json.loads(file.metadata()["checkpoint"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            damaged.append(f"{path} ({type(error).__name__}: {' '.join(str(error).split())})")
            continue
        if damaged:
            log.warning("Passing over what cannot be read: %s. Going on from the older %s.", "; ".join(damaged), path)
        return path
    raise ValueError(
        f"ckpt_path={name}, but no checkpoint in {directory} can be read: {'; '.join(damaged)}. Put one back, or start "
        "anew without ckpt_path and with another output_dir."
    )


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a value; containers that JSON does not have, and tensors, become one-key objects."""
    if isinstance(value, torch.Tensor):
        # Two places may read the same, as keys 1 and "1" do.
        name = place
        while name in tensors:
            name += "'"
        # clone: tied weights share memory, which safetensors refuses.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, place, {}), _encode(v, f"{place}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"The checkpoint holds a {type(value).__name__} at {place}; only tensors and plain values can be saved."
    )


def _decode(tree: Any, file: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return file.get_tensor(content)
        case "dict":
            return {_decode(k, file): _decode(v, file) for k, v in content}
        case "list":
            return [_decode(v, file) for v in content]
        case "tuple":
            return tuple(_decode(v, file) for v in content)
    raise ValueError(f"unknown entry {kind!r}")
