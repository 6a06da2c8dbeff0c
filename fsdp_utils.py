"""Where tensors live: processes, sharding, loading into shards, and whole tensors gathered out of them.

One process and many take the same path: with one, every shard is whole. Every function here that moves tensors is
collective: all ranks call it, in the same order.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

import lora
import low_rank
import nf4
from runtime.files import FLOATS, open_safetensors, weight_files
from runtime.progress_bar import progress_bar
from runtime.sequence_parallel import ranks_sharing

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)  # ranks wait this long while one downloads a model; torchrun ends them if one dies


# ---- Processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    sequence_group: dist.ProcessGroup | None = None  # the ranks that this one shares its micro-batches with

    def sum(self, values: Tensor) -> Tensor:
        """In-place sum over all ranks' micro-batches; one that several ranks share counts once. Collective."""
        dist.all_reduce(values)
        return values.div_(ranks_sharing(self.sequence_group))


def init_world(store: dist.Store | None = None) -> World:
    """Joins the process group of torchrun; without torchrun, the world is this one process.

    store: where the ranks of the environment meet; None: torchrun's.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if torch.cuda.is_available():
        ranks, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks > cards:  # on all ranks alike, since only the first one prints before there is a process group
            raise ValueError(f"{ranks} processes on a machine with {cards} GPU(s); set --nproc-per-node to {cards}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=LONGEST_WAIT)
    return World(dist.get_rank(), dist.get_world_size(), device)


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on the first rank of a group (None: all ranks) and broadcasts its result. Its ValueError or OSError
    is raised on all of them. Collective.
    """
    outcome: list = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = str(error) or type(error).__name__
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def on_every_rank(work: Callable[[], T]) -> T:
    """Runs `work`, which must not communicate. One rank's ValueError or OSError is raised on all. Collective."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as raised:
        error = str(raised) or type(raised).__name__
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        raise ValueError(next(filter(None, errors)))
    return result


# ---- Loading into shards --------------------------------------------------------------------------------------


def shard(
    root: nn.Module,
    blocks: nn.ModuleList,
    device: torch.device,
    fsdp_size: int = 0,
    compute_dtype: torch.dtype | None = None,
    param_offload: bool = False,
    ignored: Collection[nn.Parameter] = (),
) -> None:
    """FSDP2 over each decoder block, then over the root, which holds what is left (embeddings, last norm, head).

    `fsdp_size` ranks share one copy of the parameters (0: all ranks); copies are replicas of each other. Parameters
    are cast to `compute_dtype` (None: not at all) as they are gathered; gradients are then summed in float32.
    Offloaded shards live in host memory, as do their gradients and the optimizer's state. FSDP copies every parameter,
    even on one rank: once into its own memory, then for each forward. It does not touch the `ignored` ones, which must
    be frozen.
    """
    precision = MixedPrecisionPolicy(compute_dtype, reduce_dtype=compute_dtype and torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if param_offload else OffloadPolicy()
    options = {"mesh": make_mesh(device, fsdp_size), "mp_policy": precision, "offload_policy": offload}
    options["ignored_params"] = set(ignored)
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(root, **options)


def make_mesh(device: torch.device, fsdp_size: int) -> DeviceMesh:
    """(shard,), or (replicate, shard) if a copy takes fewer than all ranks."""
    world_size = dist.get_world_size()
    size = fsdp_size or world_size
    if world_size % size:
        raise ValueError(f"fsdp_size {fsdp_size} does not divide the number of processes, {world_size}")
    if size == world_size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def offload_state(optimizer: torch.optim.Optimizer) -> None:
    """Keeps the optimizer's state in host memory; it is on the parameters' device only during a step."""

    def move(home: torch.device | None) -> None:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.ndim:  # the step count is always on the CPU
                    state[name] = value.to(home or parameter.device)

    optimizer.register_step_pre_hook(lambda *_: move(None))
    optimizer.register_step_post_hook(lambda *_: move(torch.device("cpu")))


def load_weights(model: PreTrainedModel, folder: str, device: torch.device, param_offload: bool = False) -> None:
    """Gives a sharded meta model its memory and its checkpoint; each rank reads only its own rows of each tensor.

    Adapters get memory but no values. Parameters that have memory already are vLLM's (runtime/shared_base.py): they are
    compared with the checkpoint. Raises ValueError, on every rank, for missing, broken or mis-shaped files.
    """
    held = {parameter for parameter in model.parameters() if not parameter.is_meta}
    home = "cpu" if param_offload else device
    model._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
    compute_buffers(model, device)
    for name, buffer in model.named_buffers():
        if not buffer.isfinite().all():
            raise ValueError(f"model {folder!r} is not implemented here: nothing says how its {name} is computed")
    on_every_rank(lambda: read_checkpoint(model, folder, held))


def read_checkpoint(model: PreTrainedModel, folder: str, held: Collection[Tensor] = ()) -> None:
    """Reads this rank's rows of all parameters but the adapters' from a folder; `held` ones must have its values."""
    wanted = {
        name: (weight, *place) for path, weight in lora.base_weights(model) for name, *place in stored(path, weight)
    }
    with progress_bar("loading weights", len(wanted), "tensors") as bar:
        for path in weight_files(Path(folder)):
            with open_safetensors(path) as file:
                for name in [name for name in file.keys() if name in wanted]:
                    weight, *place = wanted.pop(name)
                    read = check_values if weight in held else read_expert if place else read_rows
                    read(file.get_slice(name), weight, name, *place)
                    bar.update()
    if wanted:  # a tied parameter has one name, here and in the file
        raise ValueError(f"the checkpoint in {folder!r} lacks {sorted(wanted)[0]!r} ({len(wanted)} such tensors)")


def stored(path: str, weight: Tensor | nf4.NF4Weight) -> list[tuple]:
    """The tensors of the checkpoint that a parameter is made of: (name,), or (name, expert, rows) for each expert's.

    >>> stored("mlp.experts.gate_up_proj", torch.empty(1, 8, 3))
    [('mlp.experts.0.gate_proj.weight', 0, slice(0, 4, None)), ('mlp.experts.0.up_proj.weight', 0, slice(4, 8, None))]
    """
    if not is_experts(path):
        return [(path,)]
    (experts, out, _), (module, _, kind) = weight.shape, path.rpartition(".")
    linears = lora.EXPERTS[kind]
    rows = [slice(part * out // len(linears), (part + 1) * out // len(linears)) for part in range(len(linears))]
    return [
        (f"{module}.{expert}.{linear}.weight", expert, part)
        for expert in range(experts)
        for linear, part in zip(linears, rows)
    ]


def is_experts(path: str) -> bool:
    """Whether a parameter is of all experts of a layer, (experts, out, in)."""
    module, _, kind = path.rpartition(".")
    return module.endswith(".experts") and kind in lora.EXPERTS


def read_rows(source, weight: Tensor | nf4.NF4Weight, name: str) -> None:
    """Copies this rank's rows of one tensor on disk into a parameter, or quantises them into one."""
    check_source(source, weight.shape, name)
    quantized = isinstance(weight, nf4.NF4Weight)
    parameters = list(weight.parameters()) if quantized else [weight]
    shards, start = [local(parameter) for parameter in parameters], first_row(parameters[0])
    rows = source[start : start + len(shards[0])]
    if quantized and torch.cuda.is_available():  # on a CPU core, billions of values take minutes
        rows = rows.cuda()
    with torch.no_grad():
        for shard, values in zip(shards, nf4.quantize(rows) if quantized else [rows]):
            shard.copy_(values)


def read_expert(source, weight: Tensor, name: str, expert: int, rows: slice) -> None:
    """Copies one expert's linear on disk to its place in the parameter of all experts, if this rank has that expert."""
    check_source(source, (rows.stop - rows.start, weight.shape[2]), name)
    shard, place = local(weight), expert - first_row(weight)
    if 0 <= place < len(shard):
        with torch.no_grad():
            shard[place, rows] = source[:].to(shard)


def check_values(source, weight: Tensor, name: str) -> None:
    """Raises ValueError if a parameter that is not read differs from the tensor on disk."""
    check_source(source, weight.shape, name)
    if not torch.equal(source[:].to(weight), weight):
        raise ValueError(f"vLLM's values of {name} are not those of the checkpoint; leave SHARE_BASE out")


def check_source(source, shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError for a tensor on disk of another dtype or shape than the model's."""
    if source.get_dtype() not in FLOATS:
        raise ValueError(f"{name} is of type {source.get_dtype()}, and must be one of {', '.join(FLOATS)}")
    if tuple(source.get_shape()) != tuple(shape):
        raise ValueError(f"{name} is {tuple(source.get_shape())} in the file, and {tuple(shape)} in the model")


def first_row(parameter: Tensor) -> int:
    """This rank's first row of a parameter. As in torch.chunk, shares are rounded up; the last ranks may have none."""
    if not isinstance(parameter, DTensor):
        return 0
    ranks, mine = parameter.device_mesh.size(-1), parameter.device_mesh.get_local_rank(-1)
    return min(mine * -(-len(parameter) // ranks), len(parameter))


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Recomputes buffers (rotary frequencies, an embedding's scale), which are not in the checkpoint, as transformers
    does; one that it does not know becomes NaN.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers' mark: `_init_weights` leaves it as it is
    with torch.no_grad():
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.full_like(buffer, torch.nan, device=device))
            if any(True for _ in module.buffers(recurse=False)):
                model._init_weights(module)


# ---- Whole tensors --------------------------------------------------------------------------------------------


def local(parameter: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def own_bytes(module: nn.Module) -> dict[str, int]:
    """The size of this rank's shard of each parameter. What FSDP does not shard is vLLM's, and not counted."""
    return {name: local(each).nbytes for name, each in module.named_parameters() if isinstance(each, DTensor)}


def local_rows(weight: Tensor | nf4.NF4Weight, rows: slice = slice(None), device: torch.device | None = None) -> Tensor:
    """Some rows of this rank's shard of a weight, dequantised if it is stored in NF4; device None: where they are."""
    parameters = weight.parameters() if isinstance(weight, nf4.NF4Weight) else [weight]
    parts = [local(parameter)[rows].to(device) for parameter in parameters]
    return nf4.dequantize(*parts, weight.shape[1], weight.dtype) if isinstance(weight, nf4.NF4Weight) else parts[0]


def gather(parameter: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded. Collective."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def clip_gradients(parameters: list[Tensor], max_norm: float) -> float:
    """Scales gradients down to `max_norm`, over all ranks; returns the norm before. Collective."""
    return gather(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()


def reshard(root: nn.Module) -> None:
    """Frees the gathered weights that a forward without a backward leaves behind."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, which every rank has, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(sharded.to_local())
    else:
        parameter.copy_(whole)


# ---- The stream: from shards to the sampler ------------------------------------------------------------------------


# FSDP shards W and B alike, by rows, so each rank forms its rows of W + s·B A from the whole A, and only the sum is
# gathered. W is never written: nothing has to be restored, and nothing can drift. Beyond the shards, memory holds
# one whole tensor, which the sampler loads.

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.11's name
# vLLM fuses these linears into one module. On a CPU it loads a module only once all of its parts have arrived.
FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    *(("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),
)
# How many weights are measured for what rounding loses, each on at most 1/4 of MERGED_AT_ONCE elements: on a GPU,
# measuring all of them takes longer than merging.
MEASURED = 32


@dataclass
class SyncStats:
    """Bytes that one sync moved and held, and how much of the update survived rounding to W's dtype."""

    bytes: int = 0  # of the tensors streamed
    peak_bytes: int = 0  # most that were alive at one time, here or in vLLM's loader
    moments: Tensor = field(default_factory=lambda: torch.zeros(2, 2))  # see `compare`; of this rank's shards
    held: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # buffer -> bytes, while it is referenced

    def hold(self, buffer: Tensor) -> None:
        """Counts a buffer for as long as it or a view of it is referenced."""
        self.held[buffer] = buffer.nbytes
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))

    def release(self, buffer: Tensor) -> None:
        """Frees a buffer's memory, even if it is still referenced."""
        buffer.untyped_storage().resize_(0)
        self.held.pop(buffer)

    def compare(self, realised: Tensor, intended: Tensor, share: float) -> None:
        """Adds up inner products of an update as it is after rounding and as it was meant, of a share of the rows."""
        pair = torch.stack([realised.to(intended.dtype), intended]).flatten(1)
        moments = pair @ pair.T / share
        self.moments = self.moments.to(moments.device) + moments

    def metrics(self) -> dict[str, float]:
        """`sync/update_survival` is the cosine between the two: 1 if nothing was lost. Collective."""
        metrics: dict[str, float] = {"sync/bytes": self.bytes, "sync/peak_bytes": self.peak_bytes}
        moments = self.moments.float().cpu()
        dist.all_reduce(moments)  # ranks without rows of adapted weights take part, too
        (realised, dot), (_, intended) = moments.tolist()
        if intended:
            metrics["sync/update_survival"] = dot / ((realised * intended) ** 0.5 or 1.0)
        return metrics


def to_send(model: nn.Module, everything: bool = False) -> set[str] | None:
    """The modules whose weights a sync streams: those with adapters and those fused with them in vLLM; None: all."""
    modules = {lora.weight_name(path, layer).rpartition(".")[0] for path, layer in lora.lora_layers(model)}
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
    release: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The weights as the sampler needs them: (name in the checkpoint, whole tensor on `device`), in the model's order.

    modules: streams only the parameters of these modules; None: all. dtype: of the stream; None: of the model.
    release: frees a tensor when the next one is requested, for consumers that have copied it by then. Collective: all
    ranks must exhaust the stream.
    """
    stats = stats or SyncStats()
    layers = defaultdict(list)  # weight's name -> the LoRA layers whose W it holds
    for path, layer in lora.lora_layers(model):
        layers[lora.weight_name(path, layer)].append(layer)
    names = list(layers)
    measured = {names[i * len(names) // MEASURED] for i in range(MEASURED)} if names else set()

    for path, weight in lora.base_weights(model):
        if modules is None or path.rpartition(".")[0] in modules:
            buffer, own = summon(weight, layers.get(path), device, dtype or weight.dtype, stats, path in measured)
            whole = buffer[: weight.shape[0]]
            for name, *place in stored(path, whole):
                yield name, whole[tuple(place)] if place else whole
            if release:
                stats.release(buffer)
            del whole, buffer, own  # so that they are freed before the next one is made


@torch.no_grad()  # on this function: around the generator it would keep the last tensor alive
def summon(
    weight: Tensor | nf4.NF4Weight,
    layers: list[lora.LoRALayer] | None,
    device: torch.device,
    dtype: torch.dtype,
    stats: SyncStats,
    measured: bool,
) -> tuple[Tensor, Tensor]:
    """The whole merged tensor, gathered from all ranks' rows, and the view of it that is this rank's share.

    Its last rows are undefined if shares were rounded up. layers: those whose updates are merged. measured: adds what
    rounding loses to `stats`. Keep the view as long as the whole: one that Python drops while gloo's thread still reads
    it corrupts memory (pytorch/pytorch issue 75529). Collective.
    """
    sharded = weight.packed if isinstance(weight, nf4.NF4Weight) else weight
    ranks, mine, group = 1, 0, None
    if isinstance(sharded, DTensor):
        mesh = sharded.device_mesh["shard"]
        ranks, mine, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    share = -(-weight.shape[0] // ranks)  # rows of a rank, as torch.chunk: the last one may have fewer
    buffer = torch.empty(ranks * share, *weight.shape[1:], dtype=dtype, device=device)
    stats.hold(buffer)
    stats.bytes += weight.shape[0] * buffer[0].nbytes
    own = buffer[mine * share : (mine + 1) * share]
    write = write_experts if layers and layers[0].stack else write_rows
    write(weight, layers, own[: len(local(sharded))], stats if measured else None)
    if ranks > 1:
        all_gather(buffer, own, group=group)
    return buffer, own


def write_rows(
    weight: Tensor | nf4.NF4Weight, layers: list[lora.LoRALayer] | None, target: Tensor, stats: SyncStats | None
) -> None:
    """Writes this rank's rows of W, or W + s·B A of its one layer, to `target`; `stats` measures what rounds off."""
    adapter = layers[0].adapters[lora.POLICY] if layers else None
    if adapter:
        A, B = gather(adapter.lora_A).to(target.device), local(adapter.lora_B).to(target.device)
        left, right = low_rank.factors(A, B, weight.dtype)
    for rows in nf4.slices(target, low_rank.MERGED_AT_ONCE):
        W = local_rows(weight, rows, target.device)
        if adapter:
            low_rank.add_product(W, left[rows], right, adapter.scale, out=target[rows])
        else:
            target[rows] = W
    if adapter and stats and len(target):
        sample = slice(None, None, -(-4 * target.numel() // low_rank.MERGED_AT_ONCE))
        W = local_rows(weight, sample, target.device)
        # B A without s: s is the same in all layers, so the cosine is, too.
        stats.compare(target[sample] - W, B[sample] @ A, share=len(W) / len(target))


def write_experts(weight: Tensor, layers: list[lora.LoRAExperts], target: Tensor, stats: SyncStats | None) -> None:
    """Writes this rank's experts, with their updates of each layer, into `target`; `stats` measures the first one.

    A rank has whole experts, and their A and B: nothing is gathered beforehand.
    """
    target.copy_(local(weight))
    for layer in layers:
        adapter = layer.adapters[lora.POLICY]
        for expert, (A, B) in enumerate(zip(local(adapter.lora_A), local(adapter.lora_B))):
            A, B, merged = A.to(target.device), B.to(target.device), target[expert, layer.rows]
            W = merged.clone()
            low_rank.add_product(W, *low_rank.factors(A, B, weight.dtype), adapter.scale, out=merged)
            if stats and expert == 0:
                stats.compare(merged - W, B @ A, share=1 / len(target))
