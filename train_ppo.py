"""PPO with LoRA: train_grpo.py with a learned critic where that has groups. Read that first; this is what differs.

    torchrun --nproc-per-node=2 train_ppo.py --config configs/arithmetic_cpu_ppo.py

The critic says what reward is to be expected after each token, so that a token is praised or blamed for what it
changed (GAE) and one completion per problem is enough. The price is a second model: as large as the policy, trained
as a whole in float32 unless `critic_lora_rank` is set, and sharded like it.

PPO: arXiv 1707.06347; for language models, with the KL penalty in each token's reward: arXiv 2009.01325. As in
verl and TRL, advantages are normalised over the step, and the critic starts from the policy's base.

A step in which all rewards are the same is as useless here as there: the critic learns a constant, and the policy's
advantages are the critic's errors alone. It counts towards `max_useless`.

Notation: as in train_grpo.py; R completion tokens of a micro-batch, S of its completions.
"""

import runtime.quiet  # noqa: F401, I001  before torch

import sys
from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fsdp_utils
from runtime.batching import MicroBatch, batch_metrics, make_updates
from configs.base import Config
from runtime.command_line import parse_config
from runtime.setup import build_critic
from runtime.optimize import Metrics, optimize, update_metrics
from runtime.setup import make_optimizer, on_disk, prepare
from runtime.progress_bar import progress_bar
from runtime.launch import launch
from runtime.run import Run, due, set_learning_rate
from train_grpo import (
    Algorithm,
    add_logprobs,
    all_tokens,
    clip_token,
    kl,
    overlong_penalties,
    rollout_metrics,
    settle,
    update_policy,
)

PPO = Algorithm(None, clip_token, all_tokens, groups=False)  # the advantage is the critic's, see `judge`


# ---- The algorithm --------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float) -> Tensor:
    """(R,) advantages A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t. GAE, arXiv 1506.02438, equation 16.

    After a completion's last token, V and A are 0: completions that were cut off count as ended.

    >>> rewards, values = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 0.25, 2.0])
    >>> gae(rewards, values, lengths=[2, 1], gamma=1.0, lam=0.5)
    tensor([0.1250, 0.7500, 1.0000])
    """
    r, v = (pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))  # (S, longest)
    deltas = r + gamma * F.pad(v, (0, 1))[:, 1:] - v
    advantages, following = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * following
        advantages[:, t] = following
    return torch.cat([row[:length] for row, length in zip(advantages, lengths)])


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, config: Config) -> tuple[Tensor, Metrics]:
    """(R,) ½ max((V - R)², (clip(V) - R)²): a value that has moved `value_clip` from the old one is left alone.

    As in OpenAI's baselines (arXiv 2005.12729, section 3), TRL and verl; the paper itself does not clip values.
    """
    errors = (values - returns).square()
    if not config.value_clip:
        return errors / 2, {"error": errors.detach()}
    clipped = (old_values + (values - old_values).clamp(-config.value_clip, config.value_clip) - returns).square()
    clip_frac = (clipped > errors).float()
    return torch.maximum(errors, clipped) / 2, {"error": errors.detach(), "clip_frac": clip_frac}


@torch.no_grad()
def judge(run: Run, batches: list[MicroBatch]) -> None:
    """Gives the step's micro-batches their values, advantages and returns.

    On entry, `advantages` holds on each token the reward of its whole completion.
    """
    config, (critic, _) = run.config, run.learners["critic"]
    with progress_bar("values", len(batches), "micro-batches") as bar:
        for batch in batches:
            values = batch.values = critic(batch.packed)
            ends = batch.sequences.diff(append=batch.sequences.new_tensor([-1])) != 0
            rewards = torch.where(ends, batch.advantages, 0.0)
            if config.kl_coef and config.kl_in == "reward":
                rewards -= config.kl_coef * kl(batch.sampler_logprobs, batch.ref_logprobs, config.kl_estimator)
            lengths = batch.sequences.bincount().tolist()
            batch.advantages = gae(rewards, values, lengths, config.gamma, config.gae_lambda)
            batch.returns = values + batch.advantages
            bar.update()
    normalize(batches, run.world)


def normalize(batches: list[MicroBatch], world: fsdp_utils.World) -> None:
    """Gives the advantages mean 0 and standard deviation 1 over the tokens of all ranks."""
    moments = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        mine = batch.advantages[batch.weights > 0].double()  # not a filler's
        moments += torch.stack([mine.new_tensor(len(mine)), mine.sum(), mine.square().sum()])
    dist.all_reduce(moments)
    count, total, squares = moments.tolist()
    mean = total / count
    std = max(squares / count - mean**2, 0.0) ** 0.5
    for batch in batches:
        batch.advantages = (batch.advantages - mean) / (std + 1e-6)


def update_critic(run: Run, batches: list[MicroBatch], may_stop: bool) -> dict[str, float]:
    """One optimizer update of the critic; as `update_policy`."""
    critic, optimizer = run.learners["critic"]

    def share_of_loss(batch: MicroBatch) -> tuple[Tensor, Metrics]:
        values = critic(batch.packed)
        losses, info = value_loss(values, batch.values, batch.returns, run.config)
        return (losses * batch.weights).sum(), info | {"value": values.detach(), "return": batch.returns}

    return optimize(run, optimizer, batches, share_of_loss, may_stop)


# ---- The loop -------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Everything between the first rollout and the last evaluation."""
    config, log = run.config, run.log
    _, critic_optimizer = run.learners["critic"]
    wait = config.critic_warmup_steps  # before the policy learns
    run.begin()

    for step in log.traced(range(run.progress.step + 1, config.steps + 1)):
        # 1. rollout
        log.phase("rollout")
        prompts = run.take(config.prompts_per_step)
        completions = run.sample(prompts, step)
        run.engine.sleep()  # until the sync

        # 2. reward
        log.phase("reward")
        scores = run.score(prompts, completions)
        run.log_samples(step, "train", prompts, completions, scores)

        # 3. advantage, out of values; and 4. logprobs, since it may need the reference's
        log.phase("logprobs")
        rewards = scores + overlong_penalties(completions, config)  # `judge` makes advantages of them
        updates = make_updates(completions, rewards, PPO.weight, config, run.world)
        add_logprobs(run, updates, reference=config.kl_coef > 0)
        judge(run, list(chain.from_iterable(updates)))

        # 5. update
        log.phase("update")
        set_learning_rate(critic_optimizer, config.critic_learning_rate, step, config)
        lr = set_learning_rate(run.optimizer, config.learning_rate, step, config, wait)
        critic_sums, policy_sums = [], []
        for batches in updates * config.epochs_per_rollout:
            critic_sums.append(update_critic(run, batches, may_stop=not critic_sums))
            if step > wait:
                policy_sums.append(update_policy(run, batches, PPO.loss))

        # 6. sync
        log.phase("sync")
        sync_metrics = run.weight_sync.update_weights(verify=due(config.verify_every, step))

        # 7. log, evaluate, save
        log.phase("eval")
        metrics = rollout_metrics(completions, scores, group_size=None) | {"lr": lr, **sync_metrics}
        metrics |= batch_metrics(updates, len(completions), run.world) | update_metrics(policy_sums)
        metrics |= {f"critic/{name}": value for name, value in update_metrics(critic_sums).items()}
        run.conclude(step, metrics)

    run.end()


def configure(arguments: list[str], description: str = __doc__) -> tuple[Config, Algorithm]:
    """The settings of a command line, complete and checked, and PPO's row."""
    config = parse_config(arguments, description)
    if config.algorithm != "ppo":
        raise ValueError(f"train_ppo.py has one algorithm, ppo, not {config.algorithm!r}: run train_grpo.py")
    config = settle(config, PPO)
    if config.max_rollouts > 1:
        raise ValueError("max_rollouts > 1 looks for groups whose rewards differ, and ppo has no groups: set it to 1")
    if config.critic_warmup_steps + config.warmup_steps >= config.steps:
        raise ValueError(
            f"critic_warmup_steps {config.critic_warmup_steps} and warmup_steps {config.warmup_steps} must be fewer "
            f"than the {config.steps} steps, or the policy never learns"
        )
    return config, PPO


def prepare_ppo() -> Run:
    """The command line's run, with its critic."""
    config, _ = configure(sys.argv[1:])
    run = prepare(config)
    critic = build_critic(config, on_disk(config), run.world)
    optimizer = make_optimizer(config, "critic", critic, config.critic_learning_rate, run.saved)
    run.learners["critic"] = (critic, optimizer)
    trained = sum(parameter.numel() for parameter in critic.parameters() if parameter.requires_grad)
    run.log.print(f"critic {trained / 1e6:,.2f}M parameters trained")
    return run


if __name__ == "__main__":
    launch(prepare_ppo, train)
