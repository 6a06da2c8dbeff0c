"""Draws runs: `python tools/plot.py runs/a runs/b [--out curves.png]`, one colour per run, one panel per question.

Needs matplotlib, which training does not: `pip install -r requirements-dev.txt`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

PANELS = {  # title: (metrics, drawn solid and dashed)
    "Held-out accuracy": ("eval/accuracy", "eval/accuracy_greedy"),
    "Held-out reward": ("eval/reward", "eval/reward_greedy"),
    "Reward": ("reward/mean",),
    "Share of groups whose rewards differ": ("reward/mixed_groups_frac",),
    "Completion length (tokens)": ("completion/length_mean",),
    "Entropy (nats per token)": ("policy/entropy",),
    "KL to the reference": ("policy/kl_ref",),
    "Trainer against sampler (KL)": ("mismatch/kl",),
    "Update surviving the merge (cosine)": ("sync/update_survival",),
    "Gradient norm": ("grad_norm",),
}
SHARES = ("Held-out accuracy", "Share of groups whose rewards differ", "Update surviving the merge (cosine)")
OCCASIONAL = ("eval", "save")  # phases that only some steps have


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, without null and NaN values; ValueError if there are none."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        raise ValueError(f"{path} has no steps yet")
    return [{name: value for name, value in row.items() if value is not None and math.isfinite(value)} for row in rows]


def draw(runs: dict[str, list[dict[str, float]]], out: Path) -> None:
    """One panel per row of `PANELS` that any run has values for, and the seconds of each phase as stacked bars."""
    from matplotlib import pyplot

    panels = {
        title: names
        for title, names in PANELS.items()
        if any(name in row for name in names for rows in runs.values() for row in rows)
    }
    columns = 3
    figure, axes = pyplot.subplots(-(-(len(panels) + 1) // columns), columns, figsize=(13, 9), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for colour, (run, rows) in enumerate(runs.items()):
            for name, style in zip(names, ("-", "--")):
                points = [(row["step"], row[name]) for row in rows if name in row]
                label = run if style == "-" else f"{run}, {name.rpartition('_')[2]}"
                axis.plot(*zip(*points), style, color=f"C{colour}", label=label) if points else None
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if title in SHARES:
            axis.set_ylim(-0.02, 1.02)
    if panels:
        axes.flat[0].legend(fontsize=8)
    draw_phases(axes.flat[len(panels)], runs)
    for axis in list(axes.flat)[len(panels) + 1 :]:
        axis.axis("off")
    figure.savefig(out, dpi=110)


def draw_phases(axis, runs: dict[str, list[dict[str, float]]]) -> None:
    """Stacked bars: each phase's median seconds; of evaluating and saving, their mean over all steps."""
    names = dict.fromkeys(name for rows in runs.values() for row in rows for name in row if name.startswith("time/"))
    phases = [name.removeprefix("time/") for name in names if name != "time/step" and not name.endswith("_wait")]
    phases.sort(key=lambda phase: phase in OCCASIONAL)  # those come last
    left = dict.fromkeys(runs, 0.0)
    for number, phase in enumerate(phases):
        for run, rows in runs.items():
            seconds = sorted(row.get(f"time/{phase}", 0.0) for row in rows)
            middle = sum(seconds) / len(seconds) if phase in OCCASIONAL else seconds[len(seconds) // 2]
            first = run == next(iter(runs))
            axis.barh(run, middle, left=left[run], color=f"C{number}", label=phase if first else None)
            left[run] += middle
    axis.set_title("Seconds per step, by phase", fontsize=10)
    if phases:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
        axis.legend(fontsize=8, ncols=7, columnspacing=0.8, handlelength=1, **place)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        names = [folder.name for folder in arguments.runs]
        runs = {
            folder.name if names.count(folder.name) == 1 else str(folder): read_metrics(folder)
            for folder in arguments.runs
        }
        draw(runs, arguments.out)
    except ModuleNotFoundError:
        sys.exit("tools/plot.py needs matplotlib: pip install -r requirements-dev.txt")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(arguments.out)


if __name__ == "__main__":
    main()
