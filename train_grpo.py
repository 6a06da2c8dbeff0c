"""GRPO with LoRA, top to bottom: reinforcement learning of a language model on problems whose answers are checked.

    torchrun --nproc-per-node=8 train_grpo.py --config configs/qwen2_5_3b_gsm8k.py
    torchrun --nproc-per-node=2 train_grpo.py --config configs/arithmetic_cpu.py --steps 20    # no GPU needed

One step: sample a group of completions per problem with vLLM, score them, compare each with its group, push their
logprobs up or down, and hand the new weights to vLLM. The loop is `train`; what an algorithm is, is `ALGORITHMS`.

From the paper (GRPO: DeepSeekMath, arXiv 2402.03300) this departs in two ways that are common since: no KL penalty
unless `kl_coef` is set, and importance weights for what the sampler's logprobs differ from the trainer's (TIS). It
is deliberately not a framework: to change the algorithm, change this file.

Notation: P prompts a step, G completions a prompt (the group), N = P·G completions; R completion tokens.
"""

import runtime.quiet  # noqa: F401, I001  before torch

import dataclasses
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import lora
from runtime.batching import MicroBatch, batch_metrics, make_updates
from configs.base import Config
from runtime.command_line import parse_config
from runtime.optimize import Metrics, optimize, update_metrics
from runtime.setup import prepare
from runtime.progress_bar import progress_bar
from rollout import Completion
from runtime.launch import launch
from runtime.run import Run, due, set_learning_rate

sys.modules.setdefault("train_grpo", sys.modules[__name__])  # a config file that imports it gets this very module

# ===============================================================================================================
# ALGORITHMS: to try your own, write one function and add one row.
#
#   advantage: (P, G) rewards -> (P, G) advantages
#   loss:      logprobs (R,), those that the update starts from, and the micro-batch of whole completions
#              -> loss (R,), and metrics (R,)
#   weight:    (N,) completion lengths -> (N,) weight of each token of a completion; the loss is the weighted sum
#
# The weights are those of the whole update, computed once: how it is cut into micro-batches and ranks changes
# nothing. A loss of whole completions puts the completion's loss on each of its tokens, and goes with `per_sequence`.
# ===============================================================================================================


def center(rewards: Tensor) -> Tensor:
    """r - mean within the group: without the std, easy and hard problems count alike. Dr. GRPO, arXiv 2503.20783."""
    return rewards - rewards.mean(1, keepdim=True)


def zscore(rewards: Tensor) -> Tensor:
    """(r - mean) / std within the group, arXiv 2402.03300, section 4.1.2; 0 where all rewards are equal."""
    return center(rewards) / (rewards.std(1, keepdim=True) + 1e-6)


def leave_one_out(rewards: Tensor) -> Tensor:
    """r - mean of the others of the group, an unbiased baseline. RLOO, arXiv 2402.14740, equation 8."""
    return center(rewards) * rewards.shape[1] / (rewards.shape[1] - 1)


def batch_zscore(rewards: Tensor) -> Tensor:
    """(r - mean) / std over the whole step. REINFORCE++, arXiv 2501.03262; verl and OpenRLHF weigh this by length."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def center_batch_zscore(rewards: Tensor) -> Tensor:
    """r - mean within the group, then divided by the std over the whole step. REINFORCE++-baseline, same paper."""
    return batch_zscore(center(rewards))


def beta_normalize(rewards: Tensor) -> Tensor:
    """(r - p) / Beta(p; 1 + a/3, 1 + b/3), p the group's mean of rewards in [0, 1]. BNPO, arXiv 2506.02864.

    Beta(a, b) is fitted to the step's p by moments. TRL's loss of this name is something else: a mean over tokens.
    """
    if ((rewards < 0) | (rewards > 1)).any():
        raise ValueError(f"bnpo needs rewards from 0 to 1, found {rewards.min():g} to {rewards.max():g}")
    p = rewards.mean(1, keepdim=True)
    mean, variance = p.mean(), p.var(unbiased=False).clamp(min=1e-6)
    total = (mean * (1 - mean) / variance - 1).clamp(min=0)  # a + b
    alpha, beta = 1 + mean * total / 3, 1 + (1 - mean) * total / 3
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_density = torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p) - log_norm
    return torch.where((p > 0) & (p < 1), (rewards - p) * torch.exp(-log_density), 0.0)


def clip_token(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate for each token, arXiv 1707.06347, equation 7: -min(A ρ, A clip(ρ)).

    With `dual_clip`, the loss of a negative advantage is at most -A·dual_clip: arXiv 1912.09729, equation 5.
    """
    return clip(ratio_of(logprobs - old_logprobs), batch.advantages, config)


def clip_sequence(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """The same, with the geometric mean of a completion's ratios as its one ratio. GSPO, arXiv 2507.18071, eq. 5-7."""
    return clip(ratio_of(batch.sequence_mean(logprobs - old_logprobs)), batch.advantages, config)


def clip(ratio: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Metrics]:
    """-min(A ρ, A clip(ρ)), and where the clip decided."""
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(free, clipped)
    if config.dual_clip:
        loss = torch.where(advantages < 0, loss.minimum(-advantages * config.dual_clip), loss)
    return loss, {"policy/clip_frac": (clipped > free).float()}


def clip_weight(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """-clip(ρ) A logp with the clipped ratio as a mere weight: every token keeps a gradient. CISPO, arXiv 2506.13585.

    TRL caps the ratio at its `epsilon_high`, this (as the paper and verl) at 1 + clip_high.
    """
    ratio = ratio_of(logprobs - old_logprobs).detach()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -weight * batch.advantages * logprobs, {"policy/clip_frac": (weight != ratio).float()}


def mirror_descent(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """-A log π(y) + τ/2 (log π(y) - log π_old(y))² of whole completions y, τ = opmd_tau. Kimi k1.5, arXiv 2501.12599.

    The paper's gradient, section 2.3.2; the advantage is its r minus the group's mean.
    """
    logprob = batch.sequence_sum(logprobs)
    distance = logprob - batch.sequence_sum(old_logprobs)
    return -batch.advantages * logprob + config.opmd_tau / 2 * distance.square(), {}


def trajectory_balance(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config
) -> tuple[Tensor, Metrics]:
    """w (log Z(x) + log π(y)/|y| - β A - log π_ref(y)/|y|)², w = clip(π(y)/π_old(y)). FlowRL, arXiv 2509.15207, eq. 6.

    At its minimum, answers are as frequent as exp(β A) makes them: equally good ones all stay. β = flowrl_beta.
    """
    ratio = ratio_of(batch.sequence_sum(logprobs - old_logprobs)).detach()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    from_reference = batch.sequence_mean(logprobs - batch.ref_logprobs)
    balance = batch.log_z + from_reference - config.flowrl_beta * batch.advantages
    return weight * balance.square(), {
        "policy/log_z": batch.log_z.detach(),
        "policy/clip_frac": (weight != ratio).float(),
    }


def per_sequence(lengths: Tensor, config: Config) -> Tensor:
    """Mean over a completion's tokens, then over completions. arXiv 2402.03300, equation 3."""
    return 1 / (len(lengths) * lengths)


def all_tokens(lengths: Tensor, config: Config) -> Tensor:
    """Mean over all tokens of all completions: long ones count more. DAPO, arXiv 2503.14476, section 3.3."""
    return torch.full_like(lengths, 1 / max(lengths.sum().item(), 1))


def constant_length(lengths: Tensor, config: Config) -> Tensor:
    """Divides by the longest possible length: no preference for long wrong answers. Dr. GRPO, arXiv 2503.20783."""
    return torch.full_like(lengths, 1 / (len(lengths) * config.max_completion_length))


def sum_of_tokens(lengths: Tensor, config: Config) -> Tensor:
    """Sum over a completion's tokens, mean over completions: the gradient of log π(y). RLOO, arXiv 2402.14740."""
    return torch.full_like(lengths, 1 / len(lengths))


class Algorithm(NamedTuple):
    advantage: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, MicroBatch, Config], tuple[Tensor, Metrics]]
    weight: Callable[[Tensor, Config], Tensor]
    settings: dict[str, Any] = {}  # its paper's values for options that default to the algorithm's choice
    groups: bool = True  # a completion is measured against the others of its problem
    whole_sequences: bool = False  # the loss is one of whole completions, so TIS has to be, too
    needs_all: bool = False  # even a completion without advantage has a gradient
    flow: bool = False  # compares the policy with the reference and a learned log Z


ALGORITHMS = {
    "grpo": Algorithm(zscore, clip_token, per_sequence),
    "dr_grpo": Algorithm(center, clip_token, constant_length),
    "dapo": Algorithm(zscore, clip_token, all_tokens, {"clip_high": 0.28, "max_rollouts": 4, "overlong_buffer": 0.2}),
    "bnpo": Algorithm(beta_normalize, clip_token, all_tokens),
    "gspo": Algorithm(zscore, clip_sequence, per_sequence, {"clip_low": 3e-4, "clip_high": 4e-4}, whole_sequences=True),
    "cispo": Algorithm(zscore, clip_weight, all_tokens, {"clip_low": 1.0, "clip_high": 4.0}),
    "rloo": Algorithm(leave_one_out, clip_token, sum_of_tokens),  # TRL clips the ratio of whole completions
    "reinforce_pp": Algorithm(batch_zscore, clip_token, all_tokens, groups=False),
    "reinforce_pp_baseline": Algorithm(center_batch_zscore, clip_token, all_tokens),
    "opmd": Algorithm(center, mirror_descent, per_sequence, whole_sequences=True, needs_all=True),
    "flowrl": Algorithm(
        zscore, trajectory_balance, per_sequence, {"clip_high": 0.28}, whole_sequences=True, needs_all=True, flow=True
    ),
}


def ratio_of(difference: Tensor) -> Tensor:
    """exp of a difference of logprobs, which is kept within what exp can bear."""
    return difference.clamp(-20, 20).exp()


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token, estimated from tokens that the policy drew. With d = logprob - ref_logprob:

    k1 = d           unbiased, noisy; its gradient is 0 on average, so it belongs into the reward
    k2 = d² / 2      biased a little; its gradient is that of the KL
    k3 = e⁻ᵈ - 1 + d unbiased, never negative; its gradient is that of KL(reference || policy)

    Schulman, http://joschu.net/blog/kl-approx.html; k3: arXiv 2402.03300, equation 4.
    """
    difference = (logprobs - ref_logprobs).clamp(-20, 20)
    if estimator == "k1":
        return difference
    return difference.square() / 2 if estimator == "k2" else (-difference).exp() - 1 + difference


# ---- The update -----------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch, loss_of: Callable, config: Config
) -> tuple[Tensor, Metrics]:
    """The micro-batch's share of the update's loss, and its metrics per token. `loss_of` is an `Algorithm.loss`."""
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    loss, info = loss_of(logprobs, old_logprobs, batch, config)

    # The sampler's arithmetic is not the trainer's; both see the same weights. arXiv 2508.18756 (TIS).
    mismatch = old_logprobs - batch.sampler_logprobs
    info |= {
        "mismatch/abs_logprob_diff": mismatch.abs(),
        "mismatch/kl": kl(batch.sampler_logprobs, old_logprobs, "k3"),
    }
    if config.tis_cap:
        weight = importance_weight(mismatch, batch, config)
        loss = loss * weight
        info["mismatch/tis_weight"] = weight

    if config.kl_coef and batch.ref_logprobs is not None:
        penalty = kl(logprobs, batch.ref_logprobs, config.kl_estimator)
        info["policy/kl_ref"] = penalty.detach()
        if config.kl_in == "loss":
            loss = loss + config.kl_coef * penalty
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    return (loss * batch.weights).sum(), info | {"policy/entropy": entropy.detach()}


def importance_weight(mismatch: Tensor, batch: MicroBatch, config: Config) -> Tensor:
    """Trainer / sampler probability of each token, or of its whole completion, truncated at `tis_cap` or masked above.

    Truncated: arXiv 2508.18756. Masked, so that what the trainer finds far likelier than the sampler did teaches
    nothing: "When speed kills stability" (Liu et al. 2025), one-sided as there; verl can also bound it from below.
    """
    level, _, masked = config.tis_mode.partition("_")
    ratio = ratio_of(batch.sequence_sum(mismatch) if level == "sequence" else mismatch)
    return ratio * (ratio <= config.tis_cap) if masked else ratio.clamp(max=config.tis_cap)


def update_policy(run: Run, batches: list[MicroBatch], loss_of: Callable, may_stop: bool = False) -> dict[str, float]:
    """One optimizer update of the policy, see runtime/optimize.py; `loss_of` is an `Algorithm.loss`."""
    policy, config = run.policy, run.config

    def share_of_loss(batch: MicroBatch) -> tuple[Tensor, Metrics]:
        logprobs, entropy, log_z = policy(batch.packed, config.temperature, entropy_gradient=config.entropy_coef > 0)
        batch.log_z = None if log_z is None else log_z[batch.sequences]
        return policy_loss(logprobs, entropy, batch, loss_of, config)

    return optimize(run, run.optimizer, batches, share_of_loss, may_stop)


# ---- The loop -------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Everything between the first rollout and the last evaluation."""
    config, log, algorithm = run.config, run.log, ALGORITHMS[run.config.algorithm]
    run.begin()

    for step in log.traced(range(run.progress.step + 1, config.steps + 1)):
        completions, scores = [], torch.empty(0, dtype=torch.float64)
        for attempt in range(config.max_rollouts):  # more than one: dynamic sampling, DAPO, arXiv 2503.14476, eq. 11
            # 1. rollout
            log.phase("rollout")
            asked = run.take(config.prompts_per_step)
            sampled = run.sample(asked, step, attempt)
            completions += sampled

            # 2. reward
            log.phase("reward")
            scores = torch.cat([scores, run.score(asked, sampled)])
            run.log_samples(step, "train", asked, sampled, scores[-len(sampled) :])
            kept = worth_learning(scores, config)
            if len(kept) == config.prompts_per_step * config.group_size:
                break
        run.engine.sleep()  # until the sync
        metrics = rollout_metrics(completions, scores, config.group_size if algorithm.groups else None)
        metrics["rollout/kept_frac"] = len(kept) / len(scores)
        completions = [completions[i] for i in kept]

        # 3. advantage
        log.phase("logprobs")
        rewards = scores[kept] + overlong_penalties(completions, config)
        if config.kl_coef and config.kl_in == "reward":
            divergences = reference_kl(run, completions)
            rewards -= config.kl_coef * divergences
            if kept:
                metrics["reward/kl_ref"] = divergences.mean().item()
        advantages = algorithm.advantage(rewards.view(len(kept) // config.group_size, config.group_size)).flatten()

        # 4. logprobs: of the reference, and of the policy that sampled
        updates = make_updates(
            completions, advantages, algorithm.weight, config, run.world, drop_useless=only_advantages_teach(config)
        )
        add_logprobs(run, updates, reference=algorithm.flow or (config.kl_coef > 0 and config.kl_in == "loss"))

        # 5. update
        log.phase("update")
        metrics["lr"] = set_learning_rate(run.optimizer, config.learning_rate, step, config)
        sums = [
            update_policy(run, batches, algorithm.loss, may_stop=i == 0)
            for i, batches in enumerate(updates * config.epochs_per_rollout)
        ]

        # 6. sync
        log.phase("sync")
        metrics |= run.weight_sync.update_weights(verify=due(config.verify_every, step))

        # 7. log, evaluate, save
        log.phase("eval")
        metrics |= update_metrics(sums) | batch_metrics(updates, len(completions), run.world)
        run.conclude(step, metrics)

    run.end()


def worth_learning(scores: Tensor, config: Config) -> list[int]:
    """Which completions to learn from: P groups, and with dynamic sampling only groups whose scores differ."""
    differ = groups_that_differ(scores, config.group_size) | (config.max_rollouts == 1)
    chosen = differ.nonzero()[: config.prompts_per_step]
    return (chosen * config.group_size + torch.arange(config.group_size)).flatten().tolist()


def groups_that_differ(scores: Tensor, group_size: int) -> Tensor:
    """(N,) -> (P,) bool: whether a group's scores are not all the same."""
    groups = scores.view(-1, group_size)
    return (groups != groups[:, :1]).any(1)


def rollout_metrics(completions: list[Completion], scores: Tensor, group_size: int | None) -> dict[str, float]:
    """Of everything sampled in the step; `group_size` is None for algorithms that compare no groups."""
    metrics = {}
    if group_size:
        differ = groups_that_differ(scores, group_size)
        metrics |= {"rollout/groups": len(differ), "reward/mixed_groups_frac": differ.double().mean().item()}
    if len(scores) > 1:
        metrics["reward/std"] = scores.std().item()
    lengths = [len(completion.token_ids) for completion in completions]
    return metrics | {
        "reward/mean": scores.mean().item(),
        "reward/min": scores.min().item(),
        "reward/max": scores.max().item(),
        "rollout/tokens": sum(lengths),
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/truncated_frac": sum(completion.truncated for completion in completions) / len(completions),
    }


def overlong_penalties(completions: list[Completion], config: Config) -> Tensor:
    """(N,) what each completion's length costs: 0 until it is in the buffer before the limit, from there falling in a
    straight line to -1 at the limit; all 0 without `overlong_buffer`. DAPO, arXiv 2503.14476, equation 13.
    """
    limit, buffer = config.max_completion_length, config.overlong_buffer * config.max_completion_length
    lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    return ((limit - buffer - lengths) / (buffer or 1)).clamp(max=0.0)  # without a buffer none is beyond the limit


@torch.no_grad()
def add_logprobs(run: Run, updates: list[list[MicroBatch]], reference: bool = False) -> None:
    """Gives micro-batches the logprobs of the reference, if asked to, and of the policy that sampled.

    The latter only where the update's own forward would not find them: if the policy changes more than once, or if
    that forward has dropout, which the sampler has not.
    """
    config, policy = run.config, run.policy
    changes = len(updates) * config.epochs_per_rollout > 1
    batches = list(chain.from_iterable(updates))
    with progress_bar("logprobs", len(batches), "micro-batches") as bar:
        for batch in batches:
            if reference:
                with lora.reference(policy):
                    batch.ref_logprobs = policy(batch.packed, config.temperature).logprobs
            if changes or config.lora_dropout:
                batch.old_logprobs = policy(batch.packed, config.temperature).logprobs
            bar.update()


@torch.no_grad()
def reference_kl(run: Run, completions: list[Completion]) -> Tensor:
    """(N,) KL of the sampler from the reference, summed over each completion; for the reward."""
    config, world = run.config, run.world
    totals = torch.zeros(len(completions), dtype=torch.float64, device=world.device)
    updates = make_updates(completions, torch.ones(len(completions)), sum_of_tokens, config, world)
    batches = list(chain.from_iterable(updates))
    with progress_bar("reference", len(batches), "micro-batches") as bar:
        for batch in batches:
            with lora.reference(run.policy):
                ref_logprobs = run.policy(batch.packed, config.temperature).logprobs
            penalty = kl(batch.sampler_logprobs, ref_logprobs, config.kl_estimator)
            penalty *= batch.weights > 0  # not a filler's
            owners = torch.tensor(batch.completions, device=world.device)[batch.sequences]
            totals.index_add_(0, owners, penalty.double())
            bar.update()
    dist.all_reduce(totals)
    return totals.cpu()


# ---- Settings -------------------------------------------------------------------------------------------------


def only_advantages_teach(config: Config) -> bool:
    """Whether a completion without advantage has no gradient, so that nobody needs to look at it."""
    others = config.kl_coef and config.kl_in == "loss", config.entropy_coef, ALGORITHMS[config.algorithm].needs_all
    return not any(others)


def settle(config: Config, algorithm: Algorithm) -> Config:
    """Fills in what the user left to the algorithm, and raises ValueError for settings that contradict it."""
    name = config.algorithm
    for option in algorithm.settings:
        if getattr(Config, option, 0) is not None:
            raise ValueError(f"{name} sets {option!r}, and may set only options that are None by default")
    level = "sequence" if algorithm.whole_sequences else "token"
    usual = {"clip_low": 0.2, "clip_high": 0.2, "tis_mode": level, "max_rollouts": 1, "overlong_buffer": 0.0}
    chosen = {name: value for name, value in (usual | algorithm.settings).items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **chosen)

    if algorithm.groups and config.group_size < 2:
        raise ValueError(f"{name} measures each completion against its group: group_size must be at least 2, not 1")
    if algorithm.advantage and config.prompts_per_step * config.group_size < 2:
        raise ValueError("a step of one completion has nothing to compare it with: prompts_per_step must exceed 1")
    if config.ref_adapter_path and not (config.kl_coef or algorithm.flow):
        raise ValueError("ref_adapter_path has no effect without kl_coef; set kl_coef above 0")
    if algorithm.whole_sequences and config.tis_cap and config.tis_mode.startswith("token"):
        raise ValueError(f"{name} weighs whole completions: tis_mode must be sequence..., not {config.tis_mode!r}")
    if algorithm.settings.get("max_rollouts", 1) > 1 and config.max_rollouts == 1:
        raise ValueError(f"{name} leaves out groups of equal rewards and samples others: max_rollouts must exceed 1")
    if config.max_rollouts > 1 and config.group_size == 1:
        raise ValueError("max_rollouts > 1 looks for groups whose rewards differ: group_size must exceed 1")
    if config.dual_clip and algorithm.loss not in (clip_token, clip_sequence):
        raise ValueError(f"{name} does not clip its loss: dual_clip must be 0, not {config.dual_clip!r}")
    if config.kl_coef and (config.kl_estimator, config.kl_in) == ("k1", "loss"):
        raise ValueError("k1 has no gradient on average: kl_estimator k2 or k3 in the loss, or kl_in reward")
    if algorithm.flow and config.kl_coef:
        raise ValueError(
            f"{name} has the reference in its objective already: kl_coef must be 0, not {config.kl_coef!r}"
        )
    if algorithm.flow and config.lora_rank == 0:
        raise ValueError(f"{name} needs the base as reference, and lora_rank 0 trains it away; set lora_rank above 0")
    if algorithm.advantage is beta_normalize and (
        config.overlong_buffer or (config.kl_coef and config.kl_in == "reward")
    ):
        raise ValueError(f"{name} needs rewards from 0 to 1: overlong_buffer must be 0, and kl_in not reward")
    return config


def find_algorithm(name: str) -> Algorithm:
    """A row of ALGORITHMS. Raises ValueError if there is none of that name."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; there are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def configure(arguments: list[str], description: str = __doc__) -> tuple[Config, Algorithm]:
    """The settings of a command line, complete and checked, and the algorithm that they name."""
    config = parse_config(arguments, description)
    if config.algorithm == "ppo":
        raise ValueError("ppo needs a critic: run train_ppo.py")
    algorithm = find_algorithm(config.algorithm)
    return settle(config, algorithm), algorithm


def prepare_grpo() -> Run:
    """The command line's run."""
    config, algorithm = configure(sys.argv[1:])
    return prepare(config, learns_log_z=algorithm.flow)


if __name__ == "__main__":
    launch(prepare_grpo, train)
