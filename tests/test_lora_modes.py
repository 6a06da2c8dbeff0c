"""Every way to train a model, on several ranks: against one plain process, and against what vLLM then runs."""

import dataclasses
import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from conftest import EPSILON, TINY, distance, on_ranks
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fsdp_utils
import lora
import policy
from fsdp_utils import summon_layers
from runtime import adapter_files, models, setup
from runtime.packing import pack

PROMPTS, COMPLETIONS = [[5, 9, 3], [7, 2]], [[4, 8, 6, 1], [3, 3, 1]]
SETTINGS = {  # mode -> (architecture, merged, nf4, recomputed activations)
    "factored": ("mistral", False, False, True),
    "merged": ("qwen3", True, False, False),
    "nf4": ("qwen2", False, True, True),
    "nf4, merged": ("llama", True, True, False),
    "full": ("qwen2", None, False, True),
    "full, untied": ("llama", None, False, False),
}


def plain_logprobs(model: nn.Module) -> torch.Tensor:
    """What a Hugging Face model gives the completions, one sequence at a time."""
    parts = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        parts.append((logits / 0.7).log_softmax(-1)[range(len(completion)), completion])
    return torch.cat(parts)


def prepared(model: nn.Module, merged: bool | None, nf4: bool) -> nn.Module:
    """The model with what the mode asks for; None: nothing, it is trained as a whole."""
    if nf4:
        lora.quantize_base(model)
    if merged is not None:
        lora.inject(model, ["all-linear"], 4, 8.0, merged=merged)
    return model


def start(model: nn.Module, fill=torch.Tensor.copy_, seed: int = 1, std: float = 0.1) -> None:
    """Values for the adapters, with a B that is not zero.

    They are multiples of 1/256: sums of their products are exact in float32, in whatever order a processor adds.
    """
    exact = lambda parameter, values: fill(parameter, (values * 256).round() / 256)  # noqa: E731
    lora.init_adapters(model, seed=0, fill=exact)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            B = layer.adapters[lora.POLICY].lora_B
            exact(B, torch.randn(B.shape, generator=generator) * std)


def compare_with_one_process(folders: dict[str, str]) -> dict[str, tuple[float, float, float]]:
    """Of each mode: relative errors of logprobs and of gradients, and the share of equal streamed elements."""
    policy.LOGITS_AT_ONCE = 2 * 160  # several chunks, of two rows
    world, results = fsdp_utils.init_world(), {}
    for mode, (architecture, merged, nf4, recompute) in SETTINGS.items():
        plain = AutoModelForCausalLM.from_pretrained(folders[architecture], dtype=torch.float32)
        start(prepared(plain, merged, nf4))
        expected = plain_logprobs(plain)
        expected.square().sum().backward()

        model = prepared(models.meta_model(folders[architecture], torch.float32), merged, nf4)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sharded = policy.Policy(model).train()
        fsdp_utils.shard(sharded, model.base_model.layers, world.device)
        fsdp_utils.load_weights(model, folders[architecture], world.device)
        start(model, fsdp_utils.fill)
        found = sharded(pack(PROMPTS, COMPLETIONS, world.device), 0.7).logprobs
        found.square().sum().backward()

        references = dict(plain.named_parameters())
        gradients = [
            (fsdp_utils.gather(parameter.grad) - references[name].grad).norm() / references[name].grad.norm()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        streams = [summon_layers(source, world.device, dtype=torch.bfloat16) for source in (model, plain)]
        same = []
        for (name, streamed), (other, whole) in zip(*streams, strict=True):
            assert name == other
            same.append((streamed == whole).flatten())
        difference = (found - expected).norm() / expected.norm()
        results[mode] = (difference.item(), max(gradients).item(), torch.cat(same).float().mean().item())
    dist.destroy_process_group()
    return results


def test_three_ranks_agree_with_one_plain_process(model_folder, tmp_path):
    """Rows of 64, 96 and 160 spread unevenly over three ranks; the reference takes logits and plain autograd."""
    folders = {name: str(model_folder(name)) for name in ("llama", "qwen2", "qwen3", "mistral")}
    for results in on_ranks(3, compare_with_one_process, folders, folder=tmp_path):
        for mode, (logprobs, gradients, same) in results.items():
            assert logprobs < 100 * EPSILON and gradients < 1000 * EPSILON, (mode, logprobs, gradients)
            # A four-bit weight fills float32's digits, so its sum with an update may be rounded twice.
            assert same > 0.999 if "nf4" in mode else same == 1.0, (mode, same)


# ---- With vLLM ------------------------------------------------------------------------------------------------

TOKENS = torch.randint(3, 250, (20,), generator=torch.Generator().manual_seed(0)).tolist()
MODES = {
    "factored": {},
    "straight_through": {"sync": "straight_through"},
    "nf4": {"dtype": "nf4", "target_modules": ["q_proj", "down_proj"]},
    "full": {"lora_rank": 0, "lora_alpha": 32.0},
    "larger rank": {"lora_rank": 32, "lora_adapter_path": "ADAPTER", "kl_coef": 0.1},
    "smaller rank": {"lora_rank": 2, "lora_adapter_path": "ADAPTER", "kl_coef": 0.1, "ref_adapter_path": "base"},
    "reference": {"ref_adapter_path": "ADAPTER", "kl_coef": 0.1, "target_modules": ["q_proj", "up_proj"]},
}
REFERENCES = {"factored": "base", "larger rank": "adapter", "smaller rank": "base", "reference": "adapter"}


def train_and_stream(model: str, adapter: str) -> dict[str, tuple[float, ...]]:
    """Of each mode: how far vLLM's logprobs are from the policy's before training, after it, and after the stream;
    and the mean logprob under the reference.
    """
    from configs.arithmetic_cpu import config as base
    from configs.checks import resolve_config
    from runtime import run
    from runtime.prompts import Stops
    from train_grpo import ALGORITHMS

    base = dataclasses.replace(base, lora_rank=8)
    world, engine, results = fsdp_utils.init_world(), setup.build_engine(base, model, Stops()), {}
    batch = pack([TOKENS[:1]], [TOKENS[1:]], world.device)
    for mode, changes in MODES.items():
        changes = {key: adapter if value == "ADAPTER" else value for key, value in changes.items()}
        config = resolve_config(dataclasses.replace(base, **changes), ALGORITHMS[base.algorithm])
        trained = models.build_policy(config, model, world)
        optimizer = torch.optim.AdamW(
            [p for p in trained.parameters() if p.requires_grad], lr=3e-3 if config.lora_rank else 3e-4
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        session = run.Run(config, world, tokenizer, [], [], None, engine, trained, optimizer, None)

        @torch.no_grad()
        def difference(trained=trained) -> float:
            return (trained(batch)[0] - torch.tensor(engine.logprobs(TOKENS))).abs().mean().item()

        session.weight_sync.update_weights(everything=True)
        distances = [difference()]
        for _ in range(3):
            (-trained(batch)[0].mean() * 10).backward()
            optimizer.step()
            optimizer.zero_grad()
        distances.append(difference())
        session.weight_sync.update_weights()
        distances.append(difference())
        with torch.no_grad(), lora.reference(trained):
            results[mode] = (*distances, trained(batch)[0].mean().item())
    dist.destroy_process_group()
    return results


def chosen(logprobs: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Of each row, that of its token."""
    return logprobs[range(len(tokens)), tokens]


class Expected(NamedTuple):
    """Logprobs of all tokens at each of `TOKENS`, (T, V), in float32; and what bfloat16 changes in them, on average."""

    adapted: torch.Tensor
    base: torch.Tensor
    noise: float


@torch.no_grad()
def adapter_in(folder, rank: int = 16, seed: int = 1) -> Expected:
    """Saves a random adapter of the tiny model, large enough that its effect is 20 times the noise of bfloat16."""
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    base, std, effect, noise = (all_logprobs(exact), 0.1, 0.0, distance(all_logprobs(rounded), all_logprobs(exact)))
    for model in (exact, rounded):
        lora.inject(model, ["all-linear"], rank, float(rank))
    while effect < 20 * noise:
        for model in (exact, rounded):
            start(model, seed=seed, std=std)
        adapted, std = all_logprobs(exact), 1.5 * std
        effect, noise = distance(adapted, base), max(noise, distance(all_logprobs(rounded), adapted))
    adapter_files.save_adapter(exact, folder)
    return Expected(adapted, base, noise)


def all_logprobs(model: nn.Module) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0].float().log_softmax(-1)


def test_what_each_mode_trains_is_what_vllm_runs(tmp_path):
    """In bfloat16, so trainer and sampler each differ from the exact model by its noise."""
    adapted, base, noise = adapter_in(tmp_path / "adapter")
    for results in on_ranks(2, train_and_stream, str(TINY), str(tmp_path / "adapter"), folder=tmp_path):
        for mode, (before, stale, synced, reference) in results.items():
            assert max(before, synced) < 4 * noise and stale > 10 * noise, (mode, noise, before, stale, synced)
            if mode in REFERENCES:
                expected = adapted if REFERENCES[mode] == "adapter" else base
                assert abs(reference - chosen(expected[:-1], TOKENS[1:]).mean().item()) < 2 * noise


def with_adapters(model: str, adapters: dict[str, str]) -> list[tuple[list[float], int, float]]:
    """Under each of vLLM's own LoRAs and under none: logprobs of `TOKENS`, and a token generated after them with its
    logprob, all of one batch.
    """
    from rollout import Engine
    from runtime.conversation import Request

    fsdp_utils.init_world()
    engine = Engine(
        model, dtype="bfloat16", max_model_len=64, max_completion_length=1, max_lora_rank=16, max_loras=len(adapters)
    )
    for name, folder in adapters.items():
        engine.load_adapter(folder, name)
    names = [*adapters, lora.POLICY]  # of which vLLM has no adapter: it is in the weights
    generated = engine.generate([Request(TOKENS, 1, 1.0, seed=0, adapter=name) for name in names])
    results = [
        (engine.logprobs(TOKENS, name), completion.token_ids[0], completion.logprobs[0])
        for name, completion in zip(names, generated)
    ]
    dist.destroy_process_group()
    return results


def test_vllm_reads_our_adapters_as_its_own_and_several_at_once(tmp_path):
    adapters = {"first": (16, 1), "second": (4, 2)}  # rank and seed
    folders = {name: str(tmp_path / name) for name in adapters}
    expected = [adapter_in(folders[name], rank, seed) for name, (rank, seed) in adapters.items()]
    references, noise = [*(each.adapted for each in expected), expected[0].base], max(each.noise for each in expected)
    (found,) = on_ranks(1, with_adapters, str(TINY), folders, folder=tmp_path)
    for reference, (logprobs, token, logprob) in zip(references, found, strict=True):
        assert distance(torch.tensor(logprobs), chosen(reference[:-1], TOKENS[1:])) < 4 * noise
        assert abs(reference[-1, token] - logprob) < 10 * noise  # a single one
    for one, other in itertools.combinations(references, 2):
        assert distance(one, other) > 10 * noise, "or taking one for the other would not be seen"
