"""Training runs side by side, over several seeds and up to the same limit: OUT.md, a table, and OUT.png, the curves."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.training_runs import Rows, interpolate, positions, step_seconds
from runtime.tracking import hardware

COLUMNS = (
    "accuracy ± standard error",
    "lowest and highest seed",
    "mismatch KL",
    "survival",
    "steps",
    "s per step",
    "rollout",
    "update",
    "sync",
    "peak, GiB",
    "seeds",
)
SECONDS = ("seconds", "time/rollout", "time/update", "time/sync")
POINTS = 61  # of a drawn curve

Compared = dict[str, list[Rows]]  # what is compared -> the metrics of each seed


def final(runs: list[Rows], metric: str, axis: str, limit: float) -> list[float]:
    """A metric of the evaluations at the limit, for each seed."""
    return [interpolate(rows, metric, axis, [limit])[0] for rows in runs]


def mean_accuracy(runs: list[Rows], axis: str, limit: float) -> float:
    """Held-out accuracy at the limit, over the seeds."""
    return statistics.mean(final(runs, "eval/accuracy", axis, limit))


def columns(runs: list[Rows], axis: str, limit: float) -> list[str]:
    """The table's columns for the seeds of one setting. Survival is measured only where adapters are merged.

    All seeds are evaluated on the same problems, so more seeds do not lower the standard error, which is over problems.
    """
    accuracy, error = (final(runs, name, axis, limit) for name in ("eval/accuracy", "eval/accuracy_stderr"))
    until = [row for rows in runs for at, row in zip(positions(rows, axis), rows) if row["step"] > 0 and at <= limit]
    steps = [row | {"seconds": step_seconds(row)} for row in until]

    def over_steps(metric: str, style: str, of: Callable[[list[float]], float] = statistics.mean) -> str:
        values = [row[metric] for row in steps if metric in row]
        return format(of(values), style) if values else ""

    return [
        f"{statistics.mean(accuracy):.1%} ± {statistics.mean(error):.1%}",
        f"{min(accuracy):.1%} to {max(accuracy):.1%}",
        over_steps("mismatch/kl", ".1e"),
        over_steps("sync/update_survival", ".2f"),
        f"{len(steps) / len(runs):.0f}",
        *(over_steps(name, ".1f", statistics.median) for name in SECONDS),
        over_steps("memory/peak_gib", ".1f", max),
        str(len(runs)),
    ]


def write(
    out: str,
    compared: Compared,
    *,
    axis: str,
    limit: float,
    title: str,
    command: str,
    notes: Sequence[str] = (),
    drawn: Sequence[str] = (),
) -> None:
    """Writes the table of all settings, with notes below it, and the curves of all, or of those in `drawn`."""
    lines = [f"`{command}` on {hardware()}. Accuracy is of held-out problems, sampled, after {limit:g} {axis} of"]
    lines += ["training; survival and mismatch KL are means over steps, seconds are medians.", ""]
    lines += [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(columns(runs, axis, limit))} |" for name, runs in compared.items()]
    Path(f"{out}.md").write_text("\n".join([*lines, "", *notes]).strip() + "\n")
    curves = {name: compared[name] for name in drawn or compared}
    draw(f"{out}.png", curves, axis, limit, title)


def draw(path: str, compared: Compared, axis: str, limit: float, title: str) -> None:
    """One line for each name, the mean over its seeds, with a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20" if len(compared) > 10 else "tab10").colors)
    at = np.linspace(0, limit, POINTS)
    for name, runs in compared.items():
        accuracies = np.array([interpolate(rows, "eval/accuracy", axis, at) for rows in runs])
        means = accuracies.mean(0)
        axes.plot(at, means, label=f"{name}  {means[-1]:.1%}")
        axes.fill_between(at, accuracies.min(0), accuracies.max(0), alpha=0.1)
    axes.set(xlabel=f"{axis} of training", ylabel="held-out accuracy (sampled)", title=title)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
