"""Adapter folders: export a merged model, or inspect an adapter.

    python tools/adapter.py export --base MODEL --adapter DIR --out DIR     # a merged Hugging Face model
    python tools/adapter.py inspect DIR [--base MODEL]                      # its sizes, and what merging it loses

An adapter that was trained on an NF4 base is merged into the weights as NF4 rounds them, so that the export computes
what was trained. `--into files` merges it into the 16-bit weights, and measures the difference.

Tensors are read, merged and written one at a time. A whole model is in memory only for that measurement.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the root's modules are found

import lora
import nf4
from low_rank import merge
from runtime.adapter_files import AdapterFile, open_adapter
from runtime.files import FLOATS, check_tied_head, find_model, new_folder, read_model, write_model
from runtime.models import auto_class, meta_model, read_model_config, read_whole_config
from runtime.prompts import load_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = (  # two exports of one adapter are compared by the logprobs of these
    "Question: A train leaves at 3 pm and drives 180 miles at 60 miles per hour. When does it arrive?\nAnswer: It "
    "drives 180 / 60 = 3 hours, so it arrives at 6 pm.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "The water cycle: the sun heats the sea, water evaporates and rises, cools in the air, and falls as rain or snow.",
    "12+30=42 7+8=15 61+27=88",
)


def read_base(folder: Path, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's folder, one at a time; with dtype "nf4", the linears as NF4 rounds them, in bfloat16."""
    linears = ()
    if dtype == "nf4":
        linears = {f"{path}.weight" for path in lora.base_linears(meta_model(str(folder), torch.bfloat16))}
    for name, tensor in read_model(folder):
        if name in linears:
            if tensor.dtype not in FLOATS.values():
                raise ValueError(f"{name} is of type {tensor.dtype} in the base: a quantised base cannot be used")
            tensor = nf4.dequantize(*nf4.quantize(tensor.to(DEVICE)), tensor.shape[1], torch.bfloat16).cpu()
        yield name, tensor


def merge_all(tensors: Iterable[tuple[str, Tensor]], adapter: AdapterFile) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with the adapter merged into the weights that it changes."""
    for name, tensor, path in with_paths(tensors, adapter):
        if path:
            A, B = matrices_for(adapter, path, tensor)
            tensor = merge(tensor, A, B, adapter.scale)
        yield name, tensor


def with_paths(tensors: Iterable[tuple[str, Tensor]], adapter: AdapterFile) -> Iterator[tuple[str, Tensor, str | None]]:
    """Adds to each weight that the adapter changes the path of its module; ValueError if a weight is missing."""
    missing = {f"{path}.weight": path for path in adapter.paths}
    for name, tensor in tensors:
        yield name, tensor, missing.pop(name, None)
    if missing:
        raise ValueError(f"the base has no {min(missing)!r}, which the adapter changes ({len(missing)} such tensors)")


def matrices_for(adapter: AdapterFile, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a module; ValueError if they do not fit its weight."""
    A, B = adapter.matrices(path)
    if weight.dtype not in FLOATS.values():
        raise ValueError(f"{path} is of type {weight.dtype} in the base: a quantised base cannot be merged into")
    if weight.shape != (len(B), A.shape[1]):
        raise ValueError(f"{path} is {len(B)} x {A.shape[1]} in the adapter, {tuple(weight.shape)} in the base")
    return A, B


def export(base: str, adapter: str, out: str, into: str = "trained") -> None:
    """Writes base + adapter as a model: merged in float32, rounded once.

    into: "trained", the base as in training; "nf4", the base as NF4 rounds it; "files", the base as it is.
    """
    source, target = Path(find_model(base)), new_folder(out)
    with open_adapter(adapter) as file:
        dtype = file.base_dtype if into == "trained" else into
        if getattr(read_model_config(str(source)), "tie_word_embeddings", False):
            check_tied_head(source)
            if any(path.endswith("lm_head") for path in file.paths):
                raise ValueError(f"{adapter!r} changes lm_head, which {base!r} ties to its embedding; untie it first")
        write_model(merge_all(read_base(source, dtype), file), target, like=source)
        print(f"wrote {out}" + (", merged into what NF4 makes of the base, in bfloat16" if dtype == "nf4" else ""))
        if file.base_dtype == "nf4" and dtype != "nf4":
            print_difference(target, merge_all(read_base(source, "nf4"), file))


@torch.no_grad()
def print_difference(out: Path, trained: Iterable[tuple[str, Tensor]]) -> None:
    """Prints how much an exported model's logprobs differ from those with the trained weights."""
    model = auto_class(read_whole_config(str(out))).from_pretrained(out, dtype="auto").to(DEVICE)
    tokenizer = load_tokenizer(str(out))
    texts = [tokenizer(text, return_tensors="pt")["input_ids"].to(DEVICE) for text in TEXTS]
    exported = next_token_logprobs(model, texts)
    parameters = dict(model.named_parameters())
    for name, tensor in trained:
        if name in parameters:  # the file of a model with a tied head may have both
            parameters[name].copy_(tensor)
    expected = next_token_logprobs(model, texts)
    tokens = torch.cat([ids[0, 1:] for ids in texts])[:, None]
    difference = (exported - expected).gather(1, tokens).abs().mean().item()
    changed = (exported.argmax(1) != expected.argmax(1)).float().mean().item()
    print(
        f"merged into the 16-bit base, but trained on NF4: on {len(tokens)} tokens of text, logprobs differ by "
        f"{difference:.3f} nats on average, and {changed:.1%} of the likeliest next tokens are others"
    )


def next_token_logprobs(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    """Texts, each (1, tokens) -> (all tokens but the first of each text, vocabulary), float32."""
    return torch.cat([model(ids).logits[0, :-1].float().log_softmax(-1) for ids in texts])


def inspect(folder: str, base: str) -> None:
    """Prints an adapter's settings and, of each module, the size of its update and how much of it survives merging.

    survival: the cosine between the update s·B A and what it changes once W + s·B A is rounded to W's dtype.
    """
    with open_adapter(folder) as file:
        base = base or file.base_model
        if not base:
            raise ValueError("it does not name its base; say --base MODEL")
        print(f"base     {base}" + (f", trained on it in {file.base_dtype}" if file.base_dtype else ""))
        print(f"targets  {', '.join(file.target_modules)}: {len(file.paths)} modules")
        scale = f"alpha / sqrt(rank) = {file.scale:g}" if file.rslora else f"alpha / rank = {file.scale:g}"
        print(f"rank     {file.rank}, alpha {file.alpha:g}: the update is scaled by {scale}")
        parameters = sum(matrix.numel() for path in file.paths for matrix in file.matrices(path))
        print(f"size     {parameters:,} parameters")
        print(f"\n{'module':<48}{'|s BA|':>10}{'|s BA|/|W|':>12}{'survival':>10}")
        for _, weight, path in with_paths(read_base(Path(find_model(base)), file.base_dtype), file):
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
    command.add_argument(
        "--into",
        default="trained",
        choices=("trained", "nf4", "files"),
        help="the weights to merge into: as the adapter was trained (the default), what NF4 makes of the base, or as "
        "the base's files have them",
    )
    command = commands.add_parser("inspect", help="print what an adapter holds, and what merging it would lose")
    command.add_argument("adapter", help="a folder in peft's format")
    command.add_argument("--base", default="", help="the model it belongs to, if not the one that it names")
    arguments = parser.parse_args()
    try:
        if arguments.command == "export":
            export(arguments.base, arguments.adapter, arguments.out, arguments.into)
        else:
            inspect(arguments.adapter, arguments.base)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
