"""The health of a run: did a step teach anything, and did the sampler get it? If not: likely causes, and when to stop.

If all rewards of a group are equal, there is nothing to learn from. Everything here reads a step's metrics
(docs/metrics.md) and its logged samples. A loop that does not measure rewards is not judged by them.
"""

import math
from collections.abc import Sequence
from typing import Any

from configs.base import Config
from runtime.checkpoint import Progress
from runtime.tracking import LOW_SURVIVAL, RunLog, judged, shorten

StepMetrics = dict[str, float]
Sample = dict[str, Any]  # a line of samples.jsonl
EXPLAIN_EVERY = 10  # steps between two full explanations of steps that teach nothing
MAX_SKIPPED = 5  # updates skipped for a NaN or infinite loss or gradient, some in every step
MAX_MISMATCH = 0.1  # nats per token, KL of the sampler from the trainer
MIN_SURVIVAL = 0.5  # cosine between the update and what merging keeps of it
SYNCS_LOST = 10  # a run stops after so many syncs in a row that lost most of the update


class HealthMonitor:
    """Checks the metrics of every step. Counts that must survive a resume are in `Progress`."""

    def __init__(self, config: Config, log: RunLog):
        self.config, self.log = config, log
        self.last_explained = -math.inf  # step
        self.survival_explained = False

    def check(self, metrics: StepMetrics, progress: Progress) -> None:
        """Raises RuntimeError for metrics that show a broken run: updates of NaN, or a sampler with other weights."""
        skipped = metrics.get("skipped_updates", 0) + metrics.get("critic/skipped_updates", 0)
        progress.updates_skipped = progress.updates_skipped + skipped if skipped else 0
        if self.config.max_useless and progress.updates_skipped > MAX_SKIPPED:
            names = ("loss", "grad_norm", "critic/loss", "critic/grad_norm")
            seen = ", ".join(f"{name} {metrics[name]}" for name in names if name in metrics)
            raise RuntimeError(
                f"loss or gradients were NaN or infinite in {progress.updates_skipped:.0f} updates, some in every "
                f"one of the last steps, more than {MAX_SKIPPED}; the last step had {seen}"
            )
        mismatch = metrics.get("mismatch/kl", 0.0)
        if self.config.max_useless and mismatch > MAX_MISMATCH:
            raise RuntimeError(f"sampler and trainer differ by {mismatch:.3g} nats per token, above {MAX_MISMATCH}")

    def reason_to_stop(
        self, step: int, metrics: StepMetrics, samples: Sequence[Sample], progress: Progress
    ) -> str | None:
        """Counts steps that teach nothing and syncs that lose the update. Returns why the run must stop, or None."""
        useless = self.reason_of_useless_steps(step, metrics, samples, progress)
        return useless or self.reason_of_lost_updates(metrics.get("sync/update_survival", 1.0), progress)

    def reason_of_useless_steps(
        self, step: int, metrics: StepMetrics, samples: Sequence[Sample], progress: Progress
    ) -> str | None:
        """Counts steps in a row whose rewards do not differ, and explains some of them."""
        progress.steps_useless = count = 0 if rewards_differ(metrics) else progress.steps_useless + 1
        if not count:
            return None
        if step >= self.last_explained + EXPLAIN_EVERY:
            self.log.print(f"  {explain(metrics, samples)}")
            self.last_explained = step
        else:
            self.log.print(f"  nothing to learn from, {count} step{'s' * (count > 1)} in a row")
        if not 0 < self.config.max_useless <= count:
            return None
        causes = "; or ".join(likely_causes(metrics, samples, self.config))
        return (
            f"nothing to learn from in {count} steps in a row (max_useless): {describe_rewards(metrics)}. "
            f"Likely causes: {causes}. See samples.jsonl"
        )

    def reason_of_lost_updates(self, survival: float, progress: Progress) -> str | None:
        """Counts syncs in a row that kept too little of the update, and explains the first one."""
        if self.config.straight_through:  # the trainer runs the rounded weights, too
            return None
        if survival < LOW_SURVIVAL and not self.survival_explained:
            self.survival_explained = True
            self.log.print(f"  {explain_survival(survival)}")
        progress.syncs_lost = progress.syncs_lost + 1 if survival < MIN_SURVIVAL else 0
        if not self.config.max_useless or progress.syncs_lost < SYNCS_LOST:
            return None
        return (
            f"for {progress.syncs_lost} syncs in a row the sampler got less of the update than {MIN_SURVIVAL:g} "
            f"(cosine): {explain_survival(survival)}. With max_useless 0 no such check stops a run"
        )


def rewards_differ(metrics: StepMetrics) -> bool:
    """Whether rewards differ where the algorithm compares them: within a group or, without groups, within a task."""
    if "reward/mixed_groups_frac" in metrics:
        return metrics["reward/mixed_groups_frac"] > 0
    tasks = [name.removeprefix("reward/min") for name in metrics if name.startswith("reward/min/")] or [""]
    return any(
        metrics.get(f"reward/min{task}", -math.inf) < metrics.get(f"reward/max{task}", math.inf) for task in tasks
    )


def describe_rewards(metrics: StepMetrics) -> str:
    """Describes the rewards of a step in which they do not differ.

    >>> describe_rewards({"reward/min": 0.0, "reward/max": 0.0})
    'all rewards are 0'
    >>> describe_rewards({"reward/min": 0.0, "reward/max": 1.0})
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


def explain(metrics: StepMetrics, samples: Sequence[Sample]) -> str:
    """A line about a step that taught nothing, with one of its completions."""
    line = f"nothing to learn from in this step: {describe_rewards(metrics)}"
    cut_off = metrics.get("completion/truncated_frac")
    line += f"; {cut_off:.0%} of the completions are cut off" if cut_off else ""
    if samples:
        sample = samples[0]
        line += f". A sample: {shorten(sample['completion'])!r} ({judged(sample)})"
    return line


def likely_causes(metrics: StepMetrics, samples: Sequence[Sample], config: Config) -> list[str]:
    """Why rewards may not differ, the likeliest cause first."""
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
    if metrics.get("reward/timeouts"):
        causes.append(f"{metrics['reward/timeouts']:.0f} rewards took longer than reward_timeout, and count 0")
    if config.reward:
        causes.append("the functions of reward say the same of every completion")
    elif samples and all(sample["extracted"] is None for sample in samples):
        causes.append(f"the answers have another format than the task reads: none was found in {len(samples)} samples")
    elif low > 0:
        causes.append("every completion has the same part of the reward, and none has more")
    else:
        causes.append("the answers have another format than the task reads")
    return [*causes, "the problems are too hard for the model"]


def explain_survival(survival: float) -> str:
    """Explains that merging loses a part of the update, with the remedies and their costs.

    survival: cosine between the update and what rounding to the weights' dtype leaves of it (`sync/update_survival`).
    """
    return (
        f"merging keeps {survival:.2f} of the update (cosine; 1: all of it), because small changes round away. Ways "
        "out: sync adapter loses nothing, but vLLM generates slower; sync straight_through trains the rounded weights "
        "themselves; a larger learning_rate or lora_alpha makes larger updates"
    )
