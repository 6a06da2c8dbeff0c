"""Learning curves over several seeds, as a table and a picture: what other benchmarks write."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

EVERY = 5  # steps between evaluations

Curves = dict[str, list[list[float]]]  # what is compared -> for each seed, accuracy after steps 0, 5, 10, ...


def accuracies(folder: Path) -> list[float]:
    """A run's curve: held-out accuracy of sampled completions."""
    steps = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [step["eval/accuracy"] for step in steps if "eval/accuracy" in step]


def hardware() -> str:
    """Where the numbers come from."""
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, torch {torch.__version__}"


def write(out: str, curves: Curves, *, steps: int, kind: str, title: str, command: str) -> None:
    """OUT.md, the final accuracies, and OUT.png, where a band is from the lowest to the highest seed."""
    lines = [f"`{command}` on {hardware()}", "", f"| {kind} | held-out accuracy | lowest and highest seed | seeds |"]
    lines.append("|---|---|---|---|")
    for name, runs in curves.items():
        final = [run[-1] for run in runs]
        mean = statistics.mean(final)
        lines.append(f"| {name} | {mean:.1%} | {min(final):.1%} to {max(final):.1%} | {len(final)} |")
    Path(f"{out}.md").write_text("\n".join(lines) + "\n")
    longest = max(len(run) for runs in curves.values() for run in runs)
    draw(f"{out}.png", curves, [min(EVERY * i, steps) for i in range(longest)], xlabel="step", title=title)


def draw(path: str, curves: Curves, xs: Sequence[float], *, xlabel: str, title: str) -> None:
    """One line for each name, the mean over its seeds, with a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20" if len(curves) > 10 else "tab10").colors)
    for name, runs in curves.items():
        points = list(zip(*runs))
        at, means = xs[: len(points)], [statistics.mean(point) for point in points]
        axes.plot(at, means, label=f"{name}  {means[-1]:.1%}")
        axes.fill_between(at, [min(point) for point in points], [max(point) for point in points], alpha=0.1)
    axes.set(xlabel=xlabel, ylabel="held-out accuracy (sampled)", title=title)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
