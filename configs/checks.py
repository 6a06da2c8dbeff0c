"""What the values of a configuration may be, each by itself and together."""

import dataclasses
from operator import ge, gt, le
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

LIMITS = {"least": ("at least", ge), "above": ("more than", gt), "most": ("at most", le)}
KINDS = {int: (int,), float: (float, int), str: (str,)}  # what a field of each kind may hold
MULTILINE = ("instruction", "system_prompt")  # texts for the model, which may have several lines
BASE = "base"  # a ref_adapter_path: the model without adapters
LARGEST = {int: 2**31 - 1, float: 1e30}  # what torch and vLLM can count; neither NaN nor infinity is less


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raises ValueError unless the value is of the field's type and within its limits."""
    kind = field.type
    if value is None and field.default is None:
        return
    if type(None) in getattr(kind, "__args__", ()):  # X | None; the argument parser makes it X
        kind = kind.__args__[0]
    if kind in KINDS and type(value) not in KINDS[kind]:
        raise ValueError(f"{field.name} must be {kind.__name__}, not {value!r}")
    if kind in LARGEST and not abs(value) <= LARGEST[kind]:
        raise ValueError(f"{field.name} must be a number of at most {LARGEST[kind]}, not {value!r}")
    text = value.replace("\n", "") if field.name in MULTILINE else value
    if kind is str and not text.isprintable():
        raise ValueError(f"{field.name} must be printable text, not {value!r}")
    if kind == list[str] and not (isinstance(value, list) and all(isinstance(text, str) and text for text in value)):
        raise ValueError(f"{field.name} must be a list of texts, none of them empty, not {value!r}")
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices and value not in choices:
        raise ValueError(f"{field.name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    for limit, (words, holds) in LIMITS.items():
        if limit in field.metadata and not holds(value, field.metadata[limit]):
            raise ValueError(f"{field.name} must be {words} {field.metadata[limit]}, not {value!r}")


def refuse(wrong: Any, message: str) -> None:
    """Raises ValueError with the message if `wrong` is true."""
    if wrong:
        raise ValueError(message)


def check_together(c: Any) -> None:
    """Raises ValueError for values of a `Config` that contradict each other."""
    refuse(
        c.warmup_steps and c.warmup_steps >= c.steps,
        f"warmup_steps must be fewer than the {c.steps} steps, not {c.warmup_steps}",
    )
    refuse(
        c.prompts_per_step % c.updates_per_rollout,
        f"updates_per_rollout must divide prompts_per_step, not {c.updates_per_rollout}",
    )

    # Separate generators
    refuse(
        c.rollout_ranks and c.sleep_level,
        f"sleep_level {c.sleep_level} frees memory that trainer and sampler share; with rollout_ranks set it to 0",
    )
    refuse(
        c.max_staleness and not c.rollout_ranks,
        "max_staleness needs processes that generate during the update; set rollout_ranks above 0",
    )

    # Names
    refuse(not c.target_modules, "target_modules must be a list of names, or [all-linear], not []")
    refuse(
        Path(c.output_dir).name in ("", "..") or len(Path(c.output_dir).name) > 128,
        f"output_dir must be a folder of the run's own, named by at most 128 characters: {c.output_dir!r}",
    )
    refuse(c.output_dir.startswith("~"), f"output_dir {c.output_dir!r}: write the home folder's path out")
    for name in ("prompt_field", "answer_field"):
        refuse(getattr(c, name) and not c.data, f"{name} names a column of data, which is not given; set data")
    refuse(not c.model, "model must be a folder, a name on the hub or 'tiny', not ''")

    # Adapters
    if c.lora_rank == 0:
        for name in ("lora_adapter_path", "ref_adapter_path"):
            refuse(getattr(c, name), f"{name} needs an adapter, but lora_rank is 0; set lora_rank above 0")
        refuse(c.straight_through, "sync straight_through: with lora_rank 0 there is no adapter; use sync merged")
        refuse(c.dtype == "nf4", "dtype nf4 is for a frozen base, but lora_rank 0 trains it; set lora_rank above 0")
        refuse(c.kl_coef, "kl_coef needs the base as reference, and lora_rank 0 trains it away; set kl_coef 0")
    if c.sync == "adapter":
        refuse(c.lora_rank > 512, f"sync adapter: vLLM's LoRA has ranks up to 512, not {c.lora_rank}; use sync merged")
        refuse(c.lora_rank == 0, "sync adapter: with lora_rank 0 there is no adapter; use sync merged")
        refuse(
            c.dtype == "nf4", "dtype nf4 is not the base that vLLM has, which sync adapter never sends; use sync merged"
        )
        refuse(
            c.sleep_level == 2,
            "sleep_level 2 discards vLLM's weights, which sync adapter never sends; use sleep_level 1",
        )


def default_rate(config: Any) -> float:
    """The learning rate of a `Config` that names none.

    LoRA takes some ten times the rate at which all weights are trained, and nearly the same at any rank while alpha is
    the same (Schulman et al. 2025, "LoRA Without Regret"). 3e-5 is that of verl's published runs (docs/peers.md).
    """
    return 3e-5 if config.lora_rank else 3e-6


def resolve_config(config: Any, algorithm: Any) -> Any:
    """A `Config` with the algorithm's choice, or a rule's, wherever an option is None. Raises ValueError for
    contradictions.

    algorithm: the row of train_grpo.ALGORITHMS, or PPO's.
    """
    name, settings = config.algorithm, algorithm.settings
    for option in () if algorithm.clips else ("clip_low", "clip_high"):
        refuse(getattr(config, option) is not None, f"{name} clips nothing: leave out {option}")
    optional = {field.name for field in dataclasses.fields(config) if field.default is None}
    for option in settings:
        if option not in optional:
            raise ValueError(f"{name} sets {option!r}, and may set only options that are None by default")
    tis_mode = "sequence" if algorithm.whole_sequences else "token"
    usual = {"clip_low": 0.2, "clip_high": 0.2, "tis_mode": tis_mode}
    usual["learning_rate"] = default_rate(config)
    usual["critic_learning_rate"] = 10 * default_rate(config)  # as verl and OpenRLHF have it
    chosen = {option: value for option, value in (usual | settings).items() if getattr(config, option) is None}
    if (config.kl_coef or algorithm.reference) and config.lora_rank and not config.ref_adapter_path:
        chosen["ref_adapter_path"] = config.lora_adapter_path or BASE
    config = dataclasses.replace(config, **chosen)
    check_algorithm(config, algorithm)
    check_tasks(config, algorithm)
    return config


def check_algorithm(c: Any, algorithm: Any) -> None:
    """Raises ValueError for values of a complete `Config` that contradict its algorithm."""
    name = c.algorithm
    refuse(
        algorithm.groups and c.group_size < 2,
        f"{name} measures each completion against its group: group_size must be at least 2, not 1",
    )
    refuse(
        algorithm.advantage and c.prompts_per_step // len(c.tasks) * c.group_size < 2,
        f"one completion per task and step has nothing to compare it with: prompts_per_step must exceed {len(c.tasks)}",
    )
    refuse(
        c.ref_adapter_path and not (c.kl_coef or algorithm.reference),
        "ref_adapter_path has no effect without kl_coef; set kl_coef above 0",
    )
    refuse(
        algorithm.whole_sequences and c.tis_mode.startswith("token"),
        f"{name} weighs whole completions: tis_mode must be sequence..., not {c.tis_mode!r}",
    )
    refuse(
        c.max_staleness and c.tis_mode == "off",
        "max_staleness 1 learns from an older policy, which needs importance weights: tis_mode must not be off",
    )
    refuse(
        algorithm.reference and c.kl_coef,
        f"{name} has the reference in its objective already: kl_coef must be 0, not {c.kl_coef!r}",
    )
    refuse(
        algorithm.reference and c.lora_rank == 0,
        f"{name} needs the base as reference, and lora_rank 0 trains it away; set lora_rank above 0",
    )
    refuse(
        algorithm.unit_rewards and (algorithm.overlong or c.kl_in_reward),
        f"{name} needs rewards from 0 to 1: no overlong penalty, and kl_penalty must be ..._loss, not {c.kl_penalty!r}",
    )


def check_tasks(c: Any, algorithm: Any) -> None:
    """Raises ValueError for what several tasks, each of which trains an adapter of its own, cannot have."""
    count = len(c.tasks)
    if count == 1:
        return
    refuse(len(set(c.tasks)) < count, f"task {c.task!r} names a task twice; leave one out")
    for name in c.tasks:
        refuse(
            name in ("policy", "reference") or not name.replace("-", "_").isidentifier(),
            f"task {c.task!r}: {name!r} cannot be an adapter's name; use letters, digits, - and _, without spaces",
        )
    refuse(
        c.prompts_per_step % (count * c.updates_per_rollout),
        f"{count} tasks share the problems of each update equally: prompts_per_step must be a multiple of "
        f"{count * c.updates_per_rollout}, not {c.prompts_per_step}",
    )
    refuse(
        c.data or "own" in c.tasks,
        "several tasks have problems of their own: leave out data, and give your task a row of reward.TASKS",
    )
    refuse(c.lora_adapter_path, f"lora_adapter_path is one adapter, and {count} tasks train {count}; leave it out")
    refuse(
        not c.sends_adapter,
        f"{count} tasks share one base in vLLM, with an adapter each: that needs sync adapter, a lora_rank from 1 to "
        "512, a dtype other than nf4, and a sleep_level below 2",
    )
    refuse(
        not algorithm.advantage or algorithm.prompt_head or algorithm.rollouts > 1,
        f"{c.algorithm} trains one task at a time: its critic, its prompt head or its choice of groups is one for all; "
        "take another algorithm, or one task",
    )
