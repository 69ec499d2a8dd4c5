"""ingest: a corpus to adapters in a library, one for each document, in this process or on Ray.

    totals = Totals()
    for result in ingest(Corpus(["notes/"]), "outputs/library", reader=Reader("assets/tiny"), workers=2):
        totals.add(result)                       # in the order in which they are done

The library is the only record of what is done: a document whose SHA-256, base model and hypernetwork an adapter in it
has is skipped, so a run that was killed anywhere goes on where it was; what it left half written is removed. Documents
are internalized one by one: an adapter depends on no other document, and has the same id from one process as from a
cluster (with as many threads for each process: products of matrices may round otherwise with another number).
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypernet.corpora.corpus import Corpus
from hypernet.corpora.internalizer import Done, Internalizer, Reader, Result, open_library

if TYPE_CHECKING:
    from hypernet.adapters.library import AdapterLibrary
    from hypernet.adapters.object_store import ObjectStoreLibrary


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


def done_in(library: "AdapterLibrary | ObjectStoreLibrary") -> Done:
    """What has an adapter of its own, as it was generated: not joined with other documents, not changed afterwards."""
    done: dict[tuple[str, str], set[str]] = defaultdict(set)
    for provenance in library.provenances():
        documents = provenance["documents"]
        if len(documents) == 1 and not provenance.get("operations"):
            done[provenance["base_model"]["fingerprint"], provenance["generator"]].add(documents[0]["sha256"])
    return dict(done)


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
    from hypernet.adapters.library import AdapterLibrary

    reader.check()
    library = open_library(output)
    done = done_in(library)
    if isinstance(library, AdapterLibrary) and library.directory.is_dir():
        library.clean()
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
