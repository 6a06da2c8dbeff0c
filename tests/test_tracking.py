"""The timeline of a step: its seconds add up, its memory is that of the phase, its trace has what ran."""

import fcntl
import gzip
import json
import math
import mmap
import os
import re
import struct
import termios
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.soak import own_megabytes
from benchmarks.what_bounds import own_times, table
from configs.base import Config
from runtime import progress_bar
from runtime.evaluation import release_free_memory
from runtime.setup import check_writable, open_log
from runtime.tracking import RunLog, wandb_mode


def test_timeline(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE_STEP", "2")
    config = Config(output_dir=str(tmp_path), run_name="run", steps=3)
    log = RunLog(config, write=True)
    for step in log.traced(range(1, 4)):
        start = time.perf_counter()
        log.phase("rollout")
        time.sleep(0.05)
        log.phase("update")
        torch.ones(64, 64) @ torch.ones(64, 64)
        if step == 2:
            with mmap.mmap(-1, 100 << 20) as fresh:  # malloc would reuse what earlier tests have freed
                for _ in range(100):
                    fresh.write(bytes(1 << 20))
        log.phase("rollout")
        time.sleep(0.05)
        log.step(step, {"reward/mean": 0.0, "completion/length_mean": 1.0, "rollout/tokens": 7})
        elapsed = time.perf_counter() - start
        log.phase("save")
        (row,) = [row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if row["step"] == step]
        phases = sum(value for name, value in row.items() if name.startswith("time/") and name != "time/step")
        assert row["time/step"] == pytest.approx(phases)
        assert row["tokens_per_second"] == pytest.approx(7 / (row["time/step"] - row.get("time/save", 0.0)))
        assert 0.1 <= row["time/rollout"] <= row["time/step"] <= elapsed + row.get("time/save", 0.0)
        if step == 2:
            assert 90 < 1024 * (row["memory/update_gib"] - row["memory/rollout_gib"]) < 130
            assert row["memory/peak_gib"] == row["memory/update_gib"]
        if step == 3:
            assert abs(row["memory/peak_gib"] - row["memory/rollout_gib"]) < 0.05, "what was before is forgotten"
    log.close()
    assert [path.name for path in (tmp_path / "run").glob("trace*")] == ["trace_2.json.gz"]
    with gzip.open(tmp_path / "run" / "trace_2.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    spans = {event["name"]: event for event in events}
    assert {"rollout", "update", "save"} <= spans.keys()
    update, mm = spans["update"], spans["aten::mm"]
    assert update["ts"] <= mm["ts"] <= update["ts"] + update["dur"]
    rows = {line.split(" | ")[0]: line for line in table(tmp_path / "run" / "trace_2.json.gz")}
    assert "`aten::" in rows["| update"]
    assert int(rows["| rollout"].split("|")[-2].strip(" %")) > 90, "it slept"


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    """A second run of the same name would move it aside and write its own checkpoints among those of the first."""
    config = Config(output_dir=str(tmp_path), run_name="run")
    check_writable(tmp_path / "run")
    log = RunLog(config, write=True)
    with pytest.raises(ValueError, match="is being written by a run that has not ended; choose another run_name"):
        check_writable(tmp_path / "run")
    with pytest.raises(ValueError, match="is being written"):  # also where the other one came after the first look
        open_log(config, write=True, saved=None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    log.close()
    check_writable(tmp_path / "run")


@pytest.mark.parametrize(
    "environment, expected",
    [({}, "offline"), ({"WANDB_API_KEY": "x"}, "online"), ({"WANDB_API_KEY": "x", "WANDB_MODE": "dryrun"}, "dryrun")],
)
def test_the_environment_decides_about_wandb(monkeypatch, tmp_path, environment, expected):
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)} | environment)
    assert wandb_mode() == expected


def test_freed_memory_goes_back_to_the_system():
    """Also from between what is still in use."""
    tensors = [torch.ones(1 << 12) for _ in range(16_000)]  # 16 KiB each, 262 MB
    kept = tensors[::100]
    del tensors
    before = own_megabytes(os.getpid())
    release_free_memory()
    assert own_megabytes(os.getpid()) < before - 160 and len(kept) == 160


def test_an_operators_time_is_without_that_of_those_it_calls():
    def span(name, start, end, thread=1):
        return {"name": name, "ts": start, "dur": end - start, "pid": 1, "tid": thread}

    spans = [span("linear", 0, 10), span("mm", 1, 7), span("copy", 2, 4), span("add", 7, 9), span("mm", 10, 13)]
    own = own_times([*spans, span("linear", 3, 6, thread=2)])
    assert sorted(own) == [
        ("add", 7, 2),
        ("copy", 2, 2),
        ("linear", 0, 2),
        ("linear", 3, 3),
        ("mm", 1, 4),
        ("mm", 10, 3),
    ]


def test_what_was_not_measured_is_not_shown(tmp_path, capsys):
    """A changed loop may lack every phase and metric; NaN is no number for the console, JSON or wandb."""
    config = Config(output_dir=str(tmp_path), run_name="run", steps=3)
    log = RunLog(config, write=True)
    logged = []
    log.wandb = SimpleNamespace(log=lambda metrics, step: logged.append(metrics), finish=lambda: None)
    log.step(1, {})
    log.phase("search")
    log.step(2, {"my/metric": 2.0, "reward/mean": 0.5, "loss": math.nan, "policy/entropy": math.inf})
    log.phase("update")
    log.step(3, {"rollout/tokens": 5, "rollout/groups": 4, "reward/mixed_groups_frac": 0.75, "eval/accuracy": 0.25})
    log.samples([])
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 2/3 \| reward 0.500 \| \d+\.\d s", lines[1])
    line = (
        r"step 3/3 \| groups 3/4 \| \d+\.\d s \(update \d+\.\d\) \| [\d,]+ tokens/s \| held-out accuracy 25.0% sampled"
    )
    assert re.fullmatch(line, lines[2])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert rows[0] == {"step": 1, "time/step": 0}
    assert rows[1]["loss"] is None and rows[1]["policy/entropy"] is None, "measured, and not finite"
    assert "loss" not in logged[1] and all(math.isfinite(value) for metrics in logged for value in metrics.values())


def shown_on_a_terminal(monkeypatch, rank: str) -> str:
    """What a bar writes to a terminal, while its work takes long and once it is done."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress_bar, "SHOWN_AFTER", 0.1)
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with progress_bar.progress_bar("update", 4, "micro-batches") as bar:
            bar.update()
            time.sleep(0.5)
        terminal.write("end")
        terminal.flush()
        written = ""
        while not written.endswith("end"):  # a read gives what has come so far
            written += os.read(ours, 1 << 16).decode()
    os.close(ours)
    return written


def test_a_progress_bar_is_for_terminals_and_is_gone_afterwards(monkeypatch, capsys):
    *shown, cleared, end = shown_on_a_terminal(monkeypatch, rank="0").split("\r")
    assert end == "end" and cleared.strip() == "" and len(cleared) >= len(shown[-1])
    assert "update: 1/4 micro-batches |" in shown[-1], "drawn though nothing was counted since"
    assert shown_on_a_terminal(monkeypatch, rank="1") == "end", "one rank shows it"
    monkeypatch.undo()
    monkeypatch.setattr(progress_bar, "SHOWN_AFTER", 0.0)
    with progress_bar.progress_bar("update", 4, "micro-batches") as bar:
        bar.update()
        time.sleep(0.1)
    assert capsys.readouterr().err == "", "a log file has none"
