"""Training runs side by side, over several seeds and up to the same limit: OUT.md, a table, and OUT.png, the curves."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import curves
from benchmarks.real_runs import Rows, interpolate, positions, step_seconds

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
    """A metric of the evaluations, of each seed at the limit."""
    return [interpolate(rows, metric, axis, [limit])[0] for rows in runs]


def columns(runs: list[Rows], axis: str, limit: float) -> list[str]:
    """Of the table; what was not measured is empty.

    All seeds are evaluated on the same problems, so their number does not lower the standard error, which is over
    problems. Survival is measured where adapters are merged.
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
    """The table of all that is compared, with notes below it, and the curves of all or of what is to be `drawn`."""
    lines = [
        f"`{command}` on {curves.hardware()}. Accuracy is of held-out problems, sampled, after {limit:g} {axis} of"
    ]
    lines += ["training; survival and mismatch KL are means over steps, seconds are medians.", ""]
    lines += [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(columns(runs, axis, limit))} |" for name, runs in compared.items()]
    Path(f"{out}.md").write_text("\n".join([*lines, "", *notes]).strip() + "\n")
    at = [limit * i / (POINTS - 1) for i in range(POINTS)]
    accuracies = {
        name: [interpolate(rows, "eval/accuracy", axis, at) for rows in compared[name]] for name in drawn or compared
    }
    curves.draw(f"{out}.png", accuracies, at, xlabel=f"{axis} of training", title=title)
