"""map_on_ray: the documents of a corpus to results, in actors of Ray Data that hold the model.

One task reads the corpus as a stream; Ray holds it back while its tables wait, so that memory does not grow with the
corpus. Each document goes to whichever actor is free. An actor or node that dies is replaced, and its documents
are given out again; what it had stored by then stays, under the same ids.

Without RAY_ADDRESS a cluster is started on this machine and stopped again; with it (`RAY_ADDRESS=auto`, after `ray
start` on every node) that one is used: its nodes need this package, and sources and library under the same paths.
"""

import dataclasses
import logging
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypernet.corpora.corpus import Corpus, Item
from hypernet.corpora.internalizer import Done, Internalizer, Reader, Result

# Bytes, so a block is one document: what is done again where a worker dies. Ray's own 128 MB would make one block, for
# one worker, of 20,000 documents.
_BLOCK_BYTES = 1
_READING_CPUS = 0.5  # another number than an actor's, or Ray would make reading a part of one actor's work
_MOST_DEATHS = 100  # of actors in a row before one is ready; Ray's 0 would end the run with the first
# What Ray tells its own developers; RAY_ACCEL_...: GPUs stay visible to processes that asked Ray for none.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # all: lines on standard output for each worker that died
    "RAY_worker_niceness": "0",  # Ray's 15 leaves workers standing wherever anything else runs
}


def map_on_ray(corpus: Corpus, output: str, done: Done, *, reader: Reader, workers: int) -> Iterator[Result]:
    """Results as they come, see `hypernet.corpora.ingest.ingest`.

    Raises:
        ValueError: Ray is missing, or cannot be started; or the output is of this process alone.
    """
    if output.startswith("memory://"):
        raise ValueError(f"{output} lies in this process, where no worker reaches it. Name another library.")
    with cluster(workers, threads=reader.threads) as ray:
        threads = reader.threads or max(1, (int(ray.cluster_resources().get("CPU", 0)) - 1) // workers)
        there = dataclasses.replace(reader.anywhere(), threads=threads)
        rows = ray.data.read_datasource(
            _datasource(corpus.anywhere()), override_num_blocks=1, num_cpus=_READING_CPUS
        ).map_batches(
            _Actor,
            fn_constructor_args=(there, output if "://" in output else os.path.abspath(output), done),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=threads,
            num_gpus=1 if reader.device.startswith("cuda") else 0,
        )
        try:
            for row in rows.iter_rows():
                yield Result(**row)
        except ray.exceptions.RayError as error:
            raise ValueError(
                f"Ray gave up: {' '.join(str(error).split())[-300:]}. What is stored stays; run it again."
            ) from error


@contextmanager
def cluster(workers: int, *, threads: int | None = None) -> Iterator[Any]:
    """Ray, with a cluster behind it: that of an outer block, that at RAY_ADDRESS, or one of this machine.

    Several `ingest` in the block share it: a cluster takes seconds to start.

    Raises:
        ValueError: Ray is missing, or there is no cluster at RAY_ADDRESS.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        python = Path(sys.executable).name
        raise ValueError(
            f"Workers need the extra [ray]: {python} -m pip install 'doc-to-lora[ray]'. Or leave --workers out."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    for handler in logging.getLogger("ray.data").handlers:
        if not hasattr(handler, "baseFilename"):
            handler.setLevel(logging.CRITICAL)  # the console's; the file of the session keeps it all
    warnings.filterwarnings("ignore", module=r"ray\.")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    context.max_consecutive_actor_init_deaths = _MOST_DEATHS
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one into the home folder
        each = threads or max(1, len(os.sched_getaffinity(0)) // workers)
        local = {"num_cpus": workers * each + 1, "include_dashboard": False}  # 1: to read
    else:
        _check_address(os.environ["RAY_ADDRESS"])
    try:
        with _without_stderr():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(f"Ray does not start: {' '.join(str(error).split())[:300]}. Check RAY_ADDRESS.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(
                f"There is no Ray cluster at RAY_ADDRESS={address} ({reason}). Start it, or unset RAY_ADDRESS."
            ) from error


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's C++ says on descriptor 2 that it will say nothing."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Actor:
    """An `Internalizer` of tables: what Ray Data makes in each worker."""

    def __init__(self, reader: Reader, output: str, done: Done) -> None:
        self._internalize = Internalizer(reader, output, done)

    def __call__(self, table: Any) -> Any:
        results = [self._internalize(Item(**row)) for row in table.to_pylist()]
        return _table(results)


def _datasource(corpus: Corpus) -> Any:
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def tables() -> Iterator[Any]:
        for item in corpus.items():
            yield _table([item])

    class Documents(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, **settings: Any) -> list[Any]:
            return [ReadTask(tables, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]

    return Documents()


def _table(rows: Iterable[Any]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist([row._asdict() for row in rows])
