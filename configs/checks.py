"""What the values of a configuration may be, each by itself and together."""

import dataclasses
from collections.abc import Iterator
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

LIMITS = {"least": ("at least", ge), "above": ("more than", gt), "most": ("at most", le), "below": ("less than", lt)}
KINDS = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}  # what a field of each kind may hold
MULTILINE = ("instruction", "system_prompt")  # texts for the model, which may have several lines
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
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices and value not in choices:
        raise ValueError(f"{field.name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    for limit, (words, holds) in LIMITS.items():
        if limit in field.metadata and not holds(value, field.metadata[limit]):
            raise ValueError(f"{field.name} must be {words} {field.metadata[limit]}, not {value!r}")


def contradictions(c: Any) -> Iterator[tuple[Any, str]]:
    """Of a `Config`, pairs of: is it wrong, and what to say then."""
    yield 0 < c.dual_clip <= 1, f"dual_clip must be more than 1, or 0 for none, not {c.dual_clip}"
    yield (
        c.warmup_steps and c.warmup_steps >= c.steps,
        f"warmup_steps must be fewer than the {c.steps} steps, not {c.warmup_steps}",
    )
    yield c.profile > c.steps, f"profile must name one of the {c.steps} steps, not {c.profile}"
    yield (
        c.prompts_per_step % c.updates_per_rollout,
        f"updates_per_rollout must divide prompts_per_step, not {c.updates_per_rollout}",
    )

    # Names
    names = c.target_modules
    yield (
        not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names),
        f"target_modules must be a list of names, or [all-linear], not {names!r}",
    )
    yield (
        Path(c.run_name).name != c.run_name or c.run_name in ("", ".", "..") or len(c.run_name) > 128,
        f"run_name must be the name of one folder, of at most 128 characters: {c.run_name!r}",
    )
    yield (
        not c.wandb_project or set(c.wandb_project) & set("/\\#?%:") or len(c.wandb_project) > 128,
        f"wandb_project must have 1 to 128 characters, none of / \\ # ? % :, not {c.wandb_project!r}",
    )
    yield not c.model, "model must be a folder, a name on the hub or 'tiny', not ''"

    # Adapters
    merged = c.lora_forward == "merged"
    yield c.lora_dropout and merged, "lora_dropout cannot act inside a merged weight; set lora_forward factored"
    if c.lora_rank == 0:
        for name in ("lora_dropout", "lora_adapter_path", "ref_adapter_path", "use_rslora"):
            yield getattr(c, name), f"{name} needs an adapter, but lora_rank is 0; set lora_rank above 0"
        yield merged, "lora_forward merged needs an adapter, but lora_rank is 0; set lora_rank above 0"
        yield (
            c.base_dtype == "nf4",
            "base_dtype nf4 is for a frozen base, but lora_rank 0 trains it; set lora_rank above 0",
        )
        yield c.kl_coef, "kl_coef needs the base as reference, and lora_rank 0 trains it away; set kl_coef 0"
    if c.sync == "adapter":
        yield c.lora_rank > 512, f"sync adapter: vLLM's LoRA has ranks up to 512, not {c.lora_rank}; use sync merged"
        yield c.lora_rank == 0, "sync adapter: with lora_rank 0 there is no adapter; use sync merged"
        yield (
            c.base_dtype == "nf4",
            "base_dtype nf4 is not the base that vLLM has, which sync adapter never sends; use sync merged",
        )
        yield merged, "lora_forward merged is the weight that sync merged sends; use that, or lora_forward factored"
        yield (
            c.sleep_level == 2,
            "sleep_level 2 discards vLLM's weights, which sync adapter never sends; use sleep_level 1",
        )
