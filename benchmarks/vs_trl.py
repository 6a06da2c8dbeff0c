"""Whole GRPO steps: lorl beside TRL's GRPOTrainer with peft and colocated vLLM, on the GPU if there is one.

    pip install --no-deps trl==1.16.0 datasets pyarrow pandas multiprocess dill xxhash
    python benchmarks/vs_trl.py [--scale cpu] [--steps 10] [--threads 2] [--sides lorl trl] [--rounds 1] [--clock wall]

Each side runs in its own process, one after the other; with several rounds they take turns. Both get the same random
Qwen2 model (41M parameters, 8 blocks, bfloat16), tokenizer, prompts in the same order, group size, rewards,
LoRA (rank 16 on every linear, float32), constant AdamW, GRPO loss, token-wise truncated importance sampling, and
the same vLLM, eager on a CPU. A micro-batch holds at most 2,560 tokens: 8 of the longest sequences, which is TRL's
default. `--scale` names another model and step, see `SCALES`.

- A random model does not end its answers, so both sides get the same forced lengths: the k-th completion of step s is
  cut after `completion_lengths(s)[k]` tokens. They are log-normal, like those of reasoning: mostly short, a few long.
- TRL writes weights into vLLM's own tensors. Kernels that pack weights away on a CPU are therefore off, on both sides.
- The reward is the share of words with an even number. Their embeddings share a direction, so it can be learned.

On a machine with other users, `--clock cpu --threads 1` counts the seconds of processor time; with several threads that
would include the time that they wait for each other.

`peak` is the largest resident memory of the process while it trains, with vLLM and all libraries. On a GPU it is the
memory allocated by torch, of which vLLM has the same share on both sides.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.training_runs import read_rows, step_seconds  # noqa: E402

GROUP, SEED, RANK, ALPHA, LEARNING_RATE = 8, 0, 16, 32.0, 1e-4
TASK = "even words"
PHASES = ("rollout", "reward", "logprobs", "update", "sync")


@dataclass(frozen=True)
class Scale:
    """A Qwen2 model, and a step of it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    words: int  # of the vocabulary
    tied: bool = True
    prompts: int = 8  # a step
    longest_prompt: int = 64  # tokens, as all lengths
    longest_completion: int = 256
    rows: int = 8  # of the longest sequences in a micro-batch
    checkpointing: bool = False

    @property
    def vocabulary(self) -> int:
        return self.words + 259  # with bytes, a mark, padding and end

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_completion


LARGE = {"prompts": 64, "longest_prompt": 512, "longest_completion": 1024, "checkpointing": True}
SCALES = {
    "cpu": Scale(512, 1536, 8, 8, 2, words=32000),
    "toy": Scale(128, 384, 3, 4, 2, words=1000, prompts=2, longest_prompt=24, longest_completion=16),
    "3b": Scale(2048, 11008, 36, 16, 2, words=151677, **LARGE),  # Qwen2.5's, as the next
    "7b": Scale(3584, 18944, 28, 28, 4, words=151805, tied=False, **LARGE),
}


# ---- The same for both ----------------------------------------------------------------------------------------


def make_model(folder: Path, scale: Scale, spread: float = 0.0) -> None:
    """Random weights, with additional noise of size `spread`, and a tokenizer with numbered words, `<17><4>`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.measuring import DEVICE
    from tools import tiny_model

    tokenizer = tiny_model.make_tokenizer()
    first_word = len(tokenizer)
    tokenizer.add_tokens([f"<{number}>" for number in range(scale.words)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=scale.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(DEVICE):  # billions of random numbers take a CPU a minute
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            model.model.embed_tokens.weight[first_word::2] += 0.02 * torch.randn(scale.hidden)
            for parameter in model.parameters() if spread else ():
                parameter += spread * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)


def prompt_texts(scale: Scale) -> list[str]:
    """A thousand prompts, with lengths from an eighth of the longest to the longest."""
    rng = random.Random(SEED)
    word = lambda: f"<{rng.randrange(scale.words)}>"  # noqa: E731
    longest = scale.longest_prompt
    return ["".join(word() for _ in range(rng.randint(longest // 8, longest))) for _ in range(1000)]


def score(completion: str, answer: str = "") -> float:
    """The share of words with an even number."""
    numbers = re.findall(r"<(\d+)>", completion)
    return sum(int(number) % 2 == 0 for number in numbers) / max(1, len(numbers))


def completion_lengths(step: int, scale: Scale) -> list[int]:
    """The lengths of a step's completions; with 256 as the longest, the median is about 52, the mean about 76."""
    rng, longest = random.Random(f"{SEED}/{step}"), scale.longest_completion
    middle = 3.9 + math.log(longest / 256)
    return [max(4, min(longest, int(rng.lognormvariate(middle, 1.0)))) for _ in range(scale.prompts * GROUP)]


def leave_weights_unpacked() -> None:
    """Turns off vLLM's kernels that pack weights on a CPU: TRL could not write to packed weights."""
    import vllm._custom_ops
    import vllm.model_executor.layers.utils

    vllm._custom_ops._supports_onednn = False
    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *_: False  # on CPUs with AMX; it packs, too


def force_lengths(scale: Scale) -> None:
    """Makes vLLM's `generate` give a step's completions the `completion_lengths`, and evaluations one token."""
    import vllm

    leave_weights_unpacked()
    generate, step = vllm.LLM.generate, iter(range(1, 1 << 30))

    def forced(self, prompts, sampling_params, **options):
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        if sum(params.n for params in each) != scale.prompts * GROUP:
            for params in each:
                params.max_tokens = 1
            return generate(self, prompts, each, **options)
        options.pop("lora_request", None)  # lorl's, one None per prompt
        lengths = iter(completion_lengths(next(step), scale))
        single_prompts, single_params = [], []
        for prompt, params in zip(prompts, each):
            for sample in range(params.n):
                single = params.clone()
                single.n, single.max_tokens, single.ignore_eos = 1, next(lengths), True
                single.seed = None if params.seed is None else params.seed + sample
                single_prompts.append(prompt)
                single_params.append(single)
        singles = iter(generate(self, single_prompts, single_params, **options))
        outputs = []
        for params in each:
            first, *others = islice(singles, params.n)
            first.outputs += [other.outputs[0] for other in others]
            outputs.append(first)
        return outputs

    vllm.LLM.generate = forced


# ---- lorl -----------------------------------------------------------------------------------------------------


def make_config(model: Path, steps: int, folder: Path, scale: Scale):
    """The settings of lorl; `trl_config` makes those of TRL from them."""
    from configs.base import Config
    from configs.checks import resolve_config
    from train_grpo import ALGORITHMS

    config = Config(
        output_dir=str(folder),
        task=TASK,
        model=str(model),
        steps=steps,
        seed=SEED,
        eval_every=0,
        eval_problems=1,
        sync="merged",  # as TRL does
        prompts_per_step=scale.prompts,
        group_size=GROUP,
        max_prompt_length=scale.longest_prompt,
        max_completion_length=scale.longest_completion,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        learning_rate=LEARNING_RATE,
        tokens_per_microbatch=scale.rows * scale.longest,
        gradient_checkpointing="full" if scale.checkpointing else "none",
    )
    return resolve_config(config, ALGORITHMS[config.algorithm])


def run_lorl(model: Path, steps: int, folder: Path, scale: Scale) -> dict:
    """Trains with lorl; what `read_steps` returns."""
    force_lengths(scale)

    import reward
    from runtime.setup import setup
    from train_grpo import train

    problems = [reward.Problem(text, "") for text in prompt_texts(scale)]
    reward.TASKS[TASK] = reward.Task(lambda *_: problems, score)
    train(setup(make_config(model, steps, folder / "lorl", scale)))
    return read_steps(folder / "lorl")


def read_steps(folder: Path) -> dict:
    """The steps of a run's metrics.jsonl, and the peak of memory in GiB."""
    rows = [row for row in read_rows(folder) if row["step"] > 0]
    names = {"score": "reward/mean", "mismatch": "mismatch/kl"} | {phase: f"time/{phase}" for phase in PHASES}
    steps = [
        {name: row[metric] for name, metric in names.items() if metric in row} | {"step": step_seconds(row)}
        for row in rows
    ]
    return {"steps": steps, "peak": max(row["memory/peak_gib"] for row in rows)}


# ---- TRL ------------------------------------------------------------------------------------------------------


def timed(owner: type, method: str, phase: str, seconds: dict[str, float]) -> None:
    """Adds the duration of each call of a method to `seconds[phase]`."""
    call = getattr(owner, method)

    def wrapper(*arguments, **options):
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start

    setattr(owner, method, wrapper)


def instrument_trl() -> dict[str, float]:
    """Makes TRL run in one process, with vLLM as lorl has it. Returns the dict of each phase's seconds, still empty."""
    import torch
    from trl import GRPOTrainer
    from trl.generation import vllm_generation

    engine, on_gpu = vllm_generation.LLM, torch.cuda.is_available()
    vllm_generation.LLM = lambda **options: engine(**options, enforce_eager=not on_gpu, disable_log_stats=True)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

    seconds: dict[str, float] = {}
    timed(vllm_generation.VLLMGeneration, "generate", "rollout", seconds)
    timed(vllm_generation.VLLMGeneration, "sync_weights", "sync", seconds)
    timed(GRPOTrainer, "_calculate_rewards", "reward", seconds)
    scored = GRPOTrainer._get_per_token_logps_and_entropies

    def logprobs(*arguments, **options):
        start = time.perf_counter()
        result = scored(*arguments, **options)
        if not torch.is_grad_enabled():  # the pass before the update
            seconds["logprobs"] = seconds.get("logprobs", 0.0) + time.perf_counter() - start
        return result

    GRPOTrainer._get_per_token_logps_and_entropies = logprobs
    return seconds


def trl_config(config, rows: int, **options):
    """TRL's `GRPOConfig` with the settings of a lorl configuration. rows: sequences in a micro-batch."""
    import torch
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(config.run_folder),
        max_steps=config.steps,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
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
        vllm_gpu_memory_utilization=config.gpu_memory_utilization,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        **options,
    )


def train_with_trl(
    config, dataset: list[dict], rewards: Callable, rows: int, evaluate: Callable = lambda trainer: {}, **options
) -> None:
    """Trains as a lorl configuration says, and writes a metrics.jsonl like lorl's.

    rewards: a reward function of TRL's. evaluate: from the trainer to metrics. options: of `GRPOConfig`.
    """
    seconds = instrument_trl()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from runtime.run import is_due
    from runtime.tracking import peak_memory, reset_peak_memory

    config.run_folder.mkdir(parents=True, exist_ok=True)
    metrics = open(config.run_folder / "metrics.jsonl", "w", buffering=1)

    class Log(TrainerCallback):
        """Writes a row per step. Its seconds and its peak of memory exclude the evaluation."""

        def begin(self) -> None:
            """Starts the clocks of a step."""
            seconds.clear()
            reset_peak_memory()
            self.since = time.perf_counter()

        def on_train_begin(self, *_, **__) -> None:
            metrics.write(json.dumps({"step": 0} | evaluate(trainer)) + "\n")
            self.begin()

        def on_step_end(self, args, state, control, **_) -> None:
            step = time.perf_counter() - self.since
            phases = seconds | {"step": step, "update": step - sum(seconds.values())}
            self.row = {"step": state.global_step} | {f"time/{name}": value for name, value in phases.items()}
            self.row["memory/peak_gib"] = peak_memory() / 2**30
            if state.global_step == config.steps or is_due(config.eval_every, state.global_step):
                self.row |= evaluate(trainer)

        def on_log(self, args, state, control, logs=None, **_) -> None:
            if "reward" in (logs or {}):
                metrics.write(json.dumps(self.row | {"reward/mean": logs["reward"]}) + "\n")
                self.begin()

    trainer = GRPOTrainer(
        model=config.model,
        reward_funcs=rewards,
        args=trl_config(config, rows, **options),
        train_dataset=Dataset.from_list(dataset),
        peft_config=LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"),
        callbacks=[Log()],
    )
    trainer.train()
    metrics.close()


def run_trl(model: Path, steps: int, folder: Path, scale: Scale) -> dict:
    """Trains with TRL; what `read_steps` returns."""
    force_lengths(scale)
    from runtime.run import endless

    config = make_config(model, steps, folder / "trl", scale)
    prompts = islice(endless(prompt_texts(scale), SEED), steps * scale.prompts)
    dataset = [{"prompt": prompt} for prompt in prompts]
    rewards = lambda completions, **_: [score(completion) for completion in completions]  # noqa: E731
    train_with_trl(config, dataset, rewards, scale.rows, shuffle_dataset=False)
    return read_steps(config.run_folder)


# ---- Side by side ---------------------------------------------------------------------------------------------


def environment(threads: int) -> dict[str, str]:
    """The environment of a process that runs one side."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }


def measure(side: str, arguments: argparse.Namespace, work: Path) -> dict:
    """Runs one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work), "--steps", str(arguments.steps)]
    command += ["--clock", arguments.clock, "--scale", arguments.scale]
    subprocess.run(command, env=environment(arguments.threads), check=True)
    return json.loads((work / f"{side}.json").read_text())


def medians(runs: list[dict], scale: Scale) -> dict[str, float]:
    """Median seconds of each phase, and tokens/s, over all steps but each run's first, which warms up."""
    steps = [
        step | {"tokens/s": sum(completion_lengths(number, scale)) / step["step"]}
        for run in runs
        for number, step in enumerate(run["steps"][1:], start=2)
    ]
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in (*PHASES, "step", "tokens/s")}


def report(results: dict[str, list[dict]], clock: str, scale: Scale) -> None:
    """Prints the medians of each side, its peak memory, and its rewards."""
    print(f"| {clock + ' s per step':<16} | {' | '.join(f'{side:>8}' for side in results)} |")
    print(f"|{'-' * 18}|{'|'.join('-' * 9 + ':' for _ in results)}|")

    def row(name: str, values: Iterable[float], digits: int = 2) -> None:
        print(f"| {name:<16} | {' | '.join(f'{value:>8,.{digits}f}' for value in values)} |")

    found = [medians(runs, scale) for runs in results.values()]
    for phase in (*PHASES, "step"):
        row(phase, (side[phase] for side in found))
    row("tokens/s", (side["tokens/s"] for side in found), 0)
    row("peak, GiB", (max(run["peak"] for run in runs) for runs in results.values()))
    for side, runs in results.items():
        print(f"rewards of {side}: " + " ".join(f"{step['score']:.3f}" for step in runs[0]["steps"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="cpu", choices=SCALES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["lorl", "trl"], choices=["lorl", "trl"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the rest is for the processes it starts itself
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    if arguments.side:
        work = Path(arguments.work)
        if arguments.clock == "cpu":
            time.perf_counter = time.process_time  # the one that runtime/tracking.py reads, too
        result = {"lorl": run_lorl, "trl": run_trl}[arguments.side](work / "model", arguments.steps, work, scale)
        (work / f"{arguments.side}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work, "model"), scale)
        results: dict[str, list[dict]] = {side: [] for side in arguments.sides}
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                results[side].append(measure(side, arguments, Path(work)))
    report(results, arguments.clock, scale)


if __name__ == "__main__":
    main()
