"""How a step's work is cut changes nothing but its speed; and it is cut evenly."""

import random
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import EPSILON, on_ranks, sharded_policy
from transformers import AutoModelForCausalLM

import fsdp_utils
import lora
from configs.base import Config
from policy import Policy
from runtime.batching import assign, batch_metrics, make_updates
from runtime.conversation import Completion

TEMPERATURE = 0.7


# ---- The cut --------------------------------------------------------------------------------------------------


def heavy_tailed(count: int, seed: int) -> list[int]:
    """Lengths as reasoning models have them: most are short, a few are ten times as long."""
    rng = random.Random(seed)
    return [min(4096, int(rng.lognormvariate(5.5, 1.0)) + 1) for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("budget", [300, 2048, 16384])
@pytest.mark.parametrize("count", [1, 7, 512])
def test_every_sequence_is_in_one_micro_batch_that_fits(ranks, budget, count):
    lengths = heavy_tailed(count, seed=count)
    plan = assign(lengths, ranks, budget)
    assert sorted(chain.from_iterable(chain.from_iterable(plan))) == list(range(count))
    assert len(plan) == ranks and len({len(batches) for batches in plan}) == 1, "or the ranks' collectives hang"
    for batches in plan:
        tokens = [[lengths[i] for i in batch] for batch in batches]
        assert all(sum(batch) <= budget or len(batch) == 1 for batch in tokens)
        assert all(batch == sorted(batch, reverse=True) for batch in tokens)
        longest = [max(batch, default=0) for batch in tokens]
        assert longest == sorted(longest, reverse=True), "memory runs out in the first micro-batch or not at all"


def test_longer_sequences_than_the_budget_bring_no_fillers():
    """Each of them is alone in its micro-batch; that it would fill several does not make more of them."""
    assert [len(batches) for batches in assign([300] * 64, ranks=2, budget=1)] == [32, 32]
    assert [len(batches) for batches in assign([3000] * 8 + [200] * 56, ranks=2, budget=1024)] == [10, 10]


def karmarkar_karp(lengths: list[int], parts: int) -> list[int]:
    """Sums of the parts that the largest differencing method finds (Karmarkar and Karp 1982)."""
    partials = [[length] + [0] * (parts - 1) for length in lengths]
    while len(partials) > 1:
        partials.sort(key=lambda sums: max(sums) - min(sums))
        largest, second = partials.pop(), partials.pop()
        partials.append([a + b for a, b in zip(sorted(largest), sorted(second, reverse=True))])
    return partials[0]


def waited_for(plan: list[list[list[int]]]) -> int:
    """Tokens of the heaviest rank, micro-batch by micro-batch: ranks that share a base wait for each other at each."""
    return sum(max(map(sum, batches)) for batches in zip(*plan))


@pytest.mark.parametrize("ranks, budget", [(2, 1 << 30), (8, 1 << 30), (2, 4096), (8, 16384), (8, 4096)])
def test_balance_is_that_of_karmarkar_karp(ranks, budget):
    """Within 1% of the cleverer method, given as many micro-batches; the mean of ten steps."""
    ours, theirs = [], []
    for seed in range(10):
        lengths = heavy_tailed(256, seed)
        plan = assign(lengths, ranks, budget)
        mean = sum(lengths) / ranks
        ours.append(waited_for([[[lengths[i] for i in batch] for batch in batches] for batches in plan]) / mean)
        sums = sorted(karmarkar_karp(lengths, ranks * len(plan[0])))
        theirs.append(waited_for([[[part] for part in sums[rank::ranks]] for rank in range(ranks)]) / mean)
    assert sum(ours) / 10 < sum(theirs) / 10 + 0.01
    assert sum(ours) / 10 < 1.03


# ---- The gradient ---------------------------------------------------------------------------------------------


def make_step() -> tuple[list[Completion], torch.Tensor]:
    """Completions and advantages of three groups of four; the second group has nothing to learn."""
    rng = random.Random(0)
    groups = [[rng.randrange(160) for _ in range(rng.randint(3, 9))] for _ in range(3)]
    completions = []
    for i in range(12):
        token_ids = [rng.randrange(160) for _ in range(rng.choice([1, 4, 4, 11, 30]))]
        completions.append(Completion(i // 4, groups[i // 4], token_ids, [-1.0] * len(token_ids), truncated=False))
    advantages = torch.tensor([rng.gauss(0, 1) for _ in range(12)], dtype=torch.float64)
    advantages[4:8] = 1e-17  # what rounding makes of 0
    return completions, advantages


def token_weights(lengths: torch.Tensor, config: Config) -> torch.Tensor:
    return 1 / (len(lengths) * lengths)


def load_policy(folder: Path, world: fsdp_utils.World, **options) -> Policy:
    """In float64, with adapters whose B is not zero. options: how it is sharded."""
    policy = sharded_policy(folder, world, torch.float64, **options)
    set_adapters(policy.model, fsdp_utils.fill)
    return policy


@torch.no_grad()
def set_adapters(model: torch.nn.Module, fill=torch.Tensor.copy_) -> None:
    lora.init_adapters(model, seed=0, fill=fill)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora.lora_layers(model):
        B = layer.adapters[lora.POLICY].lora_B
        fill(B, torch.randn(B.shape, generator=generator) * 0.1)


def plain_gradients(folder: Path) -> dict[str, torch.Tensor]:
    """Of the same step, one sequence at a time through the Hugging Face model, all logits, autograd, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    lora.inject(model, ["all-linear"], 4, 8.0)
    set_adapters(model)
    loss = 0.0
    for completion, advantage in zip(*make_step()):
        ids, start = completion.prompt_ids + completion.token_ids, len(completion.prompt_ids)
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids]
        loss = loss - advantage * logp.mean() / 12
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(policy: Policy, batches: list, world: fsdp_utils.World) -> dict[str, torch.Tensor]:
    """As the trainer's update has them, before the optimizer."""
    for i, batch in enumerate(batches):
        policy.set_requires_gradient_sync(i == len(batches) - 1)
        logprobs = policy(batch.packed, TEMPERATURE)[0]
        loss = -(batch.advantages * logprobs * batch.weights).sum()
        (loss * world.size).backward()
    found = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    found = {name: fsdp_utils.gather(parameter.grad).clone() for name, parameter in found.items()}
    policy.zero_grad()
    return found


WAYS = [  # to shard the policy; each of the first two is cut in every way
    dict(),
    dict(fsdp_size=1),
    dict(checkpointing=True, param_offload=True),
    dict(fsdp_size=2, checkpointing=True, param_offload=True),
]


def cut_and_compare(folder: Path) -> dict[tuple, tuple]:
    """Per way to shard and to cut: micro-batches, fillers on any rank, the largest relative error, and the metrics."""
    world, (completions, advantages) = fsdp_utils.init_world(), make_step()
    expected, results = plain_gradients(folder), {}
    for way, options in enumerate(WAYS):
        if options.get("fsdp_size", 1) > world.size:
            continue
        policy = load_policy(folder, world, **options)
        for budget in (1 << 20, 90, 50, 5) if way < 2 else (50,):
            for drop in (True, False):
                config = Config(tokens_per_microbatch=budget)
                updates = make_updates(completions, advantages, token_weights, config, world, drop)
                fillers = torch.tensor(sum(not batch.weights.any() for batch in updates[0]))
                dist.all_reduce(fillers)
                found = gradients(policy, updates[0], world)
                errors = [((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected]
                metrics = batch_metrics(updates, len(completions), world)
                results[way, budget, drop] = (len(updates[0]), fillers.item(), max(errors), metrics)
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_cut(model_folder, tmp_path, ranks):
    """Any budget, useless groups dropped or not, one copy of the base, one per rank or one per two, in whatever memory,
    recomputed or not: one gradient.
    """
    uneven = dict(intermediate_size=90, vocab_size=161)  # rows that 4 ranks cannot share evenly
    folder = model_folder("qwen2", dtype=torch.float64, **uneven)
    everyone = on_ranks(ranks, cut_and_compare, folder, folder=tmp_path)
    assert len({tuple(cut[0] for cut in results.values()) for results in everyone}) == 1
    for (way, budget, drop), (micro_batches, fillers, error, metrics) in everyone[0].items():
        # Logprobs and weights are float32, the rest is float64.
        assert error < 10 * EPSILON, (WAYS[way], budget, drop, error)
        kept = 8 if drop else 12
        assert metrics["batch/useless_frac"] == pytest.approx(1 - kept / 12)
        assert 1 <= metrics["batch/imbalance"] < (1.2 if ranks < 4 else 4 / 3), "three sequences a rank, or two"
        if budget == 5:  # every sequence is longer, and alone
            assert micro_batches * ranks == kept + fillers
        if budget == 1 << 20:
            assert micro_batches == 1 and fillers == 0


def test_fillers_contribute_exactly_nothing(model_folder):
    """Three ranks and one useful sequence: two ranks get a filler, and the gradients of its pass are 0, not small."""
    folder = model_folder("qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora.inject(model, ["all-linear"], 4, 8.0)
    set_adapters(model)
    policy = Policy(model)
    completions, advantages = make_step()
    advantages[:11] = 0
    norms = []
    for rank in range(3):
        world = fsdp_utils.World(rank, 3, torch.device("cpu"))
        config = Config(tokens_per_microbatch=64)
        ((batch,),) = make_updates(completions, advantages, token_weights, config, world, drop_useless=True)
        (batch.advantages * policy(batch.packed)[0] * batch.weights).sum().backward()
        grads = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        norms.append(sum(grad.abs().sum().item() for grad in grads))
        policy.zero_grad()
    assert norms[0] > 0 and norms[1:] == [0.0, 0.0]


def test_what_is_no_number_is_not_useless():
    """It has to reach the loss, where it is noticed."""
    completions, advantages = make_step()
    advantages[3] = float("nan")
    world = fsdp_utils.World(0, 1, torch.device("cpu"))
    (batches,) = make_updates(completions, advantages, token_weights, Config(), world, drop_useless=True)
    assert any(batch.advantages.isnan().any() for batch in batches)
