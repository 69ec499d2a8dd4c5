"""A trained hypernetwork from wherever it comes: our checkpoint folder, or one that the Doc-to-LoRA authors published.

    checkpoint = open_checkpoint("hub:SakanaAI/doc-to-lora/gemma_demo")

    python -m hypernet.interop.checkpoints source=hub:SakanaAI/doc-to-lora/gemma_demo output_dir=outputs/gemma_demo

The command writes a published one as such a folder, once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hypernet.base.base_model import fingerprint, silence_torchao_warnings
from hypernet.interop.published import find_published, is_published, read_published
from hypernet.io.arguments import key_values
from hypernet.io.files import replaced_folder
from hypernet.model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SavedHypernetwork,
    is_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

# Published files do not say how long their chunks were. The multi-chunk checkpoints were trained on chunks of 25 to 512
# tokens, and a user measured SQuAD F1 .76 for contexts below 128 tokens, .60 from 256 to 511, .33 from 512 on.
PUBLISHED_MAX_CHUNK_TOKENS = 512

_HELP = f"""\
Convert a published Doc-to-LoRA checkpoint (pytorch_model.bin) to safetensors and YAML. Nothing in it is executed.

  python -m hypernet.interop.checkpoints source=hub:SakanaAI/doc-to-lora/gemma_demo output_dir=outputs/gemma_demo
  python -m hypernet.interop.checkpoints source=downloads/pytorch_model.bin output_dir=outputs/own base_model=gemma

Only the base model's config.json is needed, not its weights.

Settings:
  source=                  the file, a folder that holds it, or hub:owner/repository/name
  output_dir=              folder for {CONFIG_FILE} and {WEIGHTS_FILE}
  base_model=              hub name or folder of the base model; without it the one that the file names
  max_chunk_tokens={PUBLISHED_MAX_CHUNK_TOKENS}     document tokens per chunk; the file does not say
  overwrite=false          true replaces a checkpoint that is in output_dir
"""



def open_checkpoint(source: str | Path, *, base_model: str | Path | None = None) -> SavedHypernetwork:
    """Reads a checkpoint and verifies its weights.

    Args:
        source: our folder; or a published checkpoint as `hypernet.interop.published.find_published` takes it.
        base_model: for a published checkpoint, hub name or folder of the base model (its config.json tells where the
            target modules lie); None takes the one it names. Our folder says where they lie and does not use it.

    Raises:
        ValueError: as `load_checkpoint`; or a published checkpoint does not fit the base model.
    """
    if not is_checkpoint(source) and is_published(source):
        return _load_published(source, base_model=base_model, max_chunk_tokens=PUBLISHED_MAX_CHUNK_TOKENS)
    return load_checkpoint(source)


def _load_published(source: str | Path, *, base_model: str | Path | None, max_chunk_tokens: int) -> SavedHypernetwork:
    published = read_published(find_published(source))
    name = str(base_model or published.base_model)
    hypernetwork, context_encoder = published.fitted(_skeleton(name), name=name)
    identity = fingerprint(hypernetwork, exact=True)
    return SavedHypernetwork(hypernetwork, name, None, context_encoder, max_chunk_tokens, identity)


def _skeleton(base_model: str) -> nn.Module:
    """The base model's modules without weights, from its configuration alone."""
    try:
        config = AutoConfig.from_pretrained(str(Path(base_model).expanduser()) if base_model[:1] == "~" else base_model)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers and the hub raise a dozen types for a bad source; all of them mean this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Cannot read the configuration of the base model {base_model}: {reason}. Check the name and the network, "
            "or name a folder with base_model."
        ) from error


# The command


def main(arguments: Sequence[str]) -> int:
    """Converts a published checkpoint, see _HELP; returns the exit status, with one line on standard error if not 0."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(_HELP, end="")
        return 0
    silence_torchao_warnings()
    try:
        convert(**_settings(arguments))
    except (ValueError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "out of memory"
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror}: {error.filename}. Check the path, its permissions and the space on the disk."
        print(f"hypernet.interop.checkpoints: {reason}", file=sys.stderr)
        return 1
    return 0


def convert(
    *,
    source: str,
    output_dir: str,
    base_model: str | None = None,
    max_chunk_tokens: int = PUBLISHED_MAX_CHUNK_TOKENS,
    overwrite: bool = False,
) -> None:
    """Writes a published checkpoint as a folder of ours: all of it or, on any failure, nothing.

    Raises:
        ValueError: as `load_checkpoint`, or output_dir holds something else than a checkpoint.
        FileExistsError: output_dir is not empty and overwrite is False.
    """
    folder = Path(output_dir).expanduser().resolve()
    _check_output(folder, overwrite=overwrite)
    if not is_published(source):
        raise ValueError(f"There is no published checkpoint {source}. Name a pytorch_model.bin, its folder, or hub:...")
    if base_model and Path(base_model).expanduser().is_dir():
        # The converted folder may be used from anywhere.
        base_model = str(Path(base_model).expanduser().resolve())
    checkpoint = _load_published(source, base_model=base_model, max_chunk_tokens=max_chunk_tokens)
    with replaced_folder(folder) as temporary:
        save_checkpoint(
            temporary,
            hypernetwork=checkpoint.hypernetwork,
            base_model=checkpoint.base_model,
            base_model_fingerprint=None,
            context_encoder=checkpoint.context_encoder,
            max_chunk_tokens=max_chunk_tokens,
        )
    network = checkpoint.hypernetwork
    print(
        f"{folder}: {network.parameter_counts()['total']:,} parameters, rank {network.rank}, "
        f"{', '.join(target.name for target in network.targets)} in {network.num_layers} layers of "
        f"{checkpoint.base_model}, chunks of {max_chunk_tokens} tokens"
    )


def _settings(arguments: Sequence[str]) -> dict[str, Any]:
    names = ("source", "output_dir", "base_model", "max_chunk_tokens", "overwrite")
    settings: dict[str, Any] = key_values(arguments, names)
    for name, value in settings.items():
        if not value:
            raise ValueError(f"{name}= has no value. Give one, or leave it out.")
    for name in ("source", "output_dir"):
        if name not in settings:
            raise ValueError(f"{name} is missing. Write {name}=..., see --help.")
    tokens = settings.setdefault("max_chunk_tokens", str(PUBLISHED_MAX_CHUNK_TOKENS))
    if not (tokens.isascii() and tokens.isdigit() and len(tokens) < 10 and int(tokens) > 0):
        raise ValueError(f"max_chunk_tokens should be a whole number, at least 1, got {tokens}.")
    overwrite = settings.get("overwrite", "false").lower()
    if overwrite not in ("true", "false"):
        raise ValueError(f"overwrite should be true or false, got {overwrite}.")
    return {**settings, "max_chunk_tokens": int(tokens), "overwrite": overwrite == "true"}


def _check_output(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    if found and not (overwrite and folder.is_dir()):
        raise FileExistsError(f"{folder} exists and is not empty. Name another output_dir, or set overwrite=true.")
    if foreign := sorted(found - {CONFIG_FILE, WEIGHTS_FILE}):
        raise ValueError(f"{folder} is not replaced: it also holds {foreign[:3]}. Name another output_dir.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
