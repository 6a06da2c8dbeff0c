"""All algorithms on the same task and budget: held-out accuracy by step, mean and spread over seeds.

    torchrun --nproc-per-node=2 benchmarks/algorithms.py --steps 40 --seeds 3 --out runs/algorithms

One engine serves all runs in turn; each begins with a fresh policy, optimizer and random numbers. Only the algorithm
and the seed differ, so an algorithm's own best learning rate may lie elsewhere. Writes OUT.json (the curves), OUT.md
(the table) and OUT.png.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo
import train_ppo
from configs.arithmetic_cpu import config as default
from configs.base import Config
from models import build_critic, build_policy
from prepare import make_optimizer, on_disk, prepare
from run import Run
from tracking import RunLog

EVERY = 5  # steps between evaluations


def configure(algorithm: str, seed: int, arguments: argparse.Namespace) -> Config:
    """The default task with two updates per rollout, without which no ratio is ever clipped."""
    config = dataclasses.replace(
        default,
        run_name=f"{algorithm}_{seed}",
        output_dir=f"{arguments.out}_runs",
        algorithm=algorithm,
        seed=seed,
        steps=arguments.steps,
        updates_per_rollout=2,
        learning_rate=arguments.learning_rate,
        critic_learning_rate=1e-3,
        gae_lambda=0.95,
        eval_every=EVERY,
        save_every=0,
        verify_every=0,
        wandb_mode="disabled",
    )
    return train_grpo.settle(config, train_grpo.ALGORITHMS.get(algorithm, train_ppo.PPO))


def train_once(run: Run, config: Config) -> list[float]:
    """Trains from the start; held-out accuracy of sampled completions, after steps 0, 5, 10, ..."""
    folder, log = on_disk(config), RunLog(config, write=run.world.rank == 0)
    policy = build_policy(config, folder, run.world)
    optimizer = make_optimizer(config, "policy", policy, config.learning_rate, saved=None)
    run = dataclasses.replace(run, config=config, policy=policy, optimizer=optimizer, log=log)
    run.sync()
    if config.algorithm == "ppo":
        critic = build_critic(config, folder, run.world)
        optimizer = make_optimizer(config, "critic", critic, config.critic_learning_rate, saved=None)
        run.learners["critic"] = (critic, optimizer)
        train_ppo.train(run)
    else:
        train_grpo.train(run)
    if run.world.rank:
        return []
    steps = map(json.loads, (log.folder / "metrics.jsonl").read_text().splitlines())
    return [step["eval/accuracy"] for step in steps if "eval/accuracy" in step]


def write(curves: dict[str, list[list[float]]], arguments: argparse.Namespace) -> None:
    """The curves, the table of final accuracies, and the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out = Path(arguments.out)
    where = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, torch {torch.__version__}"
    command = f"torchrun --nproc-per-node=2 benchmarks/algorithms.py {' '.join(sys.argv[1:])}"
    record = {"hardware": where, "command": command, "every": EVERY, "held-out accuracy": curves}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")

    lines = [f"`{command}` on {where}", "", "| algorithm | held-out accuracy | lowest and highest seed | seeds |"]
    lines.append("|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, runs in sorted(curves.items(), key=lambda item: -statistics.mean(run[-1] for run in item[1])):
        final = [run[-1] for run in runs]
        mean = statistics.mean(final)
        lines.append(f"| `{name}` | {mean:.1%} | {min(final):.1%} to {max(final):.1%} | {len(final)} |")
        points = list(zip(*runs))
        xs = [min(EVERY * i, arguments.steps) for i in range(len(points))]
        axes.plot(xs, [statistics.mean(point) for point in points], label=f"{name}  {mean:.1%}")
        axes.fill_between(xs, [min(point) for point in points], [max(point) for point in points], alpha=0.1)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    axes.set(xlabel="step", ylabel="held-out accuracy (sampled)", title="Two-digit sums, the same budget for all")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out.with_suffix(".png"), dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=[*train_grpo.ALGORITHMS, "ppo"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--out", default="runs/algorithms")
    arguments = parser.parse_args()
    run = prepare(configure("grpo", 0, arguments))
    curves: dict[str, list[list[float]]] = {}
    for seed in range(arguments.seeds):  # seed by seed, so that what there is when it is stopped is comparable
        for algorithm in arguments.algorithms:
            curve = train_once(run, configure(algorithm, seed, arguments))
            if run.world.rank == 0:
                curves.setdefault(algorithm, []).append(curve)
                write(curves, arguments)


if __name__ == "__main__":
    main()
