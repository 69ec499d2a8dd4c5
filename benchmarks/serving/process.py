"""ServerProcess: a server of this project in a process of its own, on this machine alone.

with ServerProcess(["-m", "hypernet", "serve", "--directory", "outputs/soak"]) as server:
    httpx.get(f"{server.url}/healthz")
    server.stop(signal.SIGKILL)
    server.start()                     # at the same address
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class ServerProcess:
    """Starts Python with these arguments and `--port`, waits until `probe` is answered, and ends it after the block.

    Args:
        probe: a path below the address.
        threads: of torch; None: as the environment says.

    Raises:
        ValueError: it ends, or does not answer within two minutes; with what it printed.
    """

    def __init__(self, arguments: Sequence[str], *, probe: str = "/healthz", threads: int | None = 1) -> None:
        self.port, self.probe = free_port(), probe
        self._command = [sys.executable, *arguments, "--port", str(self.port)]
        self._env = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self._before: Any = None
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        # A file, not a pipe: nobody reads it while the server runs, and a pipe would be full after 64 KiB.
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._env, stdout=self._log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}{self.probe}", timeout=5)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        printed = self.stop(signal.SIGKILL)
        raise ValueError(f"No server came up at {self.url}: {printed.strip() or 'it printed nothing'}")

    def stop(self, number: int = signal.SIGTERM) -> str:
        """What it has printed so far."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(timeout=60)
        return self.printed()

    def printed(self) -> str:
        self._log.seek(0)
        found = self._log.read()
        self._log.seek(0, os.SEEK_END)
        return found

    def resident_mib(self) -> float:
        """Memory of the process that is in RAM now; Linux alone."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def __enter__(self) -> "ServerProcess":
        if threading.current_thread() is threading.main_thread():  # a benchmark that is ended takes its server along
            self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self.stop(signal.SIGKILL)
        self._log.close()
