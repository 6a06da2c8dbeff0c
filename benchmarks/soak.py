"""A long run of the default task: does memory grow, do files stay open, is anything left in /dev/shm?

    make soak                                      # 2,000 steps, about half an hour on two cores
    python benchmarks/soak.py --steps 200 --sync adapter

Each process's own memory (RssAnon) and open files are noted every few seconds; memory is flat if a straight line
through the second half of the notes rises by at most SLOPE MB per 100 steps. After the run, another is killed with
SIGKILL, and what it leaves in /dev/shm has to be gone after a third. Exit code 1 if anything fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = Path("/dev/shm")
SLOPE = 1.0  # MB per 100 steps


def start(folder: Path, name: str, options: list[str]) -> subprocess.Popen:
    """The default task on two processes, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_grpo.py"]
    command += ["--config", "configs/arithmetic_cpu.py", "--output_dir", str(folder / name)]
    command += ["--lr_schedule", "constant", "--learning_rate", "1e-4", *options]
    log = open(folder / f"{name}.log", "w")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "USE_SHM": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def ranks_of(run: subprocess.Popen) -> list[int]:
    """The process ids of its ranks."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return [int(child) for child in children]


def steps_done(folder: Path, name: str) -> int:
    """The last step that its metrics have; 0 if there are none yet."""
    path = folder / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(run: subprocess.Popen, folder: Path, name: str, step: int) -> None:
    """Returns when the step is done; raises RuntimeError if the run ends before."""
    while steps_done(folder, name) < step:
        if run.poll() is not None:
            raise RuntimeError(f"the run ended early:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        time.sleep(0.2)


def watch(run: subprocess.Popen, folder: Path, name: str, seconds: float) -> np.ndarray:
    """(notes, ranks, 3): step, MB of own memory, and open files of each rank, until the run ends."""
    notes = []
    while run.poll() is None:
        time.sleep(seconds)
        step = steps_done(folder, name)
        try:
            notes.append([(step, own_megabytes(pid), len(os.listdir(f"/proc/{pid}/fd"))) for pid in ranks_of(run)])
        except (OSError, IndexError):  # it has just ended
            break
    if run.wait():
        raise RuntimeError(f"the run failed:\n{(folder / f'{name}.log').read_text()[-2000:]}")
    return np.array([note for note in notes if len(note) == 2 and note[0][0] > 0], dtype=float)


def own_megabytes(pid: int) -> float:
    """Memory of a process that is not a file's."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def judge(notes: np.ndarray) -> bool:
    """Prints what was found of each rank; whether it is flat."""
    notes = notes[notes[:, 0, 0] < notes[-1, 0, 0]]  # after the last step, the run ends and gives all back
    second_half, flat = notes[len(notes) // 2 :], True
    for rank in range(notes.shape[1]):
        steps, memory, files = second_half[:, rank].T
        slope = np.polyfit(steps, memory, 1)[0] * 100
        print(
            f"rank {rank}: steps {steps[0]:.0f} to {steps[-1]:.0f}, {memory.min():.0f} to {memory.max():.0f} MB, "
            f"{slope:+.2f} MB per 100 steps; open files {files.min():.0f} to {files.max():.0f}"
        )
        flat &= slope <= SLOPE and files[-1] <= files[0]
    return flat


def left_behind() -> set[str]:
    """The names of everything in shared memory."""
    return {path.name for path in SHARED_MEMORY.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=2.0, help="between two notes")
    parser.add_argument("--sync", default="merged")
    options = parser.parse_args()
    shared = ["--sync", options.sync]
    before = left_behind()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        long_run = ["--steps", str(options.steps), "--eval_every", "20", "--save_every", "100", *shared]
        notes = watch(start(folder, "long", long_run), folder, "long", options.seconds)
        flat, clean = judge(notes), left_behind() <= before
        print(f"/dev/shm after {options.steps} steps: {'clean' if clean else sorted(left_behind() - before)}")

        victim = start(folder, "victim", ["--steps", "1000", "--eval_every", "0", *shared])
        wait_for_step(victim, folder, "victim", 2)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        for pid in orphans("victim"):
            os.kill(pid, signal.SIGKILL)
        heir = start(folder, "heir", ["--steps", "2", *shared])
        code = heir.wait()
        clean_after_kill = code == 0 and left_behind() <= before
        print(f"/dev/shm after a kill and a run: {'clean' if clean_after_kill else sorted(left_behind() - before)}")
    sys.exit(0 if flat and clean and clean_after_kill else 1)


def orphans(name: str) -> list[int]:
    """Ranks of a run whose torchrun is gone: they have groups of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train_grpo.py" in words and name.encode() in words:
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    main()
