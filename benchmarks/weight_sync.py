"""Three ways to give a sampler the merged weights of a sharded policy, side by side.

    torchrun --standalone --nproc-per-node=2 benchmarks/weight_sync.py

stream    lorl's: merged within the shard, gathered and loaded a tensor at a time
collect   all merged weights gathered, then loaded
in place  merged into W, gathered and loaded a tensor at a time, then unmerged, as peers do

The sampler is a plain bf16 copy of the model, so that what is timed is the way there. "extra" is the most memory that
the way's tensors take at one time; "drift" is how far W has moved after DRIFT_SYNCS syncs, relative to mean |W|.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fsdp_utils  # noqa: E402
import lora  # noqa: E402
from fsdp_utils import SyncStats, summon_layers  # noqa: E402
from policy import Policy  # noqa: E402
from runtime import models  # noqa: E402

DRIFT_SYNCS = 100


def stream(model, load: Callable[[str, Tensor], None], stats: SyncStats, device) -> None:
    for name, tensor in summon_layers(model, device, stats=stats):
        load(name, tensor)
        del tensor  # or it would live on while the next one is made


def collect(model, load, stats: SyncStats, device) -> None:
    for name, tensor in list(summon_layers(model, device, stats=stats)):
        load(name, tensor)


@torch.no_grad()
def in_place(model, load, stats: SyncStats, device) -> None:
    layers = list(lora.lora_layers(model))
    for sign in (1, -1):
        for _, layer in layers:
            adapter = layer.adapters[lora.POLICY]
            delta = adapter.scale * fsdp_utils.local(adapter.lora_B) @ fsdp_utils.gather(adapter.lora_A)
            stats.hold(delta)
            fsdp_utils.local(layer.weight).add_(delta.to(layer.weight.dtype), alpha=sign)
        if sign == 1:
            for name, tensor in summon_base(model, stats):
                load(name, tensor)


def summon_base(model, stats: SyncStats) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in lora.base_weights(model):
        whole = fsdp_utils.gather(parameter)
        stats.hold(whole)
        yield name, whole


def random_adapter(model, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            for parameter in layer.adapters[lora.POLICY].parameters():
                fsdp_utils.fill(parameter, torch.randn(parameter.shape, generator=generator) * size)


def measure(way: Callable, model, sampler, device, repeats: int) -> tuple[float, int, float]:
    """Median seconds, most bytes, and drift of one way; the policy's update is another at each sync."""
    parameters = dict(sampler.named_parameters())
    before = [fsdp_utils.local(weight).clone() for _, weight in lora.base_weights(model)]

    def load(name: str, tensor: Tensor) -> None:
        parameters[name].data.copy_(tensor)

    seconds, peak = [], 0
    for _ in range(repeats):
        stats = SyncStats()
        dist.barrier()
        start = time.perf_counter()
        way(model, load, stats, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = max(peak, stats.peak_bytes)
    for seed in range(DRIFT_SYNCS):
        random_adapter(model, seed, size=0.02)
        way(model, lambda name, tensor: None, SyncStats(), device)
    weights = [fsdp_utils.local(weight) for _, weight in lora.base_weights(model)]
    sums = torch.tensor(
        [
            sum((a.float() - b.float()).abs().sum() for a, b in zip(weights, before)),
            sum(b.float().abs().sum() for b in before),
        ]
    )
    dist.all_reduce(sums)
    with torch.no_grad():
        for weight, old in zip(weights, before):
            weight.copy_(old)
    return statistics.median(seconds), peak, (sums[0] / sums[1]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    world = fsdp_utils.init_world()
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    folder = fsdp_utils.on_first_rank(tempfile.mkdtemp)
    if world.rank == 0:
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    dist.barrier()
    model = models.meta_model(folder, torch.bfloat16)
    lora.inject(model, ["all-linear"], rank=32, alpha=32.0)
    policy = Policy(model)
    fsdp_utils.shard(policy, model.base_model.layers, world.device)
    fsdp_utils.load_weights(model, folder, world.device)
    sampler = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(world.device)
    dist.barrier()
    if world.rank == 0:
        shutil.rmtree(folder)
    random_adapter(model, seed=0, size=0.02)
    whole = sum(weight.shape.numel() for _, weight in lora.base_weights(model)) * 2
    largest = max(weight.shape.numel() for name, weight in lora.base_weights(model)) * 2
    if world.rank == 0:
        sizes = f"the model is {whole / 1e6:.1f} MB, its largest tensor {largest / 1e6:.1f} MB"
        print(f"{world.size} x {world.device.type}; {sizes}")
        print(f"{'way':<18} {'seconds':>8} {'extra MB':>9} {'drift':>8}")
    ways = {"stream": stream, "collect": collect, "in place": in_place}
    for name, way in ways.items():
        seconds, peak, drift = measure(way, model, sampler, world.device, options.repeats)
        if world.rank == 0:
            print(f"{name:<18} {seconds:8.3f} {peak / 1e6:9.1f} {drift:8.2%}", flush=True)


if __name__ == "__main__":
    main()
