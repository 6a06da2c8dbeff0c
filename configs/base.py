"""The configuration: one flat dataclass.

Every field is an option of the command line, of the same name; its text here is its `--help`. wandb is configured by
its own variables, WANDB_MODE and WANDB_PROJECT. PROFILE_STEP=N writes a trace of step N (runtime/tracking.py),
USE_SHM=1 copies the model into memory before it is loaded, for slow disks (runtime/shared_memory.py), and SHARE_BASE=1
keeps one copy of the base on a GPU instead of two, which has not been run on one (runtime/shared_base.py).
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from configs.checks import BASE, check_together, check_value


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with its default and its help text. more: limits of its value (configs/checks.py), `group`, which begins
    a section of `--help`, and arguments for argparse.
    """
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: str = option("runs/grpo", "The run's folder; an older run's is renamed.", group="The run")
    steps: int = option(100, "Number of training steps, each a rollout and its updates.", least=1)
    seed: int = option(0, "The seed of the order of problems, the adapter and every sampled token.", least=0)
    eval_every: int = option(10, "Steps between evaluations; 0 evaluates only first and last.", least=0)
    eval_problems: int = option(256, "Number of held-out problems per evaluation, of each task.", least=1)
    eval_samples: int = option(1, "Sampled completions per held-out problem, beside a greedy one.", least=1)
    save_every: int = option(50, "Steps between checkpoints; 0 saves only at the end.", least=0)
    resume: str = option(
        "", "Resumes from the run's newest whole checkpoint or, with a value, from that one.", nargs="?", const="latest"
    )
    max_useless: int = option(
        20, "Stops after so many steps in a row with equal rewards; 0 turns all health checks off.", least=0
    )

    task: str = option(
        "own",
        "Rows of reward.TASKS, comma-separated, each with an adapter of its own; own: your data and reward.",
        group="The task",
    )
    data: str = option("", "A CSV, JSONL or Parquet file, a folder, or a dataset of the hub; empty: the task's own.")
    prompt_field: str = option("", "The data's column with the prompt; default: prompt, question or problem.")
    answer_field: str = option("", "The data's column with the answer, as verl's reward_model.ground_truth.")
    reward: list[str] = option([], "Functions FILE.py:NAME or FILE.py:NAME=WEIGHT; empty: the task's score.")
    reward_timeout: float = option(60.0, "Seconds after which a call of such a function counts 0.", above=0, most=1e6)
    instruction: str | None = option(None, "Text after each problem, on a new line; default: the task's own.")
    system_prompt: str | None = option(None, "The chat's system turn; default: the chat template's own.")
    chat_template_kwargs: list[str] = option([], "Values for the chat template, NAME=JSON: enable_thinking=false.")

    model: str = option("Qwen/Qwen2.5-3B-Instruct", "A folder, a name on the hub, or 'tiny'.", group="Model and LoRA")
    dtype: Literal["bfloat16", "float32", "nf4"] = option(
        "bfloat16", "The base's dtype; nf4 stores it in four bits here (QLoRA) and computes in bfloat16."
    )
    lora_rank: int = option(
        32, "The rank of the adapters, of PPO's critic, too; 0 trains all weights, in float32.", least=0
    )
    lora_alpha: float = option(32.0, "The adapter's update is scaled by lora_alpha / lora_rank.", above=0)
    target_modules: list[str] = option(["all-linear"], "Names of the linears with adapters, or all-linear.")
    lora_adapter_path: str = option("", "An adapter folder to start from, of any rank; empty starts from the base.")
    ref_adapter_path: str = option(
        "", "The KL reference: an adapter folder, or 'base'; empty takes the adapter that the run starts from, if any."
    )

    prompts_per_step: int = option(64, "P, the number of problems per step.", least=1, group="Rollout")
    group_size: int = option(8, "G, the number of completions per problem.", least=1)
    max_prompt_length: int = option(512, "In tokens; problems with longer prompts are left out.", least=1)
    max_completion_length: int = option(1024, "In tokens; longer completions are truncated.", least=1)
    stop: list[str] = option(
        [], "Texts or special tokens that end a completion, in addition to the model's end tokens."
    )
    temperature: float = option(1.0, "The temperature of sampling and of logprobs.", least=0.01, most=2)
    tensor_parallel_size: int = option(1, "Ranks that share one vLLM engine.", least=1)
    gpu_memory_utilization: float = option(0.4, "The share of a GPU's memory that vLLM may use.", above=0, most=1)
    sync: Literal["adapter", "merged", "straight_through"] | None = option(
        None,
        "adapter (the default where possible) or merged weights; straight_through also trains on the merged weights.",
    )
    rollout_ranks: int = option(
        0, "How many processes, the last ones, only generate while the others only train; 0: all do both.", least=0
    )
    max_staleness: Literal[0, 1] = option(
        0, "1: generators sample the next batch while the trainers update, with weights that are one step old."
    )
    sleep_level: Literal[0, 1, 2] = option(
        0, "During updates vLLM's weights stay (0), move to the host (1) or are dropped and sent again (2)."
    )

    # None: the algorithm's choice, see `resolve_config` in configs/checks.py.
    algorithm: str = option("grpo", "A row of train_grpo.ALGORITHMS, or ppo (train_ppo.py).", group="The algorithm")
    clip_low: float | None = option(None, "Lower clip, ratio >= 1 - clip_low; default mostly 0.2.", least=0, most=1)
    clip_high: float | None = option(None, "Upper clip, ratio <= 1 + clip_high; default mostly 0.2.", least=0)
    kl_coef: float = option(0.0, "The weight of the KL penalty; 0: none.", least=0)
    kl_penalty: Literal["k2_loss", "k3_loss", "k1_reward", "k2_reward", "k3_reward"] = option(
        "k3_loss", "The estimator of the KL penalty, and whether it is added to the loss or subtracted from the reward."
    )
    entropy_coef: float = option(0.0, "The weight of the entropy bonus in the loss.", least=0)
    tis_mode: Literal["off", "token", "token_mask", "sequence", "sequence_mask"] | None = option(
        None, "Importance weights for the sampler mismatch, truncated or masked; default mostly token."
    )
    updates_per_rollout: int = option(1, "Optimizer updates per rollout, each on a share of its prompts.", least=1)
    epochs_per_rollout: int = option(1, "Passes over a rollout, each of updates_per_rollout updates.", least=1)

    learning_rate: float | None = option(
        None,
        "AdamW's peak learning rate; default: 3e-5 for adapters, of any rank, else 3e-6.",
        above=0,
        group="The update",
    )
    critic_learning_rate: float | None = option(
        None, "The peak learning rate of PPO's critic; default: ten times the policy's default.", above=0
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option("constant", "linear and cosine fall to 0 at the end.")
    warmup_steps: int = option(
        0, "First steps, over which the learning rate rises from 0; PPO trains only its critic in them.", least=0
    )
    tokens_per_microbatch: int = option(16384, "Most tokens of a rank's forward; one sequence may be longer.", least=1)
    gradient_checkpointing: Literal["full", "selective", "none"] = option(
        "full", "What the backward recomputes to save memory: full, whole blocks; selective, MLP activations; none."
    )
    fsdp_size: int = option(0, "Ranks that share one copy of the weights; 0 means all ranks.", least=0)
    sequence_parallel_size: int = option(
        1, "Ranks that share the tokens of each micro-batch (Ulysses): for long sequences.", least=1
    )
    offload: Literal["none", "optimizer", "all"] = option(
        "none", "Keeps optimizer state, or all shards and gradients too, in host memory: slower."
    )

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for the first value that cannot be right."""
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        check_together(self)

    @property
    def compute_dtype(self) -> str:
        """The dtype of matrix products here, and of the weights in vLLM."""
        return "bfloat16" if self.dtype == "nf4" else self.dtype

    @property
    def tasks(self) -> list[str]:
        """The rows of reward.TASKS that are learned."""
        return self.task.split(",")

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are trained: one, lora.POLICY, or the task's for each of several."""
        return self.tasks if len(self.tasks) > 1 else ["policy"]

    @property
    def sends_adapter(self) -> bool:
        """Whether a sync sends the adapter alone, which is the default where vLLM can run it."""
        possible = 0 < self.lora_rank <= 512 and self.dtype != "nf4" and self.sleep_level != 2
        return self.sync == "adapter" or (self.sync is None and possible)

    @property
    def straight_through(self) -> bool:
        """Whether the update computes with the merged weights, and gradients pass through their rounding."""
        return self.sync == "straight_through"

    @property
    def kl_estimator(self) -> str:
        """k1, k2 or k3, see train_grpo.kl."""
        return self.kl_penalty.partition("_")[0]

    @property
    def kl_in_loss(self) -> bool:
        """Whether there is a KL penalty, and it is part of the loss."""
        return self.kl_coef > 0 and self.kl_penalty.endswith("_loss")

    @property
    def kl_in_reward(self) -> bool:
        """Whether there is a KL penalty, and it is part of the reward: of each token's in PPO, which has such rewards;
        elsewhere of a completion's, summed over its tokens, which is the same total.
        """
        return self.kl_coef > 0 and self.kl_penalty.endswith("_reward")

    @property
    def reference_adapter(self) -> str:
        """The folder of the frozen adapter that is the KL reference; empty if it is the base, or there is none."""
        return "" if self.ref_adapter_path == BASE else self.ref_adapter_path

    @property
    def run_folder(self) -> Path:
        """The folder of everything that the run writes."""
        return Path(self.output_dir)

    @property
    def model_source(self) -> str:
        """The model's folder, absolute, or its name on the hub; `tiny` is part of the repository."""
        folder = Path(__file__).with_name("tiny") if self.model == "tiny" else Path(self.model)
        return str(folder.absolute()) if folder.exists() else self.model

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_length + self.max_completion_length
