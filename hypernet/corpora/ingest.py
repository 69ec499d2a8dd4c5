"""ingest: a corpus to adapters in a library, one for each document, in this process or on Ray.

    totals = Totals()
    for result in ingest(Corpus(["notes/"]), "outputs/library", reader=Reader("assets/tiny"), workers=2):
        totals.add(result)                       # in the order in which they are done

The library is the only record of what is done: a document whose SHA-256, base model and hypernetwork an adapter in it
has is skipped, so a run that was killed anywhere goes on where it was. Documents are internalized one by one: an
adapter depends on no other document, and has the same id from one process as from a cluster (with as many threads for
each process: products of matrices may round otherwise with another number).
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hypernet.corpora.corpus import HUB, Corpus, Item
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


@dataclass
class Totals:
    """Results so far, and the seconds since the first was waited for."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("added", "skipped", "failed"), 0))
    num_chunks: int = 0
    num_bytes: int = 0
    work_s: float = 0.0
    """Of all processes together, on the documents that were added."""
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: Result) -> None:
        self.counts[result.status] += 1
        if result.status == "added":
            self.num_chunks += result.num_chunks
            self.num_bytes += result.num_bytes
            self.work_s += result.seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


def open_library(output: str) -> "AdapterLibrary | ObjectStoreLibrary":
    """The library in a folder, or at a URL of fsspec.

    Raises:
        ValueError: it is a file, or no library, or cannot be reached.
    """
    if "://" in output:
        from hypernet.adapters.object_store import ObjectStoreLibrary

        return ObjectStoreLibrary(output)
    from hypernet.adapters.library import AdapterLibrary

    library = AdapterLibrary(output_folder(output))
    next(library.provenances(), None)  # a folder that is no library is told now
    return library


def done_in(library: "AdapterLibrary | ObjectStoreLibrary") -> Done:
    """What has an adapter of its own, as it was generated: not joined with other documents, not changed afterwards."""
    done: dict[tuple[str, str], set[str]] = defaultdict(set)
    for provenance in library.provenances():
        documents = provenance["documents"]
        if len(documents) == 1 and not provenance.get("operations"):
            done[provenance["base_model"]["fingerprint"], provenance["generator"]].add(documents[0]["sha256"])
    return dict(done)


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


def ingest(corpus: Corpus, output: str, *, reader: Reader, workers: int = 0) -> Iterator[Result]:
    """Adds an adapter of each document to the library, and says of each what became of it, in no certain order.

    Args:
        output: folder of the library, or a URL of fsspec.
        workers: processes on Ray, each with the model; 0: this process alone, without Ray. A worker that dies is
            started again, and what it had not finished is given out again.

    Raises:
        ValueError: the output is no library; the model cannot be loaded, or the library not written (what is stored by
            then stays); or Ray is missing.
    """
    reader.check()
    done = done_in(open_library(output))
    if workers:
        from hypernet.corpora.on_ray import map_on_ray

        results = map_on_ray(corpus, output, done, reader=reader, workers=workers)
    else:
        results = map(Internalizer(reader, output, done), corpus.items())
    added: set[str] = set()
    for result in results:
        if result.status == "stopped":
            raise ValueError(result.reason)
        if result.id in added:  # two workers had the same text at the same time
            result = Result(result.name, "skipped")
        elif result.id:
            added.add(result.id)
        yield result


def _absolute(source: str | None) -> Any:
    """A path of this machine in full; a hub's or a fetched model's name as it is."""
    path = Path(source or "").expanduser()
    return os.fspath(path.absolute()) if source and path.exists() else source


def _reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, (ValueError, MemoryError)) else f"{type(error).__name__}: {text}"
