"""lorl beside TRL's GRPOTrainer with peft on a real model and task: speed, memory, and what is learned in equal time.

    pip install --no-deps --target DIR/site-packages trl==1.16.0 datasets pyarrow pandas multiprocess dill xxhash
    PYTHONPATH=DIR/site-packages python benchmarks/vs_trl_real.py --model MODEL --minutes 20 --out runs/vs_trl_real

On CPUs, each side runs in its own process, one after the other, with the settings of one of lorl's configurations and
the same vLLM, see vs_trl.py. Both are evaluated on the same held-out prompts, sampled at the temperature of training,
and both stop at their first evaluation after `--minutes` of training. Nothing else should run meanwhile. A micro-batch
of TRL has `--rows` padded sequences; 32 of them are about lorl's 2,048 tokens on this task. `--sync merged` makes lorl
send whole weights, as TRL does; by default it sends only the adapter.
Writes OUT.md and OUT.png; the runs are in OUT_runs, with their output. A run that is complete is not repeated.

The folder of TRL's packages has to be called site-packages: dill takes what lies elsewhere for code to be pickled.
"""

import argparse
import dataclasses
import importlib.util
import math
import runpy
import shlex
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import comparison, training_runs, vs_trl  # noqa: E402
from configs.base import Config  # noqa: E402

ENDLESS = 1_000_000  # steps of a run that a clock stops
SETTINGS = ("model", "learning_rate", "sync")  # of the configuration that the command line may change
SIDES = {"lorl": "lorl", "trl": "TRL with peft"}


# ---- lorl -----------------------------------------------------------------------------------------------------


def run_lorl(config: Config, arguments: argparse.Namespace) -> None:
    """train_grpo.py, with the vLLM that TRL can write to."""
    vs_trl.leave_weights_unpacked()
    options = {
        "seed": config.seed,
        "steps": config.steps,
        "output_dir": config.output_dir,
        "model": config.model,
        "eval_every": config.eval_every,
        "learning_rate": config.learning_rate,
        "sync": "adapter" if config.sends_adapter else "merged",
        "max_useless": 0,
    }
    settings = [f"--{name}={value}" for name, value in options.items()]
    sys.argv = ["train_grpo.py", "--config", arguments.config, *settings, "--resume"]
    runpy.run_path(str(ROOT / "train_grpo.py"), run_name="__main__")


# ---- TRL ------------------------------------------------------------------------------------------------------


def asked(problem, instruction: str) -> list[dict[str, str]]:
    """A conversation that ends in the problem; TRL puts the chat template around it, as lorl does."""
    return [{"role": "user", "content": f"{problem.prompt}\n{instruction}" if instruction else problem.prompt}]


class HeldOut:
    """Evaluates TRL's policy as lorl does: the same problems, prompts and number of samples."""

    def __init__(self, config: Config, problems: list, instruction: str):
        self.config, self.problems = config, problems[: config.eval_problems]
        self.chats = [asked(problem, instruction) for problem in self.problems]

    def evaluate(self, trainer) -> dict[str, float]:
        """Accuracy of sampled completions, and its standard error over problems."""
        from vllm import SamplingParams

        config = self.config
        trainer.vllm_generation.sync_weights()
        prompts = [{"prompt_token_ids": ids} for ids in trainer._tokenize_prompts(self.chats)[0]]
        sampling = SamplingParams(  # without a seed, which a CPU's vLLM bears only if it is set up for it
            n=config.eval_samples, temperature=config.temperature, max_tokens=config.max_completion_length
        )
        outputs = trainer.vllm_generation.llm.generate(prompts, sampling, use_tqdm=False)
        scores = [
            statistics.mean(reward_of(config, sample.text, problem.answer) >= 1 for sample in output.outputs)
            for output, problem in zip(outputs, self.problems)
        ]
        error = statistics.stdev(scores) / math.sqrt(len(scores))
        return {"eval/accuracy": statistics.mean(scores), "eval/accuracy_stderr": error}


def reward_of(config: Config, completion: str, answer: str) -> float:
    """lorl's reward."""
    import reward

    return reward.score(config.task, completion, answer)


def run_trl(config: Config, arguments: argparse.Namespace) -> None:
    """Trains until it is stopped."""
    vs_trl.leave_weights_unpacked()
    import reward

    instruction = reward.find_task(config.task).instruction if config.instruction is None else config.instruction
    train, test = (reward.load_problems(config.task, split) for split in ("train", "test"))
    dataset = [{"prompt": asked(problem, instruction), "answer": problem.answer} for problem in train]

    def rewards(completions: list, answer: list[str], **_) -> list[float]:
        return [reward_of(config, turns[0]["content"], truth) for turns, truth in zip(completions, answer)]

    held_out = HeldOut(config, test, instruction)
    vs_trl.train_with_trl(config, dataset, rewards, arguments.rows, held_out.evaluate)


# ---- Side by side ---------------------------------------------------------------------------------------------


def configure(side: str, seed: int, arguments: argparse.Namespace) -> Config:
    """The configuration file's, with what this comparison decides."""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / arguments.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(
        module.config,
        seed=seed,
        steps=arguments.steps or ENDLESS,
        eval_every=arguments.eval_every,
        output_dir=str(Path(f"{arguments.out}_runs", f"{side}_{seed}").absolute()),
        **{name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None},
    )


def measure(side: str, seed: int, arguments: argparse.Namespace) -> training_runs.Rows:
    """The metrics of one side's run in a fresh process."""
    folder = configure(side, seed, arguments).run_folder
    command = [sys.executable, __file__, "--side", side, "--seed", str(seed), *sys.argv[1:]]
    environment = vs_trl.environment(arguments.threads)
    rows = training_runs.train_to_limit(command, folder, arguments.axis, arguments.limit, environment)
    if not rows:
        sys.exit(f"error: {folder.name} did not reach its end, see {folder}.log")
    return rows


def main() -> None:
    parser = training_runs.make_parser(__doc__)
    parser.add_argument("--eval_every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--learning_rate", type=float, help="of both; mostly the configuration's")
    parser.add_argument("--sync", choices=["adapter", "merged"], help="how lorl sends the policy to vLLM")
    parser.add_argument("--rows", type=int, default=32, help="sequences in a micro-batch of TRL's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the rest is for the processes it starts itself
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = training_runs.parse(parser)
    if arguments.more:
        parser.error(f"unknown options: {' '.join(arguments.more)}")
    if arguments.side:
        config = configure(arguments.side, arguments.seed, arguments)
        return {"lorl": run_lorl, "trl": run_trl}[arguments.side](config, arguments)
    training_runs.end_with_children()
    compared: comparison.Compared = {SIDES[side]: [] for side in arguments.sides}
    for seed in range(arguments.seeds):
        for side in arguments.sides:
            compared[SIDES[side]].append(measure(side, seed, arguments))
    comparison.write(
        arguments.out,
        compared,
        axis=arguments.axis,
        limit=arguments.limit,
        title=f"{Path(arguments.config).stem}: lorl and TRL",
        command=f"python benchmarks/vs_trl_real.py {shlex.join(sys.argv[1:])}",
    )


if __name__ == "__main__":
    main()
