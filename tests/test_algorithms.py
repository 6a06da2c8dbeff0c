"""Every row of ALGORITHMS against its paper: by hand on a 2x3 example, and by plain loops on random numbers."""

import dataclasses
import math
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import EPSILON, ROOT, train

import train_grpo
from configs.base import Config
from configs.checks import resolve_config
from fsdp_utils import World
from runtime.batching import MicroBatch, make_updates
from runtime.conversation import Completion
from runtime.optimize import schedule, update_metrics
from train_grpo import ALGORITHMS, add_logprobs, importance_weight, kl, overlong_penalties, policy_loss, select_groups

NAMES = list(ALGORITHMS)
PAGE = (ROOT / "docs/algorithms.md").read_text()
F64 = torch.float64


def config_of(algorithm: str = "grpo", **settings) -> Config:
    """The configuration as the trainer sees it; without TIS unless asked for."""
    return resolve_config(Config(algorithm=algorithm, **({"tis_mode": "off"} | settings)), ALGORITHMS[algorithm])


def micro_batch(lengths, advantages=0.0, weights=1.0, **tensors) -> MicroBatch:
    """Completions of these lengths; advantages and weights are one per completion, in float64."""
    repeats = torch.tensor(lengths)
    spread = lambda values: torch.as_tensor(values, dtype=F64).expand(len(lengths)).repeat_interleave(repeats)  # noqa: E731
    return MicroBatch(
        packed=None,
        completions=list(range(len(lengths))),
        sequences=torch.arange(len(lengths)).repeat_interleave(repeats),
        advantages=spread(advantages),
        weights=spread(weights),
        **({"sampler_logprobs": torch.zeros(sum(lengths), dtype=F64)} | tensors),
    )


# ---- By hand: two problems, three completions each ------------------------------------------------------------

REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
LENGTHS = [1, 2, 1, 2, 1, 1]  # of the six completions: 8 tokens
LOG_RATIOS = [math.log(2), 0.0, 0.0, 0.0, 0.0, math.log(1 / 2), 0.0, math.log(2)]  # new / old: the second of #4 halves

#   advantages of the six completions, and the loss at the ratios above. With a ratio of 1 a token's loss is -A; the
#   three other tokens are the only one of #1 (2, A > 0), the second of #4 (1/2, A > 0), the only one of #6 (2, A < 0).
s = math.sqrt
DENSITY = (1 / 3 * 2 / 3) ** (4 / 3) * math.gamma(14 / 3) / math.gamma(7 / 3) ** 2
BY_HAND = {
    # std² = 1/3. #1 is clipped to 1.2, #4 is not (1/2), #6 is not (2): (1.2·2 - 1 - 1 + (1 + .5)/2 + 1 - 2·2)/6 /√3
    "grpo": ([2 / s(3), -1 / s(3), -1 / s(3), 1 / s(3), 1 / s(3), -2 / s(3)], -(2.4 - 2 + 0.75 + 1 - 4) / 6 / s(3)),
    # the same without std, tokens summed, over 6 · 10 (the longest possible): A of #2 and #4 count for two tokens
    "dr_grpo": ([2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3], -(2.4 - 2 - 1 + 1.5 + 1 - 4) / 3 / 60),
    # clipped to 1.28, over 8 tokens
    "dapo": ([2 / s(3), -1 / s(3), -1 / s(3), 1 / s(3), 1 / s(3), -2 / s(3)], -(2.56 - 3 + 1.5 + 1 - 4) / 8 / s(3)),
    # p = 1/3, 2/3: mean 1/2, variance 1/36, so a + b = 8, and the density is that of Beta(7/3, 7/3)
    "bnpo": (
        [2 / 3 / DENSITY, -1 / 3 / DENSITY, -1 / 3 / DENSITY, 1 / 3 / DENSITY, 1 / 3 / DENSITY, -2 / 3 / DENSITY],
        -(2.4 - 3 + 1.5 + 1 - 4) / 3 / DENSITY / 8,
    ),
    # ratios of completions: 2 clipped to 1.0004, 1, 1, √½ unclipped, 1, 2 unclipped
    "gspo": (
        [2 / s(3), -1 / s(3), -1 / s(3), 1 / s(3), 1 / s(3), -2 / s(3)],
        -(2 * 1.0004 - 2 + s(0.5) + 1 - 4) / 6 / s(3),
    ),
    # r - mean of the two others; a sum over tokens
    "rloo": ([1, -0.5, -0.5, 0.5, 0.5, -1], -(1.2 - 1.5 + 0.75 + 0.5 - 2) / 6),
    # mean 1/2, std² = 6 · ¼ / 5 = 0.3
    "reinforce_pp": (
        [0.5 / s(0.3), -0.5 / s(0.3), -0.5 / s(0.3), 0.5 / s(0.3), 0.5 / s(0.3), -0.5 / s(0.3)],
        -0.5 / s(0.3) * (1.2 - 3 + 1.5 + 1 - 2) / 8,
    ),
    # r - mean of the group: std² = (2 · 4/9 + 4 · 1/9) / 5 = 4/15
    "reinforce_pp_baseline": (
        [s(15) / 3, -s(15) / 6, -s(15) / 6, s(15) / 6, s(15) / 6, -s(15) / 3],
        -s(15) / 6 * (2.4 - 3 + 1.5 + 1 - 4) / 8,
    ),
    # weights of 2, ½, 2 (cap 5) on logprobs, which are those of old, -1, plus the log ratio
    "cispo": (
        [2 / s(3), -1 / s(3), -1 / s(3), 1 / s(3), 1 / s(3), -2 / s(3)],
        -(4 * (math.log(2) - 1) + 3 - 1 + 0.5 * (-math.log(2) - 1) - 1 - 4 * (math.log(2) - 1)) / 8 / s(3),
    ),
    # logprobs of completions -1 + ln 2, -2, -1, -2 - ln 2, -1, -1 + ln 2; three of them moved by ln 2, and τ = 0.1
    "opmd": (
        [2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3],
        (-(2 * (math.log(2) - 1) + 2 + 1 - 2 - math.log(2) - 1 - 2 * (math.log(2) - 1)) / 3 + 0.15 * math.log(2) ** 2)
        / 6,
    ),
    # mean log ratios ln 2, 0, 0, -½ ln 2, 0, ln 2, of completions weighted 1.28, 1, 1, 0.8, 1, 1.28, and β = 15
    "flowrl": (
        [2 / s(3), -1 / s(3), -1 / s(3), 1 / s(3), 1 / s(3), -2 / s(3)],
        (
            1.28 * (math.log(2) - 30 / s(3)) ** 2
            + 3 * 75
            + 0.8 * (-math.log(2) / 2 - 15 / s(3)) ** 2
            + 1.28 * (math.log(2) + 30 / s(3)) ** 2
        )
        / 6,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name):
    config, algorithm = config_of(name, max_completion_length=10), ALGORITHMS[name]
    advantages = algorithm.advantage(torch.tensor(REWARDS, dtype=F64)).flatten()
    expected = torch.tensor(BY_HAND[name][0], dtype=F64)
    torch.testing.assert_close(advantages, expected, atol=3e-6, rtol=0)  # to stds of 0.5, 1e-6 is added
    weights = algorithm.weight(torch.tensor(LENGTHS, dtype=F64), config)
    old = torch.full((8,), -1.0, dtype=F64)
    batch = micro_batch(
        LENGTHS, advantages, weights, old_logprobs=old, ref_logprobs=old, prompt_values=torch.zeros(8, dtype=F64)
    )
    loss, _ = policy_loss(old + torch.tensor(LOG_RATIOS, dtype=F64), old, batch, algorithm.loss, config)
    assert loss.item() == pytest.approx(BY_HAND[name][1], abs=2e-6, rel=1e-5)


# ---- By loops: the papers' equations, a completion and a token at a time --------------------------------------


def ppo(ratio, A, low, high):
    """min(ρ A, clip(ρ) A)."""
    return min(ratio * A, min(max(ratio, ratio.new_tensor(1 - low)), ratio.new_tensor(1 + high)) * A)


def objective(name, rewards, new, old, longest, reference, log_z):
    """The paper's objective J, to be maximised. rewards[p][g]; new[p][g], old[p][g]: logprobs of a completion."""
    P, G = len(rewards), len(rewards[0])
    tokens = sum(len(completion) for group in new for completion in group)
    everything = [r for group in rewards for r in group]
    mean_all = sum(everything) / len(everything)
    means = [sum(group) / G for group in rewards]
    centered = [r - mean for group, mean in zip(rewards, means) for r in group]
    std_all = math.sqrt(sum((r - mean_all) ** 2 for r in everything) / (P * G - 1)) + 1e-6
    std_centered = math.sqrt(sum(c**2 for c in centered) / (P * G - 1)) + 1e-6
    m, v = sum(means) / P, sum((x - sum(means) / P) ** 2 for x in means) / P
    a, b = m * (m * (1 - m) / v - 1), (1 - m) * (m * (1 - m) / v - 1)
    beta = torch.distributions.Beta(torch.tensor(1 + a / 3, dtype=F64), torch.tensor(1 + b / 3, dtype=F64))
    J = 0.0
    for p, g in ((p, g) for p in range(P) for g in range(G)):
        r, mean, y, y_old = rewards[p][g], means[p], new[p][g], old[p][g]
        std = math.sqrt(sum((x - mean) ** 2 for x in rewards[p]) / (G - 1)) + 1e-6
        others = (sum(rewards[p]) - r) / (G - 1)
        ratios = [torch.exp(n - o) for n, o in zip(y, y_old)]
        T = len(y)
        if name == "grpo":
            J += sum(ppo(x, (r - mean) / std, 0.2, 0.2) for x in ratios) / T / (P * G)
        elif name == "dr_grpo":
            J += sum(ppo(x, r - mean, 0.2, 0.2) for x in ratios) / longest / (P * G)
        elif name == "dapo":
            J += sum(ppo(x, (r - mean) / std, 0.2, 0.28) for x in ratios) / tokens
        elif name == "bnpo" and 0 < mean < 1:
            A = (r - mean) / math.exp(beta.log_prob(torch.tensor(mean, dtype=F64)))
            J += sum(ppo(x, A, 0.2, 0.2) for x in ratios) / tokens
        elif name == "gspo":
            s = torch.exp(sum(n - o for n, o in zip(y, y_old)) / T)
            J += ppo(s, (r - mean) / std, 3e-4, 4e-4) / (P * G)
        elif name == "cispo":
            J += sum(x.detach().clamp(max=5.0) * (r - mean) / std * n for x, n in zip(ratios, y)) / tokens
        elif name == "rloo":
            J += sum(ppo(x, r - others, 0.2, 0.2) for x in ratios) / (P * G)
        elif name == "reinforce_pp":
            J += sum(ppo(x, (r - mean_all) / std_all, 0.2, 0.2) for x in ratios) / tokens
        elif name == "reinforce_pp_baseline":
            J += sum(ppo(x, (r - mean) / std_centered, 0.2, 0.2) for x in ratios) / tokens
        elif name == "opmd":
            J += ((r - mean) * sum(y) - 0.1 / 2 * (sum(y) - sum(y_old)) ** 2) / (P * G)
        elif name == "flowrl":
            w = torch.exp(sum(y) - sum(y_old)).detach().clamp(0.8, 1.28)
            J -= w * (log_z[p, g] + sum(y) / T - 15 * (r - mean) / std - sum(reference[p][g]) / T) ** 2 / (P * G)
    return J


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_paper(name):
    generator = torch.Generator().manual_seed(1)
    config, algorithm = config_of(name, max_completion_length=12), ALGORITHMS[name]
    rewards = torch.rand(5, 4, generator=generator, dtype=F64)
    rewards[1] = 1.0  # a group with nothing to learn
    lengths = torch.randint(1, 12, (20,), generator=generator).tolist()
    old = -torch.rand(sum(lengths), generator=generator, dtype=F64)
    spread = {"gspo": 1e-3, "flowrl": 0.1}.get(name, 0.5)  # so that some ratios are clipped, and some are not
    new = (old + spread * torch.randn(len(old), generator=generator, dtype=F64)).requires_grad_()

    nested = lambda values: [values.split(lengths)[4 * p : 4 * p + 4] for p in range(5)]  # noqa: E731
    reference = new.detach() + 0.3 * torch.randn(len(old), generator=generator, dtype=F64)
    log_z = torch.randn(20, generator=generator, dtype=F64, requires_grad=True)
    flow = (nested(reference), log_z.view(5, 4))
    J = objective(name, rewards.tolist(), nested(new), nested(old), config.max_completion_length, *flow)
    expected = torch.autograd.grad(-J, (new, log_z), materialize_grads=True)

    weights = algorithm.weight(torch.tensor(lengths, dtype=F64), config)
    batch = micro_batch(lengths, algorithm.advantage(rewards).flatten(), weights, old_logprobs=old)
    batch.ref_logprobs, batch.prompt_values = reference, log_z[batch.sequences]
    loss, info = policy_loss(new, torch.zeros_like(new), batch, algorithm.loss, config)
    found = torch.autograd.grad(loss, (new, log_z), materialize_grads=True)
    assert loss.item() == pytest.approx(-J.item(), abs=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    if "policy/clip_frac" in info and name != "cispo":
        assert 0.05 < info["policy/clip_frac"].mean() < 0.9


# ---- Splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks, budget", [(1, 30), (2, 40), (3, 25)])
def test_gradients_do_not_depend_on_the_split(name, ranks, budget):
    generator = torch.Generator().manual_seed(2)
    config, algorithm = config_of(name), ALGORITHMS[name]
    lengths = torch.randint(1, 20, (12,), generator=generator).tolist()
    advantages = algorithm.advantage(torch.rand(4, 3, generator=generator, dtype=F64)).flatten()
    old = -torch.rand(sum(lengths), generator=generator)
    parameter = (old + 0.3 * torch.randn(len(old), generator=generator)).requires_grad_()
    completions = [
        Completion(request=0, prompt_ids=[0], token_ids=[0] * len(part), logprobs=part.tolist(), truncated=False)
        for part in old.split(lengths)
    ]

    def gradient(ranks, budget):
        loss, count = 0.0, 0
        for rank in range(ranks):
            world = World(rank, ranks, torch.device("cpu"))
            plan = dataclasses.replace(config, tokens_per_microbatch=budget)
            ((*batches,),) = make_updates(completions, advantages, algorithm.weight, plan, world)
            for batch in batches:
                logprobs = torch.cat([parameter.split(lengths)[i] for i in batch.completions])
                batch.old_logprobs = batch.ref_logprobs = batch.sampler_logprobs
                batch.prompt_values = torch.zeros_like(logprobs)
                loss = loss + policy_loss(logprobs, torch.zeros_like(logprobs), batch, algorithm.loss, config)[0]
                count += 1
        return torch.autograd.grad(loss, parameter)[0], count

    (expected, one), (found, several) = gradient(1, 10_000), gradient(ranks, budget)
    assert one == 1 and several > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * EPSILON * expected.abs().max().item())


# ---- KL, entropy, importance sampling ------------------------------------------------------------------------


def test_overlong_penalties():
    """Of lengths 50, 80, 85 and 100 where 100 is the limit and a fifth of it the buffer, by hand."""
    completions = [Completion(0, [], [0] * length, [], truncated=length == 100) for length in (50, 80, 85, 100)]
    config = dataclasses.replace(config_of("dapo"), max_completion_length=100)
    assert overlong_penalties(completions, config, ALGORITHMS["dapo"].overlong).tolist() == [0.0, 0.0, -0.25, -1.0]
    assert not overlong_penalties(completions, config, 0.0).any()


def test_kl_estimators():
    """Summed over all outcomes, the estimators and their gradients are exact: no sampling, no tolerance to speak of."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=generator, dtype=F64, requires_grad=True)
    reference = torch.randn(7, generator=generator, dtype=F64).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.detach().exp()
    forward, backward = (logp.exp() * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()

    def mean_gradient(estimator):
        return torch.autograd.grad((p * kl(logp, reference, estimator)).sum(), logits, retain_graph=True)[0]

    for unbiased in ("k1", "k3"):
        torch.testing.assert_close((p * kl(logp, reference, unbiased)).sum(), forward)
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros_like(logits))
    torch.testing.assert_close(mean_gradient("k2"), torch.autograd.grad(forward, logits, retain_graph=True)[0])
    torch.testing.assert_close(mean_gradient("k3"), torch.autograd.grad(backward, logits, retain_graph=True)[0])


def test_kl_in_the_loss():
    batch = micro_batch([2, 1], 0.0, [0.5, 0.25], ref_logprobs=torch.tensor([-1.0, -2.0, -3.0], dtype=F64))
    logprobs = torch.tensor([-1.5, -2.0, -1.0], dtype=F64)
    config = config_of(kl_coef=0.1, kl_penalty="k2_loss")
    loss, _ = policy_loss(logprobs, torch.zeros(3), batch, ALGORITHMS["grpo"].loss, config)
    assert loss.item() == pytest.approx(0.1 * (0.5 * 0.125 + 0 + 0.25 * 2))
    loss, _ = policy_loss(
        logprobs, torch.zeros(3), batch, ALGORITHMS["grpo"].loss, config_of(kl_coef=0.1, kl_penalty="k3_reward")
    )
    assert loss.item() == 0.0


def test_entropy_bonus():
    """Its gradient step raises the entropy, and it counts with the tokens' weights."""
    batch = micro_batch([1, 2], 0.0, [0.5, 0.25])
    entropy = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    config = config_of(entropy_coef=0.1)
    policy_loss(torch.zeros(3, dtype=F64), entropy, batch, ALGORITHMS["grpo"].loss, config)[0].backward()
    assert entropy.grad.tolist() == pytest.approx([-0.05, -0.025, -0.025])


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token", [2.0, 0.5, 1.5, 2.0]),  # trainer / sampler: 4, 1/2 | 3/2, 2
        ("token_mask", [0.0, 0.5, 1.5, 2.0]),
        ("sequence", [2.0, 2.0, 2.0, 2.0]),  # 2 | 3
        ("sequence_mask", [2.0, 2.0, 0.0, 0.0]),
    ],
)
def test_importance_weights(mode, expected, monkeypatch):
    monkeypatch.setattr(train_grpo, "TIS_CAP", train_grpo.TIS_CAP + 1e-9)
    config = config_of(tis_mode=mode)
    weight = importance_weight(torch.tensor([4, 0.5, 1.5, 2.0], dtype=F64).log(), micro_batch([2, 2]), config)
    assert weight.tolist() == pytest.approx(expected)


def test_importance_weights_undo_the_mismatch(monkeypatch):
    """With a high cap, the mean gradient over the sampler's outcomes is that over the trainer's own."""
    monkeypatch.setattr(train_grpo, "TIS_CAP", 1e9)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, generator=generator, dtype=F64, requires_grad=True)
    sampler = torch.randn(6, generator=generator, dtype=F64).log_softmax(0)
    reward = torch.randn(6, generator=generator, dtype=F64)
    logp = logits.log_softmax(0)
    batch = micro_batch([1] * 6, reward, sampler.exp(), sampler_logprobs=sampler)  # weighted as often as it is drawn
    loss, info = policy_loss(logp, torch.zeros(6), batch, ALGORITHMS["grpo"].loss, config_of(tis_mode="token"))
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logp.exp() * reward).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert (sampler.exp() * info["mismatch/kl"]).sum() > 0


# ---- The loop's other parts -----------------------------------------------------------------------------------


def test_dynamic_sampling_keeps_groups_that_differ():
    scores = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0], [0, 1]], dtype=F64).flatten()
    config = config_of(group_size=2, prompts_per_step=2)
    assert select_groups(scores, config, all_groups=True) == [0, 1, 2, 3]
    assert select_groups(scores, config, all_groups=False) == [2, 3, 6, 7]
    scores = torch.ones(10, dtype=F64)
    assert select_groups(scores, config, all_groups=False) == []
    for algorithm in ALGORITHMS.values():  # a step in which nothing can be learned is no error
        assert algorithm.advantage(scores[:0].view(0, 2)).shape == (0, 2)


def test_schedule():
    """Against torch's schedulers; and a warm-up that starts above 0 and ends at the peak."""
    for name, make in {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10),
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-12, total_iters=10),
    }.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler, config = make(optimizer), Config(steps=10, lr_schedule=name)
        for step in range(1, 11):
            assert schedule(step, config) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    warm = Config(steps=10, warmup_steps=3, lr_schedule="linear")
    assert [schedule(step, warm) for step in range(1, 6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 6 / 7])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"algorithm": "gspo", "tis_mode": "token"}, "gspo weighs whole completions"),
        ({"algorithm": "grpo", "group_size": 1}, "group_size must be at least 2"),
        ({"ref_adapter_path": "somewhere"}, "set kl_coef above 0"),
        ({"algorithm": "opmd", "clip_high": 0.3}, "leave out clip_high"),
        ({"algorithm": "reinforce_pp", "group_size": 1, "prompts_per_step": 1}, "prompts_per_step must exceed 1"),
        ({"kl_coef": 0.1, "kl_penalty": "k1_loss"}, "kl_penalty must be one of k2_loss, k3_loss, k1_reward"),
        ({"algorithm": "bnpo", "kl_coef": 0.1, "kl_penalty": "k2_reward"}, "rewards from 0 to 1"),
        ({"algorithm": "flowrl", "kl_coef": 0.1}, "kl_coef must be 0"),
        ({"algorithm": "flowrl", "lora_rank": 0}, "set lora_rank above 0"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        config_of(**({"algorithm": "grpo"} | settings))
    assert "\n" not in str(error.value)


def test_the_algorithm_fills_in_what_the_user_left_open():
    assert config_of("dapo").clip_high == 0.28
    assert config_of("dapo", clip_high=0.5).clip_high == 0.5
    assert config_of("gspo", tis_mode=None).tis_mode == "sequence"
    assert not open_options(config_of("grpo"))


def test_the_reference_is_the_start_unless_another_is_named():
    start = {"lora_adapter_path": "sft", "kl_coef": 0.1}
    for settings, folder in (
        (start, "sft"),
        (start | {"ref_adapter_path": "other"}, "other"),
        (start | {"ref_adapter_path": "base"}, ""),
        ({"kl_coef": 0.1}, ""),
    ):
        config = config_of("grpo", **settings)
        assert config.reference_adapter == folder and config.ref_adapter_path == (folder or "base")
    assert config_of("flowrl", lora_adapter_path="sft", tis_mode=None).reference_adapter == "sft"
    assert config_of("grpo", lora_adapter_path="sft").reference_adapter == "", "nothing reads a reference"


def open_options(config: Config) -> set[str]:
    """What nobody has decided yet, of the options that are the algorithm's to decide."""
    others = {"instruction", "system_prompt", "sync"}  # the task, the chat template and `sends_adapter` decide these
    return {name for name, value in dataclasses.asdict(config).items() if value is None} - others


def test_any_row_may_do_without_groups_or_look_at_the_reference():
    """What is asked of settings follows from the row, whatever its name."""
    row = ALGORITHMS["grpo"]._replace(groups=False)
    assert resolve_config(Config(group_size=1), row).group_size == 1
    row = ALGORITHMS["flowrl"]._replace(settings={})
    assert resolve_config(Config(ref_adapter_path="somewhere"), row).tis_mode == "sequence"


@pytest.mark.parametrize("option", ["kl_coef", "clip_hihg", "target_modules"])
def test_a_row_may_not_set_what_the_user_has_set(option):
    row = ALGORITHMS["grpo"]._replace(settings={option: 0.05})
    with pytest.raises(ValueError, match=f"grpo sets '{option}', and may set only options that are None by default"):
        resolve_config(Config(), row)


@pytest.mark.parametrize(
    "updates, settings, asked", [(1, {}, False), (2, {}, True), (1, {"epochs_per_rollout": 2}, True)]
)
def test_the_policy_that_sampled_is_asked_where_the_update_cannot_tell(updates, settings, asked):
    batches = [[SimpleNamespace(packed=i, old_logprobs=None)] for i in range(updates)]
    policy = lambda packed, temperature: SimpleNamespace(logprobs=packed)  # noqa: E731
    stop = SimpleNamespace(check=lambda: None)
    add_logprobs(SimpleNamespace(config=Config(**settings), policy=policy, stop=stop), batches)
    assert [batch.old_logprobs for (batch,) in batches] == [i if asked else None for i in range(updates)]


def test_metrics_are_means_over_tokens_but_for_those_of_an_update():
    updates = [{"tokens": 4.0, "loss": 1.0, "my/loss": 8.0}, {"tokens": 6.0, "loss": 3.0, "my/loss": 2.0}]
    assert update_metrics(updates) == {"loss": 2.0, "my/loss": 1.0}


@pytest.mark.parametrize("line", re.findall(r"^\$train (--algorithm .*)", PAGE, re.MULTILINE))
def test_command_lines_of_the_page_are_complete(line):
    arguments = ["--config", str(ROOT / "configs/arithmetic_cpu.py"), *shlex.split(line, comments=True)]
    config, algorithm = train_grpo.configure(arguments)
    assert algorithm is ALGORITHMS[config.algorithm] and not open_options(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_learns(name):
    """A table of logits for each of 4 problems, 5 possible tokens, completions of 1 to 3; one token is right."""
    generator = torch.Generator().manual_seed(6)
    algorithm = ALGORITHMS[name]
    clips = {"clip_low": 0.5, "clip_high": 0.5} if algorithm.clips else {}
    config = config_of(name, max_completion_length=3, **clips)
    table = torch.zeros(4, 5, dtype=F64, requires_grad=True)
    log_z = torch.zeros(4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([table, log_z], lr=0.1)
    problems = torch.arange(4).repeat_interleave(8)
    for _ in range(40):
        lengths = torch.randint(1, 4, (32,), generator=generator)
        rows = problems.repeat_interleave(lengths)
        tokens = torch.multinomial(table.softmax(1)[rows].detach(), 1, generator=generator)[:, 0]
        hits = torch.zeros(32, dtype=F64).index_add(
            0, torch.arange(32).repeat_interleave(lengths), (tokens == rows).double()
        )
        rewards = (hits / lengths).view(4, 8)
        old = table.log_softmax(1)[rows, tokens].detach()
        weights = algorithm.weight(lengths.double(), config)
        batch = micro_batch(lengths.tolist(), algorithm.advantage(rewards).flatten(), weights, old_logprobs=old)
        batch.ref_logprobs = torch.full_like(old, math.log(1 / 5))
        for _ in range(2):
            logprobs, batch.prompt_values = table.log_softmax(1)[rows, tokens], log_z[rows]
            optimizer.zero_grad()
            policy_loss(logprobs, torch.zeros_like(old), batch, algorithm.loss, config)[0].backward()
            optimizer.step()
    assert table.softmax(1)[range(4), range(4)].min() > 0.7, (
        "from 0.2; all in float64, so that draws are the same anywhere"
    )


def test_a_run_with_everything_on(tmp_path):
    """Two ranks and vLLM: dynamic sampling, several updates and epochs, KL in the reward, entropy, masks, cosine."""
    options = f"train_grpo.py --config {ROOT}/configs/arithmetic_cpu.py --algorithm dapo"
    options += " --steps 2 --updates_per_rollout 2 --epochs_per_rollout 2 --group_size 2 --kl_coef 0.05"
    options += " --kl_penalty k2_reward --entropy_coef 0.01 --tis_mode sequence_mask --lr_schedule cosine"
    options += " --warmup_steps 1 --tokens_per_microbatch 2048 --eval_problems 32"
    (_before, first, second), _ = train(2, options, tmp_path)
    assert (first["lr"], second["lr"]) == (1e-3, 2e-3)
    assert 0 < first["rollout/kept_frac"] < 1 and first["rollout/tokens"] > 2 * 64 * 8
    assert first["policy/clip_frac"] > 0 and first["mismatch/kl"] < 0.01
    assert second["reward/kl_ref"] > first["reward/kl_ref"] >= 0


def test_flowrl_keeps_what_grpo_gives_up():
    """Four right answers of eight: both end with nearly nothing but right ones, GRPO with one of them.

    In float64, so that no processor's rounding decides about a draw.
    """
    from benchmarks.flowrl import RIGHT, train

    grpo, flowrl = (train(name)[-1, :RIGHT] for name in ("grpo", "flowrl"))
    assert grpo.sum() > 0.95 and flowrl.sum() > 0.95
    assert grpo.max() > 0.7 and flowrl.max() < 0.5 and flowrl.min() > 2 * grpo.min()
