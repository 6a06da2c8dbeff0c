"""The configuration: one flat dataclass.

Every field is an option of the command line, of the same name; its text here is its `--help`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from configs.checks import check_together, check_value


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with its default, its explanation, the limits of its value (configs/checks.py), and more for argparse."""
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    # The run
    run_name: str = option("grpo", "the run's folder is OUTPUT_DIR/RUN_NAME; an older run there is moved aside")
    output_dir: str = option("runs", "where the folders of runs are")
    steps: int = option(100, "training steps; each is a rollout and what is learned from it", least=1)
    seed: int = option(0, "decides the order of problems, the adapter's start and every sampled token", least=0)
    eval_every: int = option(10, "steps between evaluations on held-out problems; 0: only first and last", least=0)
    eval_problems: int = option(256, "held-out problems per evaluation", least=1)
    eval_samples: int = option(1, "sampled completions per held-out problem, beside one greedy completion", least=1)
    save_every: int = option(50, "steps between checkpoints; 0: only at the end", least=0)
    keep_checkpoints: int = option(2, "so many newest checkpoints are kept, and the best one; 0: all", least=0)
    resume: str = option(
        "", "go on from a checkpoint: alone, the run's newest whole one; or its folder", nargs="?", const="latest"
    )
    max_skipped: int = option(
        5, "stop after so many updates were skipped for NaN or infinite gradients, some in every step", least=0
    )
    max_mismatch: float = option(
        0.1, "stop if the sampler's KL from the trainer, per token, is above this; 0: never", least=0
    )
    min_survival: float = option(
        0.5, "stop when merged weights keep less than this of the update for ten syncs; 0: never", least=0, most=1
    )
    max_useless: int = option(
        20, "stop after so many steps in a row whose rewards do not differ, which teach nothing; 0: never", least=0
    )
    profile: int = option(0, "write a torch profiler trace of this step, see runtime/tracking.py; 0: none", least=0)
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: $WANDB_MODE, or online if logged in, else offline"
    )
    wandb_project: str = option("lorl", "the project in wandb")

    # The task
    task: str = option("gsm8k", "a row of reward.TASKS")
    data_dir: str = option("", "folder with the task's train.jsonl and test.jsonl; empty: the task knows where")
    instruction: str | None = option(None, "follows each problem, on a line of its own; mostly what the task asks for")
    system_prompt: str | None = option(None, "the chat's system turn; mostly what the model's chat template has")
    flexible: bool = option(False, "a completion without a marked answer is read as its last number, see reward.py")
    cache_dir: str = option(".cache", "where downloads are kept")

    # The model and its adapter
    model: str = option("Qwen/Qwen2.5-3B-Instruct", "a folder or a name on the hub; 'tiny': configs/tiny")
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "of the base weights, here and in vLLM; adapters are float32"
    )
    base_dtype: Literal["dtype", "nf4"] = option(
        "dtype", "how the frozen base is stored here; nf4: in four bits (QLoRA), and vLLM runs what those stand for"
    )
    target_modules: list[str] = option(["all-linear"], "the linears that get an adapter: names, or all-linear")
    lora_rank: int = option(
        32, "rank of the adapters; 0: no adapters, all parameters are trained (in float32)", least=0
    )
    lora_alpha: float = option(32.0, "the adapter's update is scaled by lora_alpha / lora_rank", above=0)
    use_rslora: bool = option(False, "rank-stabilised: scaled by lora_alpha / sqrt(lora_rank) instead")
    lora_dropout: float = option(
        0.0, "share of a layer's inputs that its adapter does not see in the update", least=0, below=1
    )
    lora_forward: Literal["factored", "merged"] = option(
        "factored", "merged: the update's forward uses the rounded sum of base and adapter, which is what vLLM runs"
    )
    lora_adapter_path: str = option("", "training starts from this adapter folder, of any rank; empty: from the base")
    ref_adapter_path: str = option("", "the adapter folder whose policy kl_coef holds on to; empty: the base")

    # Rollout
    prompts_per_step: int = option(64, "P: problems per step", least=1)
    group_size: int = option(8, "G: completions per problem; the group is each one's baseline, so at least 2", least=1)
    max_prompt_length: int = option(512, "tokens; problems with longer prompts are left out", least=1)
    max_completion_length: int = option(1024, "tokens; longer completions are cut off", least=1)
    temperature: float = option(1.0, "of sampling; logprobs are taken at the same temperature", least=0.01)
    tensor_parallel_size: int = option(1, "ranks that share one vLLM engine; divides the number of processes", least=1)
    gpu_memory_utilization: float = option(0.4, "share of each GPU's memory that vLLM may take", above=0, most=1)
    kv_cache_gb: float = option(
        0.0, "GiB of KV cache per engine, instead of that share; 0: by share (on a CPU: 1 GiB)", least=0
    )
    max_num_seqs: int = option(256, "sequences that one engine generates at a time", least=1)
    enforce_eager: bool = option(False, "vLLM without CUDA graphs: starts sooner, generates slower")
    sync: Literal["merged", "adapter"] | None = option(
        None,
        "adapter: vLLM's own LoRA, loses nothing; merged: new weights, faster, lossy in bfloat16; mostly adapter",
    )
    sync_prefetch: bool = option(
        False, "gather the next weight while vLLM loads one: faster, for one weight more memory"
    )
    sleep_level: Literal[0, 1, 2] = option(
        0,
        "vLLM's GPU memory during the update. 0: stays; 1: its weights move to the host; 2: they go, and are all sent",
    )
    verify_every: int = option(
        50, "steps between proofs, by a test adapter, that vLLM runs the trained weights; 0: only at the start", least=0
    )

    # The algorithm
    # Where the default is None, the algorithm decides: see `resolve_config` in configs/checks.py.
    algorithm: str = option("grpo", "a row of train_grpo.ALGORITHMS; ppo: with train_ppo.py")
    clip_low: float | None = option(None, "the policy ratio is clipped below 1 - clip_low; mostly 0.2", least=0, most=1)
    clip_high: float | None = option(None, "and above 1 + clip_high; mostly 0.2", least=0)
    dual_clip: float = option(
        0.0, "a negative advantage counts at most so many times, e.g. 3; 0: no such bound", least=0
    )
    kl_coef: float = option(
        0.0, "weight of the KL divergence from the reference; 0: no reference forward at all", least=0
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "how one token tells of that divergence, see train_grpo.kl")
    kl_in: Literal["loss", "reward"] = option("loss", "where it is added or, from each completion's reward, subtracted")
    entropy_coef: float = option(0.0, "weight of the entropy bonus in the loss", least=0)
    tis_cap: float = option(2.0, "importance sampling: cap of trainer / sampler probability; 0: off", least=0)
    tis_mode: Literal["token", "token_mask", "sequence", "sequence_mask"] | None = option(
        None, "that probability of tokens or completions; above the cap truncated to it, or masked; mostly token"
    )
    max_rollouts: int | None = option(
        None,
        "dynamic sampling: at most so many rollouts per step until all groups have rewards that differ; mostly 1",
        least=1,
    )
    overlong_buffer: float | None = option(
        None,
        "last share of max_completion_length, over which a completion's reward falls by up to 1; mostly 0",
        least=0,
        most=1,
    )
    updates_per_rollout: int = option(1, "optimizer updates per rollout, each over its share of the prompts", least=1)
    epochs_per_rollout: int = option(1, "passes over a rollout, each of updates_per_rollout updates", least=1)
    opmd_tau: float = option(0.1, "opmd: weight of the squared distance from the policy that sampled", least=0)
    flowrl_beta: float = option(
        15.0, "flowrl: what one unit of advantage is worth in mean logprobs of a token", least=0
    )

    # The update
    learning_rate: float = option(1e-5, "of AdamW, after the warm-up", above=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = option("constant", "linear and cosine fall to 0 at the end")
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", least=0)
    weight_decay: float = option(0.0, "of AdamW", least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", least=0)
    tokens_per_microbatch: int = option(
        16384, "a forward holds at most so many tokens (or one longer sequence)", least=1
    )
    gradient_checkpointing: bool = option(True, "recompute activations in the backward: slower, far less memory")
    fsdp_size: int = option(0, "ranks that share one copy of the base; 0: all of them; 1: each has its own", least=0)
    reshard_after_forward: bool = option(
        True, "free whole weights between a block's forward and backward, gather again"
    )
    param_offload: bool = option(False, "shards, gradients and optimizer state live in host memory: slower")
    optimizer_offload: bool = option(False, "optimizer state lives in host memory, and on the GPU only for its step")
    use_shm: bool = option(False, "copy the model to /dev/shm before loading, once per host: for slow disks")

    # PPO's critic, train_ppo.py
    critic_learning_rate: float = option(1e-5, "of its AdamW", above=0)
    critic_lora_rank: int = option(0, "rank of its adapters; 0: all of its weights are trained", least=0)
    critic_warmup_steps: int = option(0, "first steps, in which only the critic learns", least=0)
    value_clip: float = option(0.2, "a value moves at most so far from the rollout's in one step; 0: freely", least=0)
    gamma: float = option(1.0, "discount of later rewards", least=0, most=1)
    gae_lambda: float = option(
        1.0, "of generalised advantage estimation; 1: no bias, 0: little variance", least=0, most=1
    )

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for the first value that cannot be right."""
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        check_together(self)

    @property
    def sends_adapter(self) -> bool:
        """Whether vLLM runs the adapter beside its weights, as it does by default wherever it can."""
        merged = self.base_dtype == "nf4" or self.lora_forward == "merged" or self.sleep_level == 2
        return self.sync == "adapter" or (self.sync is None and 0 < self.lora_rank <= 512 and not merged)

    @property
    def run_folder(self) -> Path:
        """Where everything of the run is."""
        return Path(self.output_dir, self.run_name)

    @property
    def model_source(self) -> str:
        """The model's folder, or its name on the hub; `tiny` comes with the code."""
        return str(Path(__file__).with_name("tiny")) if self.model == "tiny" else self.model

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_length + self.max_completion_length
