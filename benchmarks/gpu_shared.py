"""Shared by the sections of gpu_check.py: sizes, the rows of the table, models and runs to measure."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import vs_trl
from benchmarks.measuring import DEVICE, median_seconds

ON_GPU = DEVICE.type == "cuda"
RANK = 32  # of all adapters; alpha is the same


@dataclass(frozen=True)
class Size:
    """The sizes of everything that is measured."""

    scale: str  # of vs_trl.SCALES: the model of update, sync and step
    layers: tuple[str, ...]  # of vs_trl.SCALES: the models whose linears are timed
    vocabulary: int  # of the head, over the scale's hidden size
    tokens: int  # of a layer's input, and of an update, whose sequences have `prompt` + `completion`
    prompt: int
    completion: int
    head_rows: int
    matmul: int  # width of the square matrices of the matmul roof
    copied: int  # bytes of the copy roof
    rounds: int
    patience: float  # the sections' usual seconds are multiplied by this


SIZES = {
    "toy": Size("toy", ("toy",), 3000, 256, 8, 24, 64, 256, 1 << 20, 3, 0.0),
    "3b": Size("3b", ("3b", "7b"), 151936, 16384, 512, 512, 8192, 8192, 1 << 30, 7, 1.0),
    "7b": Size("7b", ("3b", "7b"), 152064, 16384, 512, 512, 8192, 8192, 1 << 30, 5, 1.8),
}


@dataclass(frozen=True)
class Row:
    section: str
    what: str
    value: float | None = None  # None: not measured, and `note` says why
    unit: str = ""
    target: str = ""
    verdict: str = ""  # ok or FAIL; of a speed's target: met or missed
    note: str = ""


class Rows:
    """The rows of one section, written to a file at once, so that they outlive the process."""

    def __init__(self, file: Path, section: str):
        self.file, self.section = file, section

    def add(self, what: str, value: float | None, unit: str = "", note: str = "", **more: str) -> None:
        if value is not None and not math.isfinite(value):  # which JSON does not know
            value, note = None, f"{value}; {note}"
        with open(self.file, "a") as file:
            file.write(json.dumps(asdict(Row(self.section, what, value, unit, note=note, **more))) + "\n")

    def right(self, what: str, error: float, limit: float, unit: str = "relative", note: str = "") -> None:
        """An error that must not exceed a limit; NaN does."""
        self.add(what, error, unit, note, target=f"<= {limit:g}", verdict="ok" if error <= limit else "FAIL")

    def holds(self, what: str, value: float, unit: str, note: str = "") -> None:
        """Something that must not be nothing."""
        self.add(what, value, unit, note, target="> 0", verdict="ok" if value > 0 else "FAIL")

    def aim(self, what: str, value: float, unit: str, sign: str, target: float, note: str = "") -> None:
        """A speed or a size with a target, which only a GPU can meet or miss."""
        met = value <= target if sign == "<=" else value >= target
        verdict = ("met" if met else "missed") if ON_GPU else ""
        self.add(what, value, unit, note, target=f"{sign} {target:g}", verdict=verdict)

    def unable(self, what: str, why: str) -> None:
        """Something that could not be measured here."""
        self.add(what, None, note=why)

    def fail(self, cause: str) -> None:
        """The section broke."""
        self.add("the whole section", None, note=cause, verdict="FAIL")

    def found(self, section: str, what: str) -> float | None:
        """The value of another section's row; None if it was not measured."""
        rows = [row for row in read_rows(self.file) if (row.section, row.what) == (section, what)]
        return rows[-1].value if rows else None


def read_rows(file: Path) -> list[Row]:
    """The rows of all sections so far."""
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def matmul_roof(size: Size) -> float:
    """FLOP/s of a large square bfloat16 product."""
    a, b = (torch.randn(size.matmul, size.matmul, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size.matmul**3 / median_seconds(lambda: a @ b, 10)


def copy_roof(size: Size) -> float:
    """Bytes/s that a copy within the device's memory moves: each is read once and written once."""
    source = torch.zeros(size.copied, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return size.copied / median_seconds(lambda: target.copy_(source), 10)


def model_folder(work: Path, scale: vs_trl.Scale, spread: float = 0.0) -> str:
    """The folder of a random model, made once."""
    folder = work / f"model_{scale.hidden}_{scale.layers}_{spread}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        vs_trl.make_model(partial, scale, spread)
        partial.rename(folder)
    return str(folder)


def check_config(size: Size, **settings):
    """The configuration of a policy that is checked or timed without a task."""
    from configs.base import Config

    lengths = {"max_prompt_length": size.prompt, "max_completion_length": size.completion}
    common = {"lora_rank": RANK, "lora_alpha": float(RANK), "tokens_per_microbatch": size.tokens}
    return Config(**(common | lengths | settings))


def bare_run(config, folder: str, prompts: list[list[int]], sample: bool = True):
    """A run without a task, an optimizer and a log; and without an engine unless it is to `sample`."""
    import fsdp_utils
    import lora
    from runtime import models, setup
    from runtime.prompts import Stops
    from runtime.run import Prompt, Run

    world = fsdp_utils.init_world()
    policy = models.build_policy(config, folder, world)
    engine = (
        setup.build_engine(config, folder, Stops(), lora.target_names(policy.model)) if sample else SimpleNamespace()
    )
    asked = [Prompt(None, token_ids) for token_ids in prompts]
    return Run(config, world, None, asked, asked, None, engine, policy, None, None)


@contextmanager
def merged_forward(model: nn.Module) -> Iterator[None]:
    """During the block, LoRA layers run the weight that vLLM has, W + s·B A rounded to W's dtype."""
    import lora

    adapters = [layer.adapters[lora.POLICY] for _, layer in lora.lora_layers(model)]
    before = [adapter.merged for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.merged = True
        yield
    finally:
        for adapter, merged in zip(adapters, before):
            adapter.merged = merged
