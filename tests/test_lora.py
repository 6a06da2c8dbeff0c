"""The LoRA layer against autograd, float64 and peft; adapter folders against peft; ranks against plain algebra."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import EPSILON
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import lora
import low_rank
from configs.base import Config
from runtime import adapter_files, models
from runtime.adapter_files import shrink

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral"]
IDS = torch.randint(2, 160, (2, 11), generator=torch.Generator().manual_seed(1))


def make_layer(dtype=torch.float64, rank=4, **options) -> lora.LoRALinear:
    """A layer of 12 inputs and 10 outputs with random matrices, all in `dtype`."""
    torch.manual_seed(0)
    layer = lora.as_lora_layer(nn.Sequential(nn.Linear(12, 10, dtype=dtype).requires_grad_(False)), "0")
    layer.adapters[lora.POLICY] = adapter = lora.Adapter(layer, rank, 8.0, **options)
    nn.init.normal_(adapter.lora_A, std=0.3)
    nn.init.normal_(adapter.lora_B, std=0.3)
    adapter.to(torch.promote_types(dtype, torch.float32))
    layer.active = (lora.POLICY,)
    return layer


def plain(layer: lora.LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The definition, for autograd to differentiate."""
    adapter = layer.adapters[lora.POLICY]
    update = adapter.alpha / adapter.rank * adapter.lora_B @ adapter.lora_A
    return x @ (layer.weight + update).T + layer.bias


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_gradients_are_those_of_the_definition(shape, merged):
    layer = make_layer(merged=merged)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    adapter = layer.adapters[lora.POLICY]
    torch.testing.assert_close(layer(x), plain(layer, x))

    def function(x, A, B):
        return low_rank.low_rank_linear(x, layer.weight, layer.bias, A, B, 0.7, merged)

    assert torch.autograd.gradcheck(function, (x, adapter.lora_A, adapter.lora_B))


@pytest.mark.parametrize("merged", [False, True])
def test_frozen_input_and_recomputed_activations_change_nothing(merged):
    layer = make_layer(merged=merged)
    adapter = layer.adapters[lora.POLICY]
    x = torch.randn(2, 3, 12, dtype=torch.float64).transpose(0, 1)  # not contiguous
    dy = torch.randn(3, 2, 10, dtype=torch.float64)
    expected = torch.autograd.grad(plain(layer, x), [adapter.lora_A, adapter.lora_B], dy)
    for output in (layer(x), checkpoint(layer, x, use_reentrant=False)):
        found = torch.autograd.grad(output, [adapter.lora_A, adapter.lora_B], dy)
        torch.testing.assert_close(found, expected)


def test_recomputing_a_block_spares_its_last_product(monkeypatch):
    """Nothing after it is saved, so that the last linear's output is not needed a second time."""
    block = nn.Sequential(make_layer(), nn.Linear(10, 12, dtype=torch.float64), make_layer())
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    leaves, first, last = [x, *block[0].adapters.parameters()], block[0].weight, block[2].weight
    expected = torch.autograd.grad(block(x).sum(), leaves)
    y, used, dense = checkpoint(block, x, use_reentrant=False), [], low_rank.dense
    monkeypatch.setattr(low_rank, "dense", lambda weight: used.append(weight) or dense(weight))
    found = torch.autograd.grad(y.sum(), leaves)
    assert all(map(torch.equal, found, expected))
    assert list(map(id, used)) == [id(first), id(last), id(first)], "recomputed: first; backward: last, first"


def test_merged_forward_is_the_rounded_weight_and_goes_straight_through():
    """In bfloat16, merged: y and dx are exactly those of a plain linear with the merged weight; dA, dB as factored."""
    layer = make_layer(torch.bfloat16, merged=True)
    adapter = layer.adapters[lora.POLICY]
    with torch.no_grad():  # to multiples of 1/16, so that the sum is exact in float32, in whatever order it is added
        for matrix in (adapter.lora_A, adapter.lora_B):
            matrix.copy_((matrix * 16).round() / 16)
    sampler = (layer.weight.float() + adapter.scale * adapter.lora_B @ adapter.lora_A).bfloat16().detach()
    x = torch.randn(7, 12).bfloat16().requires_grad_()
    y, expected = layer(x), nn.functional.linear(x, sampler, layer.bias)
    dy = torch.randn(7, 10).bfloat16()
    assert torch.equal(y, expected)
    assert not torch.equal(sampler, layer.weight)
    grads = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], dy)
    assert torch.equal(grads[0], torch.autograd.grad(expected, x, dy)[0])
    adapter.merged = False
    factored = torch.autograd.grad(layer(x), [adapter.lora_A, adapter.lora_B], dy)
    assert torch.equal(grads[1], factored[0]) and torch.equal(grads[2], factored[1])


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_a_merge_is_the_exact_sum_rounded_once(size):
    """In bfloat16, but for sums near the middle between two neighbours; in float32 but for the order of additions."""
    torch.manual_seed(0)
    W, A, B = torch.randn(300, 200), torch.randn(16, 200), size * torch.randn(300, 16)
    for dtype in (torch.bfloat16, torch.float32):
        base = W.to(dtype)
        exact = base.double() + 0.3 * (B.double() @ A.double())
        merged, rounded = low_rank.merge(base, A, B, 0.3), exact.to(dtype)
        lost = 2**-16 if dtype == torch.bfloat16 else 16 * EPSILON  # of the summands' magnitudes, see low_rank.factors
        magnitude = base.double().abs() + 0.3 * (B.double().abs() @ A.double().abs())
        half_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((merged.double() - exact).abs() <= 1.01 * half_ulp + lost * magnitude).all()
        if dtype == torch.bfloat16:
            assert (merged != rounded).float().mean() < 1e-4 + min(size, 1) * 2**-7  # 2⁻¹⁶ of an update, of W's 2⁻⁸
            assert (merged != base).float().mean() > 0.001, "or there would be nothing to round"
            shards = torch.cat([low_rank.merge(base[rows], A, B[rows], 0.3) for rows in (slice(0, 7), slice(7, 300))])
            assert (shards != merged).float().mean() < 1e-4  # float32 sums in another order may round the other way


@pytest.mark.parametrize("merged", [False, True])
def test_saves_its_input_and_the_adapter_only(merged):
    """And x Aᵀ, which is r wide, unless the weights are merged."""
    layer = make_layer(torch.bfloat16, merged=merged)
    saved = []
    x = torch.randn(7, 12).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    adapter = layer.adapters[lora.POLICY]
    expected = {t.data_ptr() for t in (x, adapter.lora_A, adapter.lora_B)}
    others = [t for t in saved if t.data_ptr() not in expected]
    assert len(saved) == 3 + len(others) and [t.shape for t in others] == ([] if merged else [(7, 4)])


def test_rank_stabilised_scale():
    assert make_layer(rank=4, rslora=True).adapters[lora.POLICY].scale == 4.0  # 8 / sqrt(4)
    assert make_layer(rank=4).adapters[lora.POLICY].scale == 2.0


# ---- In a model, against peft ---------------------------------------------------------------------------------


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def peft_model(folder, targets, rank, **options):
    """peft's model with a random adapter."""
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(load(folder), config).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


TARGETS = [("all-linear", 4, {}), (["q_proj", "v_proj"], 8, {"use_rslora": True}), (["down_proj", "o_proj"], 2, {})]


@pytest.mark.parametrize("targets, rank, options", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_peft_reads_ours_and_we_read_peft(architecture, targets, rank, options, model_folder, tmp_path):
    folder = model_folder(architecture)
    theirs = peft_model(folder, targets, rank, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(folder)
    target_list = [targets] if isinstance(targets, str) else targets
    lora.inject(ours, target_list, rank, 16, rslora=options.get("use_rslora", False))
    assert adapter_files.load_adapter(ours, tmp_path / "theirs") == 0.0
    logits = theirs(IDS).logits
    base = load(folder)(IDS).logits
    rounding = 100 * EPSILON * logits.abs().max().item()
    torch.testing.assert_close(ours(IDS).logits, logits, rtol=0, atol=rounding)
    assert (logits - base).abs().max() > 100 * rounding, "or an adapter that does nothing would not be seen"
    with lora.disabled(ours):
        assert torch.equal(ours(IDS).logits, base)

    adapter_files.save_adapter(ours, tmp_path / "ours", base_model=str(folder), base_dtype="nf4")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=rounding)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@torch.no_grad()
def test_adapters_of_some_layers_are_saved_so_that_peft_finds_no_more(model_folder, tmp_path):
    ours = load(model_folder("llama"))
    lora.inject(ours, ["model.layers.1.self_attn.q_proj"], 4, 8)
    lora.init_adapters(ours, seed=0)
    adapter_files.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(model_folder("llama")), tmp_path)
    assert len([name for name, _ in theirs.named_parameters() if "lora_A" in name]) == 1


# ---- Strictness, ranks, several adapters ----------------------------------------------------------------------


def saved_adapter(folder, out, rank=16, alpha=16.0, std=0.05, seed=3):
    """A folder with a random adapter on every linear, and the model that has it."""
    model = load(folder)
    lora.inject(model, ["all-linear"], rank, alpha)
    lora.init_adapters(model, seed)
    torch.manual_seed(seed)
    for _, layer in lora.lora_layers(model):
        nn.init.normal_(layer.adapters[lora.POLICY].lora_B, std=std)
    adapter_files.save_adapter(model, out, base_model=str(folder))
    return model


def test_peft_has_no_setting_that_is_not_known_here():
    """peft's own settings at their defaults are those of a plain LoRA; a later version may have more."""
    settings = json.loads(json.dumps(peft.LoraConfig(task_type="CAUSAL_LM").to_dict(), default=str))
    assert not [key for key in settings.keys() - adapter_files.PLAIN if settings[key] not in adapter_files.UNSET]
    variants = (
        "use_dora alora_invocation_tokens target_parameters arrow_config kasa_config monteclora_config use_bdlora"
    )
    assert set(variants.split()) <= settings.keys() - adapter_files.PLAIN


@pytest.mark.parametrize(
    "change", [lambda key: f"_orig_mod.{key}", lambda key: key.replace(".weight", ".default.weight")]
)
@torch.no_grad()
def test_keys_of_plain_state_dicts_are_read(change, model_folder, tmp_path):
    before = saved_adapter(model_folder("qwen2"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)
    after = load(model_folder("qwen2"))
    lora.inject(after, ["all-linear"], 16, 16)
    adapter_files.load_adapter(after, tmp_path)
    assert torch.equal(after(IDS).logits, before(IDS).logits)


@torch.no_grad()
def test_a_larger_rank_goes_on_exactly_where_the_smaller_was(model_folder, tmp_path):
    before = saved_adapter(model_folder("qwen3"), tmp_path, rank=16, alpha=16)
    after = load(model_folder("qwen3"))
    lora.inject(after, ["all-linear"], 32, 16)
    assert adapter_files.load_adapter(after, tmp_path, seed=1) == 0.0
    for (_, old), (_, new) in zip(lora.lora_layers(before), lora.lora_layers(after)):
        old, new = old.adapters[lora.POLICY], new.adapters[lora.POLICY]
        assert torch.equal(new.lora_A[:16], old.lora_A) and torch.equal(new.scale * new.lora_B[:, :16], old.lora_B)
        assert not new.lora_B[:, 16:].any()
        assert new.lora_A[16:].abs().min() > 0  # or the added directions could never learn
    logits = before(IDS).logits
    torch.testing.assert_close(after(IDS).logits, logits, rtol=0, atol=100 * EPSILON * logits.abs().max().item())


@torch.no_grad()
def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_lost(model_folder, tmp_path):
    before = saved_adapter(model_folder("llama"), tmp_path, rank=16, alpha=16)
    after = load(model_folder("llama"))
    lora.inject(after, ["all-linear"], 6, 16)
    reported = adapter_files.load_adapter(after, tmp_path)
    lost = total = 0.0
    for (_, old), (_, new) in zip(lora.lora_layers(before), lora.lora_layers(after)):
        old, new = ((a.scale * a.lora_B @ a.lora_A).double() for a in (old.adapters["policy"], new.adapters["policy"]))
        values = torch.linalg.svdvals(old)
        error = (old - new).square().sum()
        torch.testing.assert_close(error, values[6:].square().sum(), rtol=1e-4, atol=0)  # Eckart-Young
        lost, total = lost + error, total + old.square().sum()
    assert reported == pytest.approx((lost / total).sqrt().item(), rel=1e-4)
    assert 0.3 < reported < 0.9


@pytest.mark.parametrize("rank", [65, 100, 128])
@torch.no_grad()
def test_a_rank_between_the_layers_width_and_the_files_loses_nothing(rank, model_folder, tmp_path):
    before = saved_adapter(model_folder("llama"), tmp_path, rank=200, alpha=200, std=0.01)
    after = load(model_folder("llama"))  # 64 wide
    lora.inject(after, ["all-linear"], rank, 16)
    assert adapter_files.load_adapter(after, tmp_path) < EPSILON
    logits = before(IDS).logits
    torch.testing.assert_close(after(IDS).logits, logits, rtol=0, atol=1000 * EPSILON * logits.abs().max().item())


def test_shrinking_what_has_a_smaller_rank_already_loses_nothing():
    torch.manual_seed(0)
    A, B = torch.randn(8, 3) @ torch.randn(3, 30), torch.randn(20, 8)
    small_A, small_B, values = shrink(A, B, 3)
    assert (small_B @ small_A - B @ A).norm() < 100 * EPSILON * (B @ A).norm()
    assert values[3:].max() < 100 * EPSILON * values[0]


def test_a_start_or_reference_of_another_base_is_said(model_folder, tmp_path, capsys):
    folder, other = str(model_folder("qwen2")), str(tmp_path / "adapter")
    adapter_files.save_adapter(saved_adapter(folder, other), other, base_model="elsewhere", base_dtype="nf4")
    model = load(folder)
    for name in (lora.POLICY, lora.REFERENCE):
        lora.inject(model, ["all-linear"], 16, 16, name=name)
    for option in ("lora_adapter_path", "ref_adapter_path"):
        models.fill_adapters(model, Config(model=folder, **{option: other}), SimpleNamespace(rank=0))
        said = capsys.readouterr().out
        assert "which names another base: elsewhere" in said and "trained on a base in nf4" in said


@pytest.mark.parametrize("size", [0, 2])
def test_a_smaller_rank_has_a_gradient_in_every_direction(model_folder, tmp_path, size):
    """If B is 0, or has fewer directions than the new rank, B A stays as it was and no direction is 0 on both sides."""
    folder = model_folder("qwen2")
    before = saved_adapter(folder, tmp_path / "adapter", rank=16)
    with torch.no_grad():
        for _, layer in lora.lora_layers(before):
            layer.adapters[lora.POLICY].lora_B[:, size:] = 0
    adapter_files.save_adapter(before, tmp_path / "adapter", base_model=str(folder))
    model = load(folder)
    lora.inject(model, ["all-linear"], 8, 8)
    assert adapter_files.load_adapter(model, tmp_path / "adapter") < 100 * EPSILON
    assert (model(IDS).logits - before(IDS).logits).norm() < 1e4 * EPSILON * before(IDS).logits.norm()
    model(IDS).logits.square().sum().backward()
    for path, layer in lora.lora_layers(model):
        adapter = layer.adapters[lora.POLICY]
        assert (adapter.lora_A.abs().sum(1) > 0).all() and (adapter.lora_B.grad.abs().sum(0) > 0).all(), path


@torch.no_grad()
def test_named_adapters_share_one_base_and_switch(model_folder, tmp_path):
    folder = model_folder("qwen2")
    sft = saved_adapter(folder, tmp_path / "sft", rank=4, seed=5)
    policy = saved_adapter(folder, tmp_path / "policy", rank=16, seed=6)
    both = load(folder)
    lora.inject(both, ["all-linear"], 4, 16, name=lora.REFERENCE, trainable=False)
    lora.inject(both, ["all-linear"], 16, 16)
    adapter_files.load_adapter(both, tmp_path / "sft", name=lora.REFERENCE)
    adapter_files.load_adapter(both, tmp_path / "policy")
    assert torch.equal(both(IDS).logits, policy(IDS).logits)
    with lora.reference(both):
        assert torch.equal(both(IDS).logits, sft(IDS).logits)
        with lora.disabled(both):
            assert torch.equal(both(IDS).logits, load(folder)(IDS).logits)
    assert torch.equal(both(IDS).logits, policy(IDS).logits)
    with lora.reference(policy):  # it has none: the base
        assert torch.equal(policy(IDS).logits, load(folder)(IDS).logits)
    trained = [name for name, parameter in both.named_parameters() if parameter.requires_grad]
    assert trained and all(f".adapters.{lora.POLICY}." in name for name in trained)
