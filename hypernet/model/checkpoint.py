"""A trained hypernetwork on disk: YAML for what it is, safetensors for its weights, fingerprints for what fits.

    checkpoint/
      config.yaml                  format, base model, context encoder, chunk size, the hypernetwork's sizes
      hypernetwork.safetensors     its weights; or in several files, as transformers shards them, with an index:
      hypernetwork-00001-of-00003.safetensors ..., hypernetwork.safetensors.index.json
      base_model/                  optional: the base model in transformers' format, found from config.yaml

Nothing in it is executed: config.yaml names only what `AGGREGATORS` and the context encoder list.
The checkpoints of the Doc-to-LoRA authors are read by `hypernet.interop.checkpoints`.
"""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hypernet.base.base_model import fingerprint
from hypernet.io.files import replaced, save_tensors
from hypernet.model.context_encoder import CONTEXT_ENCODERS
from hypernet.model.hypernetwork import HyperNetwork

_FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, BASE_MODEL_FOLDER = "config.yaml", "hypernetwork.safetensors", "base_model"
_INDEX_FILE, _SHARDS = f"{WEIGHTS_FILE}.index.json", "hypernetwork-*-of-*.safetensors"


class SavedHypernetwork(NamedTuple):
    """What a checkpoint folder holds, read and verified.

    base_model: hub name or folder of the base model; base_model_fingerprint: of its weights, None if not recorded (any
    base model whose modules fit is then accepted).
    context_encoder: as `make_context_encoder` takes it. max_chunk_tokens: document tokens per chunk.
    fingerprint: of the hypernetwork's weights, exact. ridge: with which chunks are joined, None: their plain sum.
    """

    hypernetwork: HyperNetwork
    base_model: str
    base_model_fingerprint: str | None
    context_encoder: dict[str, Any]
    max_chunk_tokens: int
    fingerprint: str
    ridge: float | None = None


def save_checkpoint(
    directory: str | Path,
    *,
    hypernetwork: HyperNetwork,
    base_model: str,
    base_model_fingerprint: str | None,
    context_encoder: dict[str, Any],
    max_chunk_tokens: int,
    ridge: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_mb: float | None = None,
) -> None:
    """Writes config.yaml and hypernetwork.safetensors, each complete or not at all; the config comes last.

    Args:
        base_model: hub name or folder; a path relative to `directory` if it lies inside.
        dtype: of the written weights, such as torch.bfloat16 for half the bytes; None: as they are.
        max_shard_mb: megabytes (10⁶ bytes) of a file, if all in one would be larger; a tensor is never cut. None: one
            file.

    Raises:
        ValueError: as `check_ours`.
    """
    directory = Path(directory).expanduser()
    check_ours(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in hypernetwork.state_dict().items()
    }
    config = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": fingerprint(weights, exact=True),
        "base_model": {"source": base_model, "fingerprint": base_model_fingerprint},
        "context_encoder": context_encoder,
        "max_chunk_tokens": max_chunk_tokens,
        "ridge": ridge,
        "hypernetwork": hypernetwork.config,
    }
    # A config next to older weights must not load, so the old one goes first; weights without a config are no
    # checkpoint.
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    _save_weights(directory, weights, max_shard_mb)
    with replaced(directory / CONFIG_FILE) as path:
        path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _save_weights(directory: Path, weights: dict[str, Tensor], max_shard_mb: float | None) -> None:
    """One file, or several and their index; files of the other form are removed."""
    files, index = {WEIGHTS_FILE: list(weights)}, None
    if max_shard_mb is not None:
        split = split_torch_state_dict_into_shards(
            weights, filename_pattern="hypernetwork{suffix}.safetensors", max_shard_size=int(max_shard_mb * 10**6)
        )
        files = split.filename_to_tensors
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / _INDEX_FILE).unlink(missing_ok=True)
    for name, names in files.items():
        with replaced(directory / name) as path:
            save_tensors({key: weights[key] for key in names}, path)
    if index is not None:
        with replaced(directory / _INDEX_FILE) as path:
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for old in (directory / WEIGHTS_FILE, *directory.glob(_SHARDS)):
        if old.name not in files:
            old.unlink(missing_ok=True)


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint's weights and which of their tensors count: one file and all, or as its index says.

    Raises:
        ValueError: the index is damaged.
    """
    if (directory / WEIGHTS_FILE).is_file() or not (directory / _INDEX_FILE).is_file():
        return {directory / WEIGHTS_FILE: None}
    found: dict[Path, set[str] | None] = {}
    try:
        index = dict(json.loads((directory / _INDEX_FILE).read_bytes())["weight_map"])
        for file in sorted(set(index.values())):
            if Path(file).name != file:
                raise ValueError(f"{file} is not in this folder")
            found[directory / file] = {name for name, place in index.items() if place == file}
        if not found:
            raise ValueError("weight_map is empty")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(directory / _INDEX_FILE, error) from error
    return found


def check_ours(directory: str | Path) -> None:
    """Refuses a folder that `save_checkpoint` cannot write to; to be called before the work that leads there.

    A checkpoint that is there is replaced and other files stay, as transformers and PEFT do it. But config.yaml is a
    name that others use too, and theirs would be lost.

    Raises:
        ValueError: its config.yaml is not a checkpoint's, or it is a file.
    """
    path = Path(directory).expanduser() / CONFIG_FILE
    if path.parent.is_file():
        raise ValueError(f"{path.parent} is a file. Name a folder for the checkpoint.")
    if not path.is_file() or any((path.parent / name).is_file() for name in (WEIGHTS_FILE, _INDEX_FILE)):
        return
    try:
        config = yaml.safe_load(path.read_bytes())
    except (ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict) or not {"format_version", "hypernetwork"} <= config.keys():
        raise ValueError(f"{path} is not a checkpoint's, and is not replaced. Name another folder.")


def is_checkpoint(source: str | Path) -> bool:
    """Whether this is a folder of ours, complete or not."""
    directory = Path(source).expanduser()
    return any((directory / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, _INDEX_FILE))


def num_saved_layers(source: str | Path) -> int | None:
    """Layers that a checkpoint folder's adapters have, from its config.yaml alone; None where that does not say it."""
    try:
        config = yaml.safe_load((Path(source).expanduser() / CONFIG_FILE).read_bytes())
        return len(config["hypernetwork"]["targets"][0]["paths"])
    except (OSError, IndexError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None  # `load_checkpoint` says what is wrong


def load_checkpoint(source: str | Path) -> SavedHypernetwork:
    """Reads a checkpoint folder and verifies its weights.

    Raises:
        ValueError: the folder, a file or a key is missing, a file is cut off or changed, or the format is another
            version's.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        where = "" if directory.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(
            f"No checkpoint at {directory}: there is no such folder{where}. Give a folder that holds {CONFIG_FILE}, or "
            "a published pytorch_model.bin."
        )
    files = _weight_files(directory)
    for path in (directory / CONFIG_FILE, *files):
        if not path.is_file():
            raise ValueError(
                f"{directory} is not a complete checkpoint: {path.name} is missing. Copy or train it again."
            )
    try:
        config = yaml.safe_load((directory / CONFIG_FILE).read_bytes())  # bytes: with any byte order mark
        version = config["format_version"]
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise _damaged(directory / CONFIG_FILE, error) from error
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{directory} has checkpoint format {version}, this version reads format {_FORMAT_VERSION}. "
            "Use the version that wrote it."
        )
    try:
        source, base_fingerprint = str(config["base_model"]["source"]), config["base_model"]["fingerprint"]
        base_fingerprint = None if base_fingerprint is None else str(base_fingerprint)
        expected, settings = str(config["fingerprint"]), dict(config["hypernetwork"])
        # Version 0.1 kept the ridge among the hypernetwork's settings.
        ridge = settings.pop("join_ridge", None) if "ridge" not in config else config["ridge"]
        if ridge is not None and not float(ridge) > 0:
            raise ValueError(f"ridge is {ridge}, not above 0")
        ridge = None if ridge is None else float(ridge)
        context_encoder, max_chunk_tokens = dict(config["context_encoder"]), int(config["max_chunk_tokens"])
        if "beside" in context_encoder:  # what version 0.1 called it
            context_encoder["concat_layer"] = context_encoder.pop("beside")
        known = {name for kind in CONTEXT_ENCODERS.values() for name in inspect.signature(kind).parameters}
        if unknown := sorted(context_encoder.keys() - known - {"kind"}):
            raise KeyError(f"context_encoder has no {unknown[0]}")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(directory / CONFIG_FILE, error) from error
    weights: dict[str, Tensor] = {}
    for path, names in files.items():
        try:
            weights |= {name: tensor for name, tensor in load_file(path).items() if names is None or name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); it is probably cut off. Copy it again.") from error
    if fingerprint(weights, exact=True) != expected:
        what, which = (next(iter(files)), "both") if len(files) == 1 else (directory / _SHARDS, "all")
        raise ValueError(f"{what} is not what {CONFIG_FILE} was written for (fingerprint). Copy {which} again.")
    try:
        with torch.device("meta"):
            hypernetwork = HyperNetwork(**settings)
        hypernetwork.load_state_dict(weights, assign=True)
        hypernetwork.float()  # what was written in half precision is computed in full
    except Exception as error:  # sizes that do not fit fail in a dozen ways; all of them mean this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{directory / CONFIG_FILE} does not describe the weights next to it ({reason}). Copy both again."
        ) from error
    if (directory / source / "config.json").is_file():
        source = str(directory / source)
    elif source == BASE_MODEL_FOLDER:
        raise ValueError(
            f"{directory} is not a complete checkpoint: its base model {BASE_MODEL_FOLDER}/config.json is missing. "
            "Copy it again."
        )
    return SavedHypernetwork(hypernetwork, source, base_fingerprint, context_encoder, max_chunk_tokens, expected, ridge)


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{path} is damaged ({type(error).__name__}: {reason}). Copy it again.")
