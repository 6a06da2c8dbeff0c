"""LoRA adapters on disk, in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict: features of peft that `lora.py` lacks are refused, and so are missing, unexpected or mis-shaped
tensors. A model may load an adapter of another rank: it grows with zeros or shrinks by SVD.

Shapes: A (r, in), B (out, r).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import lora
from runtime.files import write_tensors

# Settings of peft's LoRA that are read here, or that do not change what an adapter computes. Any other that is set
# makes a variant of LoRA (DoRA, activated LoRA, ranks by layer, ...), of which this program would run something else.
PLAIN = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config "
    "r lora_alpha use_rslora lora_dropout target_modules exclude_modules layers_to_transform layers_pattern "
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config velora_config qalora_group_size "
    "megatron_core".split()
)
UNSET = (None, False, "none", [], {})
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of `init_lora_weights`


def peft_key(path: str, matrix: str) -> str:
    """The name of a module's "lora_A" or "lora_B" in the file."""
    return f"base_model.model.{path}.{matrix}.weight"


def as_saved_by_peft(key: str) -> str:
    """The key without what a plain state dict has in it: the adapter's name, and the prefix of torch.compile.

    >>> as_saved_by_peft("_orig_mod.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return key.replace("_orig_mod.", "").replace(".default.weight", ".weight")


@dataclass(frozen=True)
class AdapterFile:
    """An open adapter folder."""

    rank: int
    alpha: float
    rslora: bool
    base_model: str
    base_dtype: str  # how the base was stored when the adapter was trained: a Config's dtype; empty: unknown
    paths: list[str]  # of the adapted modules
    keys: dict[str, str]  # peft's key of each matrix -> its key in the file
    tensors: "safe_open"

    @property
    def scale(self) -> float:
        return lora.scaling(self.rank, self.alpha, self.rslora)

    @property
    def target_modules(self) -> list[str]:
        """See `lora.last_names`."""
        return lora.last_names(self.paths)

    def matrices(self, path: str) -> tuple[Tensor, Tensor]:
        """A and B of a module, float32."""
        found = [self.tensors.get_tensor(self.keys[peft_key(path, matrix)]) for matrix in ("lora_A", "lora_B")]
        if not all(matrix.is_floating_point() and matrix.isfinite().all() for matrix in found):
            raise ValueError(f"{path} has values that are not finite numbers")
        A, B = (matrix.float() for matrix in found)
        if A.ndim != 2 or B.ndim != 2 or len(A) != self.rank or B.shape[1] != self.rank:
            raise ValueError(f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}, at rank {self.rank}")
        return A, B


@contextmanager
def open_adapter(folder: str | Path) -> Iterator[AdapterFile]:
    """Opens an adapter folder. Errors in it, here or in the block, are a ValueError or OSError of one line."""
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"adapter folder {str(folder)!r} has no {file}")
    try:
        config = read_adapter_config(folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
            keys = {as_saved_by_peft(key): key for key in tensors.keys()}
            names = (re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key) for key in keys)
            paths = sorted({name[1] for name in names if name})
            expected = {peft_key(path, matrix) for path in paths for matrix in ("lora_A", "lora_B")}
            for kind, wrong in (("lacks", expected - keys.keys()), ("has the unexpected", keys.keys() - expected)):
                if wrong:
                    raise ValueError(f"it {kind} {min(wrong)!r} ({len(wrong)} such keys)")
            if not paths:
                raise ValueError("it holds no matrices")
            yield AdapterFile(
                rank=config["r"],
                alpha=float(config["lora_alpha"]),
                rslora=bool(config.get("use_rslora")),
                base_model=config.get("base_model_name_or_path") or "",
                base_dtype=(tensors.metadata() or {}).get("base_dtype", ""),
                paths=paths,
                keys=keys,
                tensors=tensors,
            )
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"adapter {str(folder)!r}: {error}") from None


def read_adapter_config(folder: Path) -> dict:
    """peft's configuration of an adapter; ValueError unless it is a plain LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError("its adapter_config.json is not one of a LoRA (peft_type)")
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(config.get(key)) not in kinds or not 0 < config[key] < math.inf:
            raise ValueError(f"{key} in its adapter_config.json must be a number above 0, not {config.get(key)!r}")
    for key, kind in (("use_rslora", bool), ("base_model_name_or_path", str)):
        if not isinstance(config.get(key), kind | None):
            raise ValueError(f"{key} in its adapter_config.json must be {kind.__name__}, not {config[key]!r}")
    for key in sorted(config.keys() - PLAIN):
        if config[key] not in UNSET:
            raise ValueError(f"{key} = {config[key]!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(BASE_CHANGING_STARTS):
        raise ValueError(f"it belongs to a base that its start, {start!r}, has changed; convert it with peft first")
    return config


def adapter_folder(folder: str | Path, name: str) -> Path:
    """The folder of one adapter: the run's adapter folder itself for the policy, a subfolder for a task."""
    return Path(folder, "" if name == lora.POLICY else name)


def doubts(file: AdapterFile, models: Sequence[str], dtype: str) -> list[str]:
    """Why the base, of these names and this dtype, may not be the one that the adapter was trained on."""
    told = []
    if file.base_model and file.base_model not in models:
        told.append(f"which names another base: {file.base_model}")
    if file.base_dtype not in ("", dtype):
        told.append(f"which was trained on a base in {file.base_dtype}")
    return told


# ---- From and into a model ----------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = lora.POLICY,
    base_model: str = "",
    base_dtype: str = "",
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    write: bool = True,
) -> None:
    """Writes the adapter `name` as peft would. `gather` makes a parameter whole; it may be a collective, so every
    rank calls this, and one has `write`. `base_dtype` is in the tensors' file: peft and vLLM ignore it there, and it
    cannot be left behind.
    """
    layers, tensors = dict(lora.lora_layers(model, name)), {}
    linears = {path: lora.stored_names(path, layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        for matrix, parameter in layer.adapters[name].named_parameters():
            whole = gather(parameter).detach()
            if write:
                parts = whole.cpu().view(len(linears[path]), *whole.shape[-2:])
                tensors |= {peft_key(linear, matrix): part.clone() for linear, part in zip(linears[path], parts)}
    if not write:
        return
    endings = {path.rpartition(".")[2] for path in layers}
    possible = [*lora.base_linears(model), *lora.expert_linears(model)]
    so_named = {path for path in possible if path.rpartition(".")[2] in endings}
    first = next(iter(layers.values())).adapters[name]  # all have the same rank and scale
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(endings if so_named == set(layers) else chain.from_iterable(linears.values())),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": first.rslora,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / "adapter_model.safetensors", base_dtype=base_dtype)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = lora.POLICY,
    seed: int = 0,
    fill: Callable[[Tensor, Tensor], None] = Tensor.copy_,
) -> float:
    """Fills the adapter `name` from a folder, whose rank and scale may be others.

    Returns what a smaller rank lost of the update, ‖lost‖ / ‖update‖ over all layers; 0 if the rank is not smaller.
    `seed` starts the directions that a larger rank adds. Raises ValueError unless the folder has exactly the
    adapter's modules, in their shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = dict(lora.lora_layers(model, name))
    lost = total = 0.0
    linears = {path: lora.stored_names(path, layer) for path, layer in layers.items()}
    expected = set(chain.from_iterable(linears.values()))
    with open_adapter(folder) as file:
        differences = {"lacks": expected.difference(file.paths), "also has": set(file.paths) - expected}
        told = [f"{kind} {min(paths)!r} ({len(paths)} such modules)" for kind, paths in differences.items() if paths]
        if told:
            raise ValueError(f"it {' and '.join(told)}; its targets are {', '.join(file.target_modules)}")
        for path, layer in layers.items():
            adapter, fitted = layer.adapters[name], []
            for linear in linears[path]:
                A, B = file.matrices(linear)
                if (len(B), A.shape[1]) != (layer.out_features, layer.in_features):
                    raise ValueError(
                        f"{linear} maps {A.shape[1]} to {len(B)} features there, {layer.in_features} to "
                        f"{layer.out_features} in the model: another base model?"
                    )
                if adapter.rank < file.rank:
                    A, B, values = shrink(A, B, adapter.rank)
                    lost, total = lost + values[adapter.rank :].square().sum(), total + values.square().sum()
                # Larger than the file's rank, or than that of B A, which is all that `shrink` gives.
                if adapter.rank > len(A):
                    A, B = grow(A, B, lora.fresh_A((adapter.rank - len(A), layer.in_features), generator))
                fitted.append((A, B * (file.scale / adapter.scale)))
            for parameter, matrices in zip((adapter.lora_A, adapter.lora_B), zip(*fitted)):
                fill(parameter, torch.stack(matrices).view(parameter.shape))
    return math.sqrt(lost / total) if lost else 0.0


# ---- Another rank ---------------------------------------------------------------------------------------------


def grow(A: Tensor, B: Tensor, fresh_A: Tensor) -> tuple[Tensor, Tensor]:
    """The same B A at a larger rank. Only B is padded with zeros: if A were zero too, neither would get a gradient."""
    return torch.cat([A, fresh_A]), F.pad(B, (0, len(fresh_A)))


def shrink(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest to B A of at most that rank (Eckart and Young 1936), and all singular values of B A (float64).

    From B = Q R and Aᵀ = P S they are those of R Sᵀ, which is at most r by r. There are min(r, in, out) of them. A
    direction whose singular value is 0 is left out: A and B would be 0 in it, and neither would get a gradient.
    """
    Q, R = torch.linalg.qr(B.double())
    P, S = torch.linalg.qr(A.double().T)
    U, values, Vt = torch.linalg.svd(R @ S.T, full_matrices=False)
    rank = int((values[:rank] > torch.finfo(torch.float32).eps * values[0]).sum())
    root = values[:rank].sqrt()
    return (root[:, None] * (Vt[:rank] @ P.T)).float(), (Q @ U[:, :rank] * root).float(), values
