"""Adapters of experts: against a loop over experts in float64, peft, other numbers of ranks, and vLLM."""

import re
import shutil
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from conftest import EPSILON, TINY, fill_adapters, on_ranks, refused, sharded_policy
from test_families import (
    ALPHA,
    COMPLETIONS,
    EXPERTS,
    FAMILIES,
    PROMPTS,
    RANK,
    SHAPE,
    plain_logprobs,
    randomise,
    relative,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fsdp_utils
import lora
from configs.base import Config
from policy import Policy
from runtime import adapter_files, models
from runtime.files import read_model
from runtime.packing import pack

TARGETS = ["q_proj", "experts.gate_proj", "experts.up_proj", "experts.down_proj"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype, width, inner", [(torch.float64, 12, 10), (torch.float32, 16, 8)])  # kernels take these
def test_gradients_are_those_of_a_loop_over_experts(dtype, width, inner, merged):
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", hidden_size=width, moe_intermediate_size=inner, num_experts=5)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Qwen3MoeExperts(config)})})
    lora.inject(model, TARGETS[1:], 3, 6.0, merged=merged)
    for parameter in model.to(dtype).parameters():
        nn.init.normal_(parameter, std=0.5)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    up, down = [(5, 3, width), (5, inner, 3)], [(5, 3, inner), (5, width, 3)]
    assert [tuple(parameter.shape) for parameter in adapters] == up + up + down
    x, weights = (torch.randn(7, n, dtype=dtype, requires_grad=True) for n in (width, 2))
    chosen = torch.tensor([[0, 2], [2, 4], [4, 0], [2, 0], [0, 4], [4, 2], [2, 4]])  # never 1 or 3

    experts, outputs = model["mlp"]["experts"], []
    gate_A, gate_B, up_A, up_B, down_A, down_B = adapters
    for token, numbers, shares in zip(x, chosen, weights):
        parts = []
        for e, share in zip(numbers, shares):
            gate, up = experts.gate_up_proj[e].chunk(2)
            gate, up = gate + 2 * gate_B[e] @ gate_A[e], up + 2 * up_B[e] @ up_A[e]
            down = experts.down_proj[e] + 2 * down_B[e] @ down_A[e]
            parts.append(share * (down @ (nn.functional.silu(gate @ token) * (up @ token))))
        outputs.append(sum(parts))
    expected, found = torch.stack(outputs), experts(x, chosen, weights)
    close = partial(torch.testing.assert_close, rtol=1e3 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps)
    close(found, expected)
    leaves, upstream = [x, weights, *adapters], torch.randn_like(found)
    gradients = [torch.autograd.grad(output, leaves, upstream) for output in (found, expected)]
    close(*gradients)
    with lora.disabled(model):
        close(experts(x, chosen, weights), Qwen3MoeExperts.forward(experts, x, chosen, weights))


def expert_model(folder, rank=RANK):
    """The model as `models.build_policy` makes it, on one rank."""
    model = models.meta_model(str(folder), torch.float32)
    lora.inject(model, TARGETS, rank, ALPHA)
    model.to_empty(device="cpu").tie_weights()
    fsdp_utils.compute_buffers(model, torch.device("cpu"))
    fsdp_utils.read_checkpoint(model, str(folder))
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "qwen3_next"])
def test_peft_reads_the_folder_and_runs_the_same_function(family, model_folder, tmp_path):
    """So does this program, at another rank."""
    architecture, settings = FAMILIES[family]
    folder = model_folder(architecture, **SHAPE, **settings)
    policy, packed = Policy(expert_model(folder)), pack(PROMPTS, COMPLETIONS, torch.device("cpu"))
    randomise(policy.model)
    adapter_files.save_adapter(policy.model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    again = Policy(expert_model(folder, rank=RANK + 3))
    adapter_files.load_adapter(again.model, tmp_path)
    with torch.no_grad():
        found = policy(packed).logprobs
        assert relative(found, plain_logprobs(peft.PeftModel.from_pretrained(plain, tmp_path))) < 100 * EPSILON
        assert relative(again(packed).logprobs, found) < 100 * EPSILON


def gradients(folder, **options):
    """Of all adapters, for the texts' mean logprob."""
    world = fsdp_utils.init_world()
    policy = sharded_policy(folder, world, torch.float32, targets=TARGETS, **options)
    randomise(policy.model)
    policy(pack(PROMPTS, COMPLETIONS, world.device)).logprobs.mean().backward()
    return [fsdp_utils.gather(parameter.grad) for parameter in policy.parameters() if parameter.requires_grad]


def test_shards_and_recomputed_blocks_have_the_same_gradients(moe_folder, tmp_path):
    (whole,) = on_ranks(1, gradients, moe_folder, folder=tmp_path)
    assert len(whole) == 2 * (1 + 3) * 2  # layers, linears, A and B
    for sharded in on_ranks(2, partial(gradients, checkpointing=True), moe_folder, folder=tmp_path):
        assert all(relative(*pair) < 1e3 * EPSILON for pair in zip(sharded, whole, strict=True))


def merged_stream(folder):
    """What a sync sends, and the adapters' matrices."""
    world = fsdp_utils.init_world()
    model = sharded_policy(folder, world, targets=TARGETS).model
    fill_adapters(model, fsdp_utils.fill)
    modules, stats = fsdp_utils.to_send(model), fsdp_utils.SyncStats()
    stream = fsdp_utils.summon_layers(model, world.device, modules=modules, stats=stats)
    sent = {name: tensor.clone() for name, tensor in stream}
    assert stats.metrics()["sync/update_survival"] > 0.99  # these adapters are large
    adapters = ((path, layer.adapters[lora.POLICY]) for path, layer in lora.lora_layers(model))
    return sent, {path: [fsdp_utils.gather(m).detach() for m in adapter.parameters()] for path, adapter in adapters}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_stream_merges_every_expert(ranks, model_folder, tmp_path):
    """Bit for bit: the sums are exact in float32. At two ranks, of three experts the first has two."""
    folder = model_folder("qwen3_moe", num_experts=3, moe_intermediate_size=24)
    base = dict(read_model(folder))
    for sent, adapters in on_ranks(ranks, merged_stream, folder, folder=tmp_path):
        assert len([name for name in sent if ".experts." in name]) == 2 * 3 * 3  # layers, experts, linears
        for name, tensor in sent.items():
            path, expert = re.sub(r"experts\.\d+", "experts.each", name), re.search(r"experts\.(\d+)", name)
            if matrices := adapters.get(path.removesuffix(".weight")):
                A, B = (matrix[int(expert[1])] if expert else matrix for matrix in matrices)
                assert torch.equal(tensor, (base[name].float() + 2.0 * B @ A).bfloat16()), name
            else:
                assert torch.equal(tensor, base[name]) and name.endswith(("k_proj.weight", "v_proj.weight")), name


def synced(folder, sync):
    """Trainer's and vLLM's logprobs with a random adapter; what is said where experts' updates get lost on the way."""
    from benchmarks.gpu_shared import bare_run

    settings = dict(lora_rank=RANK, lora_alpha=ALPHA, dtype="float32", target_modules=TARGETS, sync=sync)
    run = bare_run(Config(max_prompt_length=60, max_completion_length=4, **settings), str(folder), PROMPTS)
    randomise(run.policy.model)
    metrics = run.weight_sync.update_weights(verify=True)
    texts = zip(PROMPTS, COMPLETIONS)
    sampled = [logprob for p, c in texts for logprob in run.engine.logprobs(p + c)[len(p) - 1 :]]
    with torch.no_grad():
        trained = run.policy(pack(PROMPTS, COMPLETIONS, run.world.device)).logprobs
    write = fsdp_utils.write_experts
    fsdp_utils.write_experts = lambda weight, layers, target, stats: write(weight, [], target, stats)
    with pytest.raises(RuntimeError, match="vLLM does not run the trained weights"):
        run.weight_sync.update_weights(verify=True)
    with refused("vLLM on a CPU does not run adapters of experts", "sync merged"):
        bare_run(replace(run.config, sync="adapter"), str(folder), PROMPTS)
    return metrics, trained, torch.tensor(sampled)


def test_a_part_of_the_experts_linears_cannot_be_sent_alone(moe_folder):
    model = models.meta_model(str(moe_folder), torch.bfloat16)
    with refused("together", "sync merged"):
        models.add_adapters(model, Config(target_modules=["experts.down_proj"]))
    models.add_adapters(model, Config(target_modules=["experts.down_proj"], sync="merged"))


@pytest.mark.parametrize("sync", ["merged", "straight_through"])
def test_vllm_runs_the_experts_that_are_trained(sync, moe_folder, tmp_path):
    ((metrics, trained, sampled),) = on_ranks(1, synced, moe_folder, sync, folder=tmp_path)
    assert metrics["sync/probe_error"] < 0.12
    assert (trained - sampled).abs().max() < 1e-3


@pytest.fixture(scope="session")
def moe_folder(model_folder):
    """A model that vLLM and `train_grpo.py` can run."""
    folder = model_folder("qwen3_moe", **SHAPE, **EXPERTS)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
