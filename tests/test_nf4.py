"""NF4 against the paper's construction, a plain per-value reference and, where it is installed, bitsandbytes."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lora
import nf4


def test_codebook_is_made_of_the_quantiles_of_a_normal_distribution():
    """arXiv 2305.14314, section 3: 7 evenly spaced quantiles below zero, 8 above, and zero itself."""
    offset = 0.9677083  # the mean of 1 - 1/32 and 1 - 1/30, as published

    def quantiles(count):
        return torch.special.ndtri(torch.linspace(offset, 0.5, count + 1, dtype=torch.float64))[:-1]

    values = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8)]).sort().values
    torch.testing.assert_close(nf4.CODEBOOK.double(), values / values.max(), rtol=0, atol=1e-6)


def plain_nf4(row: list[float]) -> tuple[list[int], list[float], list[float]]:
    """Codes, magnitudes of blocks, and values of a row, one value at a time."""
    codebook = nf4.CODEBOOK.tolist()
    blocks = [row[start : start + 64] for start in range(0, len(row), 64)]
    largest = [max(abs(value) for value in block) for block in blocks]
    step = max(largest) / 255
    rounded = [round(value / step) * step for value in largest]
    codes = [
        [min(range(16), key=lambda code: abs(codebook[code] - value / top)) for value in block]
        for block, top in zip(blocks, largest)
    ]
    values = [codebook[code] * top for block, top in zip(codes, rounded) for code in block]
    return [code for block in codes for code in block], rounded, values


@pytest.mark.parametrize("columns", [64, 96, 320])
def test_codes_and_values_are_the_plain_references(columns):
    torch.manual_seed(0)
    weight = torch.randn(5, columns) * torch.tensor([1.0, 0.01, 3.0, 1e-6, 100.0])[:, None]
    packed, absmax, scale = nf4.quantize(weight)
    codes = torch.stack([packed >> 4, packed & 15], dim=2).flatten(1)[:, :columns]
    values = nf4.dequantize(packed, absmax, scale, columns, torch.float32)
    for row, found_codes, found, largest in zip(weight, codes, values, absmax * scale):
        expected_codes, expected_largest, expected = plain_nf4(row.tolist())
        assert found_codes.tolist() == expected_codes
        torch.testing.assert_close(largest, torch.tensor(expected_largest))
        torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(nf4.dequantize(packed, absmax, scale, columns, torch.bfloat16), values.bfloat16())


def test_error_and_storage_on_weights_of_a_model():
    """0.092 of a normal weight is what bitsandbytes loses too; double quantisation adds almost nothing."""
    torch.manual_seed(0)
    weight = torch.randn(2500, 1024)  # more rows than are quantised at a time
    stored = nf4.quantize(weight)
    error = nf4.dequantize(*stored, 1024, torch.float32) - weight
    assert 0.0915 < error.norm() / weight.norm() < 0.0925
    assert sum(tensor.nbytes for tensor in stored) / weight.numel() <= 0.53
    zero = nf4.quantize(torch.zeros(2, 64))
    assert torch.equal(nf4.dequantize(*zero, 64, torch.float32), torch.zeros(2, 64))


def test_bytes_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(64, 512)
    theirs, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=False)
    packed, absmax, scale = nf4.quantize(weight)
    assert torch.equal(state.code.cpu(), nf4.CODEBOOK)
    assert torch.equal(packed.flatten(), theirs.flatten().cpu())
    torch.testing.assert_close((absmax * scale).flatten(), state.absmax.cpu(), rtol=0.01, atol=0)


@pytest.mark.parametrize("merged", [False, True])
def test_layer_computes_with_the_dequantised_weight_and_keeps_none(merged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 8)).double()
    lora.quantize_base(model)
    lora.inject(model, ["0"], 4, 8.0, merged=merged)
    lora.init_adapters(model, seed=0)
    adapter = model[0].adapters[lora.POLICY].double()
    nn.init.normal_(adapter.lora_B, std=0.1)
    x = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    leaves = [x, adapter.lora_A, adapter.lora_B]
    update = adapter.scale * adapter.lora_B @ adapter.lora_A
    expected = (x @ (model[0].weight() + update).T + model[0].bias) @ model[1].weight().T + model[1].bias
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        found = model(x)
    torch.testing.assert_close(found, expected)
    for mine, plain in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected))):
        torch.testing.assert_close(mine, plain)
    assert not {(40, 96), (8, 40)} & set(saved)  # no dense weight is held for the backward


def test_every_linear_but_the_head_is_quantised(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    checkpoint = {name: parameter.shape for name, parameter in model.named_parameters()}
    dense_bytes = sum(p.nbytes for name, p in model.named_parameters() if "_proj" in name)
    lora.quantize_base(model)
    lora.inject(model, ["q_proj"], 4, 8.0)
    assert {name: weight.shape for name, weight in lora.base_weights(model)} == checkpoint
    quantized = {name for name, weight in lora.base_weights(model) if isinstance(weight, nf4.NF4Weight)}
    assert quantized == {name for name in checkpoint if "_proj" in name}
    stored = sum(p.nbytes for name, p in model.named_parameters() if "_proj.weight." in name)
    assert stored < 0.4 * dense_bytes  # rows of 64 and 96 values carry much overhead; see storage above
