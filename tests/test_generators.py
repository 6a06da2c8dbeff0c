"""Processes that only generate: the run is that of one process that does both, or it learns from batches one step old;
and neither side outlives the other.
"""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, on_ranks, train_on
from test_resume import await_step, finish, rows, start

import reward
from configs.base import Config
from configs.checks import resolve_config
from fsdp_utils import World
from runtime.generators import init_worlds
from runtime.run import endless
from runtime.setup import check_world
from train_grpo import ALGORITHMS

APART = ["--rollout_ranks", "1"]
STALE = [*APART, "--max_staleness", "1"]
OWN = ("rollout/staleness", "sync/peak_bytes")  # a tensor is freed when it has been sent, not when vLLM has packed it


def train_on_one_thread(command: str) -> None:
    """`train_on` of a trainer or a generator, which ends its process."""
    torch.set_num_threads(1)
    with suppress(SystemExit):
        train_on(command)


def test_alternating_sides_give_the_run_of_one_process(tmp_path):
    """In float32, with dynamic sampling and the reference's KL. The weights are merged, the checks of arrival pass."""
    command = f"train_grpo.py --config {ROOT}/configs/arithmetic_cpu.py --dtype float32 --algorithm dapo --kl_coef 0.01"
    command += " --steps 4 --prompts_per_step 8 --group_size 4 --eval_samples 1 --eval_problems 16 --eval_every 4"
    together, apart = tmp_path / "together", tmp_path / "apart"
    for folder, options in ((together, []), (apart, APART)):
        folder.mkdir()
        whole = " ".join([command, *options, "--output_dir", str(folder / "r")])
        on_ranks(1 + len(options) // 2, train_on_one_thread, whole, folder=folder)
    output = (apart / "rank_0.txt").read_text()
    assert "world  1 x CPU, 1 vLLM engine(s) in 1 process(es) of their own" in output
    assert rows(apart, "samples") == rows(together, "samples")
    for one, other in zip(rows(apart), rows(together), strict=True):
        assert one.pop("rollout/staleness", 0) == 0
        assert one.keys() == other.keys()
        for name in one.keys() - OWN:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def steps(folder: Path) -> list[dict]:
    """Of a run's metrics."""
    return [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()][1:]


def end(run: subprocess.Popen, rank: int) -> str:
    """Kills a process of a run, as the kernel would for want of memory; what the run printed when all had ended."""
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    found = {rank_of(int(pid)): int(pid) for pid in ranks}
    os.kill(found[rank], signal.SIGKILL)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert f"Signal 9 (SIGKILL) received by PID {found[rank]}" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in found.values())
    return output


def rank_of(pid: int) -> int:
    """Of torchrun's process, as it was started."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(dict(variable.split(b"=", 1) for variable in variables if variable)[b"RANK"])


@pytest.mark.slow
def test_a_step_behind_it_learns_and_survives_a_killed_generator(tmp_path):
    """No problem is lost or repeated, though at the kill a batch had been sampled ahead."""
    options = ["--prompts_per_step", "16", "--group_size", "16", "--eval_problems", "64", "--eval_every", "60"]
    options += [*STALE, "--save_every", "20", "--steps", "60"]
    run = start(tmp_path, *options)
    await_step(run, tmp_path, 25)
    end(run, rank=1)
    assert "resumed after step 20" in finish(start(tmp_path, *options, "--resume"))
    first, *others = [row["rollout/staleness"] for row in steps(tmp_path)]
    assert first == 0 and others[19] == 0, "nothing is sampled ahead of the first step, and of the first after a resume"
    assert all(staleness == 1 for step, staleness in enumerate(others) if step != 19)
    problems = endless(reward.load_problems("arithmetic", "train"), seed=0)
    drawn = [next(problems).prompt for _ in range(60 * 16)]
    samples = [sample for sample in rows(tmp_path, "samples") if sample["kind"] == "train"]
    assert {(sample["step"], sample["prompt"]) for sample in samples} == set(enumerate(drawn[::16], start=1))
    accuracy = [row["eval/accuracy"] for row in rows(tmp_path) if "eval/accuracy" in row]
    assert accuracy[-1] > accuracy[0] + 0.2, accuracy
    assert all(0 <= row["time/trainer_wait"] < row["time/step"] for row in steps(tmp_path))


@pytest.mark.slow
def test_a_killed_trainer_ends_the_generators(tmp_path):
    run = start(tmp_path, *APART, "--steps", "1000", "--eval_every", "0")
    await_step(run, tmp_path, 2)
    end(run, rank=0)


def test_what_cannot_be_separate(monkeypatch):
    """Said before anything is loaded."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="rollout_ranks 2 of 2 process.es. leaves none to train"):
        init_worlds(2)
    with pytest.raises(ValueError, match="tensor_parallel_size 2 does not divide the number .* that generate, 3"):
        check_world(Config(rollout_ranks=3, tensor_parallel_size=2), World(0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="fsdp_size 3 does not divide the number of processes that train, 2"):
        check_world(Config(rollout_ranks=3, fsdp_size=3), World(0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="sleep_level 1 .* set it to 0"):
        Config(rollout_ranks=1, sleep_level=1)
    with pytest.raises(ValueError, match="max_staleness needs .* set rollout_ranks above 0"):
        Config(max_staleness=1)
    with pytest.raises(ValueError, match="tis_mode must not be off"):
        resolve_config(Config(rollout_ranks=1, max_staleness=1, tis_mode="off"), ALGORITHMS["grpo"])
