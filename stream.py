"""The weight stream: from shards to the sampler, one whole tensor at a time, adapters merged on the way.

FSDP shards W and B alike, by rows, so W + s·B A is formed within the shard, from A whole; only the sum is gathered.
W is never written: nothing has to be restored, and nothing can drift. What is held beyond the shards is the tensor
that the sampler loads and, with `prefetch`, the next one, which is gathered meanwhile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

import lora
import nf4
from fsdp_utils import gather, local
from nf4 import NF4Weight

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # as torch 2.11 calls it
# vLLM fuses these linears into one module, which on a CPU it loads only when all of its parts have come.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Of W + s·B A that are formed at a time: a few float32 temporaries of 4 MiB each; on a GPU larger ones, or starting
# kernels would take longer than they do.
ELEMENTS_AT_ONCE = 1 << (22 if torch.cuda.is_available() else 20)


@dataclass
class SyncStats:
    """What one pass of the stream moved and held, and how much of the update survived rounding to W's dtype."""

    bytes: int = 0  # of the tensors streamed
    peak_bytes: int = 0  # of those that were alive at one time, here or with whom they were given to
    moments: Tensor = field(default_factory=lambda: torch.zeros(3))  # see `compare`, over this rank's shards
    held: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # buffer -> bytes, while anyone has it

    def hold(self, buffer: Tensor) -> None:
        """Counts a buffer for as long as anyone keeps it or a view of it."""
        self.held[buffer] = buffer.nbytes
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))

    def release(self, buffer: Tensor) -> None:
        """Frees a buffer's memory, whoever keeps it."""
        buffer.untyped_storage().resize_(0)
        self.held.pop(buffer)

    def compare(self, weight: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Adds up <realised, intended>, |realised|² and |intended|² of an update, before and after rounding."""
        realised, intended = (rounded - weight).to(exact.dtype).flatten(), (exact - weight).flatten()
        pairs = ((realised, intended), (realised, realised), (intended, intended))
        moments = torch.stack([torch.dot(one, other) for one, other in pairs])
        self.moments = self.moments.to(moments.device) + moments

    def metrics(self) -> dict[str, float]:
        """`sync/update_survival` is the cosine between the two: 1 if nothing was lost. Collective."""
        metrics: dict[str, float] = {"sync/bytes": self.bytes, "sync/peak_bytes": self.peak_bytes}
        moments = self.moments.float().cpu()
        dist.all_reduce(moments)  # also of a rank without any rows of the adapted weights
        dot, realised, intended = moments.tolist()
        if intended:
            metrics["sync/update_survival"] = dot / ((realised * intended) ** 0.5 or 1.0)
        return metrics


def to_send(model: nn.Module, everything: bool = False) -> set[str] | None:
    """The modules whose weights a sync streams: those with adapters, and what vLLM fuses with them; None: all."""
    modules = {path for path, _ in lora.lora_layers(model)}
    for path in list(modules):
        parent, _, name = path.rpartition(".")
        modules |= {f"{parent}.{part}" for group in FUSED if name in group for part in group}
    return modules if modules and not everything else None


def summon_layers(
    model: nn.Module,
    device: torch.device,
    *,
    modules: set[str] | None = None,
    stats: SyncStats | None = None,
    dtype: torch.dtype | None = None,
    prefetch: bool = False,
    release: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The weights as the sampler needs them: (Hugging Face name, whole tensor on `device`), in the model's order.

    `modules` limits the stream to the parameters of those modules; None streams all. `dtype`: of the stream; None: of
    the model. `prefetch`: the next tensor is gathered while this one is used. `release` frees a tensor when the next
    one is asked for, for takers that have copied it by then: others may keep it as long as they like. Collective: all
    ranks take the stream to its end.
    """
    stats = stats or SyncStats()
    layers = dict(lora.lora_layers(model))

    def gatherings() -> Iterator[tuple[str, Gathering]]:
        for path, weight in lora.base_weights(model):
            module, _, kind = path.rpartition(".")
            if modules is None or module in modules:
                adapter = layers[module].adapters[lora.POLICY] if kind == "weight" and module in layers else None
                yield path, Gathering(weight, adapter, device, dtype or weight.dtype, stats)

    upcoming = gatherings()
    following = next(upcoming, None)
    while following:
        path, gathering = following
        whole = gathering.wait()
        following = next(upcoming, None) if prefetch else None  # not sooner: one collective at a time, or gloo fails
        yield path, whole
        if release:
            stats.release(gathering.buffer)
        del whole, gathering  # or they would live on while the next one is made
        following = following or next(upcoming, None)


class Gathering:
    """A whole tensor on its way: this rank's rows are in their place, those of the others are coming."""

    @torch.no_grad()  # here, for around a generator it would keep what was yielded last
    def __init__(
        self,
        weight: Tensor | NF4Weight,
        adapter: lora.Adapter | None,
        device: torch.device,
        dtype: torch.dtype,
        stats: SyncStats,
    ):
        sharded = weight.packed if isinstance(weight, NF4Weight) else weight
        ranks, mine, group = 1, 0, None
        if isinstance(sharded, DTensor):
            mesh = sharded.device_mesh["shard"]
            ranks, mine, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
        self.length, share = weight.shape[0], -(-weight.shape[0] // ranks)  # as torch.chunk: the last may have fewer
        self.buffer = torch.empty(ranks * share, *weight.shape[1:], dtype=dtype, device=device)
        # A view that Python drops while gloo's thread still reads it corrupts memory: pytorch/pytorch issue 75529.
        self.own = self.buffer[mine * share : (mine + 1) * share]
        write_rows(weight, adapter, self.own[: len(local(sharded))], stats)
        self.work = all_gather(self.buffer, self.own, group=group, async_op=True) if ranks > 1 else None
        stats.bytes += self.length * self.buffer[0].nbytes
        stats.hold(self.buffer)

    def wait(self) -> Tensor:
        """The whole tensor."""
        if self.work:
            self.work.wait()
        return self.buffer[: self.length]


def write_rows(weight: Tensor | NF4Weight, adapter: lora.Adapter | None, target: Tensor, stats: SyncStats) -> None:
    """This rank's rows of W, or of W + s·B A, into `target`; a part at a time, for float32 takes twice W's room."""
    parameters = list(weight.parameters()) if isinstance(weight, NF4Weight) else [weight]
    if adapter:
        A, B = gather(adapter.lora_A).to(target.device), local(adapter.lora_B)
    for rows in nf4.slices(target, ELEMENTS_AT_ONCE):
        parts = [local(parameter)[rows].to(target.device) for parameter in parameters]
        W = nf4.dequantize(*parts, weight.shape[1], weight.dtype) if isinstance(weight, NF4Weight) else parts[0]
        if adapter:
            exact = lora.updated(W, A, B[rows].to(target.device), adapter.scale)
            target[rows] = exact
            stats.compare(W, exact, target[rows])
        else:
            target[rows] = W
