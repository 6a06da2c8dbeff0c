"""Folders in a host's memory (/dev/shm): a copy of the model for all ranks to read, and adapters for vLLM."""

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from fsdp_utils import on_every_rank, on_first_rank
from runtime.files import locked
from runtime.progress_bar import progress_bar

PLACES = (Path("/dev/shm"), Path(tempfile.gettempdir()))  # for shared folders: memory first


def first_on_host() -> bool:
    """True on one rank of each host: its first, or the world's first (a world may begin in the middle of a host)."""
    return "0" in (os.environ["LOCAL_RANK"], os.environ["RANK"])


@contextmanager
def shared_folder(needed: int, places: Sequence[Path] = PLACES) -> Iterator[Path]:
    """A new folder in each host's memory, with the same name on all hosts. Collective.

    needed: bytes. If some host has less room in memory, the folder is made among the temporary files, which may be on
    a disk; without room there, either, raises ValueError. One rank per host makes the folder, and deletes it when all
    ranks have left the block.
    """
    folder = place_with_room(needed, places) / on_first_rank(lambda: f"lorl-{secrets.token_hex(6)}")
    lock = on_every_rank(lambda: make_locked(folder) if first_on_host() else None)
    try:
        yield folder
        dist.barrier()
    finally:
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def place_with_room(needed: int, places: Sequence[Path]) -> Path:
    """The first place that has `needed` free bytes on every host. Collective."""
    free = torch.tensor([free_bytes(place) for place in places])
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    for place, room in zip(places, free.tolist()):
        if needed <= room:
            return place
    found = " and ".join(f"{place} has {room / 2**20:,.0f} MiB" for place, room in zip(places, free.tolist()))
    fix = "set TMPDIR" if places == PLACES else "leave USE_SHM out"
    raise ValueError(f"no room for {needed / 2**20:,.0f} MiB of weights: {found} free; make room, or {fix}")


def free_bytes(place: Path) -> int:
    """The bytes that this process may write there; -1 without write access."""
    return shutil.disk_usage(place).free if os.access(place, os.W_OK) else -1


def make_locked(folder: Path) -> int:
    """Makes the folder and locks it until the process ends; returns the lock.

    Folders without a lock were left behind by killed processes, and are removed.
    """
    with locked(folder.parent):  # otherwise another process could remove it before it is locked
        for path in folder.parent.glob("lorl-" + 12 * "[0-9a-f]"):
            with suppress(OSError), locked(path, wait=False):  # in use, or another user's
                shutil.rmtree(path)
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock


def use_shm() -> bool:
    """Whether the environment sets USE_SHM."""
    return os.environ.get("USE_SHM", "") not in ("", "0")


@contextmanager
def fast_folder(folder: str) -> Iterator[str]:
    """The model's folder or, with USE_SHM, a copy in the host's memory until the block ends. Collective.

    All ranks and vLLM then read the files from memory: a slow disk is read once.
    """
    if not use_shm():
        yield folder
        return
    files = on_every_rank(lambda: [path for path in Path(folder).iterdir() if path.is_file()])
    needed = sum(path.stat().st_size for path in files)
    with shared_folder(needed, PLACES[:1]) as copy:

        def copy_files() -> None:
            with progress_bar("copying the model", needed, "bytes", unit_scale=True) as bar:
                for path in files:
                    shutil.copy(path, copy)
                    bar.update(path.stat().st_size)

        on_every_rank(copy_files if first_on_host() else lambda: None)
        yield str(copy)
