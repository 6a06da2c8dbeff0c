"""Optimizers: how they are made, their learning rate, and one update over micro-batches and ranks."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

import fsdp_utils
import lora
from configs.base import Config
from runtime.batching import MicroBatch

MAX_GRAD_NORM = 1.0
Metrics = dict[str, Tensor]  # name -> (R,) a value per completion token of a micro-batch


def make_optimizer(config: Config, module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of a policy or a critic, each adapter's in a group of its own. To use another
    optimizer, change it here.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for path, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(lora.adapter_of(path), []).append(parameter)
    trained = [{"params": group} for group in groups.values()]
    fused = config.offload == "all" or None  # offloaded parameters are many and on the CPU, where the default is slow
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=fused)
    if config.offload == "optimizer":
        fsdp_utils.offload_state(optimizer)
    return optimizer


def schedule(step: int, config: Config) -> float:
    """The factor of the learning rate in step 1, 2, ...: a linear warm-up, then constant, linear or cosine."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    done = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)  # from 0, and 1 after the last step
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, config: Config) -> float:
    """Sets and returns the learning rate of a step."""
    rate = peak * schedule(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


class Update:
    """One optimizer update: `backward` for each micro-batch, then `step`."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: fsdp_utils.World):
        self.optimizer, self.world = optimizer, world
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=world.device))

    def backward(self, loss: Tensor, info: Metrics, batch: MicroBatch) -> None:
        """Adds the gradients of this rank's share of the loss, and sums up its metrics."""
        # FSDP averages gradients over ranks, but the weights already make the sum the right one. It reduces them after
        # each micro-batch: until then every rank holds whole gradients, a large tensor if all weights are trained.
        (loss * self.world.size).backward()
        counts = (batch.weights > 0).float()  # a filler's tokens do not count
        self.sums["tokens"] += counts.sum()
        self.sums["loss"] += loss.detach()
        for name, values in info.items():
            self.sums[name] += (values * counts).sum()

    def step(self) -> dict[str, float]:
        """Applies the gradients. Returns sums of metrics over the tokens of all ranks, and under "tokens" their number.

        Collective.
        """
        totals = torch.stack(list(self.sums.values())).cpu()  # the only wait for the GPU in an update
        metrics = dict(zip(self.sums, self.world.sum(totals).tolist()))
        norm = apply_gradients(self.optimizer, metrics["loss"])
        return metrics | {"grad_norm": norm, "skipped_updates": float(not math.isfinite(norm))}


def apply_gradients(optimizer: torch.optim.Optimizer, loss: float) -> float:
    """An optimizer step with the gradients of each group scaled down to `MAX_GRAD_NORM`; returns their norm before.

    A group whose gradients are all 0 is left alone: Adam's momentum would still move it. So is a group whose norm is
    not finite. If the loss is not finite, no group moves. Loss and norms are those of all ranks, so all do the same.
    """
    norms = []
    for group in optimizer.param_groups:
        norm = fsdp_utils.clip_gradients(group["params"], MAX_GRAD_NORM) if math.isfinite(loss) else math.nan
        norms.append(norm)
        if not 0 < norm < math.inf:
            for parameter in group["params"]:
                parameter.grad = None
    optimizer.step()
    optimizer.zero_grad()
    return math.hypot(*norms)


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens of a step's updates, from the sums that `Update.step` returns; loss and norm per update."""
    if not updates:
        return {}
    totals = {name: sum(update[name] for update in updates) for name in updates[0]}
    tokens = totals.pop("tokens")
    divisors = {"loss": len(updates), "grad_norm": len(updates), "skipped_updates": 1}  # of all others: tokens
    return {name: value / divisors.get(name, tokens) for name, value in totals.items() if divisors.get(name, tokens)}
