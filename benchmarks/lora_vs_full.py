"""Does LoRA learn as well as full fine-tuning? Ranks 1, 4, 16, 32 and all weights, each at its best learning rate.

    python benchmarks/lora_vs_full.py --steps 40 --seeds 3 --out runs/lora_vs_full

The claims: verl's documentation (as good from rank 32 up, 0.5B parameters), Thinking Machines' "LoRA without regret"
(from rank 1 up). Every rank tries every learning rate with the first seed; the best one then runs with all seeds.
Writes OUT.json (all curves), OUT.md (the table) and OUT.png. A run that OUT.json has already is not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import curves  # noqa: E402

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
        "output_dir": f"{arguments.out}_runs/rank{rank}_{rate:g}_{seed}",
        "eval_every": curves.EVERY,
        "save_every": 0,
        "max_useless": 0,  # a learning rate that is too high may show what becomes of it
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command += ["train_grpo.py", "--config", "configs/arithmetic_cpu.py"]
    subprocess.run(command + [f"--{name}={value}" for name, value in options.items()], cwd=ROOT, check=True)
    return curves.accuracies(Path(ROOT, options["output_dir"]))


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
    known: dict[str, list[float]] = json.loads(record.read_text()) if record.exists() else {}

    def curve(rank: int, rate: float, seed: int) -> list[float]:
        key = f"rank {rank}, learning rate {rate:g}, seed {seed}, {arguments.steps} steps"
        if key not in known:
            known[key] = train(rank, rate, seed, arguments)
            record.write_text(json.dumps(known, indent=1) + "\n")
        return known[key]

    best: curves.Curves = {}
    command = f"python benchmarks/lora_vs_full.py {' '.join(sys.argv[1:])}".strip()
    title = "Two-digit sums: LoRA and full fine-tuning, each at its best learning rate"
    for rank in arguments.lora_ranks:
        rate = max(RATES[rank], key=lambda rate: curve(rank, rate, 0)[-1])
        name = f"LoRA, rank {rank}, at {rate:g}" if rank else f"all weights, at {rate:g}"
        best[name] = [curve(rank, rate, seed) for seed in range(arguments.seeds)]
        curves.write(arguments.out, best, steps=arguments.steps, kind="trained", title=title, command=command)


if __name__ == "__main__":
    main()
