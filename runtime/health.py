"""Whether a step taught anything and the sampler got it; what to say if not, and the likely causes.

Without rewards that differ there is nothing to learn from, however long the run goes on. All of this looks at a step's
metrics (docs/metrics.md) and at its logged samples; a loop that does not measure the rewards is not judged.
"""

import math
from collections.abc import Sequence
from typing import Any

from configs.base import Config
from runtime.tracking import shorten

SYNCS_LOST = 10  # in a row, after which a run ends

Metrics = dict[str, float]
Sample = dict[str, Any]  # a line of samples.jsonl


def rewards_differ(metrics: Metrics) -> bool:
    """Whether rewards differ where the algorithm compares them: within a group, or without groups within the step."""
    if "reward/mixed_groups_frac" in metrics:
        return metrics["reward/mixed_groups_frac"] > 0
    return metrics.get("reward/min", -math.inf) < metrics.get("reward/max", math.inf)


def what_was_seen(metrics: Metrics) -> str:
    """Of a step whose rewards do not differ: how they are.

    >>> what_was_seen({"reward/min": 0.0, "reward/max": 0.0})
    'all rewards are 0'
    >>> what_was_seen({"reward/min": 0.0, "reward/max": 1.0})
    'within each group all rewards are the same, from 0 to 1'
    """
    low, high = metrics.get("reward/min"), metrics.get("reward/max")
    if low is None or high is None:
        seen = "rewards do not differ"
    elif low == high:
        seen = f"all rewards are {low:g}"
    else:
        seen = f"within each group all rewards are the same, from {low:g} to {high:g}"
    if "critic/loss" in metrics:
        seen += ", which only the critic learns; the policy follows the critic's errors"
    return seen


def explain(metrics: Metrics, samples: Sequence[Sample]) -> str:
    """The line about a step that taught nothing, with one of its completions."""
    line = f"nothing to learn from in this step: {what_was_seen(metrics)}"
    cut_off = metrics.get("completion/truncated_frac")
    line += f"; {cut_off:.0%} of the completions are cut off" if cut_off else ""
    if samples:
        sample = samples[0]
        line += (
            f". A sample: {shorten(sample['completion'])!r} (answer {sample['extracted']}, truth {sample['answer']})"
        )
    return line


def likely_causes(metrics: Metrics, samples: Sequence[Sample], config: Config) -> list[str]:
    """Why rewards do not differ, judged by how they are; the likeliest first."""
    low, high = metrics.get("reward/min", 0.0), metrics.get("reward/max", 0.0)
    if low < high:
        return [
            "each problem is either always or never solved: take problems in between",
            f"too few completions per problem: raise group_size, which is {config.group_size}",
            f"completions of a problem are too much alike: raise temperature, which is {config.temperature:g}",
        ]
    if low >= 1:
        return ["the problems are too easy: take harder ones"]
    causes = []
    cut_off = metrics.get("completion/truncated_frac", 0.0)
    if cut_off:
        limit = f"max_completion_length {config.max_completion_length}"
        causes.append(f"{cut_off:.0%} of the completions are cut off at {limit}, perhaps before their answer")
    if samples and all(sample["extracted"] is None for sample in samples):
        causes.append(f"the answers have another format than the task reads: none was found in {len(samples)} samples")
    elif low > 0:
        causes.append("every completion has the same part of the reward, and none has more")
    else:
        causes.append("the answers have another format than the task reads")
    return [*causes, "the problems are too hard for the model"]


def reason_to_stop(steps: int, metrics: Metrics, samples: Sequence[Sample], config: Config) -> str | None:
    """What ends a run after so many steps in a row that taught nothing; None as long as they are few enough."""
    if not 0 < config.max_useless <= steps:
        return None
    causes = "; or ".join(likely_causes(metrics, samples, config))
    return (
        f"nothing to learn from in {steps} steps in a row (max_useless): {what_was_seen(metrics)}. "
        f"Likely causes: {causes}. See samples.jsonl"
    )


def reason_of_losses(syncs: int, metrics: Metrics, config: Config) -> str | None:
    """What ends a run after so many syncs in a row that lost most of the update; None while they are few enough."""
    if syncs < SYNCS_LOST:
        return None
    return (
        f"for {syncs} syncs in a row the sampler got less of the update than min_survival {config.min_survival:g}: "
        f"{explain_survival(metrics['sync/update_survival'])}. With min_survival 0 a run goes on regardless"
    )


def explain_survival(survival: float) -> str:
    """What it means that merging loses a part of the update, and the ways out with what they cost.

    survival: cosine between the update and what rounding to the weights' dtype leaves of it (`sync/update_survival`).
    """
    return (
        f"merging keeps {survival:.2f} of the update (cosine; 1: all of it), because small changes round away. Ways "
        "out: sync adapter loses nothing, but vLLM generates slower; lora_forward merged trains the rounded weights "
        "themselves; a larger learning_rate or lora_alpha makes larger updates"
    )
