"""From a configuration to a `Run`: the model, the prompts, the sharded policy, the engine, a checkpoint."""

import math
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

import fsdp_utils
import lora
import reward
from configs.base import Config
from configs.checks import default_rate
from policy import Critic, Policy, use_rms_norm
from rollout import Engine
from runtime import adapter_files, checkpoint
from runtime.checkpoint import Progress, Saved
from runtime.evaluation import make_scorer
from runtime.files import check_parent, check_tied_head, find_model, locked, one_line_errors
from runtime.generators import AnyEngine, Generator, Link, RemoteEngine, init_worlds
from runtime.optimize import make_optimizer, schedule
from runtime.packing import CONVOLUTIONS, RECURRENT
from runtime.progress_bar import progress_bar
from runtime.prompts import Stops, check_prompts, find_stops, load_prompts, load_tokenizer
from runtime.run import Run, environments
from runtime.sequence_parallel import neighbours
from runtime.shared_memory import fast_folder
from runtime.tracking import RunLog, in_use
from runtime.wandb_run import choose_mode

PromptHead = Callable[[int], nn.Module]  # from the model's hidden size to a module for `Policy`
WITH_MORE = ("qwen3_5",)  # models that see images, too, of which the language model alone is trained
IN_FLOAT32 = ("A_log",)  # whatever the model's dtype: so are these parameters of recurrent layers in vLLM


def setup(config: Config, prompt_head: PromptHead | None = None) -> Run:
    """Builds all parts of a run. Raises ValueError or OSError, of one line, for errors that the user can fix.

    In a process that only generates (`rollout_ranks`) it does not return: the run is the trainers'.
    """
    reward.find_task(config.task)
    world, link = init_worlds(config.rollout_ranks)
    if link and link.generates:
        serve_trainers(config, world, link)
    check_world(config, world)
    world = replace(world, sequence_group=neighbours(config.sequence_parallel_size))
    fsdp_utils.on_first_rank(lambda: check_writable(config.run_folder))
    fsdp_utils.on_first_rank(choose_mode)
    folder = model_folder(config)
    model_config = read_model_config(folder)
    saved = find_checkpoint(config) if config.resume else None
    progress = fsdp_utils.on_first_rank(lambda: saved.progress if saved else Progress())
    tokenizer = load_tokenizer(folder, progress.started, config.chat_template_kwargs)
    train_prompts, test_prompts = load_prompts(config, tokenizer)
    check_prompts(config, model_config, train_prompts + test_prompts)
    stops = find_stops(config, tokenizer, model_config)
    problems = [prompt.problem for prompt in train_prompts + test_prompts]
    scorer = fsdp_utils.on_every_rank(lambda: make_scorer(config, problems))
    with fast_folder(folder) as files:
        start = replace(config, lora_adapter_path="") if saved else config  # a checkpoint has the trained adapter
        policy = build_policy(start, files, world, prompt_head)
        optimizer = make_optimizer(config, policy, config.learning_rate)
        if saved:
            checkpoint.restore_state(saved.folder, {"policy": (policy, optimizer)})
        with progress_bar("starting vLLM"):
            known = environments(train_prompts + test_prompts)
            make = partial(RemoteEngine, link, known, progress.started) if link else Engine
            engine = build_engine(config, files, stops, lora.target_names(policy.model), make)
    log = fsdp_utils.on_every_rank(lambda: open_log(config, world.rank == 0, saved))
    run = Run(
        config, world, tokenizer, train_prompts, test_prompts, scorer, engine, policy, optimizer, log, progress, saved
    )
    engine.sleep()  # the probe's forwards in the trainer need the memory
    run.stop.listen()  # from here on a signal lets the run be saved; until here it ends the process
    run.weight_sync.update_weights(verify=True, everything=config.dtype == "nf4")  # vLLM has the 16-bit base
    print_header(run)
    return run


def check_world(config: Config, world: fsdp_utils.World) -> None:
    """Raises ValueError for groups of ranks that do not divide their number."""
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
        log.print(f"       {active:,.1f}M are active for a token; experts are frozen")
    task = " ".join(filter(None, (config.task, config.data, *config.reward)))
    log.print(f"task   {task}, {len(run.train_prompts):,} problems to train on, {len(run.test_prompts):,} held out")
    device = torch.cuda.get_device_name() if run.world.device.type == "cuda" else "CPU"
    apart = f" in {config.rollout_ranks} process(es) of their own" if config.rollout_ranks else ""
    log.print(f"world  {run.world.size} x {device}, {engine.engines} vLLM engine(s){apart}")
    weights = sum(fsdp_utils.local(parameter).nbytes for parameter in run.policy.parameters()) / 1e6
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


def active_parameters(model: PreTrainedModel) -> float:
    """Parameters of the base that one token passes through: of the experts of a layer, those that are chosen."""
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    return sum(
        math.prod(weight.shape) * (chosen / weight.shape[0] if fsdp_utils.is_experts(path) else 1)
        for path, weight in lora.base_weights(model)
    )


# ---- The run's folder -----------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Raises ValueError if a run may not write its folder: it cannot, another run is writing it, or it is no run's."""
    check_parent(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():  # it would be renamed
        raise ValueError(
            f"output_dir {str(folder)!r} has files, and no run wrote them; choose a folder of the run's own"
        )
    if in_use(folder):
        raise ValueError(f"{str(folder)!r} is being written by a run that has not ended; choose another output_dir")


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


# ---- The models and the engine --------------------------------------------------------------------------------


def model_folder(config: Config) -> str:
    """The folder of the configured model; a model of the hub is downloaded if need be."""

    def find() -> str:
        folder = find_model(config.model_source)
        if getattr(read_model_config(folder), "tie_word_embeddings", False):
            check_tied_head(Path(folder))
        return folder

    return fsdp_utils.on_first_rank(find)


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
        lora_targets=targets,
        seed=config.seed,
    )


def serve_trainers(config: Config, world: fsdp_utils.World, link: Link) -> NoReturn:
    """Builds an engine when the trainers ask for it, and does with it what they ask until they end the run."""
    started, options = link.broadcast()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the trainers say the same
        folder = model_folder(config)
        prompts = chain.from_iterable(load_prompts(config, load_tokenizer(folder, started)))
    with fast_folder(folder) as files:
        engine = Engine(files, **options)
    engine.stop.listen()
    Generator(engine, link, environments(prompts), world.device).serve()
    sys.exit()


def sequences_at_once(config: Config, ranks: int, gpu_bytes: float) -> int:
    """Sequences that one engine generates at a time: its share of a rollout or evaluation, up to vLLM's own limits."""
    engines = ranks // config.tensor_parallel_size
    rollout = -(-config.prompts_per_step // engines) * config.group_size
    evaluation = -(-config.eval_problems // engines) * (config.eval_samples + 1)
    return min(max(rollout, evaluation), 1024 if gpu_bytes >= 70 * 2**30 else 256)


def gpu_memory() -> int:
    """Bytes of this rank's GPU; 0 without one."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0


def build_policy(config: Config, folder: str, world: fsdp_utils.World, prompt_head: PromptHead | None = None) -> Policy:
    """The sharded policy with its weights; without adapters (`lora_rank` 0), all of them are trained."""
    model = meta_model(folder, parameter_dtype(config))
    policy = meta_policy(config, model, world.device, prompt_head)
    fsdp_utils.load_weights(model, folder, world.device, config.offload == "all")
    if config.lora_rank:
        fill_adapters(model, config, world)
    return policy


def build_critic(config: Config, folder: str, world: fsdp_utils.World) -> Critic:
    """The critic, from the policy's base; trained as the policy is."""
    model = meta_model(folder, parameter_dtype(config))
    critic = meta_critic(config, model, world.device)
    fsdp_utils.load_weights(model, folder, world.device, config.offload == "all")
    if config.lora_rank:
        lora.init_adapters(model, config.seed, fill=fsdp_utils.fill)
    return critic


def parameter_dtype(config: Config) -> torch.dtype:
    """float32 if the base is trained (`lora_rank` 0): bfloat16 would round small updates away; else `compute_dtype`."""
    return getattr(torch, config.compute_dtype) if config.lora_rank else torch.float32


# ---- Models without memory -------------------------------------------------------------------------------------------


def read_model_config(folder: str) -> PretrainedConfig:
    """The configuration of a language model, or of the part of a larger one that is. Raises ValueError for models that
    are not supported; see also `check_supported`.
    """
    return read_whole_config(folder).get_text_config()


def read_whole_config(folder: str) -> PretrainedConfig:
    """A model's configuration, which may have parts, as those of models that also see images."""
    with one_line_errors(f"model {folder!r}"):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = whole.get_text_config()
    if not hasattr(config, "vocab_size") or config is not whole and whole.model_type not in WITH_MORE:
        raise ValueError(f"model {folder!r} is a {whole.model_type}, and must be a language model and nothing more")
    config.name_or_path = whole.name_or_path
    if cap := getattr(config, "attn_logit_softcapping", None):  # which PyTorch's attention kernels do not have
        raise ValueError(f"model {folder!r} has attn_logit_softcapping {cap}, which is not implemented here")
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)  # the sampler has none, and adapters have their own
    return whole


def meta_model(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters that have shapes but no memory. Raises ValueError if it cannot be trained here."""
    return meta_model_of(read_whole_config(folder), folder, dtype)


def meta_model_of(config: PretrainedConfig, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """As `meta_model`, for a configuration; the folder is named in errors."""
    with one_line_errors(f"model {folder!r}"), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    decoder, model.config = model.get_decoder(), config.get_text_config()
    for name, part in list(model.base_model.named_children()) if model.base_model is not decoder else []:
        if part is not decoder:  # what is left has the checkpoint's names
            delattr(model.base_model, name)
    check_supported(model, folder)
    for name, parameter in model.named_parameters():
        if name.endswith(IN_FLOAT32):
            parameter.data = parameter.data.float()
    use_rms_norm(model)
    return model


def auto_class(config: PretrainedConfig) -> type:
    """What makes a model whose parameters have the names of the checkpoint."""
    return AutoModelForImageTextToText if config.model_type in WITH_MORE else AutoModelForCausalLM


def check_supported(model: PreTrainedModel, folder: str) -> None:
    """Raises ValueError for a model with parts that are not implemented here."""
    head, what = model.get_output_embeddings(), f"model {folder!r} is a {type(model).__name__}, which"
    if not isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList):
        raise ValueError(f"{what} has no decoder blocks named `layers`")
    for name, parameter in model.named_parameters():
        is_known = fsdp_utils.is_experts(name) or name.removesuffix(".weight").endswith(CONVOLUTIONS)
        if parameter.ndim > 2 and not is_known:
            raise ValueError(f"{what} is not implemented here: {name} has {parameter.ndim} dimensions")
    for name in sorted(model.state_dict().keys() & dict(model.named_buffers())):
        raise ValueError(f"{what} is not implemented here: its checkpoint has {name}, which is no parameter")
    if head is None:
        raise ValueError(f"{what} has no head")


def meta_policy(
    config: Config, model: PreTrainedModel, device: torch.device, prompt_head: PromptHead | None = None
) -> Policy:
    """The sharded policy around a meta model of `parameter_dtype`."""
    if config.lora_adapter_path:
        with adapter_files.open_adapter(config.lora_adapter_path):
            pass  # a bad folder is refused now, before the weights are read
    if config.reference_adapter:
        with adapter_files.open_adapter(config.reference_adapter) as file:
            scale = {"rank": file.rank, "alpha": file.alpha, "rslora": file.rslora}
            options = {"merged": config.straight_through, "trainable": False}
            lora.inject(model, file.paths, **scale, **options, name=lora.REFERENCE)
    if config.lora_rank:
        add_adapters(model, config)
    policy = Policy(model, prompt_head and make_prompt_head(prompt_head, model.config.hidden_size, config.seed, device))
    shard(policy, config, device)
    return policy


def make_prompt_head(prompt_head: PromptHead, hidden_size: int, seed: int, device: torch.device) -> nn.Module:
    """The head with the same values on every rank, in whatever state the random numbers are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return prompt_head(hidden_size).to(device)


def meta_critic(config: Config, model: PreTrainedModel, device: torch.device) -> Critic:
    """The sharded critic around a meta model of `parameter_dtype`."""
    critic = Critic(model, device)
    if config.lora_rank:
        add_adapters(model, config)
    shard(critic, config, device)
    return critic


def add_adapters(model: PreTrainedModel, config: Config) -> None:
    """Freezes the base, stores it in `dtype`, and adds the adapters that are trained."""
    if config.dtype == "nf4":
        lora.quantize_base(model)
    lora.inject(model, config.target_modules, config.lora_rank, config.lora_alpha, merged=config.straight_through)


def shard(module: Policy | Critic, config: Config, device: torch.device) -> None:
    """Shards a policy or critic. A base that is trained (`lora_rank` 0) is float32, and cast to `dtype` to compute.

    Raises ValueError if that base has experts, or if the model's rows cannot be spread over ranks as configured.
    """
    model: PreTrainedModel = module.train().model
    check_spread(model, config.sequence_parallel_size)
    if not config.lora_rank and lora.mixtures(model):
        raise ValueError("a model with experts learns by adapters alone; set lora_rank above 0")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fsdp_utils.shard(
        module,
        model.get_decoder().layers,
        device,
        config.fsdp_size,
        compute_dtype=None if config.lora_rank else getattr(torch, config.compute_dtype),
        param_offload=config.offload == "all",
    )


def check_spread(model: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError if so many ranks cannot share a row of the model's: for attention, they share its heads."""
    if ranks == 1:
        return
    heads, option = model.config.num_attention_heads, f"sequence_parallel_size {ranks}"
    if heads % ranks:
        raise ValueError(f"{option} does not divide the model's {heads} attention heads; choose a size that does")
    positions = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    if "dynamic" in positions or "longrope" in positions:
        raise ValueError(f"{option}: this model's rotary positions depend on the row's length; set it to 1")
    if any(path.endswith(RECURRENT) for path, _ in model.named_modules()):
        raise ValueError(f"{option}: this model's recurrent layers need their sequences whole; set it to 1")


# ---- Values ---------------------------------------------------------------------------------------------------


def fill_adapters(model: PreTrainedModel, config: Config, world: fsdp_utils.World) -> None:
    """Gives the policy's adapters their values: from folders, or B = 0."""
    if config.reference_adapter:
        adapter_files.load_adapter(model, config.reference_adapter, name=lora.REFERENCE, fill=fsdp_utils.fill)
    if not config.lora_adapter_path:
        lora.init_adapters(model, config.seed, fill=fsdp_utils.fill)
        return
    lost = adapter_files.load_adapter(model, config.lora_adapter_path, seed=config.seed, fill=fsdp_utils.fill)
    if world.rank == 0:
        less = f", cut to rank {config.lora_rank}: {lost:.2%} of its update is lost" if lost else ""
        print(f"starts from adapter {config.lora_adapter_path}{less}")
