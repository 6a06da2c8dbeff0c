"""From completions to micro-batches: balanced over ranks by length, and weighted so that the split changes nothing.

Every rank holds the whole step, so all of this is computed identically everywhere, without communication.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapreplace
from itertools import chain

import torch
from torch import Tensor

from configs.base import Config
from fsdp_utils import World
from runtime.conversation import Completion, by_adapter
from runtime.packing import Packed, pack
from runtime.sequence_parallel import ranks_sharing

ROUNDING = 1e-9  # advantages below this are 0 but for rounding: the mean of 0.1, 0.1, 0.1 is not exactly 0.1


@dataclass
class MicroBatch:
    """Whole completions that one rank, or several that share them, push through the model at once.

    Tensors are (R,) float32 unless said otherwise: a value per trained token. Replies of an environment are in the
    packed row and nowhere else.
    """

    packed: Packed
    completions: list[int]  # their indices in the step, in packed order
    sequences: Tensor  # (R,) int64, the completion of each token: 0, 0, 0, 1, 1, ...
    advantages: Tensor
    weights: Tensor  # of each token in the loss; all 0 in a filler, see `assign`
    sampler_logprobs: Tensor
    rewards: Tensor | None = None  # of each token: its completion's reward on the last token, 0 on the others
    old_logprobs: Tensor | None = None  # of the policy before the step's first update; None: of the current policy
    ref_logprobs: Tensor | None = None
    prompt_values: Tensor | None = None  # of each token's prompt, if the policy has a prompt head
    values: Tensor | None = None  # of the critic before the step's first update
    returns: Tensor | None = None  # what the critic's values are trained towards, see train_ppo.py

    def sequence_sum(self, values: Tensor) -> Tensor:
        """(R,) -> (R,): on each token the sum over its completion."""
        sums = values.new_zeros(len(self.completions)).index_add(0, self.sequences, values)
        return sums[self.sequences]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """(R,) -> (R,): on each token the mean over its completion."""
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values))


def assign(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Assigns sequences to ranks and micro-batches: result[rank][micro-batch] lists indices, longest first.

    Every rank gets the same number of micro-batches: a rank with fewer would leave the others waiting in a collective.
    A micro-batch has at most `budget` tokens, or one longer sequence. An empty one is a filler.

    >>> assign([5, 9, 4, 2], ranks=2, budget=12)
    [[[1, 3]], [[0, 2]]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = -(-sum(min(length, budget) for length in lengths) // (ranks * budget)) or 1
    while True:  # with too few bins some would overflow: add one per rank, or 5%
        bins: list[list[int]] = [[] for _ in range(ranks * count)]
        lightest = [(0, index) for index in range(len(bins))]  # a heap of (tokens, index of a bin)
        for i in longest_first:
            load, index = lightest[0]
            if load and load + lengths[i] > budget:
                break
            bins[index].append(i)
            heapreplace(lightest, (load + lengths[i], index))
        else:
            return [bins[rank::ranks] for rank in range(ranks)]
        count += max(1, count // 20)


def make_updates(
    completions: list[Completion],
    advantages: Tensor | None,
    weight: Callable[[Tensor, Config], Tensor],
    config: Config,
    world: World,
    drop_useless: bool = False,
    rewards: Tensor | None = None,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each of the step's updates.

    advantages, rewards: (N,); advantages None: 0, until a critic sets them. weight: from the (n,) lengths of an
    update's completions of one task to the (n,) weights of their tokens. Each of the `updates_per_rollout` takes its
    share of each task's completions, in order. drop_useless: leaves out completions without advantage, as in a group of
    equal rewards; this is only right if nothing but the advantage gives a gradient.
    """
    if advantages is None:
        advantages = torch.zeros(len(completions), dtype=torch.float64)
    lengths = torch.tensor([completion.length for completion in completions], dtype=torch.float64)
    updates = []
    tasks = [torch.tensor(mine).chunk(config.updates_per_rollout) for mine in by_adapter(completions).values()]
    for shares in zip(*tasks):
        useful = [i for i in torch.cat(shares).tolist() if not (drop_useless and abs(advantages[i]) <= ROUNDING)]
        if not useful:
            continue
        weights = torch.zeros_like(lengths)
        for share in shares:
            weights[share] = weight(lengths[share], config)
        total = [len(completions[i].prompt_ids) + len(completions[i].token_ids) for i in useful]
        shortest = useful[total.index(min(total))]
        batches = []
        sharing = ranks_sharing(world.sequence_group)  # each of them has its part of the tokens
        assigned = assign(total, world.size // sharing, config.tokens_per_microbatch * sharing)
        for indices in assigned[world.rank // sharing]:
            chosen = [useful[i] for i in indices]
            if chosen:
                batch = make_micro_batch(chosen, completions, advantages, weights, rewards, config, world)
            else:  # a filler
                zeros = torch.zeros_like(weights)
                batch = make_micro_batch([shortest], completions, advantages, zeros, rewards, config, world)
            batches.append(batch)
        updates.append(batches)
    return updates


def make_micro_batch(
    chosen: list[int],
    completions: list[Completion],
    advantages: Tensor,
    weights: Tensor,
    rewards: Tensor | None,
    config: Config,
    world: World,
) -> MicroBatch:
    """Packs the chosen completions, and expands per-completion values to their trained tokens."""
    parts, device = [completions[i] for i in chosen], world.device
    adapters = [config.adapters.index(completion.adapter) for completion in parts]
    repeats = torch.tensor([completion.length for completion in parts])
    sequences = torch.arange(len(chosen)).repeat_interleave(repeats)  # (R,)
    logprobs = [logprob for completion in parts for logprob in completion.logprobs if logprob is not None]
    if rewards is not None:
        last = sequences.diff(append=sequences.new_tensor([-1])) != 0
        rewards = torch.where(last, rewards[chosen].repeat_interleave(repeats), 0.0).float().to(device)
    return MicroBatch(
        packed=pack(
            [completion.prompt_ids for completion in parts],
            [completion.token_ids for completion in parts],
            device,
            [completion.trained for completion in parts],
            world.sequence_group,
            adapters if len(config.adapters) > 1 else None,
        ),
        completions=chosen,
        sequences=sequences.to(device),
        advantages=advantages[chosen].repeat_interleave(repeats).float().to(device),
        weights=weights[chosen].repeat_interleave(repeats).float().to(device),
        sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32, device=device),
        rewards=rewards,
    )


def batch_metrics(updates: list[list[MicroBatch]], completions: int, world: World) -> dict[str, float]:
    """How evenly a step is divided over ranks, and how much of it was left out. Collective.

    batch/imbalance: the heaviest rank's tokens / the mean over ranks. batch/useless_frac: share of the completions
    that `make_updates` dropped.
    """
    mine = [batch for batch in chain.from_iterable(updates) if batch.weights.any()]  # not the fillers
    counts = torch.zeros(world.size, 2, dtype=torch.float64)
    counts[world.rank, 0] = sum(sum(batch.packed.lengths) for batch in mine)
    counts[world.rank, 1] = sum(len(batch.completions) for batch in mine)
    tokens, kept = world.sum(counts).unbind(1)
    return {
        "batch/imbalance": (tokens.max() / tokens.mean()).item() if kept.any() else 1.0,
        "batch/useless_frac": 1 - kept.sum().item() / max(1, completions),
    }
