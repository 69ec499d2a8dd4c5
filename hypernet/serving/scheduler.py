"""Scheduler: the one thread that owns the model. Sequences share its batch; other work runs between two steps.

scheduler = Scheduler(BatchEngine(model), max_queue=256)
scheduler.submit(generation)                        # joins the batch as soon as there is room; its `emit` is called
model.pause = scheduler.between
scheduler.call(lambda: model.internalize(text))     # a Future; answers go on meanwhile
scheduler.call(lambda: prompt_of(question), brief=True)
scheduler.stop(drain_s=30)
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from hypernet.serving.engine import DecodingEngine, Delta, Generation

log = logging.getLogger(__name__)
_T = TypeVar("_T")


_Job = tuple[Callable[[], Any], "Future[Any]"]


class QueueFull(Exception):
    """More waits than is allowed; later there may be room."""


class Stopping(Exception):
    """Nothing new is taken: the process is about to end."""


class Scheduler:
    """Runs an engine in a thread of its own, which begins at once.

    Args:
        max_queue: sequences and other work that may wait.
    """

    def __init__(self, engine: DecodingEngine, *, max_queue: int = 256) -> None:
        if max_queue < 1:
            raise ValueError(f"max_queue is {max_queue}. Give at least 1.")
        self.engine, self.max_queue = engine, max_queue
        self._waiting: deque[Generation] = deque()
        self._jobs: deque[_Job] = deque()
        self._brief: deque[_Job] = deque()
        self._condition = threading.Condition()
        self._stopping = self._abandoned = False
        self.num_tokens = self.num_steps = 0  # written so far, and in how many steps
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._jobs) + len(self._brief)

    @property
    def num_running(self) -> int:
        return len(self.engine.running)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, generation: Generation) -> None:
        """Lets a sequence wait for its place in the batch.

        Raises:
            QueueFull, Stopping: it is not taken.
        """
        with self._condition:
            self._check_room()
            self._waiting.append(generation)
            self._condition.notify()

    def call(self, work: Callable[[], _T], *, brief: bool = False) -> "Future[_T]":
        """Work that needs the model, between two steps; a cancelled Future is not begun. Raises as `submit`.

        Args:
            brief: it takes no longer than a step and holds no lock: all that waits runs before the next step, also
                between the pieces of other work. Of other work one runs between two steps.
        """
        future: Future[_T] = Future()
        with self._condition:
            self._check_room()
            (self._brief if brief else self._jobs).append((work, future))
            self._condition.notify()
        return future

    def between(self) -> None:
        """Called by work between its pieces: brief work runs, and answers get one more token. Does nothing for others
        than the model's thread.

        Raises:
            Stopping: the work should end here, since the process does.
        """
        if threading.current_thread() is not self._thread:
            return
        if self._abandoned:
            raise Stopping("The server is stopping.")
        self._round()

    def stop(self, *, drain_s: float = 30.0) -> None:
        """Takes nothing new, finishes what there is for so long, and ends the thread; the rest ends with `Stopping`."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(drain_s)
        with self._condition:
            left = [*self._waiting, *self.engine.running]
            for one in left:
                one.cancelled = True
            jobs, self._jobs, self._brief = [*self._jobs, *self._brief], deque(), deque()
            self._abandoned = True
            self._condition.notify()
        _fail(left, Stopping("The server is stopping."))
        for _, future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopping("The server is stopping."))
        self._thread.join(5)

    def _check_room(self) -> None:
        if self._stopping:
            raise Stopping("The server is stopping. Ask again once it is back.")
        if self.num_waiting >= self.max_queue:
            raise QueueFull(f"{self.num_waiting} requests wait already, the most that may. Ask again later.")

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._condition:
                while not (self.num_waiting or self.engine.running or self._stopping):
                    self._condition.wait()
                if self._stopping and not (self.num_waiting or self.engine.running):
                    return
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                _finish(*job)
            self._round()

    def _round(self) -> None:
        """All brief work, new sequences, and one step."""
        with self._condition:
            brief, self._brief = self._brief, deque()
        for job in brief:
            _finish(*job)
        with self._condition:
            arrivals = [self._waiting.popleft() for _ in range(min(self.engine.room, len(self._waiting)))]
        self._advance([one for one in arrivals if not one.cancelled])

    def _advance(self, arrivals: list[Generation]) -> None:
        """Admits and decodes; what goes wrong ends the sequences that it concerns, not the thread."""
        before = time.perf_counter()
        try:
            self.engine.admit(arrivals)
            self.num_tokens += len(arrivals)
        except Exception as error:
            log.exception("Reading %d prompts failed.", len(arrivals))
            _fail([one for one in arrivals if one not in self.engine.running], error)
        try:
            if self.engine.running:
                self.num_tokens += len(self.engine.running)
                self.num_steps += 1
                self.engine.step()
        except Exception as error:
            log.exception("A step of %d sequences failed after %.3f s.", self.num_running, time.perf_counter() - before)
            _fail(self.engine.clear(), error)


def _finish(work: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)


def _fail(generations: list[Generation], error: Exception) -> None:
    for one in generations:
        one.emit(Delta(error=error))
