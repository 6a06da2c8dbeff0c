"""What work costs a machine, counted and not timed: bytes through memory, products, kernel starts.

    with Counter(CARDS["h100"]) as count:
        y = layer(x)
    count.bytes, count.flops[torch.bfloat16], count.starts, count.seconds, count.floor

Tensors may be fake (torch's FakeTensorMode): so a model of any size is counted on any machine. An operation reads each
argument and writes each result once, but for what the card's cache holds; views are free. It takes as long as the
slowest of its bytes, its products and one kernel start, and the times of all operations are added up.
"""

import itertools
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
FLOPS = flop_registry | {aten.addmm_: flop_registry[aten.addmm]}
CAUSAL = ("torch_attn._varlen_attn", "torch_attn._varlen_attn_backward")  # half of what the formula counts is skipped
NO_KERNEL = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten._unsafe_view}
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}  # read as much as they return
SCATTERS = {
    aten.index_put_,
    aten._index_put_impl_,
    aten.index_add_,
    aten.scatter_,
}  # read and write as much as they add
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}  # do not read what they write
LISTED = 40  # tensors that one kernel of a `_foreach_` operation takes, about


@dataclass(frozen=True)
class Card:
    """A machine's peak rates."""

    bandwidth: float  # bytes/s
    rates: dict[torch.dtype, float]  # of products, FLOP/s, dense
    cache: float  # bytes, L2
    start: float = 4e-6  # s; an assumption: what eager PyTorch takes on the host for one operation

    def product_seconds(self, flops: dict[torch.dtype, int]) -> float:
        return sum(count / self.rates.get(dtype, self.rates[torch.float32]) for dtype, count in flops.items())


def card(bandwidth: float, bfloat16: float, float32: float, cache: float) -> Card:
    """From TB/s, TFLOP/s and MB."""
    return Card(bandwidth * 1e12, {torch.bfloat16: bfloat16 * 1e12, torch.float32: float32 * 1e12}, cache * 1e6)


CARDS = {  # from NVIDIA's data sheets; float32 without TF32, as is torch's default
    "h100": card(3.35, 989, 67, 50),  # SXM
    "h200": card(4.8, 989, 67, 50),
    "a100": card(2.04, 312, 19.5, 40),  # SXM, 80 GB
    "4090": card(1.01, 165, 82.6, 72),
}


Key = tuple[int, int, int]  # a tensor in memory: its storage's number, offset and bytes


class Counter(TorchDispatchMode):
    """Counts every operation within it, those of backward passes, too."""

    def __init__(self, card: Card):
        super().__init__()
        self.card, self.bytes, self.starts, self.floor_bytes = card, 0, 0, 0
        self.flops: Tally[torch.dtype] = Tally()
        self.limits = Tally(memory=0.0, products=0.0, starts=0.0)  # seconds, by what an operation waits for
        self.operators: Tally[str] = Tally()  # seconds
        self.storages, self.numbers = WeakIdKeyDictionary(), itertools.count()  # each storage's number
        self.outside: set[int] = set()  # storages that were there before
        self.inputs: dict[Key, int] = {}  # bytes read from them
        self.results: dict[Key, int] = {}  # bytes written to any storage
        self.cached: dict[Key, int] = {}  # bytes in the cache, the oldest first

    @property
    def seconds(self) -> float:
        return sum(self.limits.values())

    @property
    def floor(self) -> float:
        """Seconds, were it all one kernel that reads what was there before, multiplies, and writes what remains."""
        return max(self.floor_bytes / self.card.bandwidth, self.card.product_seconds(self.flops))

    def __exit__(self, *error):
        remaining = set(self.storages.values())
        written = sum(size for key, size in self.results.items() if key[0] in remaining)
        self.floor_bytes = sum(self.inputs.values()) + written
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operator = function.overloadpacket
        if function.is_view or operator in NO_KERNEL or not (has_written(function) or list(tensors(result))):
            return result
        if copies_summand(function, args, kwargs):  # to where the sum will be; the product is added to it there
            summand, total = args[0], next(tensors(result))
            self.add("copy of a summand", self.move(summand) + self.move(total, write=True), Tally(), 1)
            args = (total, *args[1:])
        moved, starts, flops = self.move_all(function, args, kwargs, result), 1, Tally()
        if operator in FLOPS:
            count = FLOPS[operator](*args, **kwargs, out_val=result)
            flops[next(tensors(args)).dtype] = count // 2 if str(operator) in CAUSAL else count
        if function.name().startswith("aten::_foreach"):
            starts = -(-len(args[0]) // LISTED)
        self.add(str(operator), moved, flops, starts)
        return result

    def add(self, operator: str, moved: int, flops: dict[torch.dtype, int], starts: int) -> None:
        """Adds one operation."""
        times = (moved / self.card.bandwidth, self.card.product_seconds(flops), starts * self.card.start)
        seconds, limit = max(zip(times, self.limits))
        self.limits[limit] += seconds
        self.operators[operator] += seconds
        self.bytes += moved
        self.flops += flops
        self.starts += starts

    def move_all(self, function, args: tuple, kwargs: dict, result) -> int:
        """The bytes that an operation moves through memory."""
        operator, reads = function.overloadpacket, list(tensors((args, kwargs)))
        written = list(written_arguments(function, args, kwargs))
        writes, moved = written or list(tensors(result)), 0
        if operator in SCATTERS:
            return 3 * nbytes(reads[-1])
        if operator in GATHERS:
            moved, reads = sum(map(nbytes, writes)), reads[1:]
        if operator in OVERWRITES or ("out" in kwargs and kwargs["out"] is not args[0]):
            reads = [tensor for tensor in reads if all(tensor is not other for other in written)]
        return moved + sum(map(self.move, reads)) + sum(self.move(tensor, write=True) for tensor in writes)

    def move(self, tensor: Tensor, write: bool = False) -> int:
        """The bytes that are moved to read or write a tensor: 0 if it is in the cache."""
        storage, size = tensor.untyped_storage(), nbytes(tensor)
        if storage not in self.storages:
            self.storages[storage] = next(self.numbers)
            if not write:
                self.outside.add(self.storages[storage])
        number = self.storages[storage]
        key = (number, tensor.storage_offset(), size)
        if write:
            self.results[key] = size
        elif number in self.outside and key not in self.results:
            self.inputs[key] = size
        missing = size - self.cached.pop(key, 0)
        self.cached[key] = size
        while sum(self.cached.values()) > self.card.cache:
            del self.cached[next(iter(self.cached))]
        return missing


def copies_summand(function, args: tuple, kwargs: dict) -> bool:
    """Whether it is an `addmm` that first copies its summand, a matrix, to where the sum will be."""
    return function.overloadpacket is aten.addmm and args[0].ndim == 2 and kwargs.get("out") is not args[0]


def has_written(function) -> bool:
    """Whether the operation changes an argument."""
    return any(argument.alias_info and argument.alias_info.is_write for argument in function._schema.arguments)


def written_arguments(function, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Arguments that the operation changes."""
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            yield from tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def tensors(tree) -> Iterator[Tensor]:
    """All tensors in it; of a sharded one, this rank's shard."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf._local_tensor if isinstance(leaf, DTensor) else leaf


def nbytes(tensor: Tensor) -> int:
    """Of its elements; those that `expand` repeats count once."""
    sizes = zip(tensor.shape, tensor.stride())
    return prod(size for size, stride in sizes if stride) * tensor.itemsize
