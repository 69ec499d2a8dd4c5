"""Training checkpoints as one safetensors file: tensors as tensors, everything else as JSON in its header. No pickle.

    Trainer(plugins=[SafetensorsCheckpointIO()], callbacks=[RunCheckpoint(dirpath=...)])
    trainer.fit(module, data, ckpt_path=find_checkpoint("last", "outputs/tiny/checkpoints"))

A file appears under its name only when it is complete: it is written to a temporary name and renamed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError, safe_open

from hypernet.files import replaced, save_tensors

SUFFIX = ".safetensors"


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose files end in .safetensors."""

    FILE_EXTENSION = SUFFIX


class SafetensorsCheckpointIO(CheckpointIO):
    """Saves and loads what Lightning puts into a checkpoint: nested containers of tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Raises TypeError for a value that is neither a tensor nor plain; it names where the value stands."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _encode(checkpoint, "", tensors)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replaced(Path(path)) as temporary:
            save_tensors(tensors, temporary, metadata={"checkpoint": json.dumps(tree)})

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
    """The file to resume from: None for None, the newest one in `directory` for "last", else the file itself.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return None
    directory = Path(directory)
    if name != "last":
        if not Path(name).is_file():
            raise ValueError(f"No checkpoint {name}. Give a file from a run's checkpoints folder, or ckpt_path=last.")
        return Path(name)
    found = sorted(directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"ckpt_path=last, but {directory} holds no checkpoint yet. Leave ckpt_path out to start anew.")
    return found[-1]


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
