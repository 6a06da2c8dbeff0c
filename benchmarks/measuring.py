"""Measuring time and memory: a clock that waits for the GPU, and the peak of allocated bytes."""

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Seconds; waits until the GPU has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of `rounds` calls, after one that warms up."""
    work()
    seconds = []
    for _ in range(rounds):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


class PeakBytes:
    """`peak`: the most bytes of tensors during the block, beyond those before it; on the GPU if there is one.

    CUDA's allocator counts exactly and at no cost. On a CPU, torch's profiler counts, which slows the work down.
    """

    def __enter__(self):
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self.profiler.__enter__()
        return self

    def __exit__(self, *error):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self.before
            return
        self.profiler.__exit__(*error)
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)
