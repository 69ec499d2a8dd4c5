"""Runs train.py again and again in forks of one process that has imported everything, and kills them on demand.

A JSON object per line on stdin, an answer per line on stdout; `Runs` is the side of the test.

    runs = Runs(folder)
    runs.run(["trainer.max_steps=3", ...])                                  # to its end
    runs.run([...], kill={"steps": 2, "seconds": 0.01})                     # SIGKILL 10 ms after the second checkpoint
    runs.run([...], kill={"while_writing": True})                           # while a checkpoint is being written
    runs.run([...], kill={"rows": 5, "log": folder, "signal": 15})          # SIGTERM after five lines of the log
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Runs:
    """The process that forks; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Runs":
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # A run's second process starts anew, and is to find the callbacks of the tests as well.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=env, text=True, stderr=subprocess.DEVNULL, **pipes
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def run(self, arguments: list[str], *, checkpoints: Path | None = None, kill: dict | None = None) -> dict:
        """{"code": exit code or minus the signal, "output": what it printed, "seconds": how long it ran}."""
        request = {"arguments": arguments, "checkpoints": str(checkpoints), "kill": kill}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    import lightning.pytorch.loggers  # noqa: F401
    import torch

    import hypernet.callbacks  # noqa: F401
    import hypernet.training  # noqa: F401
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.perf_counter()
        child = os.fork()
        if not child:
            _train(request["arguments"])
        kill, code = request["kill"], None
        if kill:
            checkpoints = Path(request["checkpoints"])
            while code is None and not _is_time(kill, checkpoints):
                time.sleep(0.0005)
                code = _poll(child)
            time.sleep(kill.get("seconds", 0))
            if code is None and (code := _poll(child)) is None:
                os.kill(child, kill.get("signal", signal.SIGKILL))
        if code is None:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output = Path("output.txt").read_text()
        print(json.dumps({"code": code, "output": output, "seconds": time.perf_counter() - begun}), flush=True)


def _is_time(kill: dict, checkpoints: Path) -> bool:
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    if kill.get("while_writing"):
        return any(name.startswith(".step-") for name in names)
    if rows := kill.get("rows"):
        return sum(path.read_text().count("\n") for path in Path(kill["log"]).rglob("metrics.csv")) > rows
    steps = [int(name[5:11]) for name in names if name.startswith("step-")]
    first = kill.setdefault("first", max(steps, default=0))
    return max(steps, default=0) >= first + kill["steps"]


def _poll(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _train(arguments: list[str]) -> None:
    code = 1
    try:
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.argv = [str(ROOT / "train.py"), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
        print(exit.code)
    except BaseException as error:
        print(repr(error))
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
