"""A row that is spread over ranks gives what one rank gives: losses, gradients, metrics, and a whole run."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import EPSILON, ROOT, fill_adapters, on_ranks, train
from test_families import EXPERTS, WINDOW
from transformers import AutoConfig, AutoModelForCausalLM

import fsdp_utils
import train_grpo
import train_ppo
from configs.base import Config
from configs.checks import resolve_config
from policy import Policy
from runtime import models
from runtime.batching import batch_metrics, make_updates
from runtime.conversation import Completion
from runtime.optimize import update_metrics
from runtime.sequence_parallel import neighbours, ranks_sharing
from runtime.signals import StopRequest

MODELS = {  # 12 heads of queries, which 2, 3 and 4 ranks can share
    "two heads of keys": ("qwen2", {"num_key_value_heads": 2}),  # fewer than four ranks
    "six heads of keys": ("llama", {"num_key_value_heads": 6}),  # which four ranks cannot share
    "windows": ("olmo3", WINDOW),  # of six tokens; heads are normalised together, before they are exchanged
    "experts": ("qwen3_moe", EXPERTS),
}
WAYS = {  # name -> model, and settings
    "grpo": ("two heads of keys", dict(gradient_checkpointing="none")),
    "one sequence at a time": ("six heads of keys", dict(tokens_per_microbatch=1)),
    "windows, recomputed, KL and entropy": ("windows", dict(kl_coef=0.3, entropy_coef=0.1)),
    "gspo": ("two heads of keys", dict(algorithm="gspo", tokens_per_microbatch=24)),
    "flowrl": ("windows", dict(algorithm="flowrl", tokens_per_microbatch=24)),
    "ppo": ("six heads of keys", dict(algorithm="ppo", kl_coef=0.3, kl_penalty="k2_reward", tokens_per_microbatch=24)),
    "experts": ("experts", dict(reshard=False)),
    "everything trained": ("two heads of keys", dict(lora_rank=0, tokens_per_microbatch=24)),
}


def completions_of_a_step() -> list[Completion]:
    """Four groups of three: long prompts, a reply among the tokens, none at all, and two tokens for four ranks."""
    rng = random.Random(0)
    found = []
    for i, (prompt, length) in enumerate(zip([30, 5, 5, 1] * 3, [3, 40, 11, 1, 9, 0, 4, 1, 17, 6, 2, 1])):
        tokens = [rng.randrange(160) for _ in range(length)]
        logprobs = [None if length == 40 and 10 < place < 20 else rng.uniform(-6, -4) for place in range(length)]
        found.append(Completion(i // 3, [rng.randrange(160) for _ in range(prompt)], tokens, logprobs, truncated=False))
    return found


def updates_in_ways(folders: dict[str, str], sizes: list[int]) -> dict:
    """For each number of ranks that share a row, and each way: gradients and metrics of an update."""
    torch.set_num_threads(1)  # as torchrun has it; one rank alone would have more
    world, found = fsdp_utils.init_world(), {}
    for size in sizes:
        sharing = replace(world, sequence_group=neighbours(size))
        for way, (model, settings) in WAYS.items():
            found[size, way] = update_in_a_way(folders[model], sharing, settings)
    return found


def update_in_a_way(folder: str, world: fsdp_utils.World, settings: dict) -> tuple[dict, dict]:
    """Gradients by name, and metrics, as training scripts have them."""
    settings = dict(algorithm="grpo", group_size=3, prompts_per_step=4, lora_rank=4, dtype="float32") | settings
    fsdp_size = 0 if settings.pop("reshard", True) else 1
    config = Config(
        **settings, temperature=0.7, fsdp_size=fsdp_size, sequence_parallel_size=ranks_sharing(world.sequence_group)
    )
    algorithm = train_ppo.PPO if config.algorithm == "ppo" else train_grpo.ALGORITHMS[config.algorithm]
    config = resolve_config(config, algorithm)
    policy = models.build_policy(config, folder, world, algorithm.prompt_head)
    fill_adapters(policy, fsdp_utils.fill)
    if policy.prompt_head:
        fill(policy.prompt_head[-1].weight)
    optimizer = Keeping(policy)
    run = SimpleNamespace(
        config=config, world=world, policy=policy, optimizer=optimizer, stop=StopRequest(), learners={}
    )

    completions = completions_of_a_step()
    rewards = torch.linspace(0, 1, 12, dtype=torch.float64).square()
    advantages = None if config.algorithm == "ppo" else algorithm.advantage(rewards.view(4, 3)).flatten()
    updates = make_updates(completions, advantages, algorithm.weight, config, world, rewards=rewards)
    (batches,) = updates
    train_grpo.add_logprobs(run, updates, reference=config.kl_coef > 0 or algorithm.reference)
    metrics = {"kl": train_grpo.reference_kl(run, completions)} if config.lora_rank else {}
    if config.algorithm == "ppo":
        critic = models.build_critic(config, folder, world)
        fill_adapters(critic, fsdp_utils.fill)
        fill(critic.value.weight)
        run.learners["critic"] = critic, Keeping(critic)
        train_ppo.compute_advantages(run, batches)
        sums = train_ppo.update_critic(run, batches, may_stop=True)
        metrics |= {f"critic/{name}": value for name, value in update_metrics([sums]).items()}
    sums = train_grpo.update_policy(run, batches, algorithm.loss, may_stop=True)
    metrics |= {"tokens": sums["tokens"]} | update_metrics([sums]) | batch_metrics(updates, len(completions), world)
    gradients = optimizer.gradients | (run.learners["critic"][1].gradients if run.learners else {})
    return gradients, metrics


class Keeping(torch.optim.SGD):
    """Keeps the gradients of its step, which changes nothing."""

    def __init__(self, module: torch.nn.Module):
        self.named = {f"{type(module).__name__} {n}": p for n, p in module.named_parameters() if p.requires_grad}
        super().__init__(self.named.values(), lr=0.0)

    def step(self):
        self.gradients = {name: fsdp_utils.gather(parameter.grad).clone() for name, parameter in self.named.items()}


@torch.no_grad()
def fill(parameter: torch.Tensor) -> None:
    """With something else than the zeros that it has at the start, which let no gradient through."""
    fsdp_utils.fill(parameter, torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))


@pytest.fixture(scope="module")
def folders(model_folder) -> dict[str, str]:
    sizes = dict(dtype=torch.float32, hidden_size=96, num_attention_heads=12, head_dim=8)
    return {name: str(model_folder(kind, **(sizes | settings))) for name, (kind, settings) in MODELS.items()}


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory) -> dict:
    """What one rank finds."""
    (found,) = on_ranks(1, updates_in_ways, folders, [1], folder=tmp_path_factory.mktemp("alone"))
    return {way: result for (_, way), result in found.items()}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To a thousand roundings of float32, of the whole tensor."""
    return bool((found - expected).norm() <= 1000 * EPSILON * expected.norm())


@pytest.mark.parametrize("ranks, sizes", [pytest.param(2, [2], marks=pytest.mark.slow), (4, [2, 4])])
def test_updates_are_those_of_one_rank(ranks, sizes, folders, alone, tmp_path):
    """With two groups of two, too, which share the work. All ranks have the same metrics."""
    for results in on_ranks(ranks, updates_in_ways, folders, sizes, folder=tmp_path):
        for (size, way), (gradients, metrics) in results.items():
            expected_gradients, expected = alone[way]
            assert gradients.keys() == expected_gradients.keys() and metrics.keys() == expected.keys()
            assert all(gradient.any() for gradient in expected_gradients.values()), way
            for name, gradient in gradients.items():
                assert same(gradient, expected_gradients[name]), (size, way, name)
            for name in metrics.keys() - {"batch/imbalance"}:
                found, wanted = (torch.as_tensor(each[name], dtype=torch.float64) for each in (metrics, expected))
                assert same(found, wanted), (size, way, name, found, wanted)


def test_a_run_is_that_of_rows_on_one_rank(tmp_path):
    """The whole program: two ranks that share every row, and two that share none."""
    sizes = "--steps 1 --prompts_per_step 8 --group_size 8 --eval_problems 8 --dtype float32 --kl_coef 0.1"
    metrics = []
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        command = f"train_grpo.py --config {ROOT}/configs/arithmetic_cpu.py {sizes} --sequence_parallel_size {size}"
        metrics.append(train(2, command, tmp_path / str(size))[0])
    for found, expected in zip(*metrics, strict=True):
        measured = {name for name in found if name.startswith(("time/", "memory/")) or "second" in name}
        assert found.keys() == expected.keys() and len(found.keys() - measured) > 5
        for name in found.keys() - measured - {"batch/imbalance"}:
            assert found[name] == pytest.approx(expected[name], rel=1e4 * EPSILON, abs=1e4 * EPSILON), name


@pytest.mark.parametrize(
    "architecture, settings, size, words",
    [
        ("llama", {}, 3, "sequence_parallel_size 3 does not divide the model's 4 attention heads"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2, "positions"),
    ],
)
def test_what_cannot_be_spread_is_refused(architecture, settings, size, words, model_folder):
    config = AutoConfig.for_model(architecture, num_attention_heads=4, num_hidden_layers=1, **settings)
    with torch.device("meta"):
        policy = Policy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=words) as error:
        models.check_and_set_recomputation(policy.model, Config(sequence_parallel_size=size), torch.device("cpu"))
    assert "\n" not in str(error.value)
