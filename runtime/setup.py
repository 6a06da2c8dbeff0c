"""From a configuration to a `Run`: the model, the prompts, the sharded policy, the engine, a checkpoint."""

import math
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import fsdp_utils
import lora
import reward
from configs.base import Config
from configs.checks import default_rate
from rollout import Engine
from runtime import checkpoint
from runtime.checkpoint import Progress, Saved
from runtime.evaluation import make_scorer
from runtime.files import check_parent, locked
from runtime.generators import AnyEngine, Generator, Link, RemoteEngine, init_worlds
from runtime.models import PromptHead, active_parameters, build_critic, build_policy, model_folder, read_model_config
from runtime.optimize import make_optimizer, schedule
from runtime.progress_bar import progress_bar
from runtime.prompts import Stops, check_prompts, find_stops, load_prompts, load_tokenizer
from runtime.run import Run, environments
from runtime.sequence_parallel import neighbours
from runtime.shared_base import share, shares_base
from runtime.shared_memory import fast_folder
from runtime.tracking import RunLog, in_use, profiled_step
from runtime.wandb_run import choose_mode


def setup(config: Config, prompt_head: PromptHead | None = None, with_critic: bool = False) -> Run:
    """Builds all parts of a run, PPO's critic among them. Raises ValueError or OSError, of one line, for errors that
    the user can fix.

    In a process that only generates (`rollout_ranks`) it does not return: the run is the trainers'.
    """
    for task in config.tasks:
        reward.find_task(task)
    world, link = init_worlds(config.rollout_ranks)
    if link and link.generates:
        serve_trainers(config, world, link)
    check_world(config, world)
    sharing = fsdp_utils.on_first_rank(lambda: shares_base(config, world.size))
    world = replace(world, sequence_group=neighbours(config.sequence_parallel_size))
    fsdp_utils.on_first_rank(lambda: check_writable(config.run_folder))
    fsdp_utils.on_first_rank(choose_mode)
    profiled_step()  # a mistake in it must not be found when all else has started
    folder = model_folder(config)
    model_config = read_model_config(folder)
    saved = find_checkpoint(config) if config.resume else None
    if not saved:
        fsdp_utils.on_first_rank(lambda: check_sources(config))
    progress = fsdp_utils.on_first_rank(lambda: saved.progress if saved else Progress())
    tokenizer = load_tokenizer(folder, progress.started, config.chat_template_kwargs)
    train_prompts, test_prompts = load_prompts(config, tokenizer)
    check_prompts(config, model_config, train_prompts + test_prompts)
    stops = find_stops(config, tokenizer, model_config)
    problems = [prompt.problem for prompt in train_prompts + test_prompts]
    scorer = fsdp_utils.on_every_rank(lambda: make_scorer(config, problems))
    with fast_folder(folder) as files:

        @cache  # started once: with SHARE_BASE by `share`, while the policy is built; otherwise by the call below
        def engine_for(model: PreTrainedModel) -> AnyEngine:
            with progress_bar("starting vLLM"):
                known = environments(train_prompts + test_prompts)
                make = partial(RemoteEngine, link, known, progress.started) if link else Engine
                return build_engine(config, files, stops, lora.target_names(model, config.adapters[0]), make)

        critics = {}
        if with_critic:  # before vLLM starts, which changes classes of transformers
            critic = build_critic(config, files, world)
            critics["critic"] = critic, make_optimizer(config, critic, config.critic_learning_rate)
        start = replace(config, lora_adapter_path="") if saved else config  # a checkpoint has the trained adapter
        shared = partial(share, engine_for=engine_for, world=world) if sharing else None
        policy = build_policy(start, files, world, prompt_head, shared)
        optimizer = make_optimizer(config, policy, config.learning_rate)
        if saved:
            checkpoint.restore_state(saved.folder, {"policy": (policy, optimizer)} | critics)
        engine = engine_for(policy.model)
    log = fsdp_utils.on_every_rank(lambda: open_log(config, world.rank == 0, saved))
    run = Run(
        config, world, tokenizer, train_prompts, test_prompts, scorer, engine, policy, optimizer, log, progress, saved
    )
    run.learners |= critics
    engine.sleep()  # the probe's forwards in the trainer need the memory
    run.stop.listen()  # from here on a signal lets the run be saved; until here it ends the process
    run.weight_sync.update_weights(verify=True, everything=config.dtype == "nf4")  # vLLM has the 16-bit base
    print_header(run)
    return run


def check_world(config: Config, world: fsdp_utils.World) -> None:
    """Raises ValueError for group sizes that do not divide the number of ranks."""
    generates = config.rollout_ranks or world.size
    sides = {"tensor_parallel_size": generates, "fsdp_size": world.size, "sequence_parallel_size": world.size}
    for name, ranks in sides.items():
        size = getattr(config, name) or ranks
        if ranks % size:
            side = f" that {'generate' if name == 'tensor_parallel_size' else 'train'}" if config.rollout_ranks else ""
            raise ValueError(f"{name} {size} does not divide the number of processes{side}, {ranks}")


def print_header(run: Run) -> None:
    """Prints the model, the task, the machine, and the memory that each process holds during the whole run."""
    config, log, engine = run.config, run.log, run.engine
    trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
    base = sum(math.prod(weight.shape) for _, weight in lora.base_weights(run.policy.model)) / 1e6
    learned = sum(parameter.numel() for parameter in trained) / 1e6
    log.print(f"model  {config.model}, {base:,.1f}M parameters; {learned:,.2f}M ({learned / base:.1%}) are trained")
    if lora.mixtures(run.policy.model):
        active = active_parameters(run.policy.model) / 1e6
        log.print(f"       {active:,.1f}M are active for a token")
    task = " ".join(filter(None, (config.task, config.data, *config.reward)))
    log.print(f"task   {task}, {len(run.train_prompts):,} problems to train on, {len(run.test_prompts):,} held out")
    device = torch.cuda.get_device_name() if run.world.device.type == "cuda" else "CPU"
    apart = f" in {config.rollout_ranks} process(es) of their own" if config.rollout_ranks else ""
    log.print(f"world  {run.world.size} x {device}, {engine.engines} vLLM engine(s){apart}")
    weights = sum(fsdp_utils.own_bytes(run.policy).values()) / 1e6
    states = 3 * sum(fsdp_utils.local(parameter).nbytes for parameter in trained) / 1e6  # gradient and Adam's moments
    log.print(
        f"memory {weights:,.1f} MB of weights, {states:,.1f} MB of gradients and optimizer, "
        f"{engine.kv_cache_tokens:,} tokens of KV cache; tools/plan.py counts the rest"
    )
    if config.ref_adapter_path:
        log.print(f"KL     reference: {config.reference_adapter or 'the base, without adapters'}")
    rule = " (the default: ten times that of full fine-tuning, see configs/checks.py)"
    is_rule = config.lora_rank and config.learning_rate == default_rate(config)
    log.print(f"rate   {config.learning_rate:g}{rule if is_rule else ''}, {config.lr_schedule}")
    if run.saved:
        log.print(f"resumed after step {run.progress.step}")


# ---- The run's folder -----------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Raises ValueError if a run may not write its folder: it cannot, another run is writing it, or it is no run's."""
    check_parent(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "metrics.jsonl").exists():  # it would be renamed
        raise ValueError(
            f"output_dir {str(folder)!r} has files, and no run wrote them; choose a folder of the run's own"
        )
    if in_use(folder):
        raise ValueError(f"{str(folder)!r} is being written by a run that has not ended; choose another output_dir")


def check_sources(config: Config) -> None:
    """Raises ValueError for a model or adapter in the run's own folder, which is renamed when a new run starts."""
    folder = config.run_folder.resolve()
    for name in ("model", "lora_adapter_path", "ref_adapter_path"):
        path = Path(getattr(config, name))
        if path.exists() and folder in path.resolve().parents:
            raise ValueError(
                f"{name} {str(path)!r} is in output_dir, which a new run renames; choose another output_dir"
            )


def open_log(config: Config, write: bool, saved: Saved | None) -> RunLog:
    """Makes the run's folder and its logs. A resumed run's folder is rewound to the checkpoint."""
    if not write:
        return RunLog(config, write)
    folder = config.run_folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent):
        check_writable(folder)  # again: another run in this folder may have started while the models were read
        if saved:
            checkpoint.rewind(folder, saved.progress.step, saved.progress.best_step)
        return RunLog(config, write, saved and saved.log)


def find_checkpoint(config: Config) -> Saved | None:
    """The checkpoint to resume from; None if the run has not written one yet: it then starts at the beginning."""

    def find() -> Saved | None:
        folder = checkpoint.find(config.run_folder, config.resume, say=print)
        if folder is None:
            print(f"{str(config.run_folder)!r} has no checkpoint to resume from: this run starts at the beginning")
            return None
        saved = resumable(checkpoint.read_saved(folder), config)
        if changes := changed_options(saved.settings, config, saved.progress.step):
            print(f"changed since the checkpoint: {changes}", flush=True)
        return saved

    return fsdp_utils.on_first_rank(find)


def resumable(saved: Saved, config: Config) -> Saved:
    """The checkpoint for this run. Raises ValueError if the run cannot resume from it."""
    for name in checkpoint.FIXED:
        before, now = saved.settings.get(name), getattr(config, name)
        if before != now:
            folder = str(saved.folder)
            raise ValueError(f"{name} is {now!r}, but {folder!r} has {before!r}, which a resumed run must keep")
    if saved.progress.best_step not in checkpoint.written(config.run_folder):
        # It was deleted in favour of a later, better one.
        return replace(saved, progress=replace(saved.progress, best_step=-1, best_accuracy=-1.0))
    return saved


def changed_options(before: dict[str, Any], config: Config, step: int) -> str:
    """Options that differ from the settings of the checkpoint of a step, and what that does to the learning rate.

    >>> changed_options({"steps": 10, "seed": 0}, Config(steps=20, lr_schedule="linear", learning_rate=0.5), step=10)
    'steps 10 -> 20; the learning rate of step 11 is then 0.25, not 0'
    """
    now = asdict(config)
    before = now | before
    changed = [name for name in now if before[name] != now[name] and name not in ("resume", "output_dir")]
    changes = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
    old, new = (c.learning_rate * schedule(step + 1, c) for c in (SimpleNamespace(**before), config))
    if step < config.steps and old != new:
        changes += f"; the learning rate of step {step + 1} is then {new:g}, not {old:g}"
    return changes


# ---- The engine -----------------------------------------------------------------------------------------------


def build_engine(
    config: Config,
    folder: str,
    stops: Stops,
    targets: list[str] | None = None,
    make: Callable[..., AnyEngine] = Engine,
) -> AnyEngine:
    """The sampler, with the weights of the model's folder, for adapters of these target modules (None: of any)."""
    return make(
        folder,
        dtype=config.compute_dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=config.max_model_len,
        max_completion_length=config.max_completion_length,
        stop_texts=stops.texts,
        stop_token_ids=stops.token_ids,
        max_num_seqs=sequences_at_once(config, config.rollout_ranks or dist.get_world_size(), gpu_memory()),
        gpu_memory_utilization=config.gpu_memory_utilization,
        sleep_level=config.sleep_level,
        max_lora_rank=config.lora_rank if config.sends_adapter else 0,
        max_loras=len(config.adapters),
        lora_targets=targets,
        seed=config.seed,
    )


def serve_trainers(config: Config, world: fsdp_utils.World, link: Link) -> NoReturn:
    """Builds an engine when the trainers ask for it, and does with it what they ask until they end the run."""
    started, options, count = link.broadcast()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the trainers say the same
        folder = model_folder(config)
        tokenizer = load_tokenizer(folder, started, config.chat_template_kwargs)
        known = environments(chain.from_iterable(load_prompts(config, tokenizer)))
    if len(known) != count:
        raise ValueError(f"generators find {len(known):,} conversations, trainers {count:,}: both need the same data")
    with fast_folder(folder) as files:
        engine = Engine(files, **options)
    engine.stop.listen()
    Generator(engine, link, known, world.device).serve()
    sys.exit()


def sequences_at_once(config: Config, ranks: int, gpu_bytes: float) -> int:
    """Sequences that one engine generates at a time: its share of a rollout or evaluation, up to vLLM's own limits."""
    engines = ranks // config.tensor_parallel_size
    rollout = -(-config.prompts_per_step // engines) * config.group_size
    evaluation = -(-len(config.tasks) * config.eval_problems // engines) * (config.eval_samples + 1)
    return min(max(rollout, evaluation), 1024 if gpu_bytes >= 70 * 2**30 else 256)


def gpu_memory() -> int:
    """Bytes of this rank's GPU; 0 without one."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0
