"""Documents a second of `hypernet corpus`, in one process and on Ray: `python -m benchmarks.serving.ingest`

Every run fills a new library with the same documents. The ways take turns, so that what else the machine does meets all
of them alike. A run's rate counts from its first result on; until then a cluster and models start, which is `start_s`.
All ways must give the same ids, as they do with the same number of threads (and did with others on the machines tried).
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np

from benchmarks.measuring.rows import Row, show_and_write
from benchmarks.report.tables import Table
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text
from hypernet.corpora.corpus import Corpus
from hypernet.corpora.ingest import Totals, ingest
from hypernet.corpora.internalizer import Reader
from hypernet.data.encyclopedia import Encyclopedia


class Run(NamedTuple):
    """start_s: until the first result; seconds: altogether; work_s: of one process on a document, the mean."""

    start_s: float
    seconds: float
    documents_per_s: float
    work_s: float
    ids: frozenset[str]
    totals: Totals


def write_documents(folder: Path, *, num: int, seed: int) -> None:
    entries = Encyclopedia("test", seed=seed)
    for i in range(num):
        (folder / f"{i:05}.txt").write_text(entries.record(i, num_facts=3 + i % 8).document, encoding="utf-8")


def run(folder: Path, *, checkpoint: str, workers: int, threads: int) -> Run:
    """Ingests the folder into a new library.

    Raises:
        ValueError: a document failed.
    """
    times, ids = [], set()
    reader = Reader(checkpoint, threads=threads)
    with tempfile.TemporaryDirectory(prefix="hypernet-") as library:
        started, totals = time.perf_counter(), Totals()
        for result in ingest(Corpus([str(folder)]), library, reader=reader, workers=workers):
            times.append(time.perf_counter() - started)
            totals.add(result)
            ids.add(result.id)
        seconds = time.perf_counter() - started
    if totals.counts["added"] != len(times):
        raise ValueError(f"Not every document was added: {totals.counts}.")
    rate = (len(times) - 1) / (times[-1] - times[0])
    return Run(times[0], seconds, rate, totals.work_s / len(times), frozenset(ids), totals)


def measure(cfg: "IngestBenchmarkSettings") -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0))
    threads = {workers: cfg.threads or max(1, cores // max(1, workers)) for workers in cfg.workers}
    runs: dict[int, list[Run]] = {workers: [] for workers in cfg.workers}
    with tempfile.TemporaryDirectory(prefix="hypernet-") as folder:
        write_documents(Path(folder), num=cfg.documents, seed=cfg.seed)
        for _ in range(cfg.repeats):
            for workers, of in runs.items():
                of.append(run(Path(folder), checkpoint=cfg.checkpoint, workers=workers, threads=threads[workers]))
    expected = runs[cfg.workers[0]][0]
    for workers, of in runs.items():
        rates = [one.documents_per_s for one in of]
        yield {
            **{"kind": "ingest", "way": f"Ray, workers={workers}" if workers else "one process", "workers": workers},
            **{"threads_each": threads[workers], "documents": cfg.documents, "chunks": of[0].totals.num_chunks},
            **{"adapter_bytes": of[0].totals.num_bytes, "repeats": cfg.repeats},
            **{"documents_per_s": float(np.median(rates)), "documents_per_s_min": min(rates)},
            **{"documents_per_s_max": max(rates), "start_s": float(np.median([one.start_s for one in of]))},
            **{"seconds": float(np.median([one.seconds for one in of]))},
            **{"work_s_per_document": float(np.median([one.work_s for one in of]))},
            "same_ids": all(one.ids == expected.ids for one in of),
        }


def markdown(rows: Sequence[Row]) -> str:
    """A line for each way, with its rate as a multiple of one process's."""
    (alone,) = (row["documents_per_s"] for row in rows if row["workers"] == 0)
    lines = []
    for row in rows:
        rates = [f"{row[name]:.1f}" for name in ("documents_per_s", "documents_per_s_min", "documents_per_s_max")]
        times = [
            f"{row['documents_per_s'] / alone:.2f}",
            f"{row['start_s']:.1f}",
            f"{1e3 * row['work_s_per_document']:.0f}",
        ]
        lines.append([row["way"], *rates, *times])
    head = ["", "documents/s", "lowest", "highest", "of one process", "s to start", "ms of work a document"]
    return Table("", head, lines).markdown()


class IngestBenchmarkSettings(Settings):
    checkpoint: Text
    documents: Count
    workers: list[int]
    threads: Count | None
    repeats: Count
    seed: Number
    output: OutputFile | None


SCRIPT = Script("benchmarks.serving.ingest", IngestBenchmarkSettings)


@hydra.main(config_path="../../conf", config_name="serving_ingest", version_base="1.3")
@SCRIPT
def main(cfg: IngestBenchmarkSettings) -> None:
    if not cfg.workers or min(cfg.workers) < 0 or cfg.documents < 2:
        raise ValueError("Give workers as [0,1,2], where 0 is one process without Ray, and at least 2 documents.")
    show_and_write(measure(cfg), cfg.output, config=cfg.model_dump())


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/serving_ingest.yaml")
