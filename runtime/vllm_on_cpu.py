"""What vLLM needs on a CPU: options, and replacements for a few of its parts that are slow there or do not run."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from runtime.heap import keep_freed_memory
from runtime.packing import recurrent_layers

KV_CACHE = 1 << 30  # bytes
BLOCK = 32  # tokens; only whole blocks of a prompt are shared by its samples, and vLLM's 128 are longer than many


def prepare_cpu(model: str, dtype: str, ranks: int, adapters: bool, targets: list[str] | None) -> dict[str, Any]:
    """Prepares this process for an engine of a model's folder on so many CPU ranks; the options that vLLM then needs.

    adapters, targets: whether it takes adapters, and of which modules. Raises ValueError for a dtype in which vLLM does
    not run the model there, and for adapters that it does not run there.
    """
    if adapters and "experts" in (targets or ()):
        raise ValueError("vLLM on a CPU does not run adapters of experts, only merged ones; set sync merged")
    keep_freed_memory()
    if ranks > 1:
        remove_stale_shared_memory()
    if adapters:
        use_lora_on_cpu()
    if find_spec("torchvision") is None:
        do_without_torchvision()
    options = {
        "kv_cache_memory_bytes": KV_CACHE,
        "block_size": BLOCK,
        "enforce_eager": True,
        "enable_chunked_prefill": False,  # a partial prompt with a seed needs a CUDA generator
    }
    if any(recurrent_layers(AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config())):
        if dtype != "bfloat16":
            raise ValueError(f"vLLM on a CPU runs recurrent layers in bfloat16 alone, not {dtype}; set dtype bfloat16")
        options["enable_prefix_caching"] = False  # it needs prompts in chunks there
    return options


def do_without_torchvision() -> None:
    """Lets vLLM import its Qwen3.5 module, which needs torchvision for images.

    A CPU installation lacks that, and text never calls it.
    """
    from vllm.model_executor.models import registry

    sys.modules["torchvision.transforms.v2"] = SimpleNamespace(functional=None)
    registry._run_in_subprocess = lambda function: function()  # another process would look for torchvision again


def use_lora_on_cpu() -> None:
    """Replaces two parts of vLLM that are slow on a CPU, or do not run there."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    # With LoRA, vLLM takes Triton's kernels for experts, which a CPU lacks. They have no adapters there.
    FusedMoEConfig.is_lora_enabled = property(lambda _: False, lambda *_: None)


def add_lora_linear(
    self, y: Tensor, x: Tensor, lora_a_stacked, lora_b_stacked, scale: float, output_slices, **_
) -> None:
    """y (T, out) += scale · x Aᵀ Bᵀ, each token with its own adapter. Replaces the method of vLLM's PunicaWrapperCPU.

    vLLM's copies A and B once per token, which takes ten times as long as the rest of the model. This one makes two
    products per adapter in the batch, of all tokens, rounded as in the trainer. To gather the adapter's own tokens and
    to scatter their sums would take longer than the products of a low rank. A stack is (adapters, 1, r, in) or
    (adapters, 1, out, r), one per fused linear, whose outputs are `output_slices` wide.
    """
    indices = self.token_lora_indices
    slots = indices.unique().tolist()
    for slot in slots:
        if slot < 0:  # tokens without an adapter
            continue
        start, own = 0, (indices == slot)[:, None]
        for A, B, width in zip(lora_a_stacked, lora_b_stacked, output_slices):
            low = x @ A[slot, 0].T
            if len(slots) > 1:
                low *= own
            y[:, start : start + width].addmm_(low, B[slot, 0].T, alpha=scale)
            start += width


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """Makes vLLM build the kernels of a mixture of experts anew when it has loaded weights for it."""
    for layer in model.modules():
        if hasattr(getattr(layer, "quant_method", None), "moe_kernel"):
            layer.quant_method.moe_kernel = None


def remove_stale_shared_memory() -> None:
    """Removes the shared memory of killed engines of several CPU ranks; a new engine would fail on it.

    Under torchrun, vLLM uses one name for all engines. A running engine has its segment open and needs no name.
    """
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
        left.unlink(missing_ok=True)
    dist.barrier()
