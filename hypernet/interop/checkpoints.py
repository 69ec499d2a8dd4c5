"""A trained hypernetwork from wherever it comes: our checkpoint folder, or one that the Doc-to-LoRA authors published.

    checkpoint = open_checkpoint("hub:SakanaAI/doc-to-lora/gemma_demo")

`convert` writes a published one as such a folder, once; so does the command `hypernet checkpoint convert`.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hypernet.base.base_model import fingerprint
from hypernet.base.catalog import locate
from hypernet.interop.published import find_published, is_published, read_published
from hypernet.io.files import replaced_folder
from hypernet.io.hub import hub_asked_once
from hypernet.io.paths import output_folder
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
        source = str(locate(base_model))
        source = str(Path(source).expanduser()) if source[:1] == "~" else source
        with hub_asked_once(source):
            config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers and the hub raise a dozen types for a bad source; all of them mean this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Cannot read the configuration of the base model {base_model}: {reason}. Check the name and the network, "
            "or name a folder with base_model."
        ) from error


def convert(
    *,
    source: str,
    output_dir: str,
    base_model: str | None = None,
    max_chunk_tokens: int = PUBLISHED_MAX_CHUNK_TOKENS,
    overwrite: bool = False,
) -> SavedHypernetwork:
    """Writes a published checkpoint as a folder of ours: all of it or, on any failure, nothing.

    Args:
        source: as `find_published` takes it.
        output_dir: folder for config.yaml and hypernetwork.safetensors.
        base_model: hub name or folder of the base model; None takes the one that the file names.
        max_chunk_tokens: document tokens per chunk, which published files do not say.
        overwrite: replace a checkpoint that is in output_dir.

    Raises:
        ValueError: as `load_checkpoint`, or output_dir is a file or holds something else than a checkpoint.
        FileExistsError: output_dir is not empty and overwrite is False.
    """
    folder = Path(output_folder(output_dir)).expanduser().resolve()
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
    return checkpoint


def _check_output(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()}
    if found and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty. Name another output_dir, or set overwrite.")
    if foreign := sorted(found - {CONFIG_FILE, WEIGHTS_FILE}):
        raise ValueError(f"{folder} is not replaced: it also holds {foreign[:3]}. Name another output_dir.")
