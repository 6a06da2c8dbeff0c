"""One linear with LoRA, ours and peft's, beside the bare frozen linear, in one process: time and saved bytes.

    python benchmarks/lora_layer.py [--tokens 4096] [--sizes 1024x3072 2048x11008] [--rank 32] [--rounds 15]

All have a bfloat16 base; x has a gradient, as anywhere but in the first layer. Variants take turns within each round,
so that a slow moment of the machine hits all of them; medians over the rounds, and `vs bare` is the median of the
rounds' ratios of forward + backward. `saved` is what a forward keeps for the backward beyond parameters; the last
table has it for a decoder block (Qwen2, 1024 wide) with LoRA on every linear. On the GPU if there is one.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2RotaryEmbedding

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lora  # noqa: E402
from benchmarks.measuring import DEVICE, clock  # noqa: E402


def ours(model: nn.Module, rank: int, merged: bool = False, nf4: bool = False) -> nn.Module:
    """The model with our layers."""
    if nf4:
        lora.quantize_base(model)
    lora.inject(model, ["all-linear"], rank, float(rank), merged=merged)
    lora.init_adapters(model, seed=0)
    return model


def pefts(model: nn.Module, rank: int, adapter_dtype: torch.dtype) -> nn.Module:
    """The model with peft's layers."""
    import peft

    targets = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return model


VARIANTS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "bare frozen linear": lambda model, rank: model.requires_grad_(False),
    "ours, factored": ours,
    "ours, merged": lambda model, rank: ours(model, rank, merged=True),
    "ours, NF4 base": lambda model, rank: ours(model, rank, nf4=True),
}
if find_spec("peft"):
    VARIANTS |= {
        "peft, float32 adapters": lambda model, rank: pefts(model, rank, torch.float32),
        "peft, bfloat16 adapters": lambda model, rank: pefts(model, rank, torch.bfloat16),
    }


class Timing(NamedTuple):
    forward: float  # seconds, median
    backward: float
    ratio: float  # to the bare linear, both together, median over the rounds
    saved: int  # bytes


def forward_backward(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[float, float]:
    """Seconds of each."""
    start = clock()
    y = model(x)
    middle = clock()
    y.backward(dy)
    end = clock()
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    return middle - start, end - middle


def saved_bytes(model: nn.Module, x: torch.Tensor, **inputs: Any) -> int:
    """The bytes that autograd keeps between forward and backward: each storage once, without parameters."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x, **inputs)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    del y
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in parameters)


def measure(tokens: int, in_features: int, out_features: int, rank: int, rounds: int) -> dict[str, Timing]:
    """Every variant of one linear."""
    torch.manual_seed(0)
    x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    dy = torch.randn(tokens, out_features, dtype=torch.bfloat16, device=DEVICE)
    models = {}
    for name, make in VARIANTS.items():
        linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16, device=DEVICE)
        models[name] = make(nn.Sequential(linear), rank)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round in range(rounds + 2):
        for name, model in models.items():
            times = forward_backward(model, x, dy)
            if round >= 2:  # the first ones warm up
                seconds[name].append(times)
    bare, found = [sum(times) for times in seconds["bare frozen linear"]], {}
    for name, model in models.items():
        forward, backward = (statistics.median(column) for column in zip(*seconds[name]))
        ratio = statistics.median(sum(times) / base for times, base in zip(seconds[name], bare))
        found[name] = Timing(forward, backward, ratio, saved_bytes(model, x))
    return found


def compare(tokens: int, in_features: int, out_features: int, rank: int, rounds: int) -> None:
    """Prints one table."""
    timings = measure(tokens, in_features, out_features, rank, rounds)
    print(f"\n{tokens} tokens, {in_features} -> {out_features}, rank {rank}, bfloat16, {DEVICE.type}")
    print(f"| {'layer':<24} | forward ms | backward ms | vs bare | saved MiB |")
    print(f"|{'-' * 26}|-----------:|------------:|--------:|----------:|")
    for name, (forward, backward, ratio, saved) in timings.items():
        print(f"| {name:<24} | {forward * 1e3:10.1f} | {backward * 1e3:11.1f} | {ratio:6.2f}x | {saved / 2**20:9.1f} |")


def compare_blocks(tokens: int, rank: int) -> None:
    """Prints what a whole decoder block saves."""
    config = Qwen2Config(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=4)
    config._attn_implementation = "sdpa"
    x = torch.randn(1, tokens, 1024, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    rotary = Qwen2RotaryEmbedding(config).to(DEVICE)(x, torch.arange(tokens, device=DEVICE)[None])
    print(f"\na decoder block of 1024, {tokens} tokens, LoRA of rank {rank} on its seven linears, {DEVICE.type}")
    print(f"| {'layers':<24} | saved MiB |\n|{'-' * 26}|----------:|")
    for name, make in VARIANTS.items():
        block = make(Qwen2DecoderLayer(config, layer_idx=0).to(DEVICE, torch.bfloat16), rank)
        print(f"| {name:<24} | {saved_bytes(block, x, position_embeddings=rotary) / 2**20:9.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sizes", nargs="+", default=["1024x3072", "2048x11008", "11008x2048"], help="IN x OUT")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for size in arguments.sizes:
        in_features, out_features = map(int, size.split("x"))
        compare(arguments.tokens, in_features, out_features, arguments.rank, arguments.rounds)
    compare_blocks(arguments.tokens, arguments.rank)


if __name__ == "__main__":
    main()
