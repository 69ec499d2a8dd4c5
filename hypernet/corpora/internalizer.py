"""Internalizer: one document after the other to its adapter in a library; `ingest` uses one, or one in each worker."""

import os
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hypernet.corpora.corpus import HUB, Item
from hypernet.io.paths import output_folder

if TYPE_CHECKING:  # torch and transformers take seconds, and the process that reads a corpus for Ray needs neither
    from hypernet.adapters.library import AdapterLibrary
    from hypernet.adapters.object_store import ObjectStoreLibrary
    from hypernet.doc_to_lora import DocToLoRA

Done = Mapping[tuple[str, str], Set[str]]
"""(fingerprint of the base model, of the hypernetwork) → SHA-256 of the documents that have an adapter of these."""


class Result(NamedTuple):
    """What became of a document.

    status: added; skipped: it has its adapter; failed: as `reason` says; stopped: and so did everything (the library
    cannot be written, the model not loaded).
    id, num_chunks, num_bytes: of the adapter. seconds: of one process, to read, internalize and store it.
    """

    name: str
    status: Literal["added", "skipped", "failed", "stopped"]
    reason: str = ""
    id: str = ""
    num_chunks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


def open_library(output: str) -> "AdapterLibrary | ObjectStoreLibrary":
    """The library in a folder, or at a URL of fsspec.

    Raises:
        ValueError: it is a file, or no such kind of URL.
    """
    if "://" in output:
        from hypernet.adapters.object_store import ObjectStoreLibrary

        return ObjectStoreLibrary(output)
    from hypernet.adapters.library import AdapterLibrary

    return AdapterLibrary(output_folder(output))


@dataclass(frozen=True)
class Reader:
    """The model that reads, as `DocToLoRA.from_pretrained` takes it; loaded where it is used.

    threads: of torch, in each process; None: its own choice.
    """

    checkpoint: str
    base_model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None

    def check(self) -> None:
        """Raises ValueError: there is no such checkpoint, as far as a look can tell."""
        if not self.checkpoint.startswith(HUB) and not Path(self.checkpoint).expanduser().exists():
            raise ValueError(f"There is no checkpoint folder or file {self.checkpoint}. Name one with --model.")

    def load(self) -> "DocToLoRA":
        import torch

        from hypernet.doc_to_lora import DocToLoRA

        if self.threads:
            torch.set_num_threads(self.threads)
        return DocToLoRA.from_pretrained(
            self.checkpoint, base_model=self.base_model, device=self.device, dtype=self.dtype
        )

    def anywhere(self) -> "Reader":
        """With absolute paths, for processes in other directories."""
        return replace(self, checkpoint=_absolute(self.checkpoint), base_model=_absolute(self.base_model))


class Internalizer:
    """Makes the adapters of documents and stores them, in one process; loads the model for the first of them.

    Args:
        output: of the library, as `open_library` takes it.
        done: what to skip.
    """

    def __init__(self, reader: Reader, output: str, done: Done) -> None:
        self.reader, self.output = reader, output
        self._all_done = done
        self._model: DocToLoRA | None = None

    def __call__(self, item: Item) -> Result:
        if self._model is None:
            try:
                self._model = self._load()
            except Exception as error:  # as a result, it reaches the user in one line from any process
                return Result(item.name, "stopped", _reason(error))
        started = time.perf_counter()
        try:
            data = item.data()
            digest = sha256(data).hexdigest()
            if digest in self._done:
                return Result(item.name, "skipped")
            adapter = self._model.internalize(item.document(data))
        except Exception as error:  # one document must not end the work on a million others
            return Result(item.name, "failed", _reason(error))
        try:
            identity = self._library.add(adapter)
        except Exception as error:
            return Result(item.name, "stopped", f"Cannot write to {self.output}: {_reason(error)}")
        self._done.add(digest)
        seconds = time.perf_counter() - started
        return Result(item.name, "added", "", identity, adapter.num_chunks, adapter.num_bytes, seconds)

    def _load(self) -> "DocToLoRA":
        self._library = open_library(self.output)
        model = self.reader.load()
        self._done = set(self._all_done.get((model.base_model_fingerprint, model.generator), ()))
        return model


def _absolute(source: str | None) -> Any:
    """A path of this machine in full; a hub's or a fetched model's name as it is."""
    path = Path(source or "").expanduser()
    return os.fspath(path.absolute()) if source and path.exists() else source


def _reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, (ValueError, MemoryError)) else f"{type(error).__name__}: {text}"
