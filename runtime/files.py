"""Files: model folders, downloads, atomic folders, locks. Nothing here knows ranks."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from runtime.progress_bar import progress_bar

# The dtypes of weights that are supported, by safetensors' names; quantised checkpoints are not.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
FILE_BYTES = 4 << 30
LIBRARY_TALK = re.compile(r"^ValidationError: .{,60} Value error, | Supported architectures: .*| \[type=value_error.*")
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")  # of a model's folder, beside the weights
NOT_THE_MODELS = ("*.index.json", "adapter_config.json")  # files of these patterns that belong to other weights


# ---- Models --------------------------------------------------------------------------------------------------------


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turns a library's exception about a user's file into a ValueError of one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and re.search(r"Config' object has no attribute", reason):
            reason = f"its config.json lacks {error.name!r}, which must be there as its makers have it"
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run; use a model whose architecture transformers knows"
        reason = LIBRARY_TALK.sub("", " ".join(reason.split()))[:300]
        raise ValueError(f"{what} cannot be used: {reason}") from error


def find_model(model: str) -> str:
    """The local folder of a model: `model` itself, or the hub's model of that name, downloaded once.

    Prints which weights in the folder do not belong to the model.
    """
    folder = model
    if not Path(model, "config.json").is_file():
        if Path(model).exists():
            raise ValueError(f"model {model!r} is no model folder: it has no config.json")
        try:
            folder = snapshot_download(model, allow_patterns=["*.safetensors", *MODEL_FILES])
        except Exception as error:  # of many kinds: no network, a proxy's refusal, no such name
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"model {model!r} is not a folder, and the hub does not give it: {reason}") from None
    others = other_weights(Path(folder))
    if others:
        print(f"model {model} is read without {', '.join(path.name for path in others)}", flush=True)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """A model's safetensors files: those that its index names, else model.safetensors, else all."""
    index, alone = folder / INDEX, folder / "model.safetensors"
    if not index.exists():
        return [alone] if alone.is_file() else sorted(folder.glob("*.safetensors"))
    with one_line_errors(str(index)):
        names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is no file of its folder")
    return [folder / name for name in names]


def other_weights(folder: Path) -> list[Path]:
    """The other safetensors files in a model's folder: an adapter, or a copy in another format."""
    return sorted(set(folder.glob("*.safetensors")) - set(weight_files(folder)))


def check_tied_head(folder: Path) -> None:
    """Raises ValueError if the files of a model with a tied head hold a head that differs from the embedding."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            names = [name for name in file.keys() if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
            found |= {name.split(".")[-2]: file.get_tensor(name) for name in names}
    if len(found) == 2 and not torch.equal(found["lm_head"], found["embed_tokens"]):
        raise ValueError(
            f"model {str(folder)!r} ties its head to its embedding (tie_word_embeddings in config.json), but its files "
            f"hold another lm_head.weight; set tie_word_embeddings to false there, or remove that tensor"
        )


@contextmanager
def open_safetensors(path: Path) -> Iterator["safe_open"]:
    """Opens a safetensors file. Its errors, also those in the block, become a ValueError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None


def read_model(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's folder, one at a time. Raises ValueError if a name is in two files."""
    files, seen = weight_files(folder), set()
    if not files:
        raise ValueError(f"there are no safetensors files in {str(folder)!r}")
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():
                if name in seen:
                    raise ValueError(f"{name} is in an earlier file, too; keep one, or add {INDEX}")
                seen.add(name)
                yield name, file.get_tensor(name)


def write_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Writes a safetensors file with the permissions of the umask; safetensors itself would use 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"} | metadata)
    path.chmod(mode)


def write_model(tensors: Iterable[tuple[str, Tensor]], folder: Path, like: Path) -> None:
    """Writes a Hugging Face model folder atomically, with the configuration and tokenizer of the folder `like`."""
    expected = sum(path.stat().st_size for path in weight_files(like))
    with atomic_folder(folder) as partial, progress_bar("writing the model", expected, "bytes", unit_scale=True) as bar:
        weight_map, total = {}, 0
        for number, batch in enumerate(batches(tensors, bar), start=1):
            file = f"model-{number:05d}.safetensors"
            write_tensors(batch, partial / file)
            weight_map |= dict.fromkeys(batch, file)
            total += sum(tensor.nbytes for tensor in batch.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in {path for pattern in MODEL_FILES for path in like.glob(pattern)}:
            if path.is_file() and not any(path.match(pattern) for pattern in NOT_THE_MODELS):
                shutil.copyfile(path, partial / path.name)


def batches(tensors: Iterable[tuple[str, Tensor]], bar: tqdm) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file: at most `FILE_BYTES`, or one larger tensor. The bar counts their bytes."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > FILE_BYTES:
            yield batch
            batch.clear()  # frees memory before the next tensor is read
            size = 0
        batch[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        bar.update(tensor.nbytes)
    yield batch


# ---- Folders -------------------------------------------------------------------------------------------------------


def check_parent(folder: Path) -> None:
    """Raises ValueError if the folder cannot be made or written."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"cannot write to {str(folder)!r}: {str(parent)!r} is not a writable directory")


def new_folder(out: str) -> Path:
    """The absolute path of a folder to write. Raises ValueError if it cannot be made, or is not empty."""
    folder = Path(out).resolve()
    check_parent(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{out!r} exists and is not empty")
    return folder


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder, which is renamed to `target` when the block ends, or deleted if the block fails."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except SafetensorError as error:  # safetensors raises it for an OSError
        raise OSError(f"cannot write {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flushes a file's contents or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on a file or folder. Another process waits or, without `wait`, gets a BlockingIOError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
