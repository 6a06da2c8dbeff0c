"""Does LoRA learn as well as full fine-tuning? Ranks 1, 4, 16, 32 and all weights, each at its best learning rate.

    python benchmarks/lora_vs_full.py --steps 40 --seeds 3 --out runs/lora_vs_full

The claims: verl's documentation (as good from rank 32 up, 0.5B parameters), Thinking Machines' "LoRA without regret"
(from rank 1 up). Every rank tries every learning rate with the first seed; the best one then runs with all seeds.
Writes OUT.json (all curves), OUT.md (the table) and OUT.png. A run that OUT.json has already is not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATES = {  # alpha stays 32, so that the best rate of LoRA hardly depends on the rank (Thinking Machines)
    1: (1e-3, 2e-3, 4e-3, 8e-3),
    4: (1e-3, 2e-3, 4e-3, 8e-3),
    16: (1e-3, 2e-3, 4e-3, 8e-3),
    32: (1e-3, 2e-3, 4e-3, 8e-3),
    0: (3e-5, 1e-4, 3e-4, 1e-3),  # full: about a tenth of LoRA's
}


def train(rank: int, rate: float, seed: int, arguments: argparse.Namespace) -> list[float]:
    """One run of the default task in its own processes; held-out accuracy after steps 0, 5, 10, ..."""
    options = {
        "lora_rank": rank,
        "learning_rate": rate,
        "seed": seed,
        "steps": arguments.steps,
        "run_name": f"rank{rank}_{rate:g}_{seed}",
        "output_dir": f"{arguments.out}_runs",
        "eval_every": 5,
        "save_every": 0,
        "wandb_mode": "disabled",
        "max_mismatch": 0,  # a learning rate that is too high may show what becomes of it
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command += ["train_grpo.py", "--config", "configs/arithmetic_cpu.py"]
    subprocess.run(command + [f"--{name}={value}" for name, value in options.items()], cwd=ROOT, check=True)
    lines = Path(ROOT, options["output_dir"], options["run_name"], "metrics.jsonl").read_text().splitlines()
    return [step["eval/accuracy"] for step in map(json.loads, lines) if "eval/accuracy" in step]


def write(best: dict[int, tuple[float, list[list[float]]]], arguments: argparse.Namespace) -> None:
    """The table and the picture: per rank its best learning rate and the curves of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    where = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    command = f"python benchmarks/lora_vs_full.py {' '.join(sys.argv[1:])}".strip()
    lines = [f"`{command}` on {where}", "", "| trained | best learning rate | held-out accuracy | lowest and highest |"]
    lines.append("|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(8, 5))
    for rank, (rate, runs) in best.items():
        name, final = f"LoRA, rank {rank}" if rank else "all weights", [run[-1] for run in runs]
        lines.append(f"| {name} | {rate:g} | {statistics.mean(final):.1%} | {min(final):.1%} to {max(final):.1%} |")
        points = list(zip(*runs))
        xs = [min(5 * i, arguments.steps) for i in range(len(points))]
        axes.plot(xs, [statistics.mean(point) for point in points], label=f"{name}, {rate:g}")
        axes.fill_between(xs, [min(point) for point in points], [max(point) for point in points], alpha=0.1)
    Path(f"{arguments.out}.md").write_text("\n".join(lines) + "\n")
    axes.set(xlabel="step", ylabel="held-out accuracy (sampled)", title="Two-digit sums: LoRA and full fine-tuning")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(f"{arguments.out}.png", dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, help="processes per run")
    parser.add_argument("--lora_ranks", type=int, nargs="+", default=list(RATES), help="0: all weights")
    parser.add_argument("--out", default="runs/lora_vs_full")
    arguments = parser.parse_args()
    record = Path(f"{arguments.out}.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[float]] = json.loads(record.read_text()) if record.exists() else {}

    def curve(rank: int, rate: float, seed: int) -> list[float]:
        key = f"rank {rank}, learning rate {rate:g}, seed {seed}, {arguments.steps} steps"
        if key not in curves:
            curves[key] = train(rank, rate, seed, arguments)
            record.write_text(json.dumps(curves, indent=1) + "\n")
        return curves[key]

    best = {}
    for rank in arguments.lora_ranks:
        rate = max(RATES[rank], key=lambda rate: curve(rank, rate, 0)[-1])
        best[rank] = (rate, [curve(rank, rate, seed) for seed in range(arguments.seeds)])
        write(best, arguments)


if __name__ == "__main__":
    main()
