"""How long trainers and generators wait for each other: three ratios of update to rollout, with max_staleness 0 and 1.

    python benchmarks/generators.py --out runs/generators

One trainer and one generator on two cores. A rollout is a few long completions of the tiny model, whose logits are made
so flat that it seldom ends one; the update makes more or fewer passes over them. Prints medians over the steps between
the first two and the last.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
RATIOS = {"1:3": 2, "1:1": 6, "3:1": 18}  # of update to rollout, about, and the epochs that make it so
COMMAND = (
    "-m torch.distributed.run --standalone --nproc-per-node=2 train_grpo.py --config configs/arithmetic_cpu.py "
    "--rollout_ranks 1 --prompts_per_step 2 --group_size 4 --max_completion_length 400 "
    "--entropy_coef 0.001 --eval_every 0 --eval_problems 2 --eval_samples 1 --save_every 0 --max_useless 0"
)
COLUMNS = ("step", "update", "trainer_wait", "generator_wait")


def flat_model(folder: Path) -> Path:
    """The tiny model with small logits."""
    if not folder.exists():
        shutil.copytree(ROOT / "configs" / "tiny", folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 0.1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(folder: Path, steps: int, *options: str) -> dict[str, float]:
    """Median seconds of a step and its parts."""
    command = [sys.executable, *COMMAND.split(), "--steps", str(steps), "--output_dir", str(folder), *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"WANDB_MODE": "disabled"}, check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][3:-1]  # 0 is before
    return {name: statistics.median(row[f"time/{name}"] for row in rows) for name in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="runs/generators")
    arguments = parser.parse_args()
    model = str(flat_model(Path(f"{arguments.out}_model").absolute()))
    print("| update : rollout | `max_staleness` | step | update | trainer waits | generator waits |")
    print("|---|---|---|---|---|---|")
    for ratio, epochs in RATIOS.items():
        for staleness in (0, 1):
            folder = Path(f"{arguments.out}_{epochs}_{staleness}").absolute()
            options = ["--epochs_per_rollout", str(epochs), "--max_staleness", str(staleness), "--model", model]
            found = measure(folder, arguments.steps, *options)
            seconds = " | ".join(f"{found[name]:.1f} s" for name in COLUMNS)
            print(f"| {ratio} | {staleness} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
