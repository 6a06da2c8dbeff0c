"""What benchmarks measure with: a clock that waits for the GPU, and the most bytes that were allocated at a time."""

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Seconds, after the GPU has done its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Of so many calls, after one that warms up."""
    work()
    seconds = []
    for _ in range(rounds):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


class PeakBytes:
    """`peak`: the most bytes of tensors within the block, beyond those from before; of the GPU's if there is one.

    By CUDA's allocator, which is exact and costs nothing; on a CPU by torch's profiler, which makes the work slower.
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
