"""Is a healthy run ever stopped by the check of arrival? Short runs that send the probe after every step.

    python benchmarks/verified_runs.py --model FOLDER --steps 100 --out runs/verified

One run for every `sync` and dtype, on times tables. Each check of a run must pass, or it ends there. Prints a table.
Other options go to train_grpo.py. Started again, the same command goes on where it was.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import quiet  # noqa: F401, E402, I001  before torch

from benchmarks import training_runs  # noqa: E402

MODES = [f"{sync},{dtype}" for dtype in ("bfloat16", "float32") for sync in ("adapter", "merged", "straight_through")]
SIZES = {"prompts_per_step": 4, "group_size": 4, "eval_problems": 8, "eval_every": 0, "save_every": 25}
COLUMNS = (
    "`sync`",
    "dtype",
    "checks",
    "noise",
    "probe error",
    "KL",
    "survival",
    "s/step",
    "of that, sync",
)


def train() -> None:
    """train_grpo.py, with a check after every step."""
    import sync

    sync.VERIFY_EVERY = 1
    import train_grpo
    from runtime.launch import launch

    launch(train_grpo.setup_grpo, train_grpo.train)


def describe(rows: training_runs.Rows) -> list[str]:
    """Of a run's steps: how many were checked, and the largest or median values of the checks."""
    checked = [row for row in rows if "sync/probe_error" in row]
    if not checked:
        return ["0"]
    noise, error = (max(row[f"sync/{name}"] for row in checked) for name in ("noise", "probe_error"))
    survival = min((row["sync/update_survival"] for row in rows if "sync/update_survival" in row), default=1.0)
    names = "mismatch/kl", "time/step", "time/sync"  # the first is there only if a step has learned something
    kl, seconds, syncs = (median(row[name] for row in checked if name in row) for name in names)
    return [
        str(len(checked)),
        f"{noise:.4f}",
        f"{error:.4f}",
        f"{kl:.1e}",
        f"{survival:.2f}",
        f"{seconds:.1f}",
        f"{syncs:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", default="configs/smollm2_times_tables.py")
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=100, help="per run")
    parser.add_argument("--out", required=True)
    parser.add_argument("--ranks", type=int, default=1, help="processes per run")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="SYNC,DTYPE of those to run")
    arguments, more = parser.parse_known_args()
    model = str(Path(arguments.model).absolute()) if Path(arguments.model).exists() else arguments.model
    training_runs.end_with_children()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for mode in arguments.modes:
        sync, dtype = mode.split(",")
        folder = Path(arguments.out, f"{sync}_{dtype}").absolute()
        options = {"model": model, "sync": sync, "dtype": dtype, "steps": arguments.steps}
        options |= SIZES | {"output_dir": folder}
        command = training_runs.torchrun(arguments.ranks, arguments.config, options)
        command[command.index("train_grpo.py")] = __file__
        training_runs.train_to_limit([*command, "--resume", *more], folder, "steps", arguments.steps)
        print("| " + " | ".join([f"`{sync}`", dtype, *describe(training_runs.read_rows(folder))]) + " |", flush=True)


if __name__ == "__main__":
    train() if "TORCHELASTIC_RUN_ID" in os.environ else main()
