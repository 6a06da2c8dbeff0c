"""One optimizer update: over micro-batches, summed over ranks, the same for every model that is trained."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import fsdp_utils
from runtime.batching import MicroBatch
from runtime.progress_bar import progress_bar
from runtime.run import Run

Metrics = dict[str, Tensor]  # name -> (R,) a value per completion token of a micro-batch


def optimize(
    run: Run,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    share_of_loss: Callable[[MicroBatch], tuple[Tensor, Metrics]],
    may_stop: bool = False,
) -> dict[str, float]:
    """One optimizer update; returns the sums of metrics over the tokens of all ranks, and under "tokens" their number.

    `may_stop`: a run that was asked to stop does so between micro-batches; right if no parameter changed this step.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=run.world.device))
    with progress_bar("update", len(batches), "micro-batches") as bar:
        for batch in batches:
            if may_stop:
                run.stop.check()
            loss, info = share_of_loss(batch)
            # FSDP averages over ranks; the weights already make the sum right. It does so after each micro-batch, for
            # until then every rank has whole gradients, and they would be the largest thing there if all weights learn.
            (loss * run.world.size).backward()
            counts = (batch.weights > 0).float()  # a filler's tokens do not count
            sums["tokens"] += counts.sum()
            sums["loss"] += loss.detach()  # already a share of the update's loss
            for name, values in info.items():
                sums[name] += (values * counts).sum()
            bar.update()
    totals = torch.stack(list(sums.values())).cpu()  # only here is the GPU waited for
    dist.all_reduce(totals)
    metrics = dict(zip(sums, totals.tolist()))
    norm = apply_gradients(optimizer, run.config.max_grad_norm, metrics["loss"])
    return metrics | {"grad_norm": norm, "skipped_updates": float(not math.isfinite(norm))}


def apply_gradients(optimizer: torch.optim.Optimizer, max_norm: float, loss: float) -> float:
    """Takes the optimizer's step with gradients scaled down to `max_norm` (0: as they are); their norm before that.

    Gradients that are not finite are thrown away instead, and so are those of a loss that is not; the norm is then NaN.
    The loss and the norm are those of all ranks, so all do the same.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = fsdp_utils.clip_gradients(parameters, max_norm or math.inf) if math.isfinite(loss) else math.nan
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens of a step's updates, out of the sums that `optimize` returns; loss and norm per update.

    What no update measured is not there.
    """
    if not updates:
        return {}
    totals = {name: sum(update[name] for update in updates) for name in updates[0]}
    tokens = totals.pop("tokens")
    divisors = {"loss": len(updates), "grad_norm": len(updates), "skipped_updates": 1}  # of all others: tokens
    return {name: value / divisors.get(name, tokens) for name, value in totals.items() if divisors.get(name, tokens)}
