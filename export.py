"""Adapters and models as folders for others: what `python lora.py export` and `python lora.py inspect` do.

A model is written as it comes, a file of at most 4 GiB at a time; it is never in memory whole.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from adapter_files import AdapterFile, open_adapter
from checkpoint import written_whole
from fsdp_utils import FLOATS, find_model, open_weights, weight_files
from lora import merge
from progress_bar import progress_bar

FILE_BYTES = 4 << 30
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf")


def read_model(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's folder, one at a time."""
    files = weight_files(folder)
    if not files:
        raise ValueError(f"there are no safetensors files in {str(folder)!r}")
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def merge_all(tensors: Iterable[tuple[str, Tensor]], adapter: AdapterFile) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with the adapter merged into those it has matrices for."""
    for name, tensor, path in adapted(tensors, adapter):
        if path:
            A, B = fitting(adapter, path, tensor)
            tensor = merge(tensor, A, B, adapter.scale)
        yield name, tensor


def adapted(tensors: Iterable[tuple[str, Tensor]], adapter: AdapterFile) -> Iterator[tuple[str, Tensor, str | None]]:
    """The same, with the module that a weight belongs to if it is adapted; raises ValueError if one never came."""
    missing = {f"{path}.weight": path for path in adapter.paths}
    for name, tensor in tensors:
        yield name, tensor, missing.pop(name, None)
    if missing:
        raise ValueError(f"the base has no {min(missing)!r}, which the adapter changes ({len(missing)} such tensors)")


def fitting(adapter: AdapterFile, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a module, after checking that they fit its weight."""
    A, B = adapter.matrices(path)
    if weight.dtype not in FLOATS.values():
        raise ValueError(f"{path} is of type {weight.dtype} in the base: a quantised base cannot be merged into")
    if weight.shape != (len(B), A.shape[1]):
        raise ValueError(f"{path} is {len(B)} x {A.shape[1]} in the adapter, {tuple(weight.shape)} in the base")
    return A, B


def write_model(tensors: Iterable[tuple[str, Tensor]], folder: Path, like: Path) -> None:
    """Writes a Hugging Face model folder, whole or not at all; all but the tensors is copied from the folder `like`."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} exists and is not empty")
    expected = sum(path.stat().st_size for path in weight_files(like))
    with written_whole(folder) as partial, progress_bar("writing the model", expected, "bytes", unit_scale=True) as bar:
        weight_map, total = {}, 0
        for number, batch in enumerate(batches(counted(tensors, bar)), start=1):
            file = f"model-{number:05d}.safetensors"
            save_file(batch, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(batch, file)
            total += sum(tensor.nbytes for tensor in batch.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path in like.iterdir():
            if path.is_file() and not path.name.endswith(NOT_COPIED):
                shutil.copy(path, partial)


def counted(tensors: Iterable[tuple[str, Tensor]], bar: tqdm) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; the bar shows how many bytes have come."""
    for name, tensor in tensors:
        yield name, tensor
        bar.update(tensor.nbytes)


def batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What goes into each file: at most `FILE_BYTES`, or one larger tensor."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > FILE_BYTES:
            yield batch
            batch.clear()  # before the next one is read
            size = 0
        batch[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield batch


def export(base: str, adapter: str, out: str) -> None:
    """Writes base + adapter as a model: merged in float32, rounded once."""
    source = Path(find_model(base))
    with open_adapter(adapter) as file:
        write_model(merge_all(read_model(source), file), Path(out), like=source)
    print(f"wrote {out}")


def inspect(folder: str, base: str) -> None:
    """Prints what an adapter is and, of each module, how large its update is and what of it merging would lose.

    survival: the cosine between the update s·B A and what it changes once W + s·B A is rounded to W's dtype.
    """
    with open_adapter(folder) as file:
        base = base or file.base_model
        if not base:
            raise ValueError("it does not name its base; say --base MODEL")
        print(f"base     {base}")
        print(f"targets  {', '.join(file.target_modules)}: {len(file.paths)} modules")
        scale = f"alpha / sqrt(rank) = {file.scale:g}" if file.rslora else f"alpha / rank = {file.scale:g}"
        print(f"rank     {file.rank}, alpha {file.alpha:g}: the update is scaled by {scale}")
        parameters = sum(matrix.numel() for path in file.paths for matrix in file.matrices(path))
        print(f"size     {parameters:,} parameters")
        print(f"\n{'module':<48}{'|s BA|':>10}{'|s BA|/|W|':>12}{'survival':>10}")
        for _, weight, path in adapted(read_model(Path(find_model(base))), file):
            if path:
                print(f"{path:<48}{effect(file, path, weight)}")


def effect(file: AdapterFile, path: str, weight: Tensor) -> str:
    """The three columns of one module."""
    A, B = fitting(file, path, weight)
    update = file.scale * (B @ A)
    realised = merge(weight, A, B, file.scale).float() - weight.float()
    survival = torch.cosine_similarity(update.flatten(), realised.flatten(), dim=0).item()
    size = update.norm().item()
    return f"{size:>10.4f}{size / weight.float().norm().item():>12.2e}{survival:>10.3f}"


def main() -> None:
    """The command line; a mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="lora.py", description="LoRA adapters: merge one into its base, look into one."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write base + adapter as a Hugging Face model")
    command.add_argument("--base", required=True, help="a folder, or a name on the hub")
    command.add_argument("--adapter", required=True, help="a folder in peft's format")
    command.add_argument("--out", required=True, help="the folder to write; must not exist yet, or be empty")
    command = commands.add_parser("inspect", help="print what an adapter holds, and what merging it would lose")
    command.add_argument("adapter", help="a folder in peft's format")
    command.add_argument("--base", default="", help="the model it belongs to, if not the one that it names")
    arguments = parser.parse_args()
    try:
        if arguments.command == "export":
            export(arguments.base, arguments.adapter, arguments.out)
        else:
            inspect(arguments.adapter, arguments.base)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
