"""Is it right and is it fast on this machine: one command, one table, one JSON file, under nine minutes.

    python benchmarks/gpu_check.py [--size toy|3b|7b] [--sections layers head ...] [--budget_s 540] [--out FILE]

Builds Qwen2.5 architectures with random weights on the local disk and measures, each in a section of its own:

kernels, sampler, adapter            is it right? against float64 and transformers' own model, gpu_right.py
layers, head, update, sync, step     is it fast? against peers, and roofs that the same process measures, gpu_fast.py
plan                                 was it foreseen? tools/plan.py beside the measurements of update and sync
trl                                  the same step by TRL with peft and colocated vLLM

The size is `3b` with a GPU and `toy` without: then times mean nothing, but everything runs. A wrong result or a broken
section is a FAIL, and the exit code is 1; a missed target of speed is only reported. Sections that no longer fit into
the budget, or that this machine cannot run, get a row without a number that says why.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime.quiet  # noqa: E402, F401, I001  before torch

import torch  # noqa: E402

from benchmarks import gpu_fast, gpu_right  # noqa: E402
from benchmarks.gpu_shared import ON_GPU, SIZES, Row, Rows, Size, read_rows  # noqa: E402


class Section(NamedTuple):
    run: Callable[[Rows, Size, Path], None]
    seconds: float  # that it takes at 3B on a GPU, with its process: a guess until one has run


SECTIONS = {
    "kernels": Section(gpu_right.kernels, 15),
    "sampler": Section(gpu_right.sampler, 60),
    "adapter": Section(gpu_right.adapter, 50),
    "layers": Section(gpu_fast.layers, 15),
    "head": Section(gpu_fast.head, 15),
    "update": Section(gpu_fast.update, 50),
    "sync": Section(gpu_fast.sync, 50),
    "step": Section(gpu_fast.step, 120),
    "plan": Section(gpu_fast.plan, 15),
    "trl": Section(gpu_fast.trl, 130),
}
# Which sections share a process. vLLM gives a GPU's memory back when its process ends, so there each has its own; on a
# CPU that would only be slow. `plan` makes a world of ranks that do not exist, and `step` and `trl` patch vLLM.
PROCESSES = (
    [[name] for name in SECTIONS]
    if ON_GPU
    else [["kernels", "layers", "head"], ["sampler", "adapter", "update", "sync", "step"], ["plan", "trl"]]
)
ENVIRONMENT = {  # of these processes, where it does not say otherwise
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # all models are made here
}
if ON_GPU:  # vLLM 0.24's other one draws for each seeded request apart; 0.32 takes this one by itself
    ENVIRONMENT["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class Work:
    """The folder of one check: models, rows, and which sections are over."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "rows.jsonl"

    def rows(self, section: str) -> Rows:
        return Rows(self.file, section)

    def end(self, section: str) -> None:
        (self.folder / f"{section}.over").touch()

    def still_to_come(self, sections: list[str]) -> list[str]:
        return [section for section in sections if not (self.folder / f"{section}.over").exists()]


def run_here(sections: list[str], size: Size, work: Work) -> None:
    """Runs sections in this process. An exception ends it: a GPU cannot be trusted afterwards. See `run_process`."""
    for name in sections:
        SECTIONS[name].run(work.rows(name), size, work.folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # its handlers hold the run, and so everything that has to go now
        gc.collect()
        work.end(name)


def run_process(sections: list[str], size: str, work: Work, seconds: float) -> None:
    """Runs sections in their own process, for at most `seconds`. The first section that breaks gets a row."""
    command = [sys.executable, __file__, "--size", size, "--work", str(work.folder), "--sections", *sections]
    log = work.folder / "log.txt"
    with open(log, "w") as output:
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(command, **streams, start_new_session=True, env=ENVIRONMENT | os.environ)
        try:
            code = process.wait(timeout=seconds)
            cause = last_error(log) or f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            cause = f"did not end within the {seconds:.0f} s that were left"
        finally:  # also if this process is asked to stop
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
                process.wait()
    broken = work.still_to_come(sections)
    if broken:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        work.rows(broken[0]).fail(cause)
        work.end(broken[0])


def last_error(log: Path) -> str:
    """The message of the last exception in a log, in one line; without one, the log's last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(": ")[0].endswith(("Error", "Exception", "Interrupt"))]
    return (errors or lines or [""])[-1].removeprefix("[rank0]: ")[:200]


def run_all(sections: list[str], size: str, work: Work, budget: float) -> None:
    """Runs all sections that fit into the budget, in seconds."""
    deadline = time.monotonic() + budget
    for shared in PROCESSES:
        while names := work.still_to_come([name for name in shared if name in sections]):
            needed, left = SECTIONS[names[0]].seconds * SIZES[size].patience, deadline - time.monotonic()
            if left > max(needed, 1.0):
                print(f"{', '.join(names)} ({left:.0f} s left)", file=sys.stderr, flush=True)
                run_process(names, size, work, left)
                continue
            why = f"skipped: no time; {max(left, 0.0):.0f} s are left, and it takes about {needed:.0f}"
            work.rows(names[0]).unable("the whole section", why)
            work.end(names[0])


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    header = ("section", "what", "measured", "target", "verdict", "note")
    cells = [
        (
            row.section,
            row.what,
            "-" if row.value is None else f"{row.value:,.4g} {row.unit}".strip(),
            *(row.target, row.verdict, " ".join(row.note.split()).replace("|", "/")),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    for line in (header, ["-" * width for width in widths], *cells):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"


def report(rows: list[Row], size: str, seconds: float, out: Path) -> bool:
    """Prints the table and writes the JSON; whether nothing failed."""
    from runtime.tracking import environment

    rows.sort(key=lambda row: list(SECTIONS).index(row.section))  # stable: within a section as they came
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"{device}, {size}, {seconds:.0f} s")
    print("\n".join(table(rows)))
    record = {"device": device, "size": size, "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds)}
    record |= {"environment": environment(), "rows": [asdict(row) for row in rows]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    failed = [row for row in rows if row.verdict == "FAIL"]
    print(f"{len(rows)} rows, {len(failed)} failed; also in {out}")
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b" if ON_GPU else "toy")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget_s", type=float, default=540.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # for the processes that it starts itself
    arguments = parser.parse_args()
    if arguments.work:
        run_here(arguments.sections, SIZES[arguments.size], Work(arguments.work))
        os._exit(0)  # everything is in the files: engines and process groups need not be taken down in good order
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left behind
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        run_all(arguments.sections, arguments.size, work, arguments.budget_s)
        rows = read_rows(work.file)
    sys.exit(not report(rows, arguments.size, time.monotonic() - start, arguments.out))


if __name__ == "__main__":
    main()
