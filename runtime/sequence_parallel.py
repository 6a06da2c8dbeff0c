"""Sequence parallelism: the tokens of a packed row are spread over neighbouring ranks. Ulysses, arXiv 2309.14509.

Each rank has a slice of the tokens. Everything but attention works on tokens, and needs nothing of other slices. For
attention, ranks exchange tokens for heads: each then has the whole row, of its share of the heads. What the model says
about its slice is joined in the end, so that all of these ranks compute the same loss.

Shapes: n ranks; T tokens, t of them on this rank; H heads of queries, K of keys and values, each of size d.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor


def neighbours(ranks: int) -> dist.ProcessGroup | None:
    """The group of this rank and those that share its rows, `ranks` in all; None: it shares none. Collective."""
    return dist.new_subgroups(ranks)[0] if ranks > 1 else None


def ranks_sharing(group: dist.ProcessGroup | None) -> int:
    """Ranks of a group of `neighbours`."""
    return dist.get_world_size(group) if group else 1


# ---- Slices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """How many elements each rank of a group has: the first ones, the next ones, and so on."""

    sizes: list[int]
    group: dist.ProcessGroup | None

    @property
    def own(self) -> slice:
        """This rank's."""
        rank = dist.get_rank(self.group) if self.group else 0
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def join(self, values: Tensor) -> Tensor:
        """This rank's elements (t, ...) -> those of all ranks (T, ...), on each of them. Collective."""
        return Join.apply(values, self) if self.group else values


def spread(tokens: int, group: dist.ProcessGroup | None) -> Slices:
    """Slices of a row that differ by at most one token."""
    ranks = ranks_sharing(group)
    return Slices([tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)], group)


def spread_like(positions: list[int], tokens: Slices) -> Slices:
    """Slices of ascending positions in a row: each rank has those of its tokens."""
    bounds = [bisect_left(positions, end) for end in accumulate(tokens.sizes, initial=0)]
    return Slices([end - start for start, end in pairwise(bounds)], tokens.group)


class Join(torch.autograd.Function):
    """See `Slices.join`. All ranks compute the same loss from the result, so each of them has the whole gradient: the
    backward takes this rank's slice, and adds up nothing. Gradients of parameters are summed over ranks afterwards.
    """

    @staticmethod
    def forward(ctx, values: Tensor, slices: Slices) -> Tensor:
        ctx.own = slices.own
        whole = values.new_zeros(sum(slices.sizes), *values.shape[1:])
        whole[ctx.own] = values
        dist.all_reduce(whole, group=slices.group)  # every element has one term that is not 0
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.own], None


# ---- Attention ------------------------------------------------------------------------------------------------


def attend_to_all(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, tokens: Slices
) -> Tensor:
    """Attention of a row that is spread: query (1, H, t, d), key and value (1, K, t, d) -> (1, t, H, d). Collective.

    `attention` gets all tokens and this rank's heads: (1, H/n, T, d) and as many heads of keys and values as these
    queries read -> (1, T, H/n, d). n must divide H. It need not divide K: heads are repeated then.
    """
    heads = key.shape[1]
    repeats = math.lcm(heads, len(tokens.sizes)) // heads
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    whole = [Exchange.apply(x[0].transpose(0, 1), tokens, False).transpose(0, 1)[None] for x in (query, key, value)]
    return Exchange.apply(attention(*whole)[0], tokens, True)[None]


class Exchange(torch.autograd.Function):
    """Tokens for heads, or back. Numbers change places and nothing else, so gradients take the opposite way."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Slices, back: bool) -> Tensor:
        ctx.tokens, ctx.back = tokens, back
        return exchange(x, tokens, back)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return exchange(gradient, ctx.tokens, not ctx.back), None, None


def exchange(x: Tensor, tokens: Slices, back: bool) -> Tensor:
    """(t, H, d) -> (T, H/n, d), or with `back` the other way. Collective."""
    ranks, here = len(tokens.sizes), tokens.sizes[dist.get_rank(tokens.group)]
    mine, everyones = [here] * ranks, tokens.sizes  # tokens of each part that is sent or received
    if back:
        received = x.new_empty(ranks * here, *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), mine, everyones, group=tokens.group)
        return received.unflatten(0, (ranks, here)).transpose(0, 1).flatten(1, 2)
    parts = x.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)  # (n · t, H/n, d), by the rank that gets it
    received = x.new_empty(sum(tokens.sizes), *parts.shape[1:])
    dist.all_to_all_single(received, parts.contiguous(), everyones, mine, group=tokens.group)
    return received
