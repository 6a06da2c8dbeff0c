"""A long run must not grow: memory, open files and /dev/shm of the embedded default, watched from outside.

    python benchmarks/soak.py                  # 2,000 steps on two ranks, killed and resumed halfway
    python benchmarks/soak.py --steps 60       # the short form, which the tests run

Prints one line per rank and exits with 1 if memory still grows by more than 1 MB per 100 steps after the warm-up, if
files stay open, or if anything is left in /dev/shm, after the kill as at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_GROWTH = 1.0  # MB per 100 steps
SHARED_MEMORY = Path("/dev/shm")


class Reading(NamedTuple):
    """What one rank held when a step had just been logged."""

    step: int
    megabytes: float  # of anonymous memory: what it has allocated, without files and libraries
    files: int


def start(folder: Path, steps: int, *options: str) -> subprocess.Popen:
    """The embedded default on two ranks, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_grpo.py"]
    command += ["--config", "configs/arithmetic_cpu.py", "--output_dir", str(folder), "--run_name", "soak"]
    command += ["--steps", str(steps), "--wandb_mode", "disabled", *options]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, process_group=0)


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes of torchrun: rank -> process id."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return dict(enumerate(sorted(int(child) for child in children)))


def read(process: int, step: int) -> Reading:
    """Memory and open files of a process now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return Reading(step, int(status["RssAnon"].split()[0]) / 1e3, len(os.listdir(f"/proc/{process}/fd")))


def last_step(folder: Path) -> int:
    """The newest step in the run's metrics; -1 if there is none."""
    path = folder / "soak" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def watch(launcher: subprocess.Popen, folder: Path, until: int) -> dict[int, list[Reading]]:
    """A reading of every rank after each step that is seen, until a step is there or the run has ended."""
    readings: dict[int, list[Reading]] = defaultdict(list)
    seen = last_step(folder)
    while launcher.poll() is None and seen < until:
        time.sleep(0.2)
        step = last_step(folder)
        if step > seen:
            seen = step
            try:
                for rank, process in ranks_of(launcher.pid).items():
                    readings[rank].append(read(process, step))
            except (FileNotFoundError, ProcessLookupError):
                break  # it is about to end
    return readings


def growth(readings: list[Reading]) -> float:
    """MB per 100 steps: the slope of a line through the second half of the readings, by least squares."""
    points = readings[len(readings) // 2 :]
    mean_step = sum(point.step for point in points) / len(points)
    mean = sum(point.megabytes for point in points) / len(points)
    spread = sum((point.step - mean_step) ** 2 for point in points)
    return 100 * sum((point.step - mean_step) * (point.megabytes - mean) for point in points) / spread


def left_in_shared_memory(before: set[str]) -> list[str]:
    """What is in /dev/shm now and was not before."""
    return sorted(set(os.listdir(SHARED_MEMORY)) - before)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cache_dir", default=".cache", help="where the tiny model is")
    parser.add_argument("--out", default="", help="a file for all readings, as JSON")
    arguments, more = parser.parse_known_args()
    before, options = set(os.listdir(SHARED_MEMORY)), ["--cache_dir", arguments.cache_dir, *more]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = start(folder, arguments.steps, *options)
        readings = watch(launcher, folder, until=arguments.steps)
        code = launcher.wait()
        print((folder / "output.txt").read_text()[-300:], "exit code", code)
        left = left_in_shared_memory(before)
    for rank, rows in readings.items():
        print(rank, rows[0], rows[len(rows) // 2], rows[-1], growth(rows))
    print(left)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(readings))


if __name__ == "__main__":
    main()
