"""PPO with LoRA: train_grpo.py with a learned critic in place of groups. Read that first; this file has what differs.

    torchrun --nproc-per-node=2 train_ppo.py --config configs/arithmetic_cpu_ppo.py

The critic estimates, before each token, the reward to expect. So each token gets an advantage of its own (GAE), and one
completion per problem is enough. The price is a second model, sharded like the policy and of the same size. It is
trained as the policy is: by adapters, or as a whole with `lora_rank` 0.

PPO: arXiv 1707.06347; for language models, with the KL penalty in each token's reward: arXiv 2009.01325. As in
verl and TRL, advantages are normalised over the step, and the critic starts from the policy's base.

A step in which all rewards are equal teaches as little as in GRPO: the critic learns a constant, and the policy's
advantages are only the critic's errors. It counts towards `max_useless`.

Notation: as in train_grpo.py.
"""

import runtime.quiet  # noqa: F401, I001  before torch

import sys
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fsdp_utils
from configs.base import Config
from configs.checks import resolve_config
from runtime.batching import MicroBatch, batch_metrics, make_updates
from runtime.command_line import parse_config
from runtime.evaluation import compute_rewards, evaluate, log_samples, part_metrics, rollout_metrics, total_rewards
from runtime.launch import launch
from runtime.optimize import Metrics, Update, set_learning_rate, update_metrics
from runtime.run import Run, is_due, micro_batches, rollout_requests
from runtime.setup import setup
from runtime.steps import begin_training, finish_step, finish_training
from sync import VERIFY_EVERY
from train_grpo import (
    Algorithm,
    add_logprobs,
    all_tokens,
    clip_token,
    kl,
    update_policy,
)

PPO = Algorithm(None, clip_token, all_tokens, groups=False)
GAMMA, GAE_LAMBDA = 1.0, 0.95  # discount; bias (0) against variance (1) of advantages
VALUE_CLIP = 0.2  # how far a value may move from that of the rollout; 0: freely


# ---- The algorithm --------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float) -> Tensor:
    """(R,) advantages A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t. GAE, arXiv 1506.02438, equation 16.

    After a completion's last token, V and A are 0; a truncated completion counts as finished.

    >>> rewards, values = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 0.25, 2.0])
    >>> gae(rewards, values, lengths=[2, 1], gamma=1.0, lam=0.5)
    tensor([0.1250, 0.7500, 1.0000])
    """
    r, v = (pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))  # (S, longest)
    deltas = r + gamma * F.pad(v, (0, 1))[:, 1:] - v
    advantages, next_advantages = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        next_advantages = deltas[:, t] + gamma * lam * next_advantages
        advantages[:, t] = next_advantages
    return torch.cat([row[:length] for row, length in zip(advantages, lengths)])


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float = VALUE_CLIP
) -> tuple[Tensor, Metrics]:
    """(R,) ½ max((V - y)², (clip(V) - y)²), y the returns: no gradient once V has moved `value_clip` from the old one.

    As in OpenAI's baselines (arXiv 2005.12729, section 3), TRL and verl; the paper itself does not clip values.
    """
    errors = (values - returns).square()
    if not value_clip:
        return errors / 2, {"error": errors.detach()}
    clipped = (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns).square()
    clip_frac = (clipped > errors).float()
    return torch.maximum(errors, clipped) / 2, {"error": errors.detach(), "clip_frac": clip_frac}


@torch.no_grad()
def compute_advantages(run: Run, batches: list[MicroBatch]) -> None:
    """Sets values, advantages and returns of the step's micro-batches, from their rewards. Collective."""
    config, (critic, _) = run.config, run.learners["critic"]
    for batch in micro_batches(run, batches, "values"):
        values = batch.values = critic(batch.packed)  # (R,)
        rewards = batch.rewards
        if config.kl_in_reward:
            penalty = kl(batch.sampler_logprobs, batch.ref_logprobs, config.kl_estimator)
            rewards = rewards - config.kl_coef * penalty
        lengths = batch.sequences.bincount().tolist()
        batch.advantages = gae(rewards, values, lengths, GAMMA, GAE_LAMBDA)
        batch.returns = values + batch.advantages
    normalize(batches, run.world)


def normalize(batches: list[MicroBatch], world: fsdp_utils.World) -> None:
    """Shifts and scales advantages to mean 0 and standard deviation 1 over the tokens of all ranks. Collective."""
    moments = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        mine = batch.advantages[batch.weights > 0].double()  # fillers do not count
        moments += torch.stack([mine.new_tensor(len(mine)), mine.sum(), mine.square().sum()])
    count, total, squares = world.sum(moments).tolist()
    mean = total / count
    std = max(squares / count - mean**2, 0.0) ** 0.5
    for batch in batches:
        batch.advantages = (batch.advantages - mean) / (std + 1e-6)


def update_critic(run: Run, batches: list[MicroBatch], may_stop: bool) -> dict[str, float]:
    """One optimizer update of the critic; see `update_policy`."""
    critic, optimizer = run.learners["critic"]
    update = Update(optimizer, run.world)
    for batch in micro_batches(run, batches, "update of the critic", may_stop):
        values = critic(batch.packed)  # (R,)
        losses, info = value_loss(values, batch.values, batch.returns)
        info |= {"value": values.detach(), "return": batch.returns}
        update.backward((losses * batch.weights).sum(), info, batch)
    return update.step()


# ---- The loop -------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Everything between the first rollout and the last evaluation."""
    config, log, engine, world = run.config, run.log, run.engine, run.world
    _, critic_optimizer = run.learners["critic"]
    begin_training(run)

    for step in log.traced(range(run.progress.step + 1, config.steps + 1)):
        # 1. rollout
        log.phase("rollout")
        prompts = run.next_prompts(config.prompts_per_step)
        completions = engine.generate(rollout_requests(prompts, config, step))
        engine.sleep()  # until the sync
        run.prefetch_rollout(step + 1)  # with max_staleness 1, sampled while this step learns

        # 2. reward
        log.phase("reward")
        scored = compute_rewards(prompts, completions, run.scorer, run.tokenizer, world)
        log_samples(run, step, "train", prompts, completions, scored)
        scores = total_rewards(scored)

        # 4. logprobs, before 3. advantage: with KL in the reward, it needs those of the reference
        log.phase("logprobs")
        updates = make_updates(completions, None, PPO.weight, config, world, rewards=scores)
        add_logprobs(run, updates, reference=config.kl_coef > 0)
        compute_advantages(run, list(chain.from_iterable(updates)))

        # 5. update
        log.phase("update")
        set_learning_rate(critic_optimizer, config.critic_learning_rate, step, config)
        lr = set_learning_rate(run.optimizer, config.learning_rate, step, config)
        critic_sums, policy_sums = [], []
        for batches in updates * config.epochs_per_rollout:
            critic_sums.append(update_critic(run, batches, may_stop=not critic_sums))
            if step > config.warmup_steps:  # until then only the critic learns
                policy_sums.append(update_policy(run, batches, PPO.loss))

        # 6. sync
        log.phase("sync")
        sync_metrics = run.weight_sync.update_weights(verify=is_due(VERIFY_EVERY, step))

        # 7. log, evaluate, save
        log.phase("eval")
        metrics = rollout_metrics(completions, scores, group_size=None) | sync_metrics
        metrics["lr"] = lr if policy_sums else 0.0
        metrics |= part_metrics(scored) | batch_metrics(updates, len(completions), world) | update_metrics(policy_sums)
        metrics |= {f"critic/{name}": value for name, value in update_metrics(critic_sums).items()}
        if step == config.steps or is_due(config.eval_every, step):
            metrics |= evaluate(run, step)
        finish_step(run, step, metrics)

    finish_training(run)


# ---- The command line -----------------------------------------------------------------------------------------


def configure(arguments: list[str], description: str = __doc__) -> tuple[Config, Algorithm]:
    """The complete, checked settings of a command line, and PPO's row."""
    config = parse_config(arguments, description)
    if config.algorithm != "ppo":
        raise ValueError(f"train_ppo.py has one algorithm, ppo, not {config.algorithm!r}: run train_grpo.py")
    return resolve_config(config, PPO), PPO


def setup_ppo() -> Run:
    """The run of this command line, with its critic."""
    config, _ = configure(sys.argv[1:])
    run = setup(config, with_critic=True)
    critic, _ = run.learners["critic"]
    trained = sum(parameter.numel() for parameter in critic.parameters() if parameter.requires_grad)
    run.log.print(f"critic {trained / 1e6:,.2f}M parameters trained")
    return run


if __name__ == "__main__":
    launch(setup_ppo, train)
