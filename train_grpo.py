"""GRPO with LoRA, top to bottom: reinforcement learning of a language model on problems whose answers are checked.

    torchrun --nproc-per-node=8 train_grpo.py --config configs/qwen2_5_3b_gsm8k.py
    torchrun --nproc-per-node=2 train_grpo.py --config configs/arithmetic_cpu.py --steps 20    # no GPU needed
    torchrun --nproc-per-node=8 train_grpo.py --model MODEL --data problems.csv --reward my_reward.py:score

One step: vLLM samples a group of completions per problem; each is scored and compared with its group; its logprobs are
pushed up or down; the new weights go to vLLM. The loop is `train`; the table of algorithms is `ALGORITHMS`.

It departs from the paper (GRPO: DeepSeekMath, arXiv 2402.03300) in two ways that are common today: no KL penalty unless
`kl_coef` is set, and importance weights that correct the sampler-trainer logprob mismatch (TIS). It is deliberately not
a framework: to change the algorithm, change this file, or add a row to ALGORITHMS in a config file.

Notation: P prompts a step, G completions a prompt (the group), N = P·G completions; of a micro-batch, S completions
with R trained tokens in all.
"""

import runtime.quiet  # noqa: F401, I001  before torch

import sys
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lora
from configs.base import Config
from configs.checks import resolve_config
from runtime.batching import MicroBatch, batch_metrics, make_updates
from runtime.command_line import parse_config
from runtime.conversation import Completion
from runtime.evaluation import (
    compute_rewards,
    evaluate,
    groups_that_differ,
    log_samples,
    part_metrics,
    rollout_metrics,
    total_rewards,
)
from runtime.launch import launch
from runtime.optimize import Metrics, Update, set_learning_rate, update_metrics
from runtime.run import Run, is_due, micro_batches, rollout_requests
from runtime.setup import setup
from runtime.steps import begin_training, finish_step, finish_training
from sync import VERIFY_EVERY

sys.modules.setdefault("train_grpo", sys.modules[__name__])  # a config file that imports it gets this module

# ===============================================================================================================
# ALGORITHMS: to try your own, write one function and add one row.
#
#   advantage: (P, G) rewards -> (P, G) advantages
#   loss:      logprobs (R,), logprobs before the update (R,), and a micro-batch of whole completions
#              -> loss (R,), and metrics (R,)
#   weight:    (N,) completion lengths -> (N,) weight of each token of a completion; the loss is the weighted sum
#
# The weights are computed once for the whole update, so splitting it into micro-batches and ranks changes nothing.
# A sequence-level loss puts the completion's loss on each of its tokens, and goes with `per_sequence`.
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
    """(r - mean) / std over the whole step. REINFORCE++, arXiv 2501.03262.

    verl and OpenRLHF take both over tokens, so that long completions weigh more.
    """
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def center_batch_zscore(rewards: Tensor) -> Tensor:
    """r - mean within the group, then divided by the std over the whole step. REINFORCE++-baseline, same paper."""
    return batch_zscore(center(rewards))


def beta_normalize(rewards: Tensor) -> Tensor:
    """(r - p) divided by the density of Beta(1 + a/3, 1 + b/3) at p, the group's mean reward. BNPO, arXiv 2506.02864.

    Rewards are in [0, 1]. Beta(a, b) is fitted to the step's p by moments. TRL's loss of this name is another one: a
    mean over tokens.
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
    """PPO's clipped surrogate for each token, arXiv 1707.06347, equation 7: -min(A ρ, A clip(ρ))."""
    return clip(ratio_of(logprobs - old_logprobs), batch.advantages, config)


def clip_sequence(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """`clip_token` with one ratio per completion, a geometric mean. GSPO, arXiv 2507.18071, eq. 5-7."""
    return clip(ratio_of(batch.sequence_mean(logprobs - old_logprobs)), batch.advantages, config)


def clip(ratio: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Metrics]:
    """-min(A ρ, A clip(ρ)), and the tokens where the clip was active."""
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.maximum(unclipped, clipped), {"policy/clip_frac": (clipped > unclipped).float()}


def clip_weight(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """-clip(ρ) A logp, the clipped ratio being a constant: every token has a gradient. CISPO, arXiv 2506.13585.

    TRL caps the ratio at its `epsilon_high`, this (as the paper and verl) at 1 + clip_high.
    """
    ratio = ratio_of(logprobs - old_logprobs).detach()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -weight * batch.advantages * logprobs, {"policy/clip_frac": (weight != ratio).float()}


OPMD_TAU = 0.1


def mirror_descent(logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config) -> tuple[Tensor, Metrics]:
    """-A log π(y) + τ/2 (log π(y) - log π_old(y))² of whole completions y, τ = OPMD_TAU. Kimi k1.5, arXiv 2501.12599.

    Its gradient is that of section 2.3.2. The advantage is the paper's reward minus the group's mean.
    """
    logprob = batch.sequence_sum(logprobs)
    distance = logprob - batch.sequence_sum(old_logprobs)
    return -batch.advantages * logprob + OPMD_TAU / 2 * distance.square(), {}


FLOWRL_BETA = 15.0  # one unit of advantage is worth this much mean logprob per token, in nats


def trajectory_balance(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, config: Config
) -> tuple[Tensor, Metrics]:
    """w (log Z(x) + log π(y)/|y| - β A - log π_ref(y)/|y|)², w = clip(π(y)/π_old(y)). FlowRL, arXiv 2509.15207, eq. 6.

    At the minimum, an answer's probability is proportional to exp(β A), so all good answers stay. β = FLOWRL_BETA.
    """
    ratio = ratio_of(batch.sequence_sum(logprobs - old_logprobs)).detach()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    from_reference = batch.sequence_mean(logprobs - batch.ref_logprobs)
    balance = batch.prompt_values + from_reference - FLOWRL_BETA * batch.advantages
    return weight * balance.square(), {
        "policy/log_z": batch.prompt_values.detach(),
        "policy/clip_frac": (weight != ratio).float(),
    }


def log_z_head(hidden_size: int) -> nn.Sequential:
    """FlowRL's log Z(x), a prompt head: three linears, float32, on the prompt's last hidden state; 0 at the start.

    arXiv 2509.15207, section 3. The authors' code reads the mean state of the prompt's tokens, and has dropout.
    """
    layers = [(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size)) for _ in range(2)]
    head = nn.Sequential(*layers[0], *layers[1], nn.Linear(hidden_size, 1))
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


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
    """A row of `ALGORITHMS`: three functions, and what else the algorithm needs."""

    advantage: Callable[[Tensor], Tensor] | None  # None: a critic computes them
    loss: Callable[[Tensor, Tensor, MicroBatch, Config], tuple[Tensor, Metrics]]
    weight: Callable[[Tensor, Config], Tensor]
    settings: dict[str, Any] = {}  # its paper's values for options that are None by default
    groups: bool = True  # compares the completions of a prompt
    rollouts: int = 1  # most per step; above 1, until enough groups have rewards that differ
    unit_rewards: bool = False  # needs rewards from 0 to 1
    whole_sequences: bool = False  # its loss is sequence-level, so TIS must be, too
    needs_all: bool = False  # completions without advantage have a gradient, too
    reference: bool = False  # its loss reads ref_logprobs
    clips: bool = True  # its loss reads clip_low and clip_high
    overlong: float = 0.0  # share of the length limit over which the reward falls by up to 1
    prompt_head: Callable[[int], nn.Module] | None = None  # from hidden size to a module; gives `prompt_values`


ALGORITHMS = {
    "grpo": Algorithm(zscore, clip_token, per_sequence),
    "dr_grpo": Algorithm(center, clip_token, constant_length),
    "dapo": Algorithm(zscore, clip_token, all_tokens, {"clip_high": 0.28}, rollouts=4, overlong=0.2),
    "bnpo": Algorithm(beta_normalize, clip_token, all_tokens, unit_rewards=True),
    "gspo": Algorithm(zscore, clip_sequence, per_sequence, {"clip_low": 3e-4, "clip_high": 4e-4}, whole_sequences=True),
    "cispo": Algorithm(zscore, clip_weight, all_tokens, {"clip_low": 1.0, "clip_high": 4.0}),
    "rloo": Algorithm(leave_one_out, clip_token, sum_of_tokens),  # TRL clips the ratio of whole completions
    "reinforce_pp": Algorithm(batch_zscore, clip_token, all_tokens, groups=False),
    "reinforce_pp_baseline": Algorithm(center_batch_zscore, clip_token, all_tokens),
    "opmd": Algorithm(center, mirror_descent, per_sequence, whole_sequences=True, needs_all=True, clips=False),
    "flowrl": Algorithm(
        zscore,
        trajectory_balance,
        per_sequence,
        {"clip_high": 0.28},
        whole_sequences=True,
        needs_all=True,
        reference=True,
        prompt_head=log_z_head,
    ),
}


def ratio_of(difference: Tensor) -> Tensor:
    """exp of a difference of logprobs, clamped so that exp stays finite."""
    return difference.clamp(-20, 20).exp()


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token, estimated from tokens sampled by the policy. With d = logprob - ref_logprob:

    k1 = d           unbiased, noisy; its gradient is 0 on average, so it belongs in the reward
    k2 = d² / 2      slightly biased; its gradient is that of the KL
    k3 = e⁻ᵈ - 1 + d unbiased, never negative; its gradient is that of KL(reference || policy)

    Schulman, http://joschu.net/blog/kl-approx.html; k3: arXiv 2402.03300, equation 4.
    """
    difference = (logprobs - ref_logprobs).clamp(-20, 20)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return (-difference).exp() - 1 + difference


# ---- The update -----------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch, loss_of: Callable, config: Config
) -> tuple[Tensor, Metrics]:
    """The micro-batch's share of the update's loss, and its metrics per token. loss_of: an `Algorithm.loss`."""
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    loss, info = loss_of(logprobs, old_logprobs, batch, config)

    # Sampler and trainer have the same weights but compute differently. TIS corrects that: arXiv 2508.18756. With
    # max_staleness 1 the sampler's weights are also a step older. The importance weight corrects for both, while the
    # clipped ratio stays that to the policy before this step: the decoupled objective of AReaL, arXiv 2505.24298.
    mismatch = old_logprobs - batch.sampler_logprobs
    info |= {
        "mismatch/abs_logprob_diff": mismatch.abs(),
        "mismatch/kl": kl(batch.sampler_logprobs, old_logprobs, "k3"),
    }
    if config.tis_mode != "off":
        weight = importance_weight(mismatch, batch, config)
        loss = loss * weight
        info["mismatch/tis_weight"] = weight

    if config.kl_coef and batch.ref_logprobs is not None:
        penalty = kl(logprobs, batch.ref_logprobs, config.kl_estimator)
        info["policy/kl_ref"] = penalty.detach()
        if config.kl_in_loss:
            loss = loss + config.kl_coef * penalty
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    return (loss * batch.weights).sum(), info | {"policy/entropy": entropy.detach()}


TIS_CAP = 2.0


def importance_weight(mismatch: Tensor, batch: MicroBatch, config: Config) -> Tensor:
    """Trainer / sampler probability of each token, or of its completion; above `TIS_CAP` truncated to it, or masked.

    Truncated: arXiv 2508.18756. Masked: a token that the trainer finds far likelier than the sampler did gets no
    gradient, as in "When speed kills stability" (Liu et al. 2025); verl can also bound the ratio from below.
    """
    level, _, masked = config.tis_mode.partition("_")
    ratio = ratio_of(batch.sequence_sum(mismatch) if level == "sequence" else mismatch)
    return ratio * (ratio <= TIS_CAP) if masked else ratio.clamp(max=TIS_CAP)


def update_policy(run: Run, batches: list[MicroBatch], loss_of: Callable, may_stop: bool = False) -> dict[str, float]:
    """One optimizer update of the policy; returns sums of metrics over tokens. loss_of: an `Algorithm.loss`.

    may_stop: a signal may stop the run between micro-batches, since no parameter has changed in this step yet.
    """
    policy, config = run.policy, run.config
    update = Update(run.optimizer, run.world)
    for batch in micro_batches(run, batches, "update", may_stop):
        out = policy(batch.packed, config.temperature, entropy_gradient=config.entropy_coef > 0)
        if out.prompt_values is not None:
            batch.prompt_values = out.prompt_values[batch.sequences]  # (S,) -> (R,)
        loss, info = policy_loss(out.logprobs, out.entropy, batch, loss_of, config)
        update.backward(loss, info, batch)
    return update.step()


# ---- The loop -------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Everything between the first rollout and the last evaluation."""
    config, log, engine, world = run.config, run.log, run.engine, run.world
    algorithm = ALGORITHMS[config.algorithm]
    begin_training(run)

    for step in log.traced(range(run.progress.step + 1, config.steps + 1)):
        completions, scored = [], []
        for attempt in range(algorithm.rollouts):  # more than one: dynamic sampling, DAPO, arXiv 2503.14476, eq. 11
            # 1. rollout
            log.phase("rollout")
            prompts = run.next_prompts(config.prompts_per_step)
            sampled = engine.generate(rollout_requests(prompts, config, step, attempt))
            completions += sampled

            # 2. reward
            log.phase("reward")
            rewards = compute_rewards(prompts, sampled, run.scorer, run.tokenizer, world)
            log_samples(run, step, "train", prompts, sampled, rewards)
            scored += rewards
            scores = total_rewards(scored)  # (attempts * N,)
            kept = select_groups(scores, config, all_groups=algorithm.rollouts == 1)
            if len(kept) == config.prompts_per_step * config.group_size:
                break
        engine.sleep()  # until the sync
        run.prefetch_rollout(step + 1)  # with max_staleness 1, sampled while this step learns
        group_size = config.group_size if algorithm.groups else None
        metrics = rollout_metrics(completions, scores, group_size) | part_metrics(scored)
        metrics["rollout/kept_frac"] = len(kept) / len(scores)
        completions = [completions[i] for i in kept]

        # 3. advantage
        log.phase("logprobs")
        rewards = scores[kept] + overlong_penalties(completions, config, algorithm.overlong)  # (N,)
        if config.kl_in_reward:
            divergences = reference_kl(run, completions)
            rewards -= config.kl_coef * divergences
            if kept:
                metrics["reward/kl_ref"] = divergences.mean().item()
        groups = rewards.view(len(kept) // config.group_size, config.group_size)  # (P, G)
        advantages = torch.cat([algorithm.advantage(task) for task in groups.chunk(len(config.tasks))]).flatten()

        # 4. logprobs: of the reference, and of the policy before its first update
        drop_useless = only_advantages_teach(config, algorithm)
        updates = make_updates(completions, advantages, algorithm.weight, config, world, drop_useless, rewards)
        add_logprobs(run, updates, algorithm.reference or config.kl_in_loss)

        # 5. update
        log.phase("update")
        metrics["lr"] = set_learning_rate(run.optimizer, config.learning_rate, step, config)
        sums = [
            update_policy(run, batches, algorithm.loss, may_stop=i == 0)
            for i, batches in enumerate(updates * config.epochs_per_rollout)
        ]

        # 6. sync
        log.phase("sync")
        metrics |= run.weight_sync.update_weights(verify=is_due(VERIFY_EVERY, step))

        # 7. log, evaluate, save
        log.phase("eval")
        metrics |= update_metrics(sums) | batch_metrics(updates, len(completions), world)
        if step == config.steps or is_due(config.eval_every, step):
            metrics |= evaluate(run, step)
        finish_step(run, step, metrics)

    finish_training(run)


def select_groups(scores: Tensor, config: Config, all_groups: bool) -> list[int]:
    """Indices of the completions to train on: those of the first P groups, or of the first P whose scores differ."""
    differ = groups_that_differ(scores, config.group_size) | all_groups
    chosen = differ.nonzero()[: config.prompts_per_step]
    return (chosen * config.group_size + torch.arange(config.group_size)).flatten().tolist()


def overlong_penalties(completions: list[Completion], config: Config, share: float) -> Tensor:
    """(N,) penalty of each completion's length: 0 up to (1 - `share`) of the limit, then linearly down to -1 at it.

    DAPO, arXiv 2503.14476, equation 13. Replies count, as in the limit. With share 0, all are 0.
    """
    limit, buffer = config.max_completion_length, share * config.max_completion_length
    lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    return ((limit - buffer - lengths) / (buffer or 1)).clamp(max=0.0)  # without a buffer none is beyond the limit


@torch.no_grad()
def add_logprobs(run: Run, updates: list[list[MicroBatch]], reference: bool = False) -> None:
    """Sets `ref_logprobs` (with `reference`) and `old_logprobs` of the micro-batches.

    The old ones are only computed if the step has several updates; a single one's own forward gives them.
    """
    config, policy = run.config, run.policy
    several = len(updates) * config.epochs_per_rollout > 1
    for batch in micro_batches(run, list(chain.from_iterable(updates)), "logprobs"):
        if reference:
            with lora.reference(policy):
                batch.ref_logprobs = policy(batch.packed, config.temperature).logprobs
        if several:
            batch.old_logprobs = policy(batch.packed, config.temperature).logprobs


@torch.no_grad()
def reference_kl(run: Run, completions: list[Completion]) -> Tensor:
    """(N,) KL(sampler || reference), summed over each completion, for the reward. Collective."""
    config, world = run.config, run.world
    totals = torch.zeros(len(completions), dtype=torch.float64, device=world.device)
    updates = make_updates(completions, torch.ones(len(completions)), sum_of_tokens, config, world)
    for batch in micro_batches(run, list(chain.from_iterable(updates)), "reference"):
        with lora.reference(run.policy):
            ref_logprobs = run.policy(batch.packed, config.temperature).logprobs
        penalty = kl(batch.sampler_logprobs, ref_logprobs, config.kl_estimator)
        penalty *= batch.weights > 0  # fillers do not count
        owners = torch.tensor(batch.completions, device=world.device)[batch.sequences]
        totals.index_add_(0, owners, penalty.double())
    return world.sum(totals).cpu()


def only_advantages_teach(config: Config, algorithm: Algorithm) -> bool:
    """Whether completions without advantage have no gradient, so that they can be left out."""
    return not (config.kl_in_loss or config.entropy_coef or algorithm.needs_all)


# ---- The command line -----------------------------------------------------------------------------------------


def configure(arguments: list[str], description: str = __doc__) -> tuple[Config, Algorithm]:
    """The complete, checked settings of a command line, and the algorithm that they name."""
    config = parse_config(arguments, description)
    if config.algorithm == "ppo":
        raise ValueError("ppo needs a critic: run train_ppo.py")
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {config.algorithm!r}; there are: {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[config.algorithm]
    return resolve_config(config, algorithm), algorithm


def setup_grpo() -> Run:
    """The run of this command line."""
    config, algorithm = configure(sys.argv[1:])
    return setup(config, algorithm.prompt_head)


if __name__ == "__main__":
    launch(setup_grpo, train)
