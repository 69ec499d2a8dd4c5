"""peak_bytes: the most memory that tensors hold at a time while something runs."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], *, device: str) -> int:
    """Bytes held beyond what was there before, at the worst moment of `run`.

    On a CPU every allocation is followed by torch's profiler, on a GPU by the caching allocator.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        # torch 2.11 warns that it keeps one cycle, which is all there is. acc_events=True would silence it and make
        # Python objects of all events at once: 60 s for what runs in 3.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
