"""Where tensors live: processes, sharding, loading into shards, offloading.

One process and many take the same path: with one, every shard is whole. Every function here that moves tensors is
collective: all ranks call it, in the same order.
"""

import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

import lora
import nf4
from progress_bar import progress_bar

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)  # while one rank downloads a model; one that dies ends all by torchrun
SHARED_MEMORY = Path("/dev/shm")
# What weights may be stored as, in safetensors' words; quantised ones are not understood.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


# ---- Processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


def init_world() -> World:
    """Joins the processes of torchrun; a process started without it is a world of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    return World(dist.get_rank(), dist.get_world_size(), device)


def first_to_fail() -> bool:
    """True on one rank only, the first to ask: it tells why the run ends."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    return dist.distributed_c10d._get_default_store().add("first_to_fail", 1) == 1


def on_first_rank(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and gives its result to all; its ValueError or OSError is raised on every rank."""
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = str(error) or type(error).__name__
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def on_every_rank(work: Callable[[], T]) -> T:
    """Runs `work`, which may not communicate; one rank's ValueError or OSError is raised on all."""
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


def find_model(model: str) -> str:
    """The local folder of a model: a folder as it is, a name of the hub downloaded once."""
    if Path(model, "config.json").is_file():
        return model
    if Path(model).exists():
        raise ValueError(f"model {model!r} is no model folder: it has no config.json")
    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is not a folder, and the hub does not give it: {reason}") from None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library raises over a file of the user's becomes a ValueError that names it, of one line."""
    try:
        yield
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run; use a model whose architecture transformers knows"
        raise ValueError(f"{what} cannot be used: {' '.join(reason.split())[:300]}") from error


def shard(
    root: nn.Module,
    blocks: nn.ModuleList,
    device: torch.device,
    fsdp_size: int = 0,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    param_offload: bool = False,
) -> None:
    """FSDP2 over each decoder block, then over the root, which holds what is left (embeddings, last norm, head).

    `fsdp_size` ranks share one copy of the parameters (0: all ranks); copies are replicas of each other. Parameters
    are cast to `compute_dtype` (None: not at all) as they are gathered; gradients are then summed in float32. Blocks
    that are not resharded keep their whole weights from the forward to the backward. Offloaded shards live in host
    memory, as do their gradients and the optimizer's state.
    """
    precision = MixedPrecisionPolicy(compute_dtype, reduce_dtype=compute_dtype and torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if param_offload else OffloadPolicy()
    options = {"mesh": make_mesh(device, fsdp_size), "mp_policy": precision, "offload_policy": offload}
    for block in blocks:
        fully_shard(block, **options, reshard_after_forward=reshard_after_forward)
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
    """Keeps the optimizer's state in host memory, and beside its parameters only during a step."""

    def move(home: torch.device | None) -> None:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.ndim:  # the count of steps is on the CPU as it is
                    state[name] = value.to(home or parameter.device)

    optimizer.register_step_pre_hook(lambda *_: move(None))
    optimizer.register_step_post_hook(lambda *_: move(torch.device("cpu")))


def load_weights(model: PreTrainedModel, folder: str, device: torch.device, param_offload: bool = False) -> None:
    """Gives a sharded meta model its memory and its checkpoint; each rank reads only its own rows of each tensor.

    Adapters get memory but no values. Raises ValueError, on every rank, for missing, broken or mis-shaped files.
    """
    model.to_empty(device="cpu" if param_offload else device)
    compute_buffers(model, device)
    on_every_rank(lambda: read_checkpoint(model, folder))


def read_checkpoint(model: PreTrainedModel, folder: str) -> None:
    """Reads this rank's rows of all parameters but the adapters' from the safetensors files of a folder."""
    wanted = dict(lora.base_weights(model))
    with progress_bar("loading weights", len(wanted), "tensors") as bar:
        for path in weight_files(Path(folder)):
            with open_weights(path) as file:
                for name in [name for name in file.keys() if name in wanted]:
                    read_rows(file.get_slice(name), wanted.pop(name), name)
                    bar.update()
    if wanted:  # tied parameters have one name here, and in the file
        raise ValueError(f"the checkpoint in {folder!r} lacks {sorted(wanted)[0]!r} ({len(wanted)} such tensors)")


@contextmanager
def open_weights(path: Path) -> Iterator["safe_open"]:
    """Opens a safetensors file; what is found wrong with it, here or within, is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model's index names; without an index, all there are."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    with reading(str(index)):
        names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is no file of its folder")
    return [folder / name for name in names]


def read_rows(source, weight: Tensor | nf4.NF4Weight, name: str) -> None:
    """Copies this rank's rows of one tensor on disk into a parameter, or quantises them into one."""
    if source.get_dtype() not in FLOATS:
        raise ValueError(f"{name} is of type {source.get_dtype()}, and must be one of {', '.join(FLOATS)}")
    if tuple(source.get_shape()) != tuple(weight.shape):
        raise ValueError(f"{name} is {tuple(source.get_shape())} in the file, and {tuple(weight.shape)} in the model")
    quantized = isinstance(weight, nf4.NF4Weight)
    parameters = list(weight.parameters()) if quantized else [weight]
    parameter, shards, start = parameters[0], [local(parameter) for parameter in parameters], 0
    if isinstance(parameter, DTensor):  # as torch.chunk: equal shares rounded up, the last ranks may have less or none
        ranks, mine = parameter.device_mesh.size(-1), parameter.device_mesh.get_local_rank(-1)
        start = min(mine * -(-len(parameter) // ranks), len(parameter))
    rows = source[start : start + len(shards[0])]
    rows = rows.cuda() if quantized and torch.cuda.is_available() else rows  # a CPU core takes minutes for billions
    with torch.no_grad():
        for shard, values in zip(shards, nf4.quantize(rows) if quantized else [rows]):
            shard.copy_(values)


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers (rotary frequencies) are computed from the configuration, not stored: compute them anew."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if buffers:
            fresh = type(module)(module.config).to(device)
            for name in buffers:
                setattr(module, name, getattr(fresh, name))


def first_on_host() -> bool:
    """True on one rank of each host."""
    return os.environ["LOCAL_RANK"] == "0"


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder in each host's memory, of one name everywhere, made by one rank of the host.

    All are done with it when the block ends, and it goes.
    """
    folder = SHARED_MEMORY / on_first_rank(lambda: f"lorl-{secrets.token_hex(6)}")
    lock = on_every_rank(lambda: make_locked(folder) if first_on_host() else None)
    try:
        yield folder
        dist.barrier()
    finally:
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def make_locked(folder: Path) -> int:
    """Makes the folder and locks it for as long as this process lives; returns the lock.

    Folders without a lock have been left by processes that were killed. They are removed.
    """
    with alone_in(folder.parent):  # or somebody else would find it when it is made and not yet locked
        for path in folder.parent.glob("lorl-*"):
            with suppress(OSError):  # it is in use, or another user's
                lock = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(lock)
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within it, this is the only process that is, for that folder; others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def in_shared_memory(folder: str) -> Iterator[str]:
    """A copy of a model's folder in the host's memory, which goes when the block ends.

    Every rank and vLLM then read the files from memory instead of asking a slow disk many times.
    """
    with shared_folder() as copy:

        def copy_files() -> None:
            """Raises ValueError if there is no room."""
            files = [path for path in Path(folder).iterdir() if path.is_file()]
            needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(SHARED_MEMORY).free
            if needed > free:
                raise ValueError(
                    f"use_shm needs {needed / 2**30:.1f} GiB in {SHARED_MEMORY}, which has {free / 2**30:.1f} GiB free"
                )
            with progress_bar("copying the model", needed, "bytes", unit_scale=True) as bar:
                for path in files:
                    shutil.copy(path, copy)
                    bar.update(path.stat().st_size)

        on_every_rank(copy_files if first_on_host() else lambda: None)
        yield str(copy)


# ---- Whole tensors --------------------------------------------------------------------------------------------


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a tensor that may be sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def gather(parameter: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def clip_gradients(parameters: list[Tensor], max_norm: float) -> float:
    """Scales the gradients down to that norm, which counts those of all ranks; the norm before."""
    return gather(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()


def reshard(root: nn.Module) -> None:
    """Frees what forwards without a backward have left whole."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Puts a whole tensor, which every rank has, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(sharded.to_local())
    else:
        parameter.copy_(whole)
