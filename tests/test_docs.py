"""docs/ says what is so: names, numbers and examples are looked up in the code and in a real run."""

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, on_ranks, read_rows
from transformers import AutoModelForCausalLM

DOCS = ROOT / "docs"


def load(path: Path):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(path: Path, column: str) -> list[dict[str, str]]:
    """The rows of a page's table that has such a column."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in path.read_text().splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    start = next(i for i, line in enumerate(lines) if line[0] == column)
    rows = []
    for line in lines[start + 2 :]:
        if len(line) != len(lines[start]) or set(line[0]) == {"-"}:
            break
        rows.append(dict(zip(lines[start], line)))
    return rows


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


# ---- Algorithms -----------------------------------------------------------------------------------------------


def test_every_algorithm_is_in_the_table_with_its_own_functions():
    from train_grpo import ALGORITHMS

    rows = {row["row"].strip("`"): row for row in table(DOCS / "algorithms.md", "row")}
    assert list(rows) == list(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        for column, function in (
            ("advantage", algorithm.advantage),
            ("loss of a token", algorithm.loss),
            ("weight of a token", algorithm.weight),
        ):
            assert rows[name][column].startswith(f"`{function.__name__}`"), (name, column)
        (number,) = set(re.findall(r"\d{4}\.\d{5}", rows[name]["paper"]))
        assert number in (ROOT / "train_grpo.py").read_text()


def test_functions_and_tests_that_the_page_names_exist():
    import train_grpo
    import train_ppo

    page = (DOCS / "algorithms.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) >= 10 and all(f"def {name}(" in tests for name in named)
    for name in (functions := re.findall(r"^\| [^|]+ \| `(\w+)` \| `test_", page, re.M)):
        assert hasattr(train_grpo, name) or hasattr(train_ppo, name), name
    assert len(functions) == 7


def test_promises_name_tests_that_exist_and_star_the_slow_ones():
    files = list((ROOT / "tests").glob("test_*.py"))
    source = "".join(path.read_text() for path in files)
    named = re.findall(r"`(test_\w+)(\.py)?`(\\\*)?", (DOCS / "reliability.md").read_text())
    assert len(named) > 10
    for name, is_file, star in named:
        if is_file:
            assert (ROOT / "tests" / f"{name}.py") in files
        else:
            assert f"def {name}(" in source, name
            assert bool(star) == bool(re.search(rf"@pytest.mark.slow\n(@.*\n)*def {name}\(", source)), name


def test_the_examples_are_algorithms():
    """The regret of three rewards. Dual clip: A = -1 at ratio 10 costs 3, not 10; A = 1 does not notice."""
    import train_grpo

    scope = vars(train_grpo) | {"ALGORITHMS": dict(train_grpo.ALGORITHMS)}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "algorithms.md").read_text(), re.S):
        exec(code, scope)
    rewards = torch.tensor([[0.0, 1.0, 0.25]])
    assert scope["ALGORITHMS"]["regret"].advantage(rewards).tolist() == [[-1.0, 0.0, -0.75]]

    logprobs = torch.tensor([10.0, 10.0, 2.0]).log().requires_grad_()
    batch = SimpleNamespace(advantages=torch.tensor([-1.0, 1.0, -1.0]))
    config = SimpleNamespace(clip_low=0.2, clip_high=0.2)
    loss, _ = scope["ALGORITHMS"]["grpo_dual_clip"].loss(logprobs, torch.zeros(3), batch, config)
    assert loss.tolist() == pytest.approx([3.0, -1.2, 2.0])
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == pytest.approx([0.0, 0.0, 2.0])


# ---- Metrics and alignment, of a real run ---------------------------------------------------------------------


def align_and_train(folder: Path) -> tuple[list[int], list[dict], list[dict]]:
    """One completion's table of a real run, which then takes two steps: its metrics."""
    import train_grpo

    sizes = "--steps 2 --eval_every 1 --prompts_per_step 8 --eval_problems 8 --eval_samples 1"
    sys.argv = f"train_grpo.py --config configs/arithmetic_cpu.py --output_dir {folder}/run {sizes}".split()
    train_grpo.VERIFY_EVERY, os.environ["WANDB_MODE"] = 1, "offline"
    run = train_grpo.setup_grpo()
    prompt, cells = load(DOCS / "alignment.py").align(run)
    train_grpo.train(run)
    return prompt, cells, read_rows(folder / "run/metrics.jsonl")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    return folder / "run", *on_ranks(1, align_and_train, folder, folder=folder)[0]


def test_every_metric_is_defined_and_every_definition_is_a_metric(real):
    rows = {row["metric"].strip("`"): row["when"] for row in table(DOCS / "metrics.md", "metric")}
    found = {name for metrics in real[3] for name in metrics}
    assert found <= set(rows), "metrics that docs/metrics.md does not define"
    usual = (
        "always",
        "always, but `ppo`",
        "always, but `opmd`",
        "algorithms with groups",
        "evaluations",
        "verified syncs",
        "`tis_mode`",
        "`sync` merged",
    )
    assert {name for name, when in rows.items() if when in usual} == found


def test_an_evaluation_leaves_a_table_for_people(real):
    header, _, *rows = (real[0] / "evals/step_000002.md").read_text().splitlines()
    assert header == "| prompt | completion | extracted | answer | reward |"
    for row in rows:
        prompt, completion, extracted, answer, reward = (cell.strip() for cell in row[1:-1].split("|"))
        assert eval(prompt.rstrip("=")) == int(answer) and (extracted == answer) == (float(reward) == 1)
        assert extracted == "None" or completion.endswith(f"#### {extracted}")


def test_alignment_is_that_of_the_plain_model(real):
    """Every number of the table, from a padded forward of the model in float32 and the definitions alone."""
    prompt, cells, _ = real[1:]
    ids = [cell["id"] for cell in cells]
    models = (AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        logprobs, rounded = (model(torch.tensor([ids])).logits[0].float().log_softmax(-1) for model in models)
    noise = (logprobs - rounded).abs().max().item()  # of bfloat16, in which sampler and trainer compute
    assert ids[: len(prompt)] == prompt
    for position, cell in enumerate(cells):
        assert ("target id" in cell) == (len(prompt) - 1 <= position < len(ids) - 1)
        if "target id" in cell:
            assert cell["target id"] == ids[position + 1]
            for side in ("sampler", "trainer"):
                assert cell[side] == pytest.approx(logprobs[position, ids[position + 1]].item(), abs=3 * noise)
            assert cell["weight"] == pytest.approx(1 / (8 * 16 * (len(ids) - len(prompt))))
    assert len({cell["advantage"] for cell in cells if "advantage" in cell}) == 1


def test_the_completion_in_the_lesson_is_aligned():
    rows = table(DOCS / "learn.md", "position")
    trained = [row for row in rows if row["row"]]
    assert "".join(row["token"].strip("`") for row in rows[: len(rows) - len(trained)]).startswith("35+46=")
    for row, following in zip(rows, rows[1:]):
        assert row["row"] == "" or (row["target id"], row["predicts"]) == (following["id"], following["token"])
    for row in trained:
        assert float(row["sampler"]) == pytest.approx(float(row["trainer"]), abs=0.02)
        assert float(row["weight"]) == pytest.approx(1 / (512 * len(trained)), rel=1e-3)


# ---- Pictures -------------------------------------------------------------------------------------------------


def test_the_gallerys_numbers_are_those_it_makes():
    gallery = load(DOCS / "gallery.py")
    rows = {row["mistake"].split("**")[1]: row for row in table(DOCS / "failures.md", "mistake")}
    reward_column = list(rows["Stale weights"])[1]
    healthy, stale, shifted = gallery.train(), gallery.train(stale=20), gallery.train(shift=1)
    equal = gallery.train(reward_of=lambda scores: (scores == 1).float())

    def says(text: str, name: str, history: dict) -> bool:
        """Whether the text's first number is the mean of the run's last steps.

        A start that is moved by some roundings of float32 moves these means by up to 0.5%.
        """
        mean = sum(history[name][-20:]) / 20
        return float(re.search(r"\d+\.\d+", text)[0]) == pytest.approx(mean, rel=0.05, abs=0.03)

    assert says(reward_column, "reward/mean", healthy)
    for mistake, run in (("Stale weights", stale), ("Shifted mask", shifted), ("All groups equal", equal)):
        assert says(rows[mistake][reward_column], "reward/mean", run)
    assert says(rows["Stale weights"]["what shows it"], "mismatch/kl", stale)
    assert says(rows["Shifted mask"]["what shows it"], "mismatch/kl", shifted)
    assert max(stale["mismatch/kl"][:20]) < 1e-6 < 1e-3 < stale["mismatch/kl"][25]
    assert sorted(equal["grad_norm"])[len(equal["grad_norm"]) // 2] == 0
    ((weighted,), (means,)) = gallery.normaliser([8])
    assert weighted < 1e-5 and f"{means:.0%}" in rows["Wrong normaliser"]["what shows it"]
    for size, value in zip(("1e-4", "1e-3", "1e-2"), gallery.survival([1e-4, 1e-3, 1e-2])):
        assert f"{value:.2f} for" in rows["Learning rate too low for bf16"]["what shows it"], size


def test_plot_draws_what_was_measured(tmp_path, monkeypatch, capsys):
    """Of runs that lack metrics, have null or NaN for some, and phases of their own."""
    from matplotlib import pyplot

    from tools import plot

    rows = [{"step": 0, "eval/accuracy": 0.1}, {"step": 1, "reward/mean": 0.5, "loss": None, "grad_norm": None}]
    rows += [{"step": 2, "policy/entropy": math.nan, "time/step": 2.0, "time/search": 2.0, "mismatch/kl": 0.1}]
    rows[-1]["time/trainer_wait"] = 1.0  # a part of a phase
    for name in ("a/run", "b/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        rows = rows[:2]
    drawn = {}
    monkeypatch.setattr(plot, "draw", lambda runs, out, real=plot.draw: (drawn.update(runs), real(runs, out)))
    monkeypatch.setattr(
        sys, "argv", ["plot.py", str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--out", str(tmp_path / "x.png")]
    )
    plot.main()
    assert [len(rows) for rows in drawn.values()] == [3, 2], "two runs of one name are two runs"
    axes = [axis for axis in pyplot.gcf().axes if axis.axison]
    titles = [axis.get_title() for axis in axes]
    assert titles == ["Held-out accuracy", "Reward", "Trainer against sampler (KL)", "Seconds per step, by phase"]
    numbers = [y for axis in axes for line in axis.lines for y in line.get_ydata()]
    assert sorted(numbers) == [0.1, 0.1, 0.1, 0.5, 0.5]
    assert [text.get_text() for text in axes[-1].get_legend().get_texts()] == ["search"]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
