"""Conversations of several turns: what the environment says is read, and in no loss, mean or metric."""

import math
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EPSILON, ROOT, TINY, on_ranks, refused
from test_resume import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import fsdp_utils
import lora
import train_grpo
import train_ppo
from configs.base import Config
from configs.checks import resolve_config
from policy import Critic, Policy
from reward import Problem
from rollout import Engine
from runtime import models, prompts
from runtime.batching import batch_metrics, make_updates
from runtime.conversation import Completion, Request
from runtime.environment import Environment
from runtime.evaluation import rollout_metrics
from runtime.optimize import update_metrics
from runtime.signals import StopRequest
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
    model = models.meta_model(str(folder), torch.float64)
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


def step_of(name: str, folder: Path, world, completions: list[Completion]) -> tuple[dict, dict]:
    """One update as in the loop, after another that has moved the policy: gradients, a critic's too, and metrics."""
    config, algorithm = settings(name)
    policy = make(Policy, folder, world, prompt_head=head(algorithm))
    set_values(policy, 1, fsdp_utils.fill)
    parts = {"optimizer": Recorder(policy), "learners": {}, "stop": StopRequest()}
    run = SimpleNamespace(config=config, policy=policy, world=world, **parts)
    metrics = rollout_metrics(completions, REWARDS, None)
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
    config = Config(algorithm=name, group_size=group, epochs_per_rollout=2, **sizes, **bonus)
    return resolve_config(config, algorithm), algorithm


def head(algorithm):
    return algorithm.prompt_head and models.make_prompt_head(algorithm.prompt_head, 64, 0, torch.device("cpu"))


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
        completions.append(replace(completion, logprobs=[x if x is None else next(noisy) for x in blank]))
    return completions


def compare(folder: Path) -> dict[str, tuple[dict, dict, dict]]:
    """Per algorithm: relative errors of gradients, the metrics, and what they should be."""
    world, completions, results = fsdp_utils.init_world(), make_completions(folder), {}
    for name in [*ALGORITHMS, "ppo"]:
        found, metrics = step_of(name, folder, world, completions)
        expected, plain = plain_step(name, folder, completions)
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


# ---- The engine -----------------------------------------------------------------------------------------------

SUMS = ["47+85=", "12*34=", "99+99=", "31-18=", "60*61=", "10+10="]
LONGEST = 48


def random_reply(tokenizer):
    """An environment with a will of its own: other ranks would reply something else."""
    said = []

    def reply(turn: list[int]) -> list[int] | None:
        said.append(tokenizer(f"{random.randrange(10, 100)}+{random.randrange(10, 100)}=")["input_ids"])
        return said[-1] if len(said) < 4 else None

    return reply


def fixed_reply(tokenizer):
    """One that depends on the conversation alone, and lets some conversations be longer than others."""
    turns = []

    def reply(turn: list[int]) -> list[int] | None:
        turns.append(turn)
        return tokenizer(f"{10 + sum(turn) % 90}+11=")["input_ids"] if sum(turn) % 5 and len(turns) < 4 else None

    return reply


def converse(tensor_parallel_size: int) -> dict:
    """Conversations of the tiny model, at once and alone, and how often the engine stepped."""
    world = fsdp_utils.init_world()
    random.seed(world.rank)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    engine = Engine(
        str(TINY), dtype="float32", max_model_len=64, max_completion_length=LONGEST,
        tensor_parallel_size=tensor_parallel_size,
    )  # fmt: skip

    def requests(reply):
        prompts = [tokenizer(text)["input_ids"] for text in SUMS]
        return [
            Request(ids, 3, 1.0, seed=10 * i, environment=lambda: reply(tokenizer)) for i, ids in enumerate(prompts)
        ]

    steps, step = Counter(), engine.llm.llm_engine.step
    engine.llm.llm_engine.step = lambda: steps.update(["done"]) or step()
    together = engine.generate(requests(fixed_reply))
    found = {"together": together, "steps": steps["done"]}
    found["alone"] = [completion for request in requests(fixed_reply) for completion in engine.generate([request])]
    found["single turns"] = engine.generate(
        [Request(request.prompt_ids, 3, 1.0, seed=10 * i) for i, request in enumerate(requests(None))]
    )
    found["random"] = engine.generate(requests(random_reply))
    found["logprobs"] = [engine.logprobs(c.prompt_ids + c.token_ids)[len(c.prompt_ids) - 1 :] for c in together]
    try:
        engine.generate(requests(lambda tokenizer: [].index))
    except ValueError as error:
        found["error"] = str(error)
    return found


def spans(completion: Completion) -> list[tuple[bool, list[int]]]:
    """Turns of the model (True) and replies (False), one after the other."""
    marked = groupby(zip(completion.trained, completion.token_ids), key=lambda pair: pair[0])
    return [(trained, [token for _, token in part]) for trained, part in marked]


def as_lists(completions: list[Completion]) -> list[tuple]:
    return [(c.prompt_ids, c.token_ids, c.trained, c.truncated) for c in completions]


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_conversations_depend_on_their_seeds_alone_and_keep_the_engine_full(tmp_path, tensor_parallel_size):
    """On two engines, and on two ranks of one."""
    first, second = on_ranks(2, converse, tensor_parallel_size, folder=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    end = tokenizer.eos_token_id
    for name in ("together", "random"):
        assert as_lists(first[name]) == as_lists(second[name]), "every rank has the same"
    together = first["together"]
    assert as_lists(together) == as_lists(first["alone"])
    assert len({len(spans(completion)) for completion in together}) > 2
    for completion, single in zip(together, first["single turns"]):
        turns = [tokens for trained, tokens in spans(completion) if trained]
        assert turns[0] == single.token_ids, "the first turn is that of a task without replies"
        assert all(turn[-1] == end and turn.count(end) == 1 for turn in turns[:-1])
        assert spans(completion)[-1][0], "the model has the last word"
        assert len(completion.token_ids) <= LONGEST and completion.last_turn == turns[-1]
        reply = fixed_reply(tokenizer)
        for turn, (_, said) in zip(turns, spans(completion)[1::2]):
            assert said == reply(turn)
    for completion, logprobs in zip(together, first["logprobs"]):
        assert [x is not None for x in completion.logprobs] == completion.trained
        pairs = [(a, b) for a, b in zip(completion.logprobs, logprobs) if a is not None]
        assert all(a == pytest.approx(b, abs=1e-3) for a, b in pairs), "of the whole conversation, read at once"
    cut = [completion for completion in first["random"] if completion.truncated]
    assert cut and all(LONGEST - 6 <= len(completion.token_ids) <= LONGEST for completion in cut)
    longest = max(completion.length for completion in together)
    assert first["steps"] <= longest + 5, "nobody has waited for another's turn"
    assert "is not in list" in first["error"] and first["error"] == second["error"]


# ---- The chat template ----------------------------------------------------------------------------------------

MESSAGE, NEXT = "[{{ m.role }}]{{ m.content }}<eos>\n", "{% if add_generation_prompt %}[assistant]{% endif %}"
CHATML = "{% for m in messages %}" + MESSAGE + "{% endfor %}" + NEXT
TRIMS = CHATML.replace("m.content", "m.content | trim")
BEGINS = CHATML.replace("<eos>\n", "").replace("[", "<eos>[")  # the end of a turn is the beginning of the next
REFUSES = CHATML + "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
DROPS = CHATML.replace(MESSAGE, "{% if m.role != 'tool' %}" + MESSAGE + "{% endif %}")


def talk(template: str | None, reply, turns=("5 ", "7")) -> tuple[list[int], str, list[dict]]:
    """The tokens of a conversation in which the model says these turns, their text, and its messages."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    seen = []
    asked = lambda problem, messages: seen.append(messages) or reply(problem, messages)  # noqa: E731
    messages = prompts.chat("2*3=", None)
    environment = Environment(asked, Problem("2*3=", "6"), messages, tokenizer)
    (prompt,) = prompts.tokenize([Problem("2*3=", "6")], tokenizer, None)
    ids = list(prompt.token_ids)
    for turn in turns:
        said = tokenizer(turn + "<eos>", add_special_tokens=False)["input_ids"]
        ids += said + (environment(said) or [])
    return ids, tokenizer.decode(ids), seen[-1]


@pytest.mark.parametrize("template", [CHATML, TRIMS, BEGINS])
def test_replies_stand_where_the_template_puts_them(template):
    """The tokens are those of the whole conversation, rendered at once; the reply sees all that was said."""
    replies = iter(["wrong, again", None])
    ids, text, messages = talk(template, lambda problem, messages: next(replies))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    roles = ["user", "assistant", "user", "assistant"]
    assert messages == [{"role": r, "content": c} for r, c in zip(roles, ["2*3=", "5 ", "wrong, again", "7"])]
    tokenizer.chat_template = template
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if template == TRIMS:  # what the model has sampled is kept, also what the template would leave out
        assert "5 <eos>" in text and "5<eos>" in whole
        whole = whole.replace("5<eos>", "5 <eos>")
    assert text.removesuffix("<eos>") == whole.removesuffix("<eos>\n")
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_replies_without_a_template_follow_as_they_are():
    replies = iter(["6;", None])
    assert talk(None, lambda problem, messages: next(replies))[1] == "2*3=5 <eos>6;7<eos>"


def tool(problem, messages):
    return {"role": "tool", "content": "6"}


def test_a_message_keeps_its_role():
    assert talk(CHATML, tool)[1].startswith("[user]2*3=<eos>\n[assistant]5 <eos>\n[tool]6<eos>\n[assistant]7<eos>\n")


@pytest.mark.parametrize(
    "template, reply, words",
    [
        (None, lambda problem, messages: 1 / 0, ["raised ZeroDivisionError", "test_turns.py, line"]),
        (None, lambda problem, messages: sys.exit("bye"), ["raised SystemExit: bye"]),
        (None, lambda problem, messages: 6, ["is 6, and must be a text, a message"]),
        (CHATML, lambda problem, messages: {"role": "tool"}, ["is {'role': 'tool'}, and must be"]),
        (None, lambda problem, messages: "", ["'content': ''}", "is not seen by the model"]),
        (REFUSES, tool, ["of role 'tool' is refused by the chat template (no tools)"]),
        (DROPS, tool, ["'tool', 'content': '6'} is not seen by the model"]),
    ],
)
def test_what_is_wrong_with_a_reply_is_said_in_a_line(template, reply, words):
    with refused("the reply ", "on Problem(prompt='2*3=', answer='6') and turn '5 '", *words):
        talk(template, reply)


# ---- Whole runs -----------------------------------------------------------------------------------------------


def calculator_runs(out: Path) -> None:
    """GRPO, a copy of it resumed after its first step, and PPO; on two ranks of one engine."""
    alive = []

    def run(prepare, train, options: str) -> None:
        sys.argv[1:] = f"--config {ROOT}/examples/calculator_tool.py --tensor_parallel_size 2 {options}".split()
        alive.append(prepare())  # an engine takes the process groups with it when it goes
        train(alive[-1])

    grpo = train_grpo.setup_grpo, train_grpo.train
    small = "--steps 2 --prompts_per_step 8 --group_size 8 --eval_problems 8 --save_every 1 --eval_every 1"
    run(*grpo, f"--output_dir {out}/whole/r {small}")
    fsdp_utils.on_first_rank(lambda: shutil.copytree(out / "whole", out / "parts"))
    run(*grpo, f"--output_dir {out}/parts/r {small} --resume {out}/parts/r/checkpoints/step_000001")
    ppo = "--steps 2 --algorithm ppo --prompts_per_step 32 --group_size 1 --eval_problems 8"
    run(train_ppo.setup_ppo, train_ppo.train, f"--output_dir {out}/ppo/r {ppo}")


def test_the_example_of_a_tool(tmp_path):
    """Runs are resumed bit by bit; samples show the whole conversation, and score its last turn."""
    on_ranks(2, calculator_runs, tmp_path, folder=tmp_path, timeout=600)
    assert "resumed after step 1" in (tmp_path / "rank_0.txt").read_text()
    for name in ("metrics", "samples"):
        assert rows(tmp_path / "whole", name) == rows(tmp_path / "parts", name)
    called = Counter()
    for run in ("whole", "ppo"):
        assert all(row["mismatch/kl"] < 1e-5 for row in rows(tmp_path / run) if "mismatch/kl" in row)
        for sample in rows(tmp_path / run, "samples"):
            first, *rest = sample["completion"].split("<eos>")
            called[run] += len(rest)
            assert len(rest) <= 1
            if rest:
                a, b = map(int, sample["prompt"].removesuffix("/10=").split("*"))
                assert "####" not in first and rest[0][0] == str(a * b // 10 % 10) == sample["answer"]
            assert sample["reward"] == (sample["extracted"] == sample["answer"])
    assert called["whole"] and called["ppo"]
