"""What bounds each phase of a step? From a profiler's trace: the operators, or GPU kernels, that took its time.

    PROFILE_STEP=3 torchrun --nproc-per-node=2 train_grpo.py --config configs/arithmetic_cpu.py --steps 3
    python benchmarks/what_bounds.py runs/arithmetic/trace_3.json.gz

An operator's time is its own, without that of the operators which it calls. What is left of a phase is Python, waiting
for other ranks, and on a GPU whatever happens while no kernel runs.
"""

import argparse
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

SHOWN = 4  # operators per phase


def read(path: Path) -> tuple[list[dict], list[dict]]:
    """The spans of the phases, in order, and what took their time: kernels if there are any, else operators."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    kinds = defaultdict(list)
    for event in events:
        kinds[event.get("cat")].append(event)
    phases = []
    for span in sorted(kinds["user_annotation"], key=lambda event: event["ts"]):
        within = phases and span["ts"] < phases[-1]["ts"] + phases[-1]["dur"]
        if span["tid"] == span["pid"] and not within:  # others are FSDP's and the optimizer's, or of other threads
            phases.append(span)
    kernels = kinds["kernel"] + kinds["gpu_memcpy"] + kinds["gpu_memset"]
    return phases, kernels or kinds["cpu_op"]


def own_times(operators: list[dict]) -> list[tuple[str, float, float]]:
    """(name, start, microseconds of its own) of operators that contain each other, thread by thread."""
    found, open_ones = [], []  # of the latter: [event, its own time so far]

    def close(until: float) -> None:
        while open_ones and open_ones[-1][0]["ts"] + open_ones[-1][0]["dur"] <= until:
            event, own = open_ones.pop()
            found.append((event["name"], event["ts"], own))

    for _, events in sorted(by_thread(operators).items(), key=str):
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            close(event["ts"])
            if open_ones:
                open_ones[-1][1] -= event["dur"]
            open_ones.append([event, event["dur"]])
        close(float("inf"))
    return found


def by_thread(events: list[dict]) -> dict[tuple, list[dict]]:
    """The events of each thread, or of each stream of a GPU."""
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    return threads


def table(path: Path) -> list[str]:
    """A row per phase, in the order of the step."""
    phases, events = read(path)
    own = own_times(events)
    lines = ["| phase | seconds | most of it | Python and waiting |", "|---|---|---|---|"]
    for name in dict.fromkeys(phase["name"] for phase in phases):
        spans = [(phase["ts"], phase["ts"] + phase["dur"]) for phase in phases if phase["name"] == name]
        total = sum(end - start for start, end in spans)
        times = Counter()
        for operator, start, microseconds in own:
            if any(begin <= start < end for begin, end in spans):
                times[operator] += microseconds
        most = ", ".join(f"`{operator}` {time / total:.0%}" for operator, time in times.most_common(SHOWN))
        rest = max(0.0, 1 - sum(times.values()) / total)
        lines.append(f"| {name} | {total / 1e6:.3f} | {most} | {rest:.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    print("\n".join(table(parser.parse_args().trace)))


if __name__ == "__main__":
    main()
