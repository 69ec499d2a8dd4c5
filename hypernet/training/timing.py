"""How long the phases of a training step take, without making the device wait in between.

phases = PhaseTimes()
with phases("encode"):
    ...
phases.take()         # {"encode": 1.52}, seconds since the last call; waits for the device once
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimes:
    """Sums of seconds by phase; a phase may also begin in one place and end in another.

    Args:
        now: gives the time in seconds, or an event on the GPU; None: what the machine has.
    """

    def __init__(self, *, now: Callable[[], float | torch.cuda.Event] | None = None) -> None:
        self._now = now or _now
        self._seconds: dict[str, float] = defaultdict(float)
        self._begun: dict[str, float | torch.cuda.Event] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end(name)

    def begin(self, name: str) -> None:
        self._begun[name] = self._now()

    def end(self, name: str) -> None:
        """Does nothing for a phase that has not begun."""
        begun, now = self._begun.pop(name, None), self._now()
        if begun is None:
            return
        if isinstance(now, torch.cuda.Event):
            self._events.append((name, begun, now))
        else:
            self._seconds[name] += now - begun

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        if self._events:
            torch.cuda.synchronize()
        for name, begun, ended in self._events:
            self._seconds[name] += begun.elapsed_time(ended) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


def _now() -> float | torch.cuda.Event:
    """An event on the GPU, where work goes on after its call has returned; else the clock."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
