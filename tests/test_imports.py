"""The drawing of imports: no circle, and no arrow from a folder to a training script."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

SCRIPTS = {"train_grpo", "train_ppo"}


def modules() -> dict[str, Path]:
    """The product's modules by the names under which they are imported."""
    paths = [path for folder in ("", "configs", "runtime", "tools") for path in (ROOT / folder).glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of the product that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


def test_arrows_run_one_way():
    files = modules()
    arrows = {name: imported(path, set(files)) for name, path in files.items()}
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle
    for name, targets in arrows.items():
        if "." in name:
            assert not targets & SCRIPTS, f"{name} imports a training script"
        if name.startswith("runtime."):
            assert not any(target.startswith("tools.") for target in targets), f"{name} imports a tool"


def test_the_root_holds_what_lora_rl_is():
    """Ten files, each read in ten minutes; reward.py in five."""
    root = {name: path for name, path in modules().items() if "." not in name}
    assert len(root) <= 10, sorted(root)
    lines = {name: len(path.read_text().splitlines()) for name, path in root.items()}
    assert max(lines.values()) <= 500 and lines["reward"] <= 300, lines
