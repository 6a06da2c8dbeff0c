"""The configuration: one flat dataclass, and the command line made from it.

A config file is Python that says `config = Config(...)` and lists only what differs from the defaults here:

    train_grpo.py --config configs/arithmetic_cpu.py --learning_rate 3e-4

Every field below is an option of the same name; its text here is its `--help`. Config files are code: run only
those that you trust.
"""

import dataclasses
import difflib
import runpy
import sys
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser


def option(default: Any, help: str, **argument: Any) -> Any:
    """A field with its default, its one-line explanation, and what else argparse should know of it."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **argument})
    return dataclasses.field(default=default, metadata={"help": help, **argument})


@dataclasses.dataclass(frozen=True)
class Config:
    # The run
    run_name: str = option("grpo", "the run's folder is OUTPUT_DIR/RUN_NAME; an older run there is moved aside")
    output_dir: str = option("runs", "where the folders of runs are")
    steps: int = option(100, "training steps; each is one rollout and one update")
    seed: int = option(0, "decides the order of problems, the adapter's start and every sampled token")
    eval_every: int = option(10, "steps between evaluations on held-out problems; 0: only at the end")
    eval_problems: int = option(256, "held-out problems per evaluation")
    eval_samples: int = option(1, "sampled completions per held-out problem, beside one greedy completion")
    save_every: int = option(50, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = option(2, "so many newest checkpoints are kept, and the best one; 0: all")
    resume: str = option(
        "", "go on from a checkpoint: alone, the run's newest whole one; or its folder", nargs="?", const="latest"
    )
    max_skipped: int = option(5, "stop after so many updates in a row had to be skipped for NaN or infinite gradients")
    max_mismatch: float = option(0.1, "stop if the sampler's KL from the trainer, per token, is above this; 0: never")
    profile: int = option(0, "write a torch profiler trace of this step, see tracking.py; 0: none")
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: online if logged in, else offline"
    )
    wandb_project: str = option("lorl", "the project in wandb")

    # The task
    task: str = option("gsm8k", "a row of reward.TASKS")
    data_dir: str = option("", "folder with the task's train.jsonl and test.jsonl; empty: the task knows where")
    cache_dir: str = option(".cache", "where downloads and the tiny model are kept")

    # The model and its adapter
    model: str = option("Qwen/Qwen2.5-3B-Instruct", "a folder or a name on the hub; 'tiny': made on the spot")
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "of the base weights, here and in vLLM; adapters are float32"
    )
    base_dtype: Literal["dtype", "nf4"] = option(
        "dtype", "how the frozen base is stored here; nf4: in four bits (QLoRA), and vLLM runs what those stand for"
    )
    target_modules: list[str] = option(["all-linear"], "the linears that get an adapter: names, or all-linear")
    lora_rank: int = option(32, "rank of the adapters; 0: no adapters, all parameters are trained (in float32)")
    lora_alpha: float = option(32.0, "the adapter's update is scaled by lora_alpha / lora_rank")
    use_rslora: bool = option(False, "rank-stabilised: scaled by lora_alpha / sqrt(lora_rank) instead")
    lora_dropout: float = option(0.0, "share of a layer's inputs that its adapter does not see in the update")
    lora_forward: Literal["factored", "merged"] = option(
        "factored", "merged: the update's forward uses the rounded sum of base and adapter, which is what vLLM runs"
    )
    lora_adapter_path: str = option("", "training starts from this adapter folder, of any rank; empty: from the base")
    ref_adapter_path: str = option("", "the adapter folder whose policy kl_coef holds on to; empty: the base")

    # Rollout
    prompts_per_step: int = option(64, "P: problems per step")
    group_size: int = option(8, "G: completions per problem; the group is each one's baseline, so at least 2")
    max_prompt_length: int = option(512, "tokens; problems with longer prompts are left out, and counted")
    max_completion_length: int = option(1024, "tokens; longer completions are cut off")
    temperature: float = option(1.0, "of sampling; logprobs are taken at the same temperature")
    tensor_parallel_size: int = option(1, "ranks that share one vLLM engine; divides the number of processes")
    gpu_memory_utilization: float = option(0.4, "share of each GPU's memory that vLLM may take")
    kv_cache_gb: float = option(0.0, "GiB of KV cache per engine, instead of that share; 0: by share (on a CPU: 1 GiB)")
    max_num_seqs: int = option(256, "sequences that one engine generates at a time")
    enforce_eager: bool = option(False, "vLLM without CUDA graphs: starts sooner, generates slower")
    sync: Literal["merged", "adapter"] = option(
        "merged", "merged: vLLM gets base plus adapter as weights; adapter: vLLM's own LoRA, lossless, generates slower"
    )
    sync_prefetch: bool = option(
        False, "gather the next weight while vLLM loads one: faster, for one weight more memory"
    )
    sleep_level: Literal[0, 1, 2] = option(
        0,
        "vLLM's GPU memory during the update. 0: stays; 1: its weights move to the host; 2: they go, and are all sent",
    )
    verify_every: int = option(50, "syncs between checks that vLLM runs the trained weights; 0: only the first")

    # The algorithm
    # Where the default is None, the algorithm decides: see `settle` in train_grpo.py.
    algorithm: str = option("grpo", "a row of train_grpo.ALGORITHMS; ppo: with train_ppo.py")
    clip_low: float | None = option(None, "the policy ratio is clipped below 1 - clip_low; mostly 0.2")
    clip_high: float | None = option(None, "and above 1 + clip_high; mostly 0.2")
    dual_clip: float = option(0.0, "a negative advantage counts at most so many times, e.g. 3; 0: no such bound")
    kl_coef: float = option(0.0, "weight of the KL divergence from the reference; 0: no reference forward at all")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "how one token tells of that divergence, see train_grpo.kl")
    kl_in: Literal["loss", "reward"] = option("loss", "where it is added or, from each completion's reward, subtracted")
    entropy_coef: float = option(0.0, "weight of the entropy bonus in the loss")
    tis_cap: float = option(2.0, "importance sampling: cap of trainer / sampler probability; 0: off")
    tis_mode: Literal["token", "token_mask", "sequence", "sequence_mask"] | None = option(
        None, "that probability of tokens or completions; above the cap truncated to it, or masked; mostly token"
    )
    max_rollouts: int | None = option(
        None, "dynamic sampling: at most so many rollouts per step until all groups have rewards that differ; mostly 1"
    )
    overlong_buffer: float | None = option(
        None, "last share of max_completion_length, over which a completion's reward falls by up to 1; mostly 0"
    )
    updates_per_rollout: int = option(1, "optimizer updates per rollout, each over its share of the prompts")
    epochs_per_rollout: int = option(1, "passes over a rollout, each of updates_per_rollout updates")
    opmd_tau: float = option(0.1, "opmd: weight of the squared distance from the policy that sampled")
    flowrl_beta: float = option(15.0, "flowrl: what one unit of advantage is worth in mean logprobs of a token")

    # The update
    learning_rate: float = option(1e-5, "of AdamW, after the warm-up")
    lr_schedule: Literal["constant", "linear", "cosine"] = option("constant", "linear and cosine fall to 0 at the end")
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    tokens_per_microbatch: int = option(16384, "a forward holds at most so many tokens (or one longer sequence)")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward: slower, far less memory")
    fsdp_size: int = option(0, "ranks that share one copy of the base; 0: all of them; 1: each has its own")
    reshard_after_forward: bool = option(
        True, "free whole weights between a block's forward and backward, gather again"
    )
    param_offload: bool = option(False, "shards, gradients and optimizer state live in host memory: slower")
    optimizer_offload: bool = option(False, "optimizer state lives in host memory, and on the GPU only for its step")
    use_shm: bool = option(False, "copy the model to /dev/shm before loading, once per host: for slow disks")

    # PPO's critic, train_ppo.py
    critic_learning_rate: float = option(1e-5, "of its AdamW")
    critic_lora_rank: int = option(0, "rank of its adapters; 0: all of its weights are trained")
    critic_warmup_steps: int = option(0, "first steps, in which only the critic learns")
    value_clip: float = option(0.2, "a value moves at most so far from the rollout's in one step; 0: freely")
    gamma: float = option(1.0, "discount of later rewards")
    gae_lambda: float = option(1.0, "of generalised advantage estimation; 1: no bias, 0: little variance")

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for the first value that cannot be right."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if value is None and field.default is None:
                continue
            if type(None) in getattr(kind, "__args__", ()):  # X | None; the argument parser below makes it X
                kind = kind.__args__[0]
            if kind in KINDS and type(value) not in KINDS[kind]:
                raise ValueError(f"{field.name} must be {kind.__name__}, not {value!r}")
            if kind in (int, float) and not abs(value) <= LARGEST[kind]:
                raise ValueError(f"{field.name} must be a number of at most {LARGEST[kind]}, not {value!r}")
            if kind is str and not value.isprintable():
                raise ValueError(f"{field.name} must be printable text, not {value!r}")
            choices = getattr(kind, "__args__", ()) if getattr(kind, "__origin__", None) is Literal else ()
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # "not >=" also refuses NaN
                raise ValueError(f"{name} must be at least {least}, not {value!r}")
        for name in ("temperature", "learning_rate", "critic_learning_rate", "lora_alpha", "gpu_memory_utilization"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)!r}")
        if self.gpu_memory_utilization > 1:
            raise ValueError(f"gpu_memory_utilization is a share, at most 1, not {self.gpu_memory_utilization!r}")
        for name in ("clip_low", "overlong_buffer", "gamma", "gae_lambda"):
            if (getattr(self, name) or 0) > 1:
                raise ValueError(f"{name} must be at most 1, not {getattr(self, name)!r}")
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be more than 1, or 0 for none, not {self.dual_clip!r}")
        if self.group_size < 2 and self.algorithm not in WITHOUT_GROUPS:
            raise ValueError(
                f"group_size must be at least 2, not {self.group_size!r}: each completion is measured against the "
                f"others of its group (not so with {', '.join(WITHOUT_GROUPS)})"
            )
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps must be fewer than the {self.steps} steps, not {self.warmup_steps!r}")
        names = self.target_modules
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"target_modules must be a list of names, or [all-linear], not {names!r}")
        if not self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be less than 1, not {self.lora_dropout!r}")
        if self.lora_dropout and self.lora_forward == "merged":
            raise ValueError("lora_dropout cannot act inside a merged weight; set lora_forward factored")
        if self.lora_rank == 0:
            self.refuse_adapter_options()
        if self.ref_adapter_path and not self.kl_coef and self.algorithm != "flowrl":
            raise ValueError("ref_adapter_path has no effect without kl_coef; set kl_coef above 0")
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(f"updates_per_rollout must divide prompts_per_step, not {self.updates_per_rollout!r}")
        if self.profile > self.steps:
            raise ValueError(f"profile must name one of the {self.steps} steps, not {self.profile!r}")
        if Path(self.run_name).name != self.run_name or self.run_name in ("", ".", "..") or len(self.run_name) > 128:
            raise ValueError(f"run_name must be the name of one folder, of at most 128 characters: {self.run_name!r}")
        if not self.wandb_project or set(self.wandb_project) & set("/\\#?%:") or len(self.wandb_project) > 128:
            raise ValueError(
                f"wandb_project must have 1 to 128 characters, none of / \\ # ? % :, not {self.wandb_project!r}"
            )
        if not self.model:
            raise ValueError("model must be a folder, a name on the hub or 'tiny', not ''")
        if self.sync == "adapter" and self.lora_rank > 512:
            raise ValueError(f"sync adapter: vLLM's LoRA has ranks up to 512, not {self.lora_rank!r}; use sync merged")
        if self.sync == "adapter" and self.lora_rank == 0:
            raise ValueError("sync adapter: with lora_rank 0 there is no adapter; use sync merged")
        if self.sync == "adapter" and self.base_dtype == "nf4":
            raise ValueError(
                "base_dtype nf4 is not the base that vLLM has, which sync adapter never sends; use sync merged"
            )
        if self.sync == "adapter" and self.lora_forward == "merged":
            raise ValueError(
                "lora_forward merged is the weight that sync merged sends; use that, or lora_forward factored"
            )
        if self.sync == "adapter" and self.sleep_level == 2:
            raise ValueError("sleep_level 2 discards vLLM's weights, which sync adapter never sends; use sleep_level 1")

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_length + self.max_completion_length

    def refuse_adapter_options(self) -> None:
        """Raises ValueError for what makes no sense without adapters."""
        for name in ("lora_dropout", "lora_adapter_path", "ref_adapter_path", "use_rslora"):
            if getattr(self, name):
                raise ValueError(f"{name} needs an adapter, but lora_rank is 0; set lora_rank above 0")
        if self.lora_forward == "merged":
            raise ValueError("lora_forward merged needs an adapter, but lora_rank is 0; set lora_rank above 0")
        if self.base_dtype == "nf4":
            raise ValueError("base_dtype nf4 is for a frozen base, but lora_rank 0 trains it; set lora_rank above 0")
        if self.kl_coef:
            raise ValueError("kl_coef needs the base as reference, and lora_rank 0 trains it away; set kl_coef 0")


KINDS = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}  # what a field of each kind may hold
LARGEST = {int: 2**31 - 1, float: 1e30}  # what torch and vLLM can count; neither NaN nor infinity is less
POSITIVE = "steps prompts_per_step max_prompt_length max_completion_length max_num_seqs eval_problems eval_samples "
POSITIVE += "tensor_parallel_size updates_per_rollout epochs_per_rollout tokens_per_microbatch group_size max_rollouts"
NOT_NEGATIVE = "seed eval_every save_every kv_cache_gb verify_every clip_low clip_high kl_coef tis_cap weight_decay "
NOT_NEGATIVE += (
    "max_grad_norm fsdp_size keep_checkpoints profile max_skipped max_mismatch lora_rank lora_dropout dual_clip "
)
NOT_NEGATIVE += "entropy_coef overlong_buffer opmd_tau flowrl_beta warmup_steps gamma gae_lambda critic_lora_rank "
NOT_NEGATIVE += "critic_warmup_steps value_clip"
LEAST = dict.fromkeys(POSITIVE.split(), 1) | dict.fromkeys(NOT_NEGATIVE.split(), 0)
WITHOUT_GROUPS = ("ppo", "reinforce_pp")  # algorithms whose baseline is not the group


class OneLineParser(HfArgumentParser):
    """An argument parser whose errors are ValueErrors of one line."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse_config(arguments: list[str], description: str) -> Config:
    """The `Config` of a command line: the file after `--config`, then `--field value` on top of it.

    Raises ValueError or OSError of one line for whatever is wrong; `--help` prints all fields and exits.
    """
    parser = OneLineParser(Config, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", required="-h" not in arguments and "--help" not in arguments, help="a file of configs/"
    )
    known, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**dataclasses.asdict(read_config_file(known.config)))
    config, _, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        fields = [f"--{field.name}" for field in dataclasses.fields(Config)]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], fields, n=1, cutoff=0.0)
        raise ValueError(f"unknown option {unknown[0]!r}; the nearest there is: {nearest[0]}")
    return config


def read_config_file(path: str) -> Config:
    """Runs a config file and returns its `config`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path!r}; see configs/ for those there are")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can import configs.base from anywhere
    try:
        config = runpy.run_path(path).get("config")
    except (Exception, SystemExit) as error:
        raise ValueError(f"config file {path!r} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, Config):
        raise ValueError(f"config file {path!r} must define config = Config(...), found {type(config).__name__}")
    return config
