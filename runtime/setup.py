"""From a configuration to a `Run`: the model, the prompts, the sharded policy, the engine, a checkpoint."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fsdp_utils
import lora
import reward
from configs.base import Config
from configs.checks import default_rate
from policy import Critic, Policy
from rollout import Engine
from runtime import adapter_files, checkpoint
from runtime.checkpoint import Progress, Saved
from runtime.conversation import Environment
from runtime.files import check_tied_head, find_model, folder_lock, one_line_errors
from runtime.optimize import make_optimizer
from runtime.progress_bar import progress_bar
from runtime.run import Prompt, Run
from runtime.shared_memory import fast_folder
from runtime.signals import listen
from runtime.tracking import RunLog, in_use

PromptHead = Callable[[int], nn.Module]  # from the model's hidden size to a module for `Policy`


def setup(config: Config, prompt_head: PromptHead | None = None) -> Run:
    """Builds all parts of a run. Raises ValueError or OSError, of one line, for errors that the user can fix."""
    reward.find_task(config.task)
    world = fsdp_utils.init_world()
    fsdp_utils.on_first_rank(lambda: check_writable(config.run_folder))
    folder = model_folder(config)
    model_config = read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    train_prompts, test_prompts = load_prompts(config, tokenizer)
    check_prompts(config, model_config, train_prompts + test_prompts)
    saved = find_checkpoint(config) if config.resume else None
    with fast_folder(folder) as files:
        start = replace(config, lora_adapter_path="") if saved else config  # a checkpoint has the trained adapter
        policy = build_policy(start, files, world, prompt_head)
        optimizer = make_optimizer(config, policy, config.learning_rate)
        if saved:
            checkpoint.restore_state(saved.folder, {"policy": (policy, optimizer)})
        with progress_bar("starting vLLM"):
            engine = build_engine(config, files, lora.target_names(policy.model))
    log = fsdp_utils.on_every_rank(lambda: open_log(config, world.rank == 0, saved))
    run = Run(config, world, tokenizer, train_prompts, test_prompts, engine, policy, optimizer, log, saved)
    engine.sleep()  # the probe's forwards in the trainer need the memory
    listen(run.stop.handle)  # from here on a signal lets the run be saved; until here it ends the process
    run.weight_sync.update_weights(verify=True, everything=config.dtype == "nf4")  # vLLM has the 16-bit base
    print_header(run)
    return run


def print_header(run: Run) -> None:
    """Prints the model, the task, the machine, and the memory that each process holds during the whole run."""
    config, log, engine = run.config, run.log, run.engine
    trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
    base = sum(math.prod(weight.shape) for _, weight in lora.base_weights(run.policy.model)) / 1e6
    learned = sum(parameter.numel() for parameter in trained) / 1e6
    log.print(f"model  {config.model}, {base:,.1f}M parameters; {learned:,.2f}M ({learned / base:.1%}) are trained")
    if lora.mixtures(run.policy.model):
        active = active_parameters(run.policy.model) / 1e6
        log.print(f"       {active:,.1f}M are active for a token; experts are frozen, all-linear is attention alone")
    log.print(
        f"task   {config.task}, {len(run.train_prompts):,} problems to train on, {len(run.test_prompts):,} held out"
    )
    device = torch.cuda.get_device_name() if run.world.device.type == "cuda" else "CPU"
    log.print(f"world  {run.world.size} x {device}, {engine.engines} vLLM engine(s)")
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
    sizes = ((math.prod(weight.shape), weight.shape) for _, weight in lora.base_weights(model))
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    return sum(size * chosen / shape[0] if len(shape) > 2 else size for size, shape in sizes)


# ---- The run's folder -----------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Raises ValueError if the run's folder cannot be made or written, or if another run is writing it."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"cannot write to {str(folder)!r}: {str(parent)!r} is not a writable directory")
    if in_use(folder):
        raise ValueError(f"{str(folder)!r} is being written by a run that has not ended; choose another run_name")


def open_log(config: Config, write: bool, saved: Saved | None) -> RunLog:
    """Makes the run's folder and its logs. A resumed run's folder is rewound to the checkpoint."""
    if not write:
        return RunLog(config, write)
    folder = config.run_folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder.parent):
        check_writable(folder)  # again: another run of this name may have started while the models were read
        if saved:
            checkpoint.rewind(folder, saved.progress.step, saved.progress.best_step)
        return RunLog(config, write, saved and saved.log)


def find_checkpoint(config: Config) -> Saved | None:
    """The checkpoint to resume from; None if the run has not written one yet: it then starts at the beginning."""

    def find() -> Saved | None:
        folder = checkpoint.find(config.run_folder, config.resume, say=print)
        if folder is None:
            print(f"{str(config.run_folder)!r} has no checkpoint to resume from: this run starts at the beginning")
        return folder and read_saved(folder, config)

    return fsdp_utils.on_first_rank(find)


def read_saved(folder: Path, config: Config) -> Saved:
    """Reads a checkpoint's state.json. Raises ValueError if this run cannot resume from it."""
    try:
        state = json.loads((folder / "state.json").read_text())
        progress, settings, log = Progress(**state["progress"]), dict(state["config"]), dict(state["log"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {str(folder)!r} is of another version of this program: {error}") from None
    for name in checkpoint.FIXED:
        before, now = settings.get(name), getattr(config, name)
        if before != now:
            raise ValueError(f"{name} is {now!r}, but {str(folder)!r} has {before!r}, which a resumed run must keep")
    if progress.best_step not in checkpoint.written(config.run_folder):  # deleted in favour of a later, better one
        progress = replace(progress, best_step=-1, best_accuracy=-1.0)
    return Saved(folder, progress, log)


# ---- Prompts --------------------------------------------------------------------------------------------------


def model_folder(config: Config) -> str:
    """The folder of the configured model; a model of the hub is downloaded if need be."""

    def find() -> str:
        folder = find_model(config.model_source)
        if getattr(read_model_config(folder), "tie_word_embeddings", False):
            check_tied_head(Path(folder))
        return folder

    return fsdp_utils.on_first_rank(find)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    with one_line_errors(f"the tokenizer of model {folder!r}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[list[Prompt]]:
    """Training and held-out prompts of at most `max_prompt_length` tokens; rank 0 reads or downloads the problems."""
    instruction = reward.find_task(config.task).instruction if config.instruction is None else config.instruction
    ending = f"\n{instruction}" if instruction else ""

    def load(split: str) -> list[reward.Problem]:
        problems = reward.load_problems(config.task, split, config.data_dir)
        return [replace(problem, prompt=problem.prompt + ending) for problem in problems]

    splits = fsdp_utils.on_first_rank(lambda: (load("train"), load("test")))
    check_system_prompt(config.system_prompt, tokenizer)
    with one_line_errors(f"the tokenizer of model {tokenizer.name_or_path!r}"):
        prompts = [tokenize(problems, tokenizer, config.system_prompt) for problems in splits]
    prompts = [[in_environment(prompt, config, tokenizer) for prompt in split] for split in prompts]
    longest = config.max_prompt_length
    kept = [[prompt for prompt in split if len(prompt.token_ids) <= longest] for split in prompts]
    train, test = kept
    if not (train and test):
        raise ValueError(f"no prompt fits in max_prompt_length, {longest} tokens")
    if kept != prompts:
        counts = [f"{len(before) - len(after):,} of {len(before):,}" for before, after in zip(prompts, kept)]
        line = "prompts over max_prompt_length, {} tokens, are left out: {} to train on, {} held out"
        fsdp_utils.on_first_rank(lambda: print(line.format(longest, *counts), flush=True))
    return [train, test[: config.eval_problems]]


def check_system_prompt(system_prompt: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the chat template does not show the system prompt to the model."""
    if system_prompt is None:
        return
    name, fix = tokenizer.name_or_path, "leave system_prompt out, or put its text into instruction"
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of model {name!r} has no chat template for a system turn; {fix}")
    try:
        text = tokenizer.apply_chat_template(chat("?", system_prompt), tokenize=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the chat template of model {name!r} refuses a system turn ({reason}); {fix}") from error
    if system_prompt.strip() not in text:
        raise ValueError(f"the chat template of model {name!r} leaves a system turn out; {fix}")


def chat(prompt: str, system_prompt: str | None) -> list[dict[str, str]]:
    """A conversation with the model's turn next."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": prompt}]


def check_prompts(config: Config, model: PretrainedConfig, prompts: list[Prompt]) -> None:
    """Raises ValueError for prompts without tokens, with unknown tokens, or too long for the model."""
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"the tokenizer of {config.model!r} makes no token of prompt {prompt.problem.prompt!r}")
        if max(prompt.token_ids) >= model.vocab_size:
            raise ValueError(
                f"the tokenizer of {config.model!r} makes token {max(prompt.token_ids)} of prompt "
                f"{prompt.problem.prompt!r}, but the model has only {model.vocab_size}"
            )
    longest = getattr(model, "max_position_embeddings", None) or math.inf
    stretched = (getattr(model, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if config.max_model_len > longest and not stretched:  # vLLM checks stretched positions
        raise ValueError(
            f"max_prompt_length {config.max_prompt_length} and max_completion_length {config.max_completion_length} "
            f"make {config.max_model_len} tokens; model {config.model!r} supports at most {longest}: lower one"
        )


def tokenize(
    problems: list[reward.Problem], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> list[Prompt]:
    """Applies the tokenizer's chat template, if it has one, to each problem."""
    texts = [problem.prompt for problem in problems]
    if tokenizer.chat_template:
        chats = [chat(text, system_prompt) for text in texts]
        ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(texts)["input_ids"]
    return [Prompt(problem, tokens) for problem, tokens in zip(problems, ids)]


def in_environment(prompt: Prompt, config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt with what the task replies to the model; a task without replies has one turn."""
    task = reward.find_task(config.task)
    if not task.reply:
        return prompt
    messages = chat(prompt.problem.prompt, config.system_prompt)
    return replace(prompt, environment=partial(Environment, task.reply, prompt.problem, messages, tokenizer))


# ---- The models and the engine --------------------------------------------------------------------------------


def build_engine(config: Config, folder: str, targets: list[str] | None = None) -> Engine:
    """The sampler, with the weights of the model's folder, for adapters of these target modules (None: of any)."""
    return Engine(
        folder,
        dtype=config.compute_dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=config.max_model_len,
        max_completion_length=config.max_completion_length,
        max_num_seqs=sequences_at_once(config, dist.get_world_size(), gpu_memory()),
        gpu_memory_utilization=config.gpu_memory_utilization,
        sleep_level=config.sleep_level,
        max_lora_rank=config.lora_rank if config.sends_adapter else 0,
        lora_targets=targets,
        seed=config.seed,
    )


def sequences_at_once(config: Config, ranks: int, gpu_bytes: float) -> int:
    """Sequences that one engine generates at a time: its share of a rollout or evaluation, up to vLLM's own limits."""
    engines = max(1, ranks // config.tensor_parallel_size)
    rollout = -(-config.prompts_per_step // engines) * config.group_size
    evaluation = -(-config.eval_problems // engines) * (config.eval_samples + 1)
    return min(max(rollout, evaluation), 1024 if gpu_bytes >= 70 * 2**30 else 256)


def gpu_memory() -> int:
    """Bytes of this rank's GPU; 0 without one."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0


def build_policy(config: Config, folder: str, world: fsdp_utils.World, prompt_head: PromptHead | None = None) -> Policy:
    """The sharded policy with its weights; without adapters (`lora_rank` 0), all of them are trained."""
    model = meta_model(folder, parameter_dtype(config, config.lora_rank))
    policy = meta_policy(config, model, world.device, prompt_head)
    fsdp_utils.load_weights(model, folder, world.device, config.offload == "all")
    if config.lora_rank:
        fill_adapters(model, config, world)
    return policy


def build_critic(config: Config, folder: str, world: fsdp_utils.World) -> Critic:
    """The critic, from the policy's base; with `critic_lora_rank` 0, all of its weights are trained."""
    model = meta_model(folder, parameter_dtype(config, config.critic_lora_rank))
    critic = meta_critic(config, model, world.device)
    fsdp_utils.load_weights(model, folder, world.device, config.offload == "all")
    if config.critic_lora_rank:
        lora.init_adapters(model, config.seed, fill=fsdp_utils.fill)
    return critic


def parameter_dtype(config: Config, rank: int) -> torch.dtype:
    """float32 if the base is trained (`rank` 0), because bfloat16 rounds small updates away; else `compute_dtype`."""
    return getattr(torch, config.compute_dtype) if rank else torch.float32


# ---- Models without memory -------------------------------------------------------------------------------------------


def read_model_config(folder: str) -> PretrainedConfig:
    """A model's configuration. Raises ValueError for models that are not supported; see also `check_supported`."""
    with one_line_errors(f"model {folder!r}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"model {folder!r} is a {config.model_type}, and must be a language model and nothing more")
    if cap := getattr(config, "attn_logit_softcapping", None):  # which PyTorch's attention kernels do not have
        raise ValueError(f"model {folder!r} has attn_logit_softcapping {cap}, which is not implemented here")
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)  # the sampler has none, and adapters have their own
    return config


def meta_model(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters that have shapes but no memory. Raises ValueError if it cannot be trained here."""
    config = read_model_config(folder)
    with one_line_errors(f"model {folder!r}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    check_supported(model, folder)
    return model


def check_supported(model: PreTrainedModel, folder: str) -> None:
    """Raises ValueError for a model with parts that are not implemented here."""
    head, what = model.get_output_embeddings(), f"model {folder!r} is a {type(model).__name__}, which"
    if not isinstance(getattr(model.base_model, "layers", None), nn.ModuleList):
        raise ValueError(f"{what} has no decoder blocks named `layers`")
    for name, parameter in model.named_parameters():
        experts, kind = name.split(".")[-2:]
        if parameter.ndim > 2 and (experts != "experts" or kind not in fsdp_utils.EXPERTS):  # convolutions
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
            options = {"merged": config.lora_forward == "merged", "trainable": False}
            lora.inject(model, file.paths, **scale, **options, name=lora.REFERENCE)
    if config.lora_rank:
        add_adapters(model, config, config.lora_rank)
    policy = Policy(model, prompt_head and make_prompt_head(prompt_head, model.config.hidden_size, config.seed, device))
    shard(policy, config, config.lora_rank, device)
    return policy


def make_prompt_head(prompt_head: PromptHead, hidden_size: int, seed: int, device: torch.device) -> nn.Module:
    """The head with the same values on every rank, in whatever state the random numbers are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return prompt_head(hidden_size).to(device)


def meta_critic(config: Config, model: PreTrainedModel, device: torch.device) -> Critic:
    """The sharded critic around a meta model of `parameter_dtype`."""
    critic = Critic(model, device)
    if config.critic_lora_rank:
        add_adapters(model, config, config.critic_lora_rank)
    shard(critic, config, config.critic_lora_rank, device)
    return critic


def add_adapters(model: PreTrainedModel, config: Config, rank: int) -> None:
    """Freezes the base, stores it in `dtype`, and adds the adapters that are trained."""
    if config.dtype == "nf4":
        lora.quantize_base(model)
    options = {"dropout": config.lora_dropout, "merged": config.lora_forward == "merged"}
    lora.inject(model, config.target_modules, rank, config.lora_alpha, **options)


def shard(module: Policy | Critic, config: Config, rank: int, device: torch.device) -> None:
    """Shards a policy or critic. A base that is trained (`rank` 0) is float32, and cast to `dtype` to compute.

    Raises ValueError if that base has experts.
    """
    model: PreTrainedModel = module.train().model
    if not rank and lora.mixtures(model):
        raise ValueError("a model with experts learns by adapters alone; set lora_rank (or critic_lora_rank) above 0")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fsdp_utils.shard(
        module,
        model.base_model.layers,
        device,
        config.fsdp_size,
        compute_dtype=None if rank else getattr(torch, config.compute_dtype),
        param_offload=config.offload == "all",
    )


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
