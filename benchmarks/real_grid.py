"""A grid of training runs on a real model, one after the other, as a table and a picture.

    python benchmarks/real_grid.py fidelity --model MODEL --minutes 20 --seeds 3 --out runs/fidelity
    python benchmarks/real_grid.py lora_vs_full --model MODEL --steps 60 --seeds 2 --out runs/real_lora_vs_full

`fidelity`: what the sampler runs and what the trainer differentiates (docs/fidelity.md), at equal training time: a
run is stopped at its first evaluation after so many minutes, evaluations and checkpoints not counted, and its curve
is read at exactly that time. `lora_vs_full`: ranks and all weights, each at its best learning rate.

Nothing else should run meanwhile. Options that are not listed here go to train_grpo.py. Started again, the same
command goes on where it was. Writes OUT.md and OUT.png after every run; the runs are in OUT_runs, with their output.
"""

import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import comparison, training_runs  # noqa: E402

SENT = {mode: {"sync": mode} for mode in ("adapter", "merged", "straight_through")}  # how vLLM gets the policy
TRAINED = {f"LoRA, rank {rank}": {"lora_rank": rank} for rank in (1, 8, 32)}  # alpha stays the same
FULL = "all weights"
TRAINED[FULL] = {"lora_rank": 0}
RATES = {"fidelity": [1e-5, 1e-4, 1e-3], "lora_vs_full": [1e-4, 3e-4, 1e-3]}
ENDLESS = 1_000_000  # steps of a run that a clock stops


@dataclass
class Cell:
    """One setting at one learning rate, and the metrics of the seeds that are complete."""

    setting: str
    rate: float
    options: dict[str, object]
    runs: list[training_runs.Rows] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.rate:g}"


def cells(arguments: Namespace) -> list[Cell]:
    """The grid, or of it the settings that were asked for."""
    settings = SENT if arguments.grid == "fidelity" else TRAINED
    chosen = arguments.settings or settings
    if unknown := set(chosen) - set(settings):
        sys.exit(f"error: unknown settings {sorted(unknown)}; {arguments.grid} has: {', '.join(map(repr, settings))}")
    rates = {setting: arguments.full_rates if setting == FULL else arguments.rates for setting in chosen}
    return [Cell(setting, rate, settings[setting]) for setting in chosen for rate in rates[setting]]


def train(cell: Cell, seed: int, arguments: Namespace) -> training_runs.Rows:
    """The metrics of one run; none if it did not reach its end."""
    name = f"{cell.name}, seed {seed}".replace(" + ", "_").replace(", ", "_").replace(" ", "")
    folder = Path(f"{arguments.out}_runs", name).absolute()
    options = cell.options | ({"model": arguments.model} if arguments.model else {})
    options |= {
        "learning_rate": cell.rate,
        "seed": seed,
        "steps": arguments.steps or ENDLESS,
        "output_dir": folder,
        "max_useless": 0,  # what becomes of a bad setting is shown, and not stopped
    }
    command = training_runs.torchrun(arguments.ranks, arguments.config, options) + ["--resume", *arguments.more]
    return training_runs.train_to_limit(command, folder, arguments.axis, arguments.limit)


def write(grid: list[Cell], arguments: Namespace) -> None:
    """OUT.md and OUT.png of what there is; of lora_vs_full only each setting's best learning rate is drawn."""
    limit = {"axis": arguments.axis, "limit": arguments.limit}
    done = [cell for cell in grid if cell.runs]
    worst_first = sorted(done, key=lambda cell: comparison.mean_accuracy(cell.runs, **limit))
    best = {cell.setting: cell for cell in worst_first}
    notes = [f"- Best learning rate of {setting}: {cell.rate:g}" for setting, cell in best.items()]
    if FULL in best and len(best) > 1:
        ratios = (f"{setting} {cell.rate / best[FULL].rate:.3g}" for setting, cell in best.items() if setting != FULL)
        notes.append(f"- Best learning rates as multiples of that of {FULL}: {', '.join(ratios)}")
    comparison.write(
        arguments.out,
        {cell.name: cell.runs for cell in done},
        **limit,
        title=f"{Path(arguments.config).stem}: {arguments.grid}",
        command=f"python benchmarks/real_grid.py {shlex.join(sys.argv[1:])}",
        notes=notes,
        drawn=[cell.name for cell in done if arguments.grid == "fidelity" or cell in best.values()],
    )


def main() -> None:
    parser = training_runs.make_parser(__doc__)
    parser.add_argument("grid", choices=RATES)
    parser.add_argument("--settings", nargs="+", help="some rows of the grid, e.g. 'adapter'; mostly all")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of LoRA")
    parser.add_argument("--full_rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4], help="those of all weights")
    parser.add_argument("--ranks", type=int, default=2, help="processes per run")
    arguments = training_runs.parse(parser)
    arguments.rates = arguments.rates or RATES[arguments.grid]
    grid, missing = cells(arguments), []
    training_runs.end_with_children()
    for seed in range(arguments.seeds):  # seed by seed, so that what there is when it is stopped is comparable
        for cell in grid:
            rows = train(cell, seed, arguments)
            if rows:
                cell.runs.append(rows)
                write(grid, arguments)
            else:
                missing.append(f"{cell.name}, seed {seed}")
    if missing:
        sys.exit(f"error: did not reach their end: {'; '.join(missing)}; their output is in {arguments.out}_runs")


if __name__ == "__main__":
    main()
