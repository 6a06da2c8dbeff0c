"""The weight stream: bit-equal to a whole merge, W untouched, and no more memory than it says."""

import pytest
import torch
from conftest import on_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

import fsdp_utils
import lora
import stream
from policy import Policy

UNEVEN = dict(intermediate_size=90, vocab_size=161, tie_word_embeddings=False)  # rows that 4 ranks cannot share evenly


class Memory(TorchDispatchMode):
    """The most bytes that tensors made while it is on took at one time, by watching every operation."""

    def __init__(self, model):
        super().__init__()
        self.before = [fsdp_utils.local(parameter).untyped_storage() for parameter in model.parameters()]
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                self.storages[tensor.untyped_storage()] = None
        for storage in self.before:
            self.storages.pop(storage, None)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return out


def fill_adapters(model, fill):
    """The same random values, wherever the model's tensors live."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            for parameter in layer.adapters[lora.POLICY].parameters():
                fill(parameter, torch.randn(parameter.shape, generator=generator) * 0.1)


def sharded_model(folder, world, fsdp_size, param_offload):
    model = fsdp_utils.meta_model(str(folder), torch.bfloat16)
    lora.inject(model, ["all-linear"], rank=5, alpha=10.0)
    policy = Policy(model)
    fsdp_utils.shard(policy, model.base_model.layers, world.device, fsdp_size, param_offload=param_offload)
    fsdp_utils.load_weights(model, str(folder), world.device)
    fill_adapters(model, fsdp_utils.fill)
    return model


def whole_merge(folder):
    """The reference: every tensor of an ordinary model, with W + s·B A in float32 and cast once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lora.inject(model, ["all-linear"], rank=5, alpha=10.0)
    fill_adapters(model, torch.Tensor.copy_)
    for _, layer in lora.lora_layers(model):
        adapter = layer.adapters[lora.POLICY]
        layer.weight.data = (layer.weight.float() + 2.0 * (adapter.lora_B @ adapter.lora_A)).bfloat16()
    return {path: parameter.data for path, parameter in model.named_parameters() if ".adapters." not in path}


def streams(folder, ways):
    """For each (fsdp_size, param_offload): names that are not bit-equal to the whole merge, after many passes."""
    world, expected, wrong = fsdp_utils.init_world(), whole_merge(folder), []
    for fsdp_size, param_offload in ways:
        model = sharded_model(folder, world, fsdp_size, param_offload)
        frozen = [fsdp_utils.local(p).clone() for p in model.parameters() if not p.requires_grad]
        for options in [dict(prefetch=False), dict(release=True)] + [dict()] * 5:
            names = []
            for name, tensor in stream.summon_layers(model, world.device, **options):
                names.append(name)
                if not torch.equal(tensor, expected[name]):
                    wrong.append((fsdp_size, param_offload, options, name))
            assert names == list(expected)
        now = [fsdp_utils.local(p) for p in model.parameters() if not p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))
    return wrong


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_stream_is_bit_equal_to_a_whole_merge(ranks, model_folder, tmp_path):
    ways = [(size, offload) for size in (1, 2, 4) if size <= ranks for offload in (False, True)]
    assert not any(on_ranks(ranks, streams, model_folder("qwen2", **UNEVEN), ways, folder=tmp_path))


def peaks(folder):
    """(most bytes of any operation's tensors, what the stream itself reports, its largest tensor) per way."""
    world, found = fsdp_utils.init_world(), []
    model = sharded_model(folder, world, 0, False)
    stream.ELEMENTS_AT_ONCE = 1 << 14
    for options in (dict(prefetch=False, release=True), dict(release=True)):
        stats = stream.SyncStats()
        with Memory(model) as memory:
            largest = max(
                tensor.nbytes for _, tensor in stream.summon_layers(model, world.device, stats=stats, **options)
            )
        found.append((memory.peak, stats.peak_bytes, largest))
    return found


def test_a_pass_holds_one_tensor_and_with_prefetch_two(model_folder, tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=2048, vocab_size=160)
    for alone, ahead in on_ranks(2, peaks, model_folder("qwen2", **sizes), folder=tmp_path):
        for (measured, reported, largest), tensors in ((alone, 1), (ahead, 2)):
            assert reported == tensors * largest
            temporaries = 8 * 4 * (1 << 14) + 2 * 4 * 5 * 2048  # of one part of a merge, and A
            assert measured < reported + temporaries < reported + largest / 2
