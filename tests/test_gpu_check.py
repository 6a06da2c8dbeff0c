"""The check of a GPU, whole, at toy sizes on a CPU: all is right, and neither failures nor gaps are hidden."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("peft")
from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_shared import Row, read_rows  # noqa: E402

RIGHT = ("kernels", "sampler", "adapter")  # sections of nothing but correctness


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The exit code, the printed text and the JSON of one check of everything."""
    out = tmp_path_factory.mktemp("check") / "found.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--size", "toy", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return done.returncode, done.stdout, json.loads(out.read_text())


def test_everything_is_right(checked):
    code, text, record = checked
    rows = [Row(**row) for row in record["rows"]]
    assert code == 0 and not [row for row in rows if row.verdict == "FAIL"], text
    for section in RIGHT:
        judged = [row for row in rows if row.section == section and row.verdict == "ok"]
        assert len(judged) >= 6, section
    judged = {(row.section, row.what) for row in rows if row.verdict == "ok"}
    assert ("sync", "share of a test adapter's effect that is missing in vLLM") in judged
    assert ("step", "trainer and sampler: KL") in judged


def test_table_and_json_are_complete(checked):
    _, text, record = checked
    rows = [Row(**row) for row in record["rows"]]
    assert {row.section for row in rows} == set(gpu_check.SECTIONS)
    assert all(line in text for line in gpu_check.table(rows))
    for row in rows:
        assert row.value is not None or row.note, f"{row.what} has neither a number nor a reason"
        difference = row.what == "LoRA's overhead"  # of two times that noise may exchange
        assert row.value is None or row.value >= (-1 if difference else 0)
    assert {"device", "size", "date", "seconds", "environment"} <= record.keys()


def test_the_plan_is_what_was_measured(checked):
    foreseen = [row for row in checked[2]["rows"] if row["section"] == "plan" and row["value"]]
    assert len(foreseen) == 3 and all(0.9 < row["value"] < 1.1 for row in foreseen)


def test_a_section_that_breaks_is_told_and_the_others_go_on(tmp_path):
    (tmp_path / "model_128_3_0.0").touch()  # where the planner expects a model's folder
    work = gpu_check.Work(tmp_path)
    gpu_check.run_all(["plan", "trl"], "toy", work, budget=120)
    broken, *others = read_rows(work.file)
    assert (broken.section, broken.verdict) == ("plan", "FAIL") and "model_128_3_0.0" in broken.note
    assert [row.section for row in others] == ["trl"]


def test_what_does_not_fit_in_the_budget_is_skipped(tmp_path):
    work = gpu_check.Work(tmp_path)
    gpu_check.run_all(list(gpu_check.SECTIONS), "3b", work, budget=10)
    rows = read_rows(work.file)
    assert {row.section for row in rows} == set(gpu_check.SECTIONS)
    assert all(row.value is None and row.note.startswith("skipped: no time") and not row.verdict for row in rows)
