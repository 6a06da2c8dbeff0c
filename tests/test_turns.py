"""Conversations of several turns: what the environment says is read, and in no loss, mean or metric."""

import math
import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EPSILON, on_ranks
from transformers import AutoModelForCausalLM

import fsdp_utils
import lora
import train_grpo
import train_ppo
from configs.base import Config
from configs.checks import resolve_config
from policy import Critic, Policy
from rollout import Completion
from runtime import setup
from runtime.batching import batch_metrics, make_updates
from runtime.optimize import update_metrics
from train_grpo import ALGORITHMS

TEMPERATURE = 0.7
LIMIT = 40  # max_completion_length
TURNS = [
    (3,),
    (2, 4, 5),
    (1, 1, 1, 1, 1),
    (7, 25, 1),
    *2 * [(3,), (2, 4, 5), (1, 1, 1, 1, 1), (7, 3, 1)],
]  # of each completion: tokens sampled, replied, sampled, ...
REWARDS = torch.tensor([1.0, 0.0, 0.25, 0.5] + [0.5] * 4 + [0.0, 0.0, 1.0, 0.0], dtype=torch.float64)


# ---- The step, by the trainer ---------------------------------------------------------------------------------


class Recorder:
    """In place of an optimizer: keeps the gradients and changes nothing."""

    def __init__(self, module):
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.param_groups = [{"params": list(self.named.values())}]

    def step(self):
        self.gradients = {name: fsdp_utils.gather(p.grad).clone() for name, p in self.named.items()}

    def zero_grad(self):
        for parameter in self.named.values():
            parameter.grad = None


def make(kind, folder: Path, world, **more):
    """A sharded policy or critic in float64."""
    model = setup.meta_model(str(folder), torch.float64)
    if kind is Policy:
        lora.inject(model, ["all-linear"], 4, 8.0)
    module = kind(model, **more)
    if kind is Critic:
        module.value.double()  # shards of one dtype
    fsdp_utils.shard(module, model.base_model.layers, world.device)
    fsdp_utils.load_weights(model, str(folder), world.device)
    return module


@torch.no_grad()
def set_values(module: torch.nn.Module, seed: int, fill=torch.Tensor.copy_) -> None:
    """Everything that is not in the model's folder: adapters, a prompt head's last linear, a critic's value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if "adapters" in name or name in ("prompt_head.6.weight", "value.weight"):
            fill(parameter, torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)


def move(module: torch.nn.Module) -> None:
    """As if by an update of the optimizer."""
    fsdp_utils.reshard(module)  # after a forward without a backward
    set_values(module, 2, fsdp_utils.fill)


def step_of(name: str, folder: Path, world, completions: list[Completion]) -> tuple[dict, dict, dict]:
    """One update as in the loop, after another that has moved the policy: gradients, metrics, gradients of a critic."""
    config, algorithm = settings(name)
    policy = make(Policy, folder, world, prompt_head=head(algorithm))
    set_values(policy, 1, fsdp_utils.fill)
    run = SimpleNamespace(config=config, policy=policy, world=world, optimizer=Recorder(policy), learners={})
    metrics = train_grpo.rollout_metrics(completions, REWARDS, None)
    penalized = REWARDS + train_grpo.overlong_penalties(completions, config, algorithm.overlong)
    if config.kl_in_reward and name != "ppo":
        penalized = penalized - config.kl_coef * train_grpo.reference_kl(run, completions)
    advantages = algorithm.advantage(penalized.view(-1, 4)).flatten() if algorithm.advantage else None
    drop = name != "ppo" and train_grpo.only_advantages_teach(config, algorithm)
    updates = make_updates(completions, advantages, algorithm.weight, config, world, drop, penalized)
    batches = list(chain.from_iterable(updates))
    train_grpo.add_logprobs(run, updates, algorithm.reference or config.kl_coef > 0)
    gradients = {}
    if name == "ppo":
        critic = make(Critic, folder, world, device=world.device)
        set_values(critic, 1, fsdp_utils.fill)
        run.learners["critic"] = critic, Recorder(critic)
        train_ppo.compute_advantages(run, batches)
        move(critic)
        sums = update_metrics([train_ppo.update_critic(run, batches, may_stop=False)])
        metrics |= {f"critic/{key}": value for key, value in sums.items()}
        gradients = {f"critic.{key}": value for key, value in run.learners["critic"][1].gradients.items()}
    move(policy)
    metrics |= update_metrics([train_grpo.update_policy(run, batches, algorithm.loss)])
    metrics |= batch_metrics(updates, len(completions), world)
    return gradients | {f"policy.{key}": value for key, value in run.optimizer.gradients.items()}, metrics


def settings(name: str) -> tuple[Config, train_grpo.Algorithm]:
    algorithm = train_ppo.PPO if name == "ppo" else ALGORITHMS[name]
    sizes = dict(temperature=TEMPERATURE, tokens_per_microbatch=60, max_completion_length=LIMIT, prompts_per_step=3)
    penalty = {"kl_coef": 0.1, "kl_penalty": "k1_reward" if name in ("ppo", "rloo") else "k2_loss"}
    bonus = {} if name == "dapo" else {"entropy_coef": 0.01} | (penalty if name != "flowrl" else {})
    group = 1 if name == "ppo" else 4
    return resolve_config(
        Config(algorithm=name, group_size=group, epochs_per_rollout=2, **sizes, **bonus), algorithm
    ), algorithm


def head(algorithm):
    return algorithm.prompt_head and setup.make_prompt_head(algorithm.prompt_head, 64, 0, torch.device("cpu"))


# ---- The same by a plain loop over transformers' model, one completion at a time ------------------------------


class Plain:
    """The Hugging Face model with the same adapters, and what it says of a completion's sampled tokens."""

    def __init__(self, folder: Path, algorithm, seed: int, critic: bool = False):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        if critic:
            self.value = torch.nn.Linear(64, 1, bias=False)
            self.module = torch.nn.ModuleDict({"model": self.model, "value": self.value})
        else:
            lora.inject(self.model, ["all-linear"], 4, 8.0)
            self.prompt_head = head(algorithm)
            self.module = torch.nn.Module()
            self.module.model, self.module.prompt_head = self.model, self.prompt_head
        set_values(self.module, seed)

    def states(self, completion, turns):
        """The hidden state before each sampled token, those tokens, and the prompt's last state."""
        ids = completion.prompt_ids + completion.token_ids
        states = self.model.base_model(torch.tensor([ids])).last_hidden_state[0]
        places, place = [], len(completion.prompt_ids)
        for turn, count in enumerate(turns):
            places += range(place, place + count) if turn % 2 == 0 else []
            place += count
        before = [place - 1 for place in places]
        return states[before], [ids[place] for place in places], states[len(completion.prompt_ids) - 1]

    def logprobs(self, completion, turns):
        """(n,) logprobs and entropies of the n sampled tokens, and log Z of the prompt."""
        states, targets, prompt = self.states(completion, turns)
        logp = (self.model.lm_head(states) / TEMPERATURE).log_softmax(-1)
        log_z = self.prompt_head(prompt.detach().float())[0] if self.prompt_head else None
        return logp[range(len(targets)), targets], -(logp.exp() * logp).sum(-1), log_z

    def values(self, completion, turns):
        return self.value(self.states(completion, turns)[0].float())[:, 0]

    def gradients(self):
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}


def plain_step(name: str, folder: Path, completions: list[Completion]) -> tuple[dict, dict]:
    config, algorithm = settings(name)
    texts, N = list(zip(completions, TURNS)), len(completions)
    before, after = Plain(folder, algorithm, 1), Plain(folder, algorithm, 2)
    with torch.no_grad():
        old = [before.logprobs(*text)[0] for text in texts]
        with lora.disabled(before.model):
            ref = [before.logprobs(*text)[0] for text in texts]
    sampler = [torch.tensor([x for x in completion.logprobs if x is not None]).double() for completion in completions]
    lengths = [sum(turns[::2]) for turns in TURNS]
    total = sum(lengths)
    everything = [sum(turns) for turns in TURNS]
    metrics = {"completion/length_mean": total / N, "rollout/tokens": total}

    rewards = REWARDS.clone()
    if name == "dapo":  # over 0.8 of the limit, replies included
        rewards += torch.tensor([min(0.0, (0.8 * LIMIT - length) / (0.2 * LIMIT)) for length in everything])
        assert rewards[3] < REWARDS[3]
    if name == "rloo":
        rewards -= torch.stack([0.1 * (a - b).sum() for a, b in zip(sampler, ref)])
    gradients = {}
    if name == "ppo":
        A, critic_metrics, gradients = plain_critic(folder, texts, rewards, sampler, ref)
        metrics |= critic_metrics
    else:
        A = [advantage.expand(n) for advantage, n in zip(algorithm.advantage(rewards.view(-1, 4)).flatten(), lengths)]
    kept = [i for i in range(N) if name != "dapo" or abs(A[i][0]) > 1e-9]
    metrics["batch/useless_frac"] = 1 - len(kept) / N

    loss, tokens = 0.0, sum(lengths[i] for i in kept)
    for i in kept:
        new, entropy, log_z = after.logprobs(*texts[i])
        losses, info = plain_losses(name, new, old[i], ref[i], A[i], log_z, config)
        mismatch = old[i] - sampler[i]
        weight = (mismatch.sum().expand_as(mismatch) if algorithm.whole_sequences else mismatch).exp().clamp(max=2.0)
        losses = losses * weight
        info |= {"mismatch/abs_logprob_diff": mismatch.abs(), "mismatch/kl": mismatch.exp() - 1 - mismatch}
        info |= {"mismatch/tis_weight": weight, "policy/entropy": entropy}
        if config.kl_coef:
            k1 = new - ref[i]
            info["policy/kl_ref"] = k1 if config.kl_in_reward else k1**2 / 2
            losses = losses + 0.1 * k1**2 / 2 * config.kl_in_loss
        if name != "dapo":
            losses = losses - 0.01 * entropy
        loss = loss + losses.sum() * plain_weight(name, lengths[i], N, total)
        for key, values in info.items():
            metrics[key] = metrics.get(key, 0.0) + values.sum().item() / tokens
    loss.backward()
    metrics["loss"] = loss.item()
    return gradients | {f"policy.{key}": value for key, value in after.gradients().items()}, metrics


def plain_weight(name, n, N, total):
    if name in ("grpo", "gspo", "opmd", "flowrl"):
        return 1 / (N * n)
    return {"dr_grpo": 1 / (N * LIMIT), "rloo": 1 / N}.get(name, 1 / total)


def plain_losses(name, new, old, ref, A, log_z, config):
    """Of each token of one completion."""
    everyone = lambda value: value.expand_as(new)  # noqa: E731
    ratio = (new - old).exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if name == "cispo":
        weight = ratio.detach().clamp(low, high)
        return -weight * A * new, {"policy/clip_frac": weight != ratio}
    if name == "opmd":
        return -A * new.sum() + 0.05 * (new.sum() - old.sum()) ** 2, {}
    if name == "flowrl":
        ratio = everyone((new.sum() - old.sum()).exp().detach())
        weight = ratio.clamp(low, high)
        loss = weight * (log_z + (new - ref).mean() - 15 * A) ** 2
        return loss, {"policy/clip_frac": weight != ratio, "policy/log_z": everyone(log_z)}
    if name == "gspo":
        ratio = everyone((new - old).mean().exp())
    free, clipped = -A * ratio, -A * ratio.clamp(low, high)
    return torch.maximum(free, clipped), {"policy/clip_frac": clipped > free}


def plain_critic(folder: Path, texts, rewards, sampler, ref):
    """Normalised advantages of each completion's tokens, and the critic's metrics and gradients."""
    before, after = (Plain(folder, train_ppo.PPO, seed, critic=True) for seed in (1, 2))
    advantages, losses, errors, clipped, new_values, returns = [], [], [], [], [], []
    for text, reward, samplers, refs in zip(texts, rewards, sampler, ref):
        old, n = before.values(*text).detach().double(), len(samplers)
        r = -0.1 * (samplers - refs)
        r[-1] += reward
        V = [*old.tolist(), 0.0]
        deltas = [r[t].item() + V[t + 1] - V[t] for t in range(n)]  # the next sampled token's value, after any reply
        A = torch.tensor([sum(0.95**k * d for k, d in enumerate(deltas[t:])) for t in range(n)])
        values = after.values(*text)
        error = (values - (A + old)) ** 2
        near = (old + (values - old).clamp(-0.2, 0.2) - (A + old)) ** 2
        advantages.append(A.double())
        losses.append(torch.maximum(error, near) / 2)
        errors.append(error.detach())
        clipped.append(near > error)
        new_values.append(values.detach())
        returns.append(A + old)
    loss = torch.cat(losses).mean()
    loss.backward()
    metrics = {"loss": loss.item()}
    for key, values in zip(("error", "clip_frac", "value", "return"), (errors, clipped, new_values, returns)):
        metrics[key] = torch.cat(values).double().mean().item()
    flat = torch.cat(advantages)
    mean, std = flat.mean(), flat.std(unbiased=False)
    gradients = {f"critic.{key}": value for key, value in after.gradients().items() if "lm_head" not in key}
    return (
        [(A - mean) / (std + 1e-6) for A in advantages],
        {f"critic/{key}": value for key, value in metrics.items()},
        gradients,
    )


# ---- The comparison -------------------------------------------------------------------------------------------


def make_completions(folder: Path) -> list[Completion]:
    """Random tokens; the sampler's logprobs are those of the policy before the update, and some noise."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(3)
    plain = Plain(folder, ALGORITHMS["grpo"], 1)
    prompts = [[rng.randrange(160) for _ in range(rng.randint(3, 9))] for _ in range(3)]
    completions = []
    for i, turns in enumerate(TURNS):
        blank = [x for turn, count in enumerate(turns) for x in [0.0 if turn % 2 == 0 else None] * count]
        completion = Completion(i // 4, prompts[i // 4], [rng.randrange(160) for _ in blank], blank, truncated=i == 3)
        with torch.no_grad():
            old = plain.logprobs(completion, turns)[0]
        noisy = iter((old + 0.3 * torch.randn(len(old), generator=generator)).tolist())
        logprobs = [None if x is None else next(noisy) for x in blank]
        completions.append(Completion(i // 4, completion.prompt_ids, completion.token_ids, logprobs, i == 3))
    return completions


def compare(folder: Path) -> dict[str, tuple[dict, dict, dict]]:
    """Per algorithm: relative errors of gradients, the metrics, and what they should be."""
    world, completions, results = fsdp_utils.init_world(), make_completions(folder), {}
    for name in [*ALGORITHMS, "ppo"]:
        (found, metrics), (expected, plain) = (
            step_of(name, folder, world, completions),
            plain_step(name, folder, completions),
        )
        errors = {}
        for learner in ("policy", "critic"):  # relative to the whole gradient; both are scaled to the norm of 1
            keys = [key for key in expected if key.startswith(learner)]
            assert set(keys) == {key for key in found if key.startswith(learner)}
            if keys:
                a, b = (torch.cat([each[key].double().flatten() for key in keys]) for each in (found, expected))
                errors[learner] = (a / a.norm() - b / b.norm()).norm().item()
                plain["grad_norm" if learner == "policy" else "critic/grad_norm"] = b.norm().item()
        results[name] = errors, metrics, plain
    torch.distributed.destroy_process_group()
    return results


def test_gradients_and_metrics_are_those_of_a_plain_loop_over_sampled_tokens(model_folder, tmp_path):
    """Of every algorithm: the weights and metrics of float32, the rest in float64."""
    everyone = on_ranks(2, compare, model_folder("qwen2", dtype=torch.float64), folder=tmp_path)
    for name, (errors, metrics, expected) in everyone[0].items():
        for learner, error in errors.items():
            assert error < (100 if learner == "policy" else 1000) * EPSILON, (name, learner, error)
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)
        measured = {key for key in metrics if key.startswith(("policy", "mismatch", "critic"))}
        assert measured <= expected.keys() | {"critic/skipped_updates"}, name
        assert math.isfinite(metrics["loss"])
