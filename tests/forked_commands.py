"""Runs this project's commands in forks of one process that has imported everything, and kills them on demand.

A command by itself takes 6 s of processor time to import torch, transformers and lightning; a fork takes none. A JSON
object per line on stdin, an answer per line on stdout; `Commands` is the side of the tests.

    commands.run("train.py", ["trainer.max_steps=3", ...], cwd=folder)              # to its end
    commands.run("hypernet", ["library", "list"], cwd=folder)                       # python -m hypernet
    commands.run(..., kill={"steps": 2, "seconds": 0.01, "checkpoints": folder})    # SIGKILL after two checkpoints
    commands.run(..., kill={"while_writing": True, "checkpoints": folder})          # while one is being written
    commands.run(..., kill={"rows": 5, "log": folder, "signal": 15})                # SIGTERM after five more lines
    commands.run(..., kill={"said": "Step 2", "signal": 2})                         # SIGINT once its stderr has this
    commands.run(..., kill={"found": f"{folder}/*.json"})                          # once such a file is there
    commands.run(..., stdin="a document")                                          # through a pipe
    commands.run(..., processes=2)                                                 # both forked, as by torchrun
"""

import gc
import glob
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
EVERYTHING = ("lightning.pytorch.loggers", "peft", "hypernet.training.build", "hypernet.training.callbacks")


class Finished(NamedTuple):
    """code: its exit status, or minus the signal that killed it."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Commands:
    """The process that forks; a context manager.

    Args:
        imported: modules that it imports before.
        environment: of it and of the commands; that of the tests by default.
    """

    def __init__(self, imported: Sequence[str] = EVERYTHING, environment: Mapping[str, str] = os.environ) -> None:
        self.imported = imported
        self.environment = environment

    def __enter__(self) -> "Commands":
        command = [sys.executable, __file__, *self.imported]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # A run's second process starts anew, and is to find the callbacks of the tests as well.
        path = os.pathsep.join([str(ROOT), *filter(None, [self.environment.get("PYTHONPATH")])])
        env = {**self.environment, "PYTHONPATH": path}
        self.process = subprocess.Popen(command, env=env, text=True, stderr=subprocess.DEVNULL, **pipes)
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def run(
        self,
        command: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        kill: dict | None = None,
        processes: int = 1,
        stdin: str | None = None,
    ) -> Finished:
        """command: a script of this project, or the name of a module.

        processes: how many ranks of one run are forked; with 1 the command starts the others itself, anew.
        """
        request = {"command": command, "arguments": arguments, "cwd": str(cwd), "kill": kill, "processes": processes}
        request["stdin"] = stdin
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        return Finished(*json.loads(self.process.stdout.readline()))


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    gc.disable()
    for name in sys.argv[1:]:
        import_module(name)
    # What was imported stays: the collector would go through it, and copy its pages, in every fork.
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        streams = [tempfile.TemporaryFile("w+") for _ in range(2)]
        ranks = _ranks(request["processes"])
        child, *others = [os.fork() or _run(request, rank, streams) for rank in ranks]
        code, kill = None, request["kill"]
        if kill:
            while code is None and not _is_time(kill, streams):
                time.sleep(0.0005)
                code = _poll(child)
            time.sleep(kill.get("seconds", 0))
            if code is None and (code := _poll(child)) is None:
                os.kill(child, kill.get("signal", signal.SIGKILL))
        if code is None:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for other in others:
            if code:
                os.kill(other, signal.SIGKILL)  # it would wait for the first process in a collective operation
            code = code or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
        printed = []
        for stream in streams:
            stream.seek(0)
            printed.append(stream.read())
            stream.close()
        print(json.dumps([code, *printed]), flush=True)


def _is_time(kill: dict, streams: list) -> bool:
    if said := kill.get("said"):
        return said.encode() in os.pread(streams[1].fileno(), 10**6, 0)
    if found := kill.get("found"):
        return bool(glob.glob(found))
    if rows := kill.get("rows"):
        logged = sum(path.read_text().count("\n") for path in Path(kill["log"]).rglob("metrics.csv"))
        return logged > rows + kill.setdefault("logged", logged)
    checkpoints = Path(kill["checkpoints"])
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    if kill.get("while_writing"):
        return any(name.startswith(".step-") for name in names)
    steps = [int(name[5:11]) for name in names if name.startswith("step-")]
    first = kill.setdefault("first", max(steps, default=0))
    return max(steps, default=0) >= first + kill["steps"]


def _ranks(number: int) -> list[dict[str, str]]:
    """The environment variables by which Lightning knows that all processes of a run are started for it."""
    if number == 1:
        return [{}]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    return [address | {"LOCAL_RANK": str(rank)} for rank in range(number)]


def _poll(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _run(request: dict, rank: dict[str, str], streams: list) -> None:
    code = 1
    try:
        if request["stdin"] is None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        else:
            reading, writing = os.pipe()
            os.write(writing, request["stdin"].encode())  # at most what a pipe holds, 64 KiB
            os.close(writing)
            os.dup2(reading, 0)
            sys.stdin = open(0)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        # Ignored where the tests themselves run in the background of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.update(rank)
        name = request["command"]
        sys.argv = [str(ROOT / name), *request["arguments"]]
        if name.endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
    os._exit(0)  # taking down all that was imported takes 2 s
