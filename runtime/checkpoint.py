"""Checkpoints: everything that a run needs to resume bit for bit, written atomically.

    checkpoints/step_000010/state.safetensors   trained parameters and optimizer moments, whole tensors, float32
    checkpoints/step_000010/state.json          step, lengths of the logs, configuration
    checkpoints/step_000010/adapter/            the same adapter as a peft folder (model/, a model's, with lora_rank 0);
                                                of several tasks adapter/TASK/, one for each
    checkpoints/step_000010/checksums.json      SHA-256 of every file above; written last
    latest, best                                files that name the newest one, and the one with the best evaluation

A checkpoint does not depend on the number of ranks, and holds no random state: the random numbers of a step follow from
its number, see `Run.complete_step`. Files are safetensors and JSON: reading one runs no code.
"""

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from configs.base import Config
from fsdp_utils import fill, gather, on_every_rank, reshard
from runtime.files import atomic_folder, fsync, one_line_errors, write_tensors

KEPT = 2  # newest checkpoints of a run, beside the best one

# Settings that a resumed run must keep, because the checkpoint's tensors or its place in the data depend on them.
FIXED = (
    "model task dtype target_modules lora_rank lora_alpha lora_adapter_path algorithm seed prompts_per_step "
    "group_size max_prompt_length instruction system_prompt chat_template_kwargs prompt_field answer_field"
).split()


@dataclass
class Progress:
    """How far a run has come, in whole steps."""

    step: int = 0
    prompts_drawn: int = 0  # from the endless stream of training prompts
    updates_skipped: int = 0  # since the last step without a NaN or infinite loss or gradient
    syncs_lost: int = 0  # syncs in a row that kept too little of the update, see health.py
    steps_useless: int = 0  # steps in a row whose rewards did not differ
    best_accuracy: float = -1.0  # of all checkpoints with an evaluation
    best_step: int = -1  # the step of that checkpoint; -1: none
    started: str = field(default_factory=lambda: datetime.now().isoformat(timespec="seconds"), compare=False)


@dataclass(frozen=True)
class Saved:
    """A checkpoint from which a run resumes."""

    folder: Path
    progress: Progress
    log: dict[str, Any]  # position of the log
    settings: dict[str, Any]  # the configuration it was written with


# ---- Tensors --------------------------------------------------------------------------------------------------


Learners = dict[str, tuple[nn.Module, torch.optim.Optimizer]]  # name -> trained module and its optimizer


def trained_state(learners: Learners) -> Iterator[tuple[str, Any, dict | None]]:
    """Every trained parameter and value of its optimizer state, by name; sharded tensors as shards.

    The third is the parameter's state in the optimizer if the value is in there, as the last part of its name.
    """
    for learner, (module, optimizer) in learners.items():
        for name, parameter in module.named_parameters(prefix=learner):
            if parameter.requires_grad:
                yield name, parameter, None
                state = optimizer.state.get(parameter, {})
                for key in sorted(state):
                    yield f"{name}/{key}", state[key], state


def gather_state(learners: Learners, keep: bool) -> dict[str, Tensor]:
    """The trained state as whole tensors on the CPU, on ranks with `keep`. Collective."""
    tensors = {}
    for module, _ in learners.values():
        reshard(module)  # within a step parameters are gathered, and the optimizer only knows the shards
    for name, value, _ in trained_state(learners):
        whole = gather(as_tensor(value).detach())
        if keep:
            tensors[name] = whole.cpu().clone()
    return tensors


@torch.no_grad()
def restore_state(folder: Path, learners: Learners) -> None:
    """Loads a checkpoint's tensors into modules and optimizers, however they are sharded.

    Raises ValueError for a tensor that is missing, that has another shape, or that nobody takes.
    """
    where = f"checkpoint {str(folder)!r}"
    on_every_rank(lambda: check_readable(folder))
    with one_line_errors(where), safe_open(folder / "state.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        found = {name: shape for name, shape in found.items() if name.partition(".")[0] in learners}
        with_state = {name.rpartition("/")[0] for name in found}
        for learner, (module, optimizer) in learners.items():
            names = module.named_parameters(prefix=learner)
            allocate_state(optimizer, [parameter for name, parameter in names if name in with_state])
        for name, value, state in trained_state(learners):
            shape, expected = found.pop(name, None), list(as_tensor(value).shape)
            if shape != expected:
                raise ValueError(f"it has {name!r} of shape {shape}, not {expected}")
            if isinstance(value, Tensor):
                fill(value, file.get_tensor(name))
            else:
                state[name.rpartition("/")[2]] = type(value)(file.get_tensor(name).item())
        if found:
            raise ValueError(f"it has {min(found)!r}, which this run's optimizer does not ({len(found)} such tensors)")


def as_tensor(value: Tensor | float) -> Tensor:
    """The value itself, or a number of an optimizer's state as a tensor, exactly."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def check_readable(folder: Path) -> None:
    """Raises ValueError if this machine has no such checkpoint."""
    if not (folder / "state.safetensors").exists():
        raise ValueError(
            f"{socket.gethostname()} cannot read checkpoint {str(folder)!r}: every machine needs it; "
            "put output_dir on storage that they share, or copy the checkpoint"
        )


def allocate_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Creates the optimizer's state for the parameters, by a step with zero gradients."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


# ---- Folders --------------------------------------------------------------------------------------------------


def write(
    run: Path, step: int, state: dict[str, Any], tensors: dict[str, Tensor], export: Callable[[Path], None]
) -> Path:
    """Writes `checkpoints/step_N`. `export(folder)` adds files for other programs.

    A folder of that name is always complete: it is written under another name, flushed to the disk, then renamed.
    Raises OSError if the disk is full; an earlier folder of that name is then unchanged.
    """
    target = run / "checkpoints" / f"step_{step:06d}"
    with atomic_folder(target) as partial:
        write_tensors(tensors, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(state) + "\n")
        export(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        checksums = {str(path.relative_to(partial)): digest(path) for path in files}
        (partial / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")
        for path in [*files, partial / "checksums.json", *{path.parent for path in files}]:
            fsync(path)
    fsync(target.parent)
    shutil.rmtree(target.with_suffix(".old"), ignore_errors=True)  # see `rewind`
    return target


def set_pointers(run: Path, latest: int, best: int) -> None:
    """Writes the files `latest` and `best`, which name the checkpoints of those steps; a negative step: no file."""
    for name, step in (("latest", latest), ("best", best)):
        if step < 0:
            (run / name).unlink(missing_ok=True)
            continue
        partial = run / f"{name}.partial"
        partial.write_text(f"checkpoints/step_{step:06d}\n")
        fsync(partial)
        partial.rename(run / name)
    fsync(run)


def rewind(run: Path, step: int, best: int) -> None:
    """Restores the folder to the state of that step's checkpoint.

    Later checkpoints are renamed to `.old`, and deleted when the run saves that step again. Partial folders of killed
    processes are deleted.
    """
    for path in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(path)
    for later, path in written(run).items():
        if later > step:
            shutil.rmtree(path.with_suffix(".old"), ignore_errors=True)
            path.rename(path.with_suffix(".old"))
    set_pointers(run, step, best)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def integrity_error(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if all files have their checksums."""
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        for name, expected in checksums.items():
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()):
                return f"it names a file outside itself, {name!r}"
            if digest(path) != expected:
                return f"{name} is not what was written"
        if not {"state.safetensors", "state.json"} <= checksums.keys():
            return "it has no state"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def written(run: Path) -> dict[int, Path]:
    """A run's checkpoint folders by step, in order; only `find` checks their contents."""
    names = (re.fullmatch(r"step_(\d{6,})", path.name) for path in (run / "checkpoints").glob("step_*"))
    steps = sorted(int(name[1]) for name in names if name)
    return {step: run / "checkpoints" / f"step_{step:06d}" for step in steps}


def find(run: Path, which: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: `which` is a folder, or "latest" for the newest intact one of the run.

    None if the run has written none yet. Raises ValueError if there are some, but none to go on from.
    """
    if which != "latest":
        error = integrity_error(Path(which))
        if error:
            raise ValueError(f"checkpoint {which!r} cannot be used: {error}")
        own = [path.resolve() for path in written(run).values()]
        if Path(which).resolve() not in own:
            raise ValueError(f"{which!r} is no checkpoint of the run {str(run)!r}; set output_dir to its own")
        return Path(which)
    folders = written(run)
    for folder in reversed(folders.values()):
        error = integrity_error(folder)
        if error is None:
            return folder
        say(f"checkpoint {folder} is damaged ({error}); trying the one before it")
    if folders:
        raise ValueError(f"no checkpoint in {str(run / 'checkpoints')!r} is whole; start anew without --resume")
    return None


def read_saved(folder: Path) -> Saved:
    """Reads a checkpoint's state.json. Raises ValueError if another version of this program has written it."""
    try:
        state = json.loads((folder / "state.json").read_text())
        saved = Saved(folder, Progress(**state["progress"]), dict(state["log"]), dict(state["config"]))
        if unknown := saved.settings.keys() - {field.name for field in fields(Config)}:
            raise ValueError(f"it has the option {min(unknown)!r}")
        Config(**saved.settings)  # raises for a value that is none today
        return saved
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {str(folder)!r} is of another version of this program: {error}") from None


def prune(run: Path, best: int) -> None:
    """Deletes all but the newest `KEPT` checkpoints and that of the step `best`."""
    folders = written(run)
    for step in list(folders)[:-KEPT]:
        if step != best:
            shutil.rmtree(folders[step])
