"""Adapter folders: export a merged model, or inspect what an adapter holds.

    python tools/adapter.py export --base MODEL --adapter DIR --out DIR     # a merged Hugging Face model
    python tools/adapter.py inspect DIR [--base MODEL]                      # its sizes, and what merging it loses

Tensors are read, merged and written one at a time, so a model is never in memory as a whole.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root: this script is run from there

from lora import merge
from runtime.adapter_files import AdapterFile, open_adapter
from runtime.files import FLOATS, find_model, read_model, write_model


def merge_all(tensors: Iterable[tuple[str, Tensor]], adapter: AdapterFile) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with the adapter merged into the weights that it changes."""
    for name, tensor, path in with_paths(tensors, adapter):
        if path:
            A, B = matrices_for(adapter, path, tensor)
            tensor = merge(tensor, A, B, adapter.scale)
        yield name, tensor


def with_paths(tensors: Iterable[tuple[str, Tensor]], adapter: AdapterFile) -> Iterator[tuple[str, Tensor, str | None]]:
    """Adds to each weight the path of its module, if the adapter changes it; ValueError if a weight is missing."""
    missing = {f"{path}.weight": path for path in adapter.paths}
    for name, tensor in tensors:
        yield name, tensor, missing.pop(name, None)
    if missing:
        raise ValueError(f"the base has no {min(missing)!r}, which the adapter changes ({len(missing)} such tensors)")


def matrices_for(adapter: AdapterFile, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a module; ValueError unless they fit its weight."""
    A, B = adapter.matrices(path)
    if weight.dtype not in FLOATS.values():
        raise ValueError(f"{path} is of type {weight.dtype} in the base: a quantised base cannot be merged into")
    if weight.shape != (len(B), A.shape[1]):
        raise ValueError(f"{path} is {len(B)} x {A.shape[1]} in the adapter, {tuple(weight.shape)} in the base")
    return A, B


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
        for _, weight, path in with_paths(read_model(Path(find_model(base))), file):
            if path:
                print(f"{path:<48}{survival_columns(file, path, weight)}")


def survival_columns(file: AdapterFile, path: str, weight: Tensor) -> str:
    """One module's row of the table."""
    A, B = matrices_for(file, path, weight)
    update = file.scale * (B @ A)
    realised = merge(weight, A, B, file.scale).float() - weight.float()
    survival = torch.cosine_similarity(update.flatten(), realised.flatten(), dim=0).item()
    size = update.norm().item()
    return f"{size:>10.4f}{size / weight.float().norm().item():>12.2e}{survival:>10.3f}"


def main() -> None:
    """The command line; a mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="LoRA adapters: merge one into its base, look into one.")
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


if __name__ == "__main__":
    main()
