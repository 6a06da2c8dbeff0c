"""One copy of the frozen base: the trainer's parameters are views of vLLM's own tensors.

With `sync adapter` neither side ever writes the base, so one copy serves both where both are whole on one GPU. It is on
with SHARE_BASE=1, and has not been run on a GPU.

vLLM has q, k and v in one matrix, and gate and up; their rows are the checkpoint's. What it packs, permutes or converts
when it loads (on CPUs all linears, experts everywhere) the trainer keeps as a copy of its own.
"""

import os
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

import lora
from configs.base import Config
from configs.checks import refuse
from fsdp_utils import World
from rollout import Engine
from sync import held_weights


def shares_base(config: Config, ranks: int) -> bool:
    """Whether the environment sets SHARE_BASE. Raises ValueError if it does, and trainer and vLLM have nothing to share
    on each of so many ranks.
    """
    if os.environ.get("SHARE_BASE", "") in ("", "0"):
        return False
    needs = {
        "sync adapter": config.sends_adapter,  # only then vLLM's weights are those of the base, in the same dtype
        "sleep_level 0": not config.sleep_level,
        "fsdp_size 1": (config.fsdp_size or ranks) == 1,
        "tensor_parallel_size 1": config.tensor_parallel_size == 1,
        "rollout_ranks 0": not config.rollout_ranks,
        "offload none or optimizer": config.offload != "all",
    }
    for need, is_met in needs.items():
        refuse(not is_met, f"SHARE_BASE=1 needs {need}: vLLM and the trainer share whole weights of one dtype on a GPU")
    return True


def share(model: PreTrainedModel, engine_for: Callable[[PreTrainedModel], Engine], world: World) -> set[nn.Parameter]:
    """Starts vLLM, and gives frozen parameters of a meta model with adapters the memory of vLLM's; returns them.

    vLLM starts only now, since it changes classes of transformers, of which a model cannot be made afterwards. Raises
    ValueError if it has packed its linears.
    """
    held, shared, others = held_weights(engine_for(model)), set(), []
    for name, parameter in lora.base_weights(model):
        view = held.tensor(name, len(parameter))
        if view is None or (view.shape, view.dtype, view.device) != (parameter.shape, parameter.dtype, world.device):
            others.append(name)
            continue
        torch.utils.swap_tensors(parameter, nn.Parameter(view, requires_grad=False))  # tied ones stay tied
        shared.add(parameter)
    linears = {linear.weight for linear in lora.base_linears(model).values()}
    refuse(not linears & shared, "SHARE_BASE=1: vLLM has packed its weights, as it does on CPUs; leave it out")
    if world.rank == 0:
        size = sum(parameter.nbytes for parameter in shared) / 1e6
        apart = f"; {len(others)} parameters it has otherwise, such as {others[0]}: own copies" if others else ""
        print(f"shared {size:,.1f} MB of the base with vLLM{apart}", flush=True)
    return shared
