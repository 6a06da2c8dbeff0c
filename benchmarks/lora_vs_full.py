"""Does LoRA learn as well as full fine-tuning? Ranks 1, 4, 16, 32 and all weights, each at its best learning rate.

    python benchmarks/lora_vs_full.py --steps 40 --seeds 3 --out runs/lora_vs_full

The claims: verl's documentation (as good from rank 32 up, 0.5B parameters), Thinking Machines' "LoRA without regret"
(from rank 1 up). Every rank tries every learning rate with the first seed; the best one then runs with all seeds.
Writes OUT.md and OUT.png; the runs are in OUT_runs. A run that is complete is not repeated.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import comparison, training_runs  # noqa: E402

RATES = {  # alpha stays 32, so that the best rate of LoRA hardly depends on the rank (Thinking Machines)
    1: (1e-3, 2e-3, 4e-3, 8e-3),
    4: (1e-3, 2e-3, 4e-3, 8e-3),
    16: (1e-3, 2e-3, 4e-3, 8e-3),
    32: (1e-3, 2e-3, 4e-3, 8e-3),
    0: (3e-5, 1e-4, 3e-4, 1e-3),  # full: about a tenth of LoRA's
}


def train(rank: int, rate: float, seed: int, arguments: argparse.Namespace) -> training_runs.Rows:
    """The metrics of one run of the default task, in its own processes."""
    folder = Path(f"{arguments.out}_runs", f"rank{rank}_{rate:g}_{seed}").absolute()
    options = {
        "lora_rank": rank,
        "learning_rate": rate,
        "seed": seed,
        "steps": arguments.steps,
        "output_dir": folder,
        "eval_every": 5,
        "save_every": 0,
        "max_useless": 0,  # a learning rate that is too high may show what becomes of it
    }
    command = training_runs.torchrun(arguments.ranks, "configs/arithmetic_cpu.py", options)
    rows = training_runs.train_to_limit(command, folder, "steps", arguments.steps)
    if not rows:
        sys.exit(f"error: {folder.name} did not reach its end, see {folder}.log")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, help="processes per run")
    parser.add_argument("--lora_ranks", type=int, nargs="+", default=list(RATES), help="0: all weights")
    parser.add_argument("--out", default="runs/lora_vs_full")
    arguments = parser.parse_args()
    limit = {"axis": "steps", "limit": arguments.steps}
    best: comparison.Compared = {}
    command = f"python benchmarks/lora_vs_full.py {' '.join(sys.argv[1:])}".strip()
    title = "Two-digit sums: LoRA and full fine-tuning, each at its best learning rate"
    for rank in arguments.lora_ranks:
        tried = {rate: comparison.mean_accuracy([train(rank, rate, 0, arguments)], **limit) for rate in RATES[rank]}
        rate = max(tried, key=tried.get)
        name = f"LoRA, rank {rank}, at {rate:g}" if rank else f"all weights, at {rate:g}"
        best[name] = [train(rank, rate, seed, arguments) for seed in range(arguments.seeds)]
        comparison.write(arguments.out, best, title=title, command=command, **limit)


if __name__ == "__main__":
    main()
