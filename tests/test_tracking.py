"""The timeline of a step: its seconds add up, its memory is that of the phase, its trace has what ran."""

import fcntl
import gzip
import json
import math
import mmap
import os
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_rows, serving, small_disk

from benchmarks.soak import own_megabytes
from benchmarks.what_bounds import own_times, table
from configs.base import Config
from runtime import progress_bar, wandb_run
from runtime.heap import release_free_memory
from runtime.setup import check_writable, open_log
from runtime.tracking import RunLog


def test_timeline(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE_STEP", "2")
    monkeypatch.setenv("WANDB_MODE", "disabled")  # its thread takes memory at any time
    config = Config(output_dir=str(tmp_path / "run"), steps=3)
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
        (row,) = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if row["step"] == step]
        phases = sum(value for name, value in row.items() if name.startswith("time/") and name != "time/step")
        assert row["time/step"] == pytest.approx(phases)
        assert row["tokens_per_second"] == pytest.approx(7 / (row["time/step"] - row.get("time/save", 0.0)))
        assert 0.1 <= row["time/rollout"] <= row["time/step"] <= elapsed + row.get("time/save", 0.0)
        if step == 2:
            assert 90 < 1024 * (row["memory/update_gib"] - row["memory/rollout_gib"]) < 130
            assert row["memory/peak_gib"] >= row["memory/update_gib"]  # the profiler may take more
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
    config = Config(output_dir=str(tmp_path / "run"))
    check_writable(tmp_path / "run")
    log = RunLog(config, write=True)
    with pytest.raises(ValueError, match="is being written by a run that has not ended; choose another output_dir"):
        check_writable(tmp_path / "run")
    with pytest.raises(ValueError, match="is being written"):  # also where the other one came after the first look
        open_log(config, write=True, saved=None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    log.close()
    check_writable(tmp_path / "run")


GOOD, SHORT = {"WANDB_API_KEY": "x" * 40}, {"WANDB_API_KEY": "x" * 5}
AWAY = "the service process is busy and did not respond in time."


@pytest.mark.parametrize(
    "environment, problem, mode_or_error",
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": ""}, None, "offline"),
        (GOOD, None, "online"),
        (GOOD, AWAY, "offline"),
        (GOOD | {"WANDB_MODE": "dryrun"}, "never asked", "dryrun"),
        (
            GOOD | {"WANDB_MODE": "online"},
            AWAY,
            "did not respond in time.; to train without its server, set WANDB_MODE",
        ),
        (GOOD, "returned error 401: {}", "error 401"),
        ({"WANDB_MODE": "online"}, None, "WANDB_MODE online needs an API key"),
        ({"WANDB_MODE": ""}, None, "WANDB_MODE must be one of online, offline, shared, disabled, .*, not ''"),
        ({"WANDB_MODE": "of"}, None, "WANDB_MODE must be one of .*, not 'of'"),
    ],
)
def test_the_environment_decides_about_wandb(monkeypatch, tmp_path, environment, problem, mode_or_error):
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)} | environment)
    monkeypatch.setattr(wandb_run, "login_problem", lambda: problem)
    try:
        wandb_run.choose_mode()
        assert os.environ["WANDB_MODE"] == mode_or_error
    except ValueError as error:
        assert re.search(mode_or_error, str(error)) and "\n" not in str(error)


@pytest.mark.parametrize("key, words", [(GOOD, "returned error 401"), (SHORT, "must have 40+ characters, has 5")])
def test_a_bad_key_is_refused_before_anything_is_loaded(tmp_path, key, words):
    with serving(lambda path, body: (401, {})) as address:
        environment = os.environ | key | {"WANDB_BASE_URL": address}
        environment |= {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_SILENT": "true"}
        command = "from runtime.wandb_run import choose_mode; choose_mode()"
        done = subprocess.run(
            [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ValueError: wandb: ") and words in error and "WANDB_MODE=offline" in error


FAILING = """
import os, signal, subprocess, sys, time
from pathlib import Path
from configs.base import Config
from runtime.tracking import COLUMNS, RunLog

folder, fault = sys.argv[1:]
log = RunLog(Config(output_dir=folder + "/r"), write=True)
log.record({"step": 1, "loss": 0.5})
while not log.wandb.calls.empty():
    time.sleep(0.01)
if fault == "killed":
    subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=True)
if fault == "full":
    Path(folder, "fill").write_bytes(bytes(500_000))
slowest = 0.0
for step in range(2, 6):
    start = time.perf_counter()
    log.record({"step": step, "loss": 0.5})
    sample = dict.fromkeys(COLUMNS, "a" * 100_000) | {"step": step, "kind": "eval", "reward": 0.0}
    log.samples([sample] if fault != "full" else [])
    if fault == "full":
        log.wandb.log_table("eval/samples", ["text"], [["a" * 600_000]], step)
    slowest = max(slowest, time.perf_counter() - start)
log.close()
print("slowest", slowest)
"""


@pytest.mark.parametrize("fault, lines", [("no home", 0), ("killed", 1), ("full", 1)])
def test_no_fault_of_wandb_reaches_the_run(tmp_path, fault, lines):
    """A real offline run without a home, with wandb's process killed, and with a disk that gets full under it."""
    run = tmp_path / "runs"
    run.mkdir()
    with small_disk(run, "1m") if fault == "full" else nullcontext():
        environment = os.environ | {"WANDB_MODE": "offline", "HOME": "/dev/null", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FAILING, str(run), fault]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        rows = read_rows(run / "r" / "metrics.jsonl")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("wandb fails (") == lines, done.stdout
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_a_wandb_that_hangs_costs_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "TIMEOUT", 0.1)
    monkeypatch.setattr(wandb_run, "WAITING", 2)
    monkeypatch.setattr(wandb_run.wandb, "init", lambda **_: time.sleep(60))
    said = []
    run = wandb_run.WandbRun(tmp_path, None, said.append)
    start = time.perf_counter()
    for step in range(1000):
        run.log({"loss": 1.0}, step)
    run.finish()
    assert time.perf_counter() - start < 5 and len(said) == 1 and "2 calls wait for it" in said[0]


def test_freed_memory_goes_back_to_the_system():
    """Also from between what is still in use."""
    tensors = [torch.ones(1 << 12) for _ in range(16_000)]  # 16 KiB each, 262 MB
    kept = tensors[::100]
    del tensors
    before = own_megabytes(os.getpid())
    release_free_memory()
    assert own_megabytes(os.getpid()) < before - 160 and len(kept) == 160


def test_memory_of_large_arrays_is_used_again():
    """In a process of its own, since the setting stays; a page is 4 KiB, or more where the system has larger ones."""
    code = """
import resource
from runtime.heap import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(b"x") * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
keep_freed_memory()
faults()
print(fresh, faults())
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    fresh, again = map(int, said.split())
    assert again < fresh / 5


def test_products_of_ever_new_lengths_take_no_more_memory():
    """Beside what the libraries keep by themselves. A CPU whose bfloat16 products are not oneDNN's keeps nothing."""
    code = """
import ctypes, sys
if sys.argv[1] == "ours":
    import runtime.quiet
import torch
class MallInfo(ctypes.Structure):  # of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = MallInfo
def used():
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd
weight = torch.randn(64, 64).bfloat16()
for length in range(300):
    torch.randn(1 + length, 64).bfloat16() @ weight
    if length == 99:
        before = used()
print(used() - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    ours, theirs = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, who], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
            ).stdout
        )
        for who in ("ours", "theirs")
    )
    assert ours < max(theirs / 3, 10e6), (ours, theirs)


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
    config = Config(output_dir=str(tmp_path / "run"), steps=3)
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
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert rows[0] == {"step": 1, "time/step": 0}
    assert rows[1]["loss"] is None and rows[1]["policy/entropy"] is None, "measured, and not finite"
    assert "loss" not in logged[1] and all(math.isfinite(value) for metrics in logged for value in metrics.values())


def test_a_console_without_some_letters_shows_their_numbers(tmp_path):
    code = """
import sys
from configs.base import Config
from runtime.tracking import RunLog
RunLog(Config(output_dir=sys.argv[1]), write=True).print("35 \u00b5s \u65e5\u672c")
"""
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode("latin-1").splitlines()[-1] == "35 \u00b5s \\u65e5\\u672c"


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
