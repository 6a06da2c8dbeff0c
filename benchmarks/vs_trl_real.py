"""lorl beside TRL's GRPOTrainer with peft on a real model and task: speed, memory, and what is learned in equal time.

    pip install --no-deps --target DIR/site-packages trl==1.16.0 datasets pyarrow pandas multiprocess dill xxhash
    PYTHONPATH=DIR/site-packages python benchmarks/vs_trl_real.py --model MODEL --minutes 20 --out runs/vs_trl_real

On CPUs, each side in a process of its own, one after the other, with the settings of one of lorl's configurations and
the same vLLM, see vs_trl.py. Both are evaluated alike, on the same held-out prompts, sampled at the temperature of
training, and both stop at their first evaluation after so many minutes of training. Nothing else should run meanwhile.
A micro-batch of TRL's has `--rows` padded sequences; 32 of them are about the 2,048 tokens of lorl's on this task.
`--sync merged` makes lorl send whole weights, as TRL does; by default it sends the adapter alone.
Writes OUT.md and OUT.png; the runs are in OUT_runs, with their output. A run that is complete is not repeated.

The folder of TRL's packages has to be called site-packages: dill takes what lies elsewhere for code to be pickled.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import resource
import runpy
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import real_runs, real_table, vs_trl  # noqa: E402
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


def trl_config(config: Config, rows: int):
    """lorl's settings by TRL's names."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(config.run_folder),
        max_steps=config.steps,
        seed=config.seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        model_init_kwargs={"dtype": config.dtype},
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=config.prompts_per_step * config.group_size // rows,
        num_generations=config.group_size,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        gradient_checkpointing=config.gradient_checkpointing != "none",
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_schedule,
        weight_decay=0.0,
        max_grad_norm=1.0,
        loss_type="grpo",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=config.max_model_len,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
    )


class HeldOut:
    """Evaluates what TRL trains, as lorl does: the same problems, prompts and number of samples."""

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
    """lorl's."""
    import reward

    return reward.score(config.task, completion, answer)


def run_trl(config: Config, arguments: argparse.Namespace) -> None:
    """Trains until it is stopped, and writes a metrics.jsonl such as lorl's."""
    vs_trl.leave_weights_unpacked()
    seconds = vs_trl.instrument_trl()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOTrainer

    import reward

    instruction = reward.find_task(config.task).instruction if config.instruction is None else config.instruction
    train, test = (reward.load_problems(config.task, split) for split in ("train", "test"))
    rows = [{"prompt": asked(problem, instruction), "answer": problem.answer} for problem in train]

    def rewards(completions: list, answer: list[str], **_) -> list[float]:
        return [reward_of(config, turns[0]["content"], truth) for turns, truth in zip(completions, answer)]

    trainer = GRPOTrainer(
        model=config.model,
        reward_funcs=rewards,
        args=trl_config(config, arguments.rows),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"),
    )
    held_out = HeldOut(config, test, instruction)
    trainer.add_callback(log_class()(config, seconds, lambda: held_out.evaluate(trainer)))
    trainer.train()


def log_class() -> type:
    """Of a callback; made late, since transformers takes seconds to import."""
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        """A row of metrics.jsonl per step. Its seconds and peak of memory are those without evaluation."""

        def __init__(self, config: Config, seconds: dict[str, float], evaluate: Callable[[], dict[str, float]]):
            self.config, self.seconds, self.evaluate = config, seconds, evaluate
            config.run_folder.mkdir(parents=True, exist_ok=True)
            self.file = open(config.run_folder / "metrics.jsonl", "w", buffering=1)

        def begin(self) -> None:
            """Starts the clocks of a step."""
            self.seconds.clear()
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew, see proc(5)
            self.since = time.perf_counter()

        def on_train_begin(self, *_, **__) -> None:
            self.file.write(json.dumps({"step": 0} | self.evaluate()) + "\n")
            self.begin()

        def on_step_end(self, args, state, control, **_) -> None:
            whole = time.perf_counter() - self.since
            phases = self.seconds | {"step": whole, "update": whole - sum(self.seconds.values())}
            self.row = {"step": state.global_step} | {f"time/{name}": value for name, value in phases.items()}
            self.row["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            if state.global_step % self.config.eval_every == 0 or state.global_step == self.config.steps:
                self.row |= self.evaluate()

        def on_log(self, args, state, control, logs=None, **_) -> None:
            if "reward" in (logs or {}):
                self.file.write(json.dumps(self.row | {"reward/mean": logs["reward"]}) + "\n")
                self.begin()

    return Log


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


def measure(side: str, seed: int, arguments: argparse.Namespace) -> real_runs.Rows:
    """The metrics of one side's run in a fresh process."""
    folder, axis, limit = configure(side, seed, arguments).run_folder, arguments.axis, arguments.limit
    complete = lambda: real_runs.is_complete(real_runs.read_rows(folder), axis, limit)  # noqa: E731
    if not complete():
        print(f"{folder.name}: its output is in {folder}.log", flush=True)
        command = [sys.executable, __file__, "--side", side, "--seed", str(seed), *sys.argv[1:]]
        stop = complete if axis == "minutes" else lambda: False
        real_runs.run_until(stop, command, Path(f"{folder}.log"), vs_trl.environment(arguments.threads))
    if not complete():
        sys.exit(f"error: {folder.name} did not reach its end, see {folder}.log")
    return real_runs.read_rows(folder)


def main() -> None:
    parser = real_runs.make_parser(__doc__)
    parser.add_argument("--eval_every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--learning_rate", type=float, help="of both; mostly the configuration's")
    parser.add_argument("--sync", choices=["adapter", "merged"], help="how lorl sends the policy to vLLM")
    parser.add_argument("--rows", type=int, default=32, help="sequences in a micro-batch of TRL's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the rest is for the processes it starts itself
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = real_runs.parse(parser)
    if arguments.more:
        parser.error(f"unknown options: {' '.join(arguments.more)}")
    if arguments.side:
        config = configure(arguments.side, arguments.seed, arguments)
        return {"lorl": run_lorl, "trl": run_trl}[arguments.side](config, arguments)
    real_runs.end_with_children()
    compared: real_table.Compared = {SIDES[side]: [] for side in arguments.sides}
    for seed in range(arguments.seeds):
        for side in arguments.sides:
            compared[SIDES[side]].append(measure(side, seed, arguments))
    real_table.write(
        arguments.out,
        compared,
        axis=arguments.axis,
        limit=arguments.limit,
        title=f"{Path(arguments.config).stem}: lorl and TRL",
        command=f"python benchmarks/vs_trl_real.py {shlex.join(sys.argv[1:])}",
    )


if __name__ == "__main__":
    main()
