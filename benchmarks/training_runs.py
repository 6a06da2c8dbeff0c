"""Training runs: starting them one after the other, and reading their metrics.jsonl."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
POLL = 2.0  # seconds between two looks at a run's metrics

Rows = list[dict[str, float]]


def read_rows(folder: Path) -> Rows:
    """The rows of a run's metrics.jsonl, without null values; none if there is no such file yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def step_seconds(row: dict[str, float]) -> float:
    """The duration of a step, without evaluation and saving."""
    return row.get("time/step", 0.0) - row.get("time/eval", 0.0) - row.get("time/save", 0.0)


def positions(rows: Rows, axis: str) -> np.ndarray:
    """The position of each row, in "steps" or in "minutes" of training."""
    if axis == "steps":
        return np.array([row["step"] for row in rows])
    return np.cumsum([step_seconds(row) for row in rows]) / 60


def is_complete(rows: Rows, axis: str, limit: float) -> bool:
    """Whether the run was evaluated at or after the limit."""
    evaluated = (at for at, row in zip(positions(rows, axis), rows) if "eval/accuracy" in row)
    return any(at >= limit for at in evaluated)


def interpolate(rows: Rows, metric: str, axis: str, at: Sequence[float]) -> list[float]:
    """A metric of the evaluations at given positions, interpolated linearly."""
    points = [(x, row[metric]) for x, row in zip(positions(rows, axis), rows) if metric in row]
    return np.interp(at, *zip(*points)).tolist()


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that such benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="configs/smollm2_times_tables.py")
    parser.add_argument("--model", help="a folder or a name on the hub; mostly the configuration's")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--minutes", type=float, help="of training per run")
    limits.add_argument("--steps", type=int, help="per run, instead of minutes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", required=True)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with `axis` and `limit` (how far a run goes) and `more` (options that are not known here)."""
    arguments, arguments.more = parser.parse_known_args()
    arguments.axis = "minutes" if arguments.steps is None else "steps"
    arguments.limit = arguments.minutes if arguments.steps is None else arguments.steps
    if not arguments.limit:
        parser.error("say how far a run goes: --minutes or --steps")
    if arguments.model and Path(arguments.model).exists():
        arguments.model = str(Path(arguments.model).absolute())  # runs start in the root of the code
    return arguments


def torchrun(ranks: int, config: str, options: dict[str, object]) -> list[str]:
    """The command of a training run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*command, "train_grpo.py", "--config", config, *(f"--{name}={value}" for name, value in options.items())]


def train_to_limit(
    command: list[str], folder: Path, axis: str, limit: float, environment: dict[str, str] | None = None
) -> Rows:
    """The metrics of the run that a command writes to `folder`; none if it ended before the limit.

    A run that is complete already is only read. The command's output is in FOLDER.log.
    """

    def complete() -> bool:
        return is_complete(read_rows(folder), axis, limit)

    if not complete():
        log = Path(f"{folder}.log")
        print(f"{folder.name}: its output is in {log}", flush=True)
        stop = complete if axis == "minutes" else lambda: False  # the last step ends the run by itself
        run_until(stop, command, log, environment)
    return read_rows(folder) if complete() else []


def run_until(done: Callable[[], bool], command: list[str], log: Path, environment: dict[str, str] | None = None):
    """Runs a command to its end, or stops it by SIGTERM as soon as `done`. Appends its output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None and not done():
                time.sleep(POLL)
        finally:
            process.terminate()  # a run saves what it has
            process.wait()


def end_with_children() -> None:
    """Makes SIGTERM raise SystemExit, so that `run_until` ends what it has started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
