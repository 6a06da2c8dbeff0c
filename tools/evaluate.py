"""Evaluates a model, an adapter or a run's checkpoint on a task's test problems, without training.

    python tools/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --eval_samples 8
    torchrun --nproc-per-node=8 tools/evaluate.py --adapter runs/x/checkpoints/step_000100/adapter
    python tools/evaluate.py --run_folder runs/x --checkpoint best

Every setting of training (configs/base.py) is an option here. A checkpoint, or its adapter, brings the settings of its
run. By default all test problems are evaluated, and vLLM takes 90% of a GPU's memory. It writes results.json (metrics,
settings, versions, hardware) and samples.jsonl (every completion).
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the root's modules are found

import runtime.quiet  # noqa: F401, I001  before torch

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import fsdp_utils
import lora
import reward
from configs.base import Config
from rollout import Engine
from runtime import checkpoint
from runtime.adapter_files import adapter_folder, doubts, open_adapter
from runtime.command_line import OneLineParser, parse_over, read_config_file
from runtime.evaluation import Evaluation, evaluate_prompts, make_scorer, mean_and_stderr, per_adapter, sample_records
from runtime.files import new_folder
from runtime.launch import launch
from runtime.models import meta_model, model_folder, read_model_config
from runtime.prompts import check_prompts, find_stops, load_prompts, load_tokenizer
from runtime.run import Prompt, Scorer
from runtime.setup import build_engine, check_world
from runtime.shared_memory import fast_folder
from runtime.signals import listen
from runtime.tracking import environment, hardware, json_lines
from tools.adapter import read_base, merge_all

ALL = 1_000_000  # problems
DEFAULTS = {  # whatever the run had; the second line is about training alone
    **{"eval_problems": ALL, "gpu_memory_utilization": 0.9},
    **{"rollout_ranks": 0, "max_staleness": 0, "fsdp_size": 0, "sequence_parallel_size": 1},
}

# ---- Settings -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[Config, str, list[str]]:
    """The settings, the output folder if given, and doubts about the adapter. Raises ValueError or OSError (one line).

    `model` and `lora_adapter_path` of the settings are what is evaluated.
    """
    parser = OneLineParser(Config, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", default="", help="a file of configs/", group="What is evaluated")
    parser.add_argument("--adapter", default="", help="an adapter's folder, in peft's format")
    parser.add_argument("--run_folder", default="", help="a run's folder: one of its checkpoints is evaluated")
    parser.add_argument("--checkpoint", default="", help="of that run: latest (the default), best, or a step")
    parser.add_argument("--out", default="", help="the folder to write; default: in evaluations, beside OUTPUT_DIR")
    given, _ = parser.parse_known_args(arguments)
    adapter, settings = find_settings(given)
    if not adapter:  # with sync adapter, vLLM would wait for one
        config = dataclasses.replace(parse_over(settings | DEFAULTS, parser, arguments), sync="merged")
        if len(config.tasks) > 1:
            raise ValueError(f"a model without adapters is evaluated on one task at a time, not {config.task!r}")
        return config, given.out, []

    of_tasks = {}
    if not (Path(adapter) / "adapter_config.json").is_file():
        of_tasks = {path.parent.name: str(path.parent) for path in Path(adapter).glob("*/adapter_config.json")}
    with open_adapter(next(iter(of_tasks.values()), adapter)) as file:
        named = {"model": file.base_model, "dtype": file.base_dtype}
    settings = {name: value for name, value in named.items() if value} | settings
    settings |= {"lora_adapter_path": adapter, "lora_rank": file.rank}
    config = parse_over(settings | DEFAULTS, parser, arguments)
    adapter = of_tasks.get(config.task, adapter)
    changes = {"lora_adapter_path": adapter, "lora_rank": file.rank, "lora_alpha": file.scale * file.rank}
    if file.keys != {key: key for key in file.keys}:
        changes["sync"] = "merged"  # vLLM reads only the keys that peft writes
    config = dataclasses.replace(config, **changes)
    if len(config.tasks) > 1 and not config.sends_adapter:
        raise ValueError(
            f"{len(config.tasks)} tasks have an adapter each: evaluate them with sync adapter, or one by one"
        )
    told = doubts(file, (config.model, config.model_source), config.dtype)
    if not file.base_dtype and config.dtype != "nf4":
        told.append("which does not say how its base was stored; if that was NF4, add --dtype nf4")
    return config, given.out, told


def find_settings(given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The adapter's folder ("": none), and the settings of the config file or of the run that trained it."""
    adapter, settings = given.adapter or given.lora_adapter_path, {}
    if given.run_folder and adapter:
        raise ValueError("a run has its own adapter: leave out --run_folder, or --adapter")
    if given.checkpoint and not given.run_folder:
        raise ValueError(f"checkpoint {given.checkpoint!r} of which run? add --run_folder")
    if given.config:  # of a run, it only adds a task
        settings = dataclasses.asdict(read_config_file(given.config))
        adapter = adapter or ("" if given.run_folder else settings["lora_adapter_path"])
    if given.run_folder:
        folder = find_checkpoint(Path(given.run_folder), given.checkpoint or "latest")
        settings |= checkpoint.read_saved(folder).settings
        if settings["lora_rank"]:
            adapter = str(folder / "adapter")
        else:
            settings["model"] = str(folder / "model")
    elif adapter and (folder := checkpoint_of(adapter)):
        if not given.config:
            settings = checkpoint.read_saved(folder).settings
        if Path(adapter).resolve().parent != folder:
            settings["task"] = Path(adapter).resolve().name  # one of several
    others = set(given.task.split(",")) - set(settings.get("task", "").split(","))
    if others and given.task != Config.task:
        for name in ("data", "prompt_field", "answer_field", "reward", "instruction"):  # those of the other task
            settings.pop(name, None)
    return adapter, settings


def checkpoint_of(adapter: str) -> Path | None:
    """The checkpoint that an adapter's folder lies in: `step_N/adapter`, or `step_N/adapter/TASK`; None: in none."""
    folder = Path(adapter).resolve().parent
    folder = folder.parent if folder.name == "adapter" else folder
    return folder if (folder / "state.json").is_file() else None


def find_checkpoint(run: Path, which: str) -> Path:
    """The folder of a run's checkpoint: "latest", "best", or a step's number."""
    if which.isdecimal():
        folder = run / "checkpoints" / f"step_{int(which):06d}"
    elif which in ("latest", "best") and (run / which).is_file():
        folder = run / (run / which).read_text().strip()
    else:
        raise ValueError(f"run {str(run)!r} has no checkpoint {which!r}; ask for latest, best or a step")
    error = checkpoint.integrity_error(folder)
    if error:
        raise ValueError(f"checkpoint {str(folder)!r} cannot be used: {error}")
    return folder


# ---- In vLLM --------------------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """vLLM with the evaluated model, and the problems: a `Run` without a trainer."""

    config: Config
    world: fsdp_utils.World
    tokenizer: PreTrainedTokenizerBase
    test_prompts: list[Prompt]
    scorer: Scorer
    engine: Engine
    doubts: list[str]  # about the base that the adapter is evaluated on


def setup() -> tuple[Sampler, Path]:
    """The sampler of this command line, and the output folder."""
    listen(signal.SIG_DFL)
    config, out, doubts = parse(sys.argv[1:])
    for task in config.tasks:
        reward.find_task(task)
    world = fsdp_utils.init_world()
    check_world(config, world)
    out = out or f"{config.run_folder.parent}/evaluations/{config.task}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = fsdp_utils.on_first_rank(lambda: new_folder(out))
    model = model_folder(config)
    tokenizer = load_tokenizer(model, started(config), config.chat_template_kwargs)
    _, prompts = load_prompts(config, tokenizer)
    model_config = read_model_config(model)
    check_prompts(config, model_config, prompts)
    stops = find_stops(config, tokenizer, model_config)
    scorer = fsdp_utils.on_every_rank(lambda: make_scorer(config, [prompt.problem for prompt in prompts]))
    with fast_folder(model) as files:
        folders = {name: adapter_folder(config.lora_adapter_path, name) for name in config.adapters}
        targets = None
        for each in folders.values() if config.lora_adapter_path else ():
            with open_adapter(each) as adapter:
                targets = adapter.target_modules
        sync = "adapter" if config.sends_adapter else "merged"  # as in training, which may have slept
        engine = build_engine(dataclasses.replace(config, sleep_level=0, sync=sync), files, stops, targets)
        if config.sends_adapter:
            for name, each in folders.items():
                engine.load_adapter(str(each), name)
        elif config.lora_adapter_path or config.dtype == "nf4":
            engine.load_weights(policy_weights(config, Path(files)))
    sampler = Sampler(config, world, tokenizer, prompts, scorer, engine, doubts)
    if world.rank == 0:
        print_header(sampler)
    return sampler, folder


def started(config: Config) -> str:
    """The date in the prompts of a checkpoint's run, see `Progress`; "" without a checkpoint."""
    folder = checkpoint_of(config.lora_adapter_path or config.model)
    return checkpoint.read_saved(folder).progress.started if folder else ""


def policy_weights(config: Config, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights that training would send to vLLM: the base (nf4: as NF4 rounds it) with the adapter merged."""
    dtype = getattr(torch, config.compute_dtype)
    model = meta_model(str(folder), dtype)
    # The files of a model with a tied head may have both.
    wanted = {name for path, weight in lora.base_weights(model) for name, *_ in fsdp_utils.stored(path, weight)}
    base = ((name, tensor.to(dtype)) for name, tensor in read_base(folder, config.dtype) if name in wanted)
    with open_adapter(config.lora_adapter_path) if config.lora_adapter_path else nullcontext() as adapter:
        yield from merge_all(base, adapter) if adapter else base


# ---- Results --------------------------------------------------------------------------------------------------


def print_header(sampler: Sampler) -> None:
    """Prints model, adapter, task and machine, and doubts about the adapter's base."""
    config, adapter = sampler.config, sampler.config.lora_adapter_path
    print(f"model  {config.model}, base weights in {config.dtype}")
    if adapter:
        print(f"       with {adapter}, rank {config.lora_rank}, {'by vLLM' if config.sends_adapter else 'merged'}")
        for doubt in sampler.doubts:
            print(f"       {doubt}")
    task = " ".join(filter(None, (config.task, config.data, *config.reward)))
    print(f"task   {task}, {len(sampler.test_prompts):,} test problems, {config.eval_samples} samples of each")
    print(f"world  {sampler.world.size} x {hardware()}", flush=True)


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """The chance that at least one of k completions is right, drawn without replacement from a problem's n.

    right (problems, n) of 0 and 1, with n ≥ k -> (problems, 1) float64. Unbiased: 1 - C(n - c, k) / C(n, k) for c right
    ones (Chen et al. 2021, arXiv 2107.03374, equation 1), as the product of 1 - k / i over i = n - c + 1 ... n: the
    binomials of a large n are no floating-point numbers.
    """
    n = right.shape[1]
    factors = 1 - k / torch.arange(n, 0, -1, dtype=torch.float64)  # i = n first; 0 at i = k, so signs do not matter
    none_right = torch.cat([torch.ones(1, dtype=torch.float64), factors.cumprod(0)])  # for c = 0 ... n
    return 1 - none_right[right.sum(1, keepdim=True).long()]


def measure(evaluation: Evaluation) -> dict[str, float]:
    """Training's `eval/*` metrics, pass@k for k = 1, 2, 4, ... n; timeouts, truncation, length; also of each task."""
    metrics = evaluation.metrics()
    if evaluation.right:
        sampled, _ = evaluation.right
        n = sampled.shape[1]
        for k in sorted({2**power for power in range(n.bit_length())} | {n}):
            metrics |= mean_and_stderr(f"pass@{k}", pass_at_k(sampled, k))
    completions = evaluation.completions
    metrics |= {
        "timeouts": sum(len(reward.timeouts) for reward in evaluation.rewards),
        "truncated_frac": sum(completion.truncated for completion in completions) / len(completions),
        "length_mean": sum(completion.length for completion in completions) / len(completions),
    }
    return metrics | per_adapter(completions, lambda mine: measure(evaluation.restricted_to(mine)))


def evaluate(sampler: Sampler, folder: Path) -> None:
    """Samples, scores, prints and writes."""
    evaluation, prompts = evaluate_prompts(sampler), sampler.test_prompts
    if sampler.world.rank > 0:
        return
    metrics = measure(evaluation)
    metrics["tokens_per_second"] = sum(completion.length for completion in evaluation.completions) / evaluation.seconds
    width = max(map(len, metrics))
    for name, value in metrics.items():
        kind, slash, task = name.partition("/")
        if not kind.endswith("_stderr"):
            error = metrics.get(f"{kind}_stderr{slash}{task}")
            shown = f"{value:.4f}" if value < 10 else f"{value:,.1f}"
            print(f"{name:<{width}}{shown:>10}" + (f" ± {error:.4f}" if error is not None else ""))
    folder.mkdir(parents=True, exist_ok=True)
    completions, rewards = evaluation.completions, evaluation.rewards
    samples = sample_records(sampler, 2 * prompts, completions, rewards)
    places = [divmod(completion.request, len(prompts)) for completion in completions]  # sampled ones, then greedy ones
    keys = [{"problem": problem, "kind": ("sampled", "greedy")[kind]} for kind, problem in places]
    (folder / "samples.jsonl").write_bytes(json_lines([key | sample for key, sample in zip(keys, samples)]))
    results = {"metrics": metrics, "problems": len(prompts), "processes": sampler.world.size}
    results |= {"config": dataclasses.asdict(sampler.config), "environment": environment()}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote  {folder}/results.json, samples.jsonl")


if __name__ == "__main__":
    launch(setup, lambda made: evaluate(*made))
