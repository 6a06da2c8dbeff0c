"""From completions to micro-batches: spread over ranks by length, weighted so that the spread changes nothing.

Every rank holds the whole step, so all of this is computed identically everywhere, without communication.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapreplace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from configs.base import Config
from fsdp_utils import World
from policy import Packed, pack
from rollout import Completion

ROUNDING = 1e-9  # what may be left of an advantage that is really 0: the mean of 0.1, 0.1, 0.1 is not quite 0.1


@dataclass
class MicroBatch:
    """Whole completions that one rank pushes through the model at once; per-token tensors are (R,) float32."""

    packed: Packed
    completions: list[int]  # which of the step's completions it holds, in this order
    sequences: Tensor  # (R,) int64, which of those a token belongs to: 0, 0, 0, 1, 1, ...
    advantages: Tensor  # for PPO, at first the reward of the whole completion on each of its tokens
    weights: Tensor  # all 0 in a filler, see `assign`
    sampler_logprobs: Tensor
    old_logprobs: Tensor | None = None  # of the policy that the update starts from; None: of the policy as it is
    ref_logprobs: Tensor | None = None
    log_z: Tensor | None = None  # on each token its prompt's, if the policy learns it
    values: Tensor | None = None  # of a critic at the rollout,
    returns: Tensor | None = None  # and what they should have been, see train_ppo.py

    def sequence_sum(self, values: Tensor) -> Tensor:
        """(R,) -> (R,): on each token the sum over its completion."""
        sums = values.new_zeros(len(self.completions)).index_add(0, self.sequences, values)
        return sums[self.sequences]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """(R,) -> (R,): on each token the mean over its completion."""
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values))


def assign(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Spreads sequences over ranks and micro-batches: result[rank][micro-batch] lists indices, longest first.

    Every rank gets the same number of micro-batches, or their collectives would wait for each other forever. One
    holds at most `budget` tokens, or a single longer sequence. One without sequences is a filler.

    >>> assign([5, 9, 4, 2], ranks=2, budget=12)
    [[[1, 3]], [[0, 2]]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = -(-sum(min(length, budget) for length in lengths) // (ranks * budget)) or 1
    while True:  # with too few bins, some would overflow: add one per rank, or 5%
        bins: list[list[int]] = [[] for _ in range(ranks * count)]
        lightest = [(0, bin) for bin in range(len(bins))]  # a heap of (tokens, bin)
        for i in longest_first:
            load, bin = lightest[0]
            if load and load + lengths[i] > budget:
                break
            bins[bin].append(i)
            heapreplace(lightest, (load + lengths[i], bin))
        else:
            return [bins[rank::ranks] for rank in range(ranks)]
        count += max(1, count // 20)


def make_updates(
    completions: list[Completion],
    advantages: Tensor,
    weight: Callable[[Tensor, Config], Tensor],
    config: Config,
    world: World,
    drop_useless: bool = False,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each of the step's updates. Every rank has the whole step, so none has to ask.

    advantages: (N,). weight: from the (n,) lengths of an update's completions to the (n,) weights of their tokens.
    Each of the `updates_per_rollout` takes its share of the completions, in order. drop_useless: leave out what has no
    advantage, as where a whole group has one reward; right if nothing but the advantage gives a gradient.
    """
    lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    plan = []
    for share in torch.arange(len(completions)).chunk(config.updates_per_rollout):
        useful = [i for i in share.tolist() if not (drop_useless and abs(advantages[i]) <= ROUNDING)]
        if not useful:
            continue
        weights = torch.zeros_like(lengths)
        weights[share] = weight(lengths[share], config)
        total = [len(completions[i].prompt_ids) + len(completions[i].token_ids) for i in useful]
        filler = useful[total.index(min(total))]
        batches = []
        for bin in assign(total, world.size, config.tokens_per_microbatch)[world.rank]:
            chosen = [useful[i] for i in bin] or [filler]
            batches.append(make_micro_batch(chosen, completions, advantages, weights * bool(bin), world.device))
        plan.append(batches)
    return plan


def make_micro_batch(
    chosen: list[int], completions: list[Completion], advantages: Tensor, weights: Tensor, device: torch.device
) -> MicroBatch:
    """Packs the chosen completions, and spreads what belongs to a completion over its tokens."""
    repeats = torch.tensor([len(completions[i].token_ids) for i in chosen])
    logprobs = list(chain.from_iterable(completions[i].logprobs for i in chosen))
    return MicroBatch(
        packed=pack([completions[i].prompt_ids for i in chosen], [completions[i].token_ids for i in chosen], device),
        completions=chosen,
        sequences=torch.arange(len(chosen)).repeat_interleave(repeats).to(device),
        advantages=advantages[chosen].repeat_interleave(repeats).float().to(device),
        weights=weights[chosen].repeat_interleave(repeats).float().to(device),
        sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32, device=device),
    )


def batch_metrics(updates: list[list[MicroBatch]], completions: int, world: World) -> dict[str, float]:
    """How well the work of a step is divided, and how much of it was left out. Collective.

    batch/imbalance: the heaviest rank's tokens / the mean over ranks. batch/useless_frac: share of the completions
    that `make_updates` dropped.
    """
    mine = [batch.packed for batch in chain.from_iterable(updates) if batch.weights.any()]  # not the fillers
    counts = torch.zeros(world.size, 2, dtype=torch.float64)
    counts[world.rank, 0] = sum(sum(packed.lengths) for packed in mine)
    counts[world.rank, 1] = sum(len(packed.lengths) for packed in mine)
    dist.all_reduce(counts)
    tokens, kept = counts.unbind(1)
    return {
        "batch/imbalance": (tokens.max() / tokens.mean()).item() if kept.any() else 1.0,
        "batch/useless_frac": 1 - kept.sum().item() / max(1, completions),
    }
