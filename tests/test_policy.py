"""Packing leaves nothing out and lets nothing leak; the head is exact."""

import copy
import importlib
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, on_ranks
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.arcee.modeling_arcee import ArceeMLP
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

import fsdp_utils
import lora
import low_rank
import policy
from policy import FrozenHead, Head, Policy, trained_head
from runtime import models, packing
from runtime.packing import pack, packed_attention
from train_grpo import log_z_head

CPU = torch.device("cpu")


def reference_head(hidden, head, targets, temperature):
    """Plain autograd through all logits."""
    logits = hidden @ head.weight.T * head.scale
    if head.bias is not None:
        logits = logits + head.bias * head.scale
    if head.cap:
        logits = head.cap * torch.tanh(logits / head.cap)
    logp = F.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "settings, bias, temperature, logits_at_once",
    [
        ({}, False, 1.0, 1 << 25),
        ({}, False, 0.7, 350),  # chunks of seven rows, the last one short
        ({"scale": 0.3}, False, 0.7, 350),
        ({"scale": 0.3}, True, 0.7, 350),
        ({"cap": 2.0}, False, 1.0, 350),
        ({"cap": 2.0, "scale": 1.7}, True, 0.7, 1 << 25),
    ],
)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_heads_are_exact_in_float64(
    monkeypatch, trained, settings, bias, temperature, logits_at_once, entropy_gradient
):
    """The logprobs, the entropy, and the gradients of the hidden states and of a head that is trained."""
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    values = [torch.randn(24, 16, **double), torch.randn(50, 16, **double), torch.randn(50, **double)]
    targets, (upstream, for_entropy) = torch.randint(50, (24,)), torch.randn(2, 24, **double)
    gradients = []
    for score in (trained_head if trained else FrozenHead.apply, reference_head):
        hidden, weight, b = (value.clone().requires_grad_(trained or i == 0) for i, value in enumerate(values))
        head = Head(weight, b if bias else None, **settings)
        options = [] if score is reference_head else [entropy_gradient]
        logprobs, entropy = score(hidden, head, targets, temperature, *options)
        loss = (logprobs * upstream).sum() + (entropy * for_entropy).sum() * entropy_gradient
        inputs = [hidden, weight, b][: (3 if bias else 2) if trained else 1]
        assert entropy.requires_grad == (entropy_gradient or score is reference_head)
        gradients.append([logprobs, entropy, *torch.autograd.grad(loss, inputs)])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-12)


def test_gradients_of_confident_tokens_are_those_of_float64():
    """Where p_y is 0.99 to 0.9999, p_y - 1 must not be formed in bfloat16, whose numbers below 1 are 0.004 apart."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, 64, generator=generator) * 0.1).bfloat16()
    targets = torch.arange(64)
    hidden = (weight[targets] * torch.linspace(20, 28, 64)[:, None]).bfloat16().requires_grad_()
    logprobs, _ = FrozenHead.apply(hidden, Head(weight), targets, 1.0, False)
    logprobs.sum().backward()

    wide = hidden.detach().double().requires_grad_()
    expected = (wide @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    p = expected.exp()
    assert p.median() > 0.998 and p.max() > 0.9999
    error = (hidden.grad.double() - wide.grad).norm(dim=1) / wide.grad.norm(dim=1)
    assert error.median() < 0.06 and error.max() < 0.25, "logits of 18 are rounded by up to 0.06 in bfloat16"


RECURRENT = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
RECURRENT |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize("architecture, sizes", [("qwen2", {}), ("qwen3_5_text", RECURRENT)])
def test_neighbours_do_not_leak(architecture, sizes, model_folder):
    """Changing one sequence leaves the logprobs of all others as they were, to the last bit."""
    folder = model_folder(architecture, **sizes)
    ours = Policy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    prompts, completions = [[5] * 9, [6] * 9, [7] * 5], [[8] * 6, [9] * 6, [10] * 4]
    before = ours(pack(prompts, completions, CPU)).logprobs
    prompts[1], completions[1] = [11] * 9, [12] * 6
    after = ours(pack(prompts, completions, CPU)).logprobs
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[12:], after[12:])
    assert not torch.equal(before[6:12], after[6:12])


@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_next"])
def test_kernels_of_recurrent_layers_are_told_where_sequences_begin(architecture, model_folder, monkeypatch):
    """On a GPU: here by others with the packages' signatures, which transformers finds in the packages' place."""
    kind = {"qwen3_5": "qwen3_5_text"}.get(architecture, architecture)
    code = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    folder = model_folder(kind, dtype=torch.float32, **RECURRENT)
    ours = Policy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    packed = pack([[5] * 9, [6] * 9, [7] * 5], [[8] * 6, [9] * 6, [10] * 4], CPU)
    convolution, attention, expected = code.causal_conv1d_fn, code.torch_chunk_gated_delta_rule, ours(packed).logprobs

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        assert seq_idx.dtype == torch.int32 and x.stride(1) == 1  # which the package asks for
        parts = x.split(seq_idx[0].bincount().tolist(), dim=2)
        return torch.cat([convolution(part, weight, bias, activation=activation) for part in parts], dim=2)

    def chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None
    ):
        parts = zip(*(tensor.split(cu_seqlens.diff().tolist(), dim=1) for tensor in (q, k, v, g, beta)))
        options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return torch.cat([attention(q, k, v, g=g, beta=b, **options)[0] for q, k, v, g, b in parts], dim=1), None

    kernels = SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn, chunk_gated_delta_rule=chunk_gated_delta_rule)
    for package in packing.KERNELS:
        for part in (package, package.partition(".")[0]):
            monkeypatch.setitem(sys.modules, part, kernels)
    for function, name, package in (
        ("causal_conv1d_fn", "causal_conv1d_fn", "causal_conv1d"),
        ("torch_chunk_gated_delta_rule", "chunk_gated_delta_rule", "fla"),
    ):
        find = use_kernel_func_from_hub_with_fallback(name, package)
        monkeypatch.setattr(code, function, find(lambda *_, **__: pytest.fail("the stand-in was not found")))
    has_kernels = packing.has_kernels.__wrapped__  # which remembers nothing
    assert has_kernels("cuda") and not has_kernels("cpu")
    monkeypatch.setattr(packing, "has_kernels", lambda _: True)
    assert (ours(packed).logprobs - expected).norm() < 100 * EPSILON * expected.norm()


def test_log_z_is_of_each_sequences_prompt(model_folder):
    """It reads the prompt's last token, in the order of the sequences; also where one has no completion."""
    folder = model_folder("qwen2", dtype=torch.float32)
    plain, ours = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    log_z = log_z_head(64)
    torch.nn.init.normal_(log_z[-1].weight)
    prompts, completions = [[5] * 9, [6, 7, 8], [9, 10]], [[], [11, 12], [13]]
    found = Policy(ours, log_z)(pack(prompts, completions, CPU)).prompt_values
    states = [plain.base_model(torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]
    expected = log_z(torch.stack(states))[:, 0]
    assert (found - expected).norm() < 1000 * EPSILON * expected.norm()


def test_masks_come_from_lengths():
    """Pad and end-of-sequence ids are tokens like any other."""
    packed = pack([[0, 0], [1]], [[0, 1, 0], [1, 1]], CPU)
    assert packed.targets.tolist() == [0, 1, 0, 1, 1]
    assert packed.rows.tolist() == [1, 2, 3, 5, 6]


def test_shorter_before_longer_is_refused():
    with pytest.raises(ValueError, match="longest first"):
        pack([[1], [1]], [[2], [2, 3]], CPU)


def say_the_same_twice(folders):
    """Whether the policies in training mode do."""
    world, same = fsdp_utils.init_world(), []
    for folder in folders:
        model = models.meta_model(str(folder), torch.float32)
        fsdp_utils.load_weights(model, str(folder), world.device)
        policy, packed = Policy(model).train(), pack([[5]], [[6, 7, 8, 9]], world.device)
        same.append(torch.equal(policy(packed).logprobs, policy(packed).logprobs))
    return same


def test_a_base_has_no_dropout(model_folder, tmp_path):
    """What learns is what samples, also in training mode, which recomputing activations needs."""
    folders = [model_folder(kind, residual_dropout=0.5) for kind in ("seed_oss", "starcoder2")]
    assert on_ranks(1, say_the_same_twice, folders, folder=tmp_path) == [[True, True]]


@pytest.mark.parametrize(
    "architecture, sizes, words",
    [
        ("gemma2", {}, "attn_logit_softcapping 50.0"),
        ("apertus", {}, "its checkpoint has .*act_fn.beta, which is no parameter"),
        ("mamba", {}, "conv1d.weight has 3 dimensions"),
        ("gpt2", {}, "no decoder blocks named `layers`"),
        ("gemma3", {}, "must be a language model and nothing more"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(architecture, sizes, words, tmp_path):
    AutoConfig.for_model(architecture, **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        models.meta_model(str(tmp_path), torch.bfloat16)
    assert "\n" not in str(error.value) and repr(str(tmp_path)) in str(error.value)


def test_attention_that_is_not_told_what_to_keep_apart_is_refused():
    tensor = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="Linear is not implemented here"):
        packed_attention(torch.nn.Linear(1, 1), tensor, tensor, tensor, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_operation_for_rms_norm_gives_what_transformers_gives(dtype):
    """The same bits, and gradients too, with a weight that tells apart whether it is rounded before or after."""
    torch.manual_seed(0)
    for kind in (LlamaRMSNorm, Qwen2RMSNorm):
        theirs, ours = (torch.nn.Sequential(kind(96, eps=1e-3)).to(dtype) for _ in range(2))
        policy.use_rms_norm(ours)
        assert "forward" in vars(ours[0])
        weight, x, dy = torch.randn(96), torch.randn(1, 64, 96, dtype=dtype), torch.randn(1, 64, 96, dtype=dtype)
        found = []
        for model in (theirs, ours):
            model[0].weight.data.copy_(weight)
            states = x.clone().requires_grad_()
            y = model(states)
            found.append((y, *torch.autograd.grad(y, (states, model[0].weight), dy)))
        assert all(torch.equal(one, other) for one, other in zip(*found))


def test_other_norms_stay_as_they_are():
    """One scales by 1 + weight, one rounds after the weight, and one has a gate."""
    others = torch.nn.Sequential(Gemma2RMSNorm(8), Olmo2RMSNorm(8), BambaRMSNormGated(8), torch.nn.RMSNorm(8))
    policy.use_rms_norm(others)
    assert not any("forward" in vars(norm) for norm in others)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
def test_recomputing_changes_no_bit_and_selects_what_is_cheap(architecture, model_folder, monkeypatch):
    """The same logprobs and gradients; multiplied again are all products but the last, or none."""
    dense, multiplied, results = low_rank.dense, [], {}
    monkeypatch.setattr(low_rank, "dense", lambda weight: multiplied.append(weight) or dense(weight))
    for what in ("none", "selective", "full"):
        model = AutoModelForCausalLM.from_pretrained(model_folder(architecture), dtype=torch.bfloat16)
        lora.inject(model, ["all-linear"], 4, 6.0)
        lora.init_adapters(model, seed=0)
        for _, layer in lora.lora_layers(model):
            layer.adapters[lora.POLICY].lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
        policy.recompute(model, what)
        adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        logprobs = Policy(model).train()(pack([[5, 6, 7]], [[8, 9, 10, 11]], CPU)).logprobs
        forward, linears = len(multiplied), len(adapters) // 2
        results[what] = [logprobs, *torch.autograd.grad(logprobs.sum(), adapters)]
        again = (6 if what == "full" else 0) * linears // 7
        # in the backward each once, but for three that read the embedding; and what is recomputed
        assert forward == linears and len(multiplied) - forward == linears + again - (0 if what == "full" else 3)
        multiplied.clear()
    for what in ("selective", "full"):
        assert all(map(torch.equal, results[what], results["none"])), what


def test_a_gated_mlp_keeps_what_its_first_two_linears_give():
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=96))
    x, kept = torch.randn(1, 5, 32, requires_grad=True), {False: [], True: []}
    for selective, saved in kept.items():
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            policy.gated_mlp(mlp, x, selective)
    sizes = [len({t.data_ptr() for t in saved if t.numel() == 5 * 96}) for saved in kept.values()]
    assert sizes == [4, 2], "gate, act(gate), up and their product, or gate and up alone"


def test_mlps_of_other_kinds_are_told_apart():
    gated, others = (LlamaMLP, Qwen2MLP, GemmaMLP, Qwen2MoeMLP), (Phi3MLP, ArceeMLP, Starcoder2MLP, torch.nn.Linear)
    assert [policy.is_gated_mlp(kind) for kind in gated + others] == [True] * 4 + [False] * 4
    with pytest.raises(ValueError, match="gradient_checkpointing selective: this model has no gated MLP"):
        policy.recompute(torch.nn.Sequential(torch.nn.Linear(2, 2)), "selective")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch's compiler needs g++ on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_mlp_in_one_kernel_is_as_exact_as_in_two(dtype, monkeypatch):
    """The function that GPUs compile, compiled for a CPU and checkpointed, beside float64."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # rollout.py sets it on a CPU
    torch.manual_seed(0)
    exact = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=96)).double()
    mlp, errors = copy.deepcopy(exact).to(dtype), {}
    exact.load_state_dict(mlp.state_dict())
    for way, activated in {"two": policy.activated, "one": policy.one_kernel.__wrapped__()}.items():
        monkeypatch.setattr(policy, "activated", activated)
        for rows in (37, 64):
            x, dy = torch.randn(2, 1, rows, 32, dtype=dtype, generator=torch.Generator().manual_seed(rows))
            found = []
            for each, run in ((exact, exact.forward), (mlp, partial(policy.gated_mlp, mlp, selective=True))):
                states = x.to(each.down_proj.weight.dtype).requires_grad_()
                with config.patch({"cpp.cxx": (None, "g++")}):  # conftest.py hides it from vLLM
                    y = run(states)
                    found.append((y, *torch.autograd.grad(y, (states, *each.parameters()), dy.to(y))))
            errors[way, rows] = [((a - b).norm() / a.norm()).item() for a, b in zip(*found)]
    assert counters["stats"]["unique_graphs"] > 0
    for rows in (37, 64):
        for one, two in zip(errors["one", rows], errors["two", rows]):
            assert one <= 1.1 * two + EPSILON, (rows, one, two)


def test_what_others_make_of_calling_a_model_does_not_matter(model_folder, monkeypatch):
    """vLLM replaces `__call__` of the models that it takes from transformers, in this very process."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama", dtype=torch.float32), dtype=torch.float32)
    packed, ours = pack([[5]], [[6, 7]], CPU), Policy(model)
    expected = ours(packed).logprobs
    monkeypatch.setattr(type(model.base_model), "__call__", lambda *_, **__: pytest.fail("called"))
    assert torch.equal(ours(packed).logprobs, expected)
