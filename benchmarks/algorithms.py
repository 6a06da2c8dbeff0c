"""All algorithms on the same task and budget: held-out accuracy by step, mean and spread over seeds.

    torchrun --nproc-per-node=2 benchmarks/algorithms.py --steps 40 --seeds 3 --out runs/algorithms

One engine serves all runs in turn; each begins with a fresh policy, optimizer and random numbers. Only the algorithm
and the seed differ, so an algorithm's own best learning rate may lie elsewhere. Writes OUT.md and OUT.png.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo
import train_ppo
from benchmarks import comparison, training_runs
from configs.arithmetic_cpu import config as default
from configs.base import Config
from configs.checks import resolve_config
from runtime.models import build_critic, build_policy, model_folder
from runtime.optimize import make_optimizer
from runtime.run import Run
from runtime.setup import setup
from runtime.tracking import RunLog


def configure(algorithm: str, seed: int, arguments: argparse.Namespace) -> Config:
    """The default task with two updates per rollout, without which no ratio is ever clipped."""
    config = dataclasses.replace(
        default,
        output_dir=f"{arguments.out}_runs/{algorithm}_{seed}",
        algorithm=algorithm,
        seed=seed,
        steps=arguments.steps,
        updates_per_rollout=2,
        learning_rate=arguments.learning_rate,
        critic_learning_rate=1e-3,
        eval_every=5,
        save_every=0,
    )
    return resolve_config(config, train_grpo.ALGORITHMS.get(algorithm, train_ppo.PPO))


def train_once(run: Run, config: Config) -> training_runs.Rows:
    """Trains from the start; the run's metrics."""
    folder, log = model_folder(config), RunLog(config, write=run.world.rank == 0)
    algorithm = train_grpo.ALGORITHMS.get(config.algorithm, train_ppo.PPO)
    policy = build_policy(config, folder, run.world, algorithm.prompt_head)
    optimizer = make_optimizer(config, policy, config.learning_rate)
    run = dataclasses.replace(run, config=config, policy=policy, optimizer=optimizer, log=log)
    run.weight_sync.update_weights()
    if config.algorithm == "ppo":
        critic = build_critic(config, folder, run.world)  # after vLLM: right for this model, see `setup`
        run.learners["critic"] = critic, make_optimizer(config, critic, config.critic_learning_rate)
        train_ppo.train(run)
    else:
        train_grpo.train(run)
    return training_runs.read_rows(log.folder) if run.world.rank == 0 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=[*train_grpo.ALGORITHMS, "ppo"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--out", default="runs/algorithms")
    arguments = parser.parse_args()
    run = setup(configure("grpo", 0, arguments))
    found: comparison.Compared = {}
    limit = {"axis": "steps", "limit": arguments.steps}
    command = f"torchrun --nproc-per-node=2 benchmarks/algorithms.py {' '.join(sys.argv[1:])}"
    for seed in range(arguments.seeds):  # seed by seed, so that what there is when it is stopped is comparable
        for algorithm in arguments.algorithms:
            rows = train_once(run, configure(algorithm, seed, arguments))
            if run.world.rank == 0:
                found.setdefault(algorithm, []).append(rows)
                best_first = dict(sorted(found.items(), key=lambda item: -comparison.mean_accuracy(item[1], **limit)))
                title = "Two-digit sums, the same budget for all"
                comparison.write(arguments.out, best_first, title=title, command=command, **limit)


if __name__ == "__main__":
    main()
