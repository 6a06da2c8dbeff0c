"""A run that dies goes on as if it had not: on real processes, killed for real."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Ranks, on_ranks, read_rows, small_disk, torchrun_command, train_on
from test_lora import saved_adapter
from torch import nn

import fsdp_utils
from configs.base import Config
from runtime import checkpoint, steps
from runtime.checkpoint import Progress
from runtime.run import Run
from runtime.setup import resumable
from runtime.tracking import COLUMNS, RunLog

NOISE = ("time/", "memory/", "tokens_per_second", "sync/seconds")  # what may differ between two equal runs
GRPO = "train_grpo.py --config configs/arithmetic_cpu.py --kl_coef 0.01"
SMALL = "--prompts_per_step 8 --group_size 4 --eval_samples 1 --eval_problems 16"
SMALL += " --steps 8 --save_every 2 --eval_every 4"


def start(folder: Path, *options: str, ranks: int = 2, **environment: str) -> subprocess.Popen:
    """A short run of the arithmetic default, or of PPO, in a process group of its own."""
    program = "train_ppo.py --config configs/arithmetic_cpu_ppo.py" if "critic_learning_rate" in str(options) else GRPO
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "process_group": 0}
    command = torchrun_command(ranks, *program.split(), *SMALL.split(), "--output_dir", f"{folder}/r", *options)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a run to end; what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-6000:]
    return output


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    """A log of a run, without what may differ."""
    found = read_rows(folder / "r" / f"{name}.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(NOISE)} for row in found]


def await_step(process: subprocess.Popen | Ranks, folder: Path, step: int) -> None:
    """Returns as soon as a step is logged; its save, if it has one, follows at once."""
    path, deadline = folder / "r" / "metrics.jsonl", time.time() + 240
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to all of a run's processes."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def fork(folder: Path, *options: str, ranks: int = 2) -> Ranks:
    """The same run of the default, on forked ranks, which start sooner than torchrun's."""
    folder.mkdir(exist_ok=True)
    return Ranks(ranks, train_on, " ".join([GRPO, *SMALL.split(), f"--output_dir {folder}/r", *options]), folder=folder)


def outcome(run: Ranks) -> str:
    """Waits for such a run to end; what it printed."""
    run.results()
    return run.output()


def test_a_killed_run_resumes_bit_identically(tmp_path):
    """Killed in the first step, in another step, in a save, then let to end: every metric and sample is that of a
    quiet run.
    """
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    checkpoints = killed / "r" / "checkpoints"
    outcome(fork(quiet))

    run = fork(killed)
    await_step(run, killed, 0)
    time.sleep(random.uniform(0, 0.2))
    run.kill()
    # whether a checkpoint is there yet or not, it goes on

    run = fork(killed, "--resume")
    await_step(run, killed, 3)
    time.sleep(random.uniform(0, 0.5))
    run.kill()

    run = fork(killed, "--resume")
    await_step(run, killed, 6)
    while not list(checkpoints.glob("*6.partial")) and not (checkpoints / "step_000006").exists():
        pass
    run.kill()

    assert "resumed after step" in outcome(fork(killed, "--resume"))
    assert rows(killed) == rows(quiet)
    assert rows(killed, "samples") == rows(quiet, "samples")
    assert not list(checkpoints.glob("*.partial")) and (killed / "r" / "latest").read_text().endswith("step_000008\n")
    assert (killed / "r" / "best").read_text() == (quiet / "r" / "best").read_text()

    # A flipped bit is noticed; the checkpoint before it is used, on another number of ranks.
    damaged = checkpoints / "step_000008" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    output = outcome(fork(killed, "--resume", ranks=1))
    assert "step_000008 is damaged (state.safetensors is not what was written)" in output
    assert "resumed after step 6" in output
    for one, two in zip(rows(killed)[1:], rows(quiet)[1:], strict=True):
        assert one["step"] == two["step"] and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.2)
    # Another cut rounds otherwise, and in bfloat16 that may decide about a token of hundreds.
    pairs = [pair for pair in zip(rows(killed, "samples"), rows(quiet, "samples"), strict=True) if pair[0]["step"] > 6]
    assert all(one["prompt"] == two["prompt"] for one, two in pairs)
    assert sum(one == two for one, two in pairs) > 0.8 * len(pairs) > 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_identically(tmp_path):
    """PPO, whose critic must go on too, stopped by Ctrl-C, which a terminal sends to all processes.

    The wandb run goes on as well, and no secret of the environment is written anywhere.
    """
    options = ["--critic_learning_rate", "2e-3", "--offload", "optimizer"]
    secrets = {"WANDB_API_KEY": "5ec4e7" * 6 + "cafe", "HF_TOKEN": "hf_5ec4e7canary"}
    environment = secrets | {"WANDB_MODE": "offline"}
    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    finish(start(quiet, *options, ranks=1, WANDB_MODE="offline"))

    process = start(stopped, *options, ranks=1, **environment)
    await_step(process, stopped, 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    last = rows(stopped)[-1]["step"]
    assert f"stopped after step {last}, and saved. To go on, add --resume to the command." in output
    assert last < 8 and max(sample["step"] for sample in rows(stopped, "samples")) >= last

    output = finish(start(stopped, *options, "--resume", ranks=1, **environment))
    assert f"resumed after step {last}" in output
    assert rows(stopped) == rows(quiet)
    assert rows(stopped, "samples") == rows(quiet, "samples")
    written = [path for path in (stopped / "r").rglob("*") if path.is_file()]
    ids = {path.parent.name.rpartition("-")[2] for path in written if path.suffix == ".wandb"}
    assert len(ids) == 1, "one wandb run"
    for secret in secrets.values():
        assert not [path for path in written if secret.encode() in path.read_bytes()] and secret not in output


def variants(base: list[str], cases: list[list[str]]) -> list[list]:
    """Of each variant, the last steps of a quiet run and of one that went on from its middle; in one process."""
    import train_grpo

    alive = []  # an engine takes the process groups with it when it goes

    def run(*arguments: str) -> tuple[list[dict], list[dict]]:
        sys.argv[1:] = [*base, *arguments]
        run = train_grpo.setup_grpo()
        train_grpo.train(run)
        alive.append(run)
        return rows(run.log.folder.parent), rows(run.log.folder.parent, "samples")

    compared = []
    for case in cases:
        quiet = run(*case, "--save_every", "2")
        resumed = run(*case, "--resume", f"{base[base.index('--output_dir') + 1]}/checkpoints/step_000002")
        compared.append([quiet, resumed])
    return compared


@pytest.mark.slow
def test_every_kind_of_run_goes_on(tmp_path):
    """Full fine-tuning, four-bit bases, a start that is also the reference, adapter sync, FlowRL's log Z and dynamic
    sampling's place in the data.
    """
    saved_adapter(TINY, tmp_path / "start", std=0.01)
    cases = {
        "full": ["--lora_rank", "0", "--learning_rate", "1e-4"],
        "nf4": f"--dtype nf4 --sync straight_through --kl_coef 0.1 --lora_adapter_path {tmp_path}/start".split(),
        "adapter": ["--sync", "adapter"],
        "flowrl": ["--algorithm", "flowrl", "--lr_schedule", "cosine"],
        "dapo": ["--algorithm", "dapo", "--updates_per_rollout", "2", "--offload", "all"],
    }
    base = ["--config", str(ROOT / "configs" / "arithmetic_cpu.py"), "--output_dir", str(tmp_path / "r")]
    base += ["--steps", "4", "--eval_every", "2"]
    base += "--prompts_per_step 8 --group_size 4 --eval_samples 1 --eval_problems 8".split()
    (compared,) = on_ranks(1, variants, base, list(cases.values()), folder=tmp_path, timeout=600)
    for name, (quiet, resumed) in zip(cases, compared, strict=True):
        assert resumed == quiet and [row["step"] for row in quiet[0]] == [0, 1, 2, 3, 4], name
        assert sum(row.get("grad_norm", 0) for row in quiet[0][3:]) > 0, name
        assert max(row.get("mismatch/kl", 0) for row in quiet[0]) < 0.002, name


def small_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with one frozen and one trained layer, and an optimizer with state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save_small(run: Path, step: int) -> Path:
    model, optimizer = small_model()
    tensors = checkpoint.gather_state({"policy": (model, optimizer)}, keep=True)
    return checkpoint.write(run, step, {"progress": {}}, tensors, lambda folder: None)


class Counter(torch.optim.SGD):
    """An optimizer that keeps a number in its state."""

    def step(self):
        super().step()
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1


OPTIMIZERS = {
    "AdamW": lambda trained: torch.optim.AdamW(trained, lr=0.1),
    "momentum": lambda trained: Counter(trained, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda trained: torch.optim.Adafactor(trained, lr=0.1),
    "Muon": lambda trained: torch.optim.Muon([p for p in trained if p.ndim == 2], lr=0.1),
    "NAdam": lambda trained: torch.optim.NAdam(trained, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on(tmp_path, monkeypatch, name):
    """Resumed after two steps of four, it ends where it ends without that; with another optimizer it is refused."""
    monkeypatch.setattr(checkpoint, "on_every_rank", lambda work: work())

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
        for _ in range(count):
            model(torch.linspace(-1, 2, 6).view(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    model, _ = small_model()
    learners = {"policy": (model, OPTIMIZERS[name](list(model[1].parameters())))}
    steps(*learners["policy"], count=2)
    state = checkpoint.gather_state(learners, keep=True)
    assert {key.partition("/")[0] for key in state} == {"policy.1.weight", "policy.1.bias"}, "what is trained"
    folder = checkpoint.write(tmp_path, 2, {}, state, lambda folder: None)
    expected = steps(*learners["policy"], count=2)

    model, _ = small_model()
    other = {"policy": (model, torch.optim.RMSprop(model[1].parameters(), centered=True))}
    with pytest.raises(ValueError, match="cannot be used: it has 'policy.1.[a-z]+/[a-z_]+'"):
        checkpoint.restore_state(folder, other)
    learners = {"policy": (model, OPTIMIZERS[name](list(model[1].parameters())))}
    checkpoint.restore_state(folder, learners)
    assert all(map(torch.equal, steps(*learners["policy"], count=2), expected))


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_any_harm_is_noticed_and_the_one_before_is_used(tmp_path, file, harm):
    save_small(tmp_path, 1)
    path = save_small(tmp_path, 2) / file
    content = path.read_bytes()
    if harm == "flip":
        path.write_bytes(content[:10] + bytes([content[10] ^ 4]) + content[11:])
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    said: list[str] = []
    assert checkpoint.find(tmp_path, "latest", said.append).name == "step_000001"
    assert len(said) == 1 and "step_000002" in said[0]
    with pytest.raises(ValueError, match="step_000002"):
        checkpoint.find(tmp_path, str(path.parent), said.append)


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    """As on a full disk: nothing half-written stays, and the older checkpoint is still the newest."""
    save_small(tmp_path, 1)

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        checkpoint.write(tmp_path, 2, {}, {"a": torch.zeros(2)}, disk_full)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert checkpoint.find(tmp_path, "latest", print).name == "step_000001"


def test_what_a_disk_is_too_full_for_fails_and_leaves_nothing(tmp_path, capsys):
    """A real file system of 64 KiB."""
    with small_disk(tmp_path, "64k"):
        save_small(tmp_path, 1)
        with pytest.raises(OSError, match="space"):
            checkpoint.write(tmp_path, 2, {}, {"a": torch.zeros(50_000)}, lambda folder: None)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]

        log = RunLog(Config(output_dir=str(tmp_path / "r")), write=True)
        for step in range(100):
            log.append("samples", [{"step": step, "text": "x" * 1000}])
        with pytest.raises(OSError, match="samples.jsonl are not on the disk"):
            log.flush()
        log.tabulate([dict.fromkeys(COLUMNS, "a") | {"step": 1, "kind": "eval", "reward": 0.0}])
        assert "no table of samples: [Errno 28]" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "r" / "samples.jsonl").write_text("")  # somebody has made room
        log.flush()
        kept = [json.loads(line)["step"] for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()[1:]]
        assert kept == list(range(100 - len(kept), 100)) and len(kept) > 20
        log.close()


def test_resuming_an_older_checkpoint_sets_the_newer_aside(tmp_path):
    for step in (1, 2, 3):
        save_small(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000004.partial").mkdir()
    checkpoint.rewind(tmp_path, step=1, best=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000002.old", "step_000003.old"]
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "checkpoints/step_000001\n"
    assert checkpoint.find(tmp_path, "latest", print).name == "step_000001"
    save_small(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000002", "step_000003.old"]


def test_random_numbers_follow_from_the_step():
    """Of torch, numpy and Python, whatever was drawn before; other ones on every rank and in every step."""

    def draws(rank: int, step: int) -> tuple:
        run = SimpleNamespace(config=Config(), world=SimpleNamespace(rank=rank), progress=Progress(), prompts_drawn=0)
        run.log = SimpleNamespace(position=lambda: {})
        Run.complete_step(run, step)
        return torch.rand(1).item(), np.random.rand(), random.random(), random.gauss(0, 1)

    found = {(rank, step): draws(rank, step) for rank in range(2) for step in range(3)}
    assert {place: draws(*place) for place in reversed(found)} == found
    assert all(len(set(kind)) == len(found) for kind in zip(*found.values()))


def test_names_cannot_leave_the_folder(tmp_path):
    folder = save_small(tmp_path, 1)
    (folder / "checksums.json").write_text(json.dumps({"../../outside": "0"}))
    with pytest.raises(ValueError, match="outside itself"):
        checkpoint.find(tmp_path, str(folder), print)


def test_old_checkpoints_go_but_the_best_stays(tmp_path):
    """Also beyond a million steps, whose names are longer."""
    for step in (1, 2, 999_999, 1_000_000):
        save_small(tmp_path, step)
    checkpoint.set_pointers(tmp_path, latest=1_000_000, best=1)
    checkpoint.prune(tmp_path, best=1)
    assert list(checkpoint.written(tmp_path)) == [1, 999_999, 1_000_000]
    assert (tmp_path / "latest").read_text() == "checkpoints/step_1000000\n"
    assert checkpoint.find(tmp_path, "latest", print).name == "step_1000000"


def test_the_first_evaluated_checkpoint_is_the_best_so_far(monkeypatch):
    """Whatever its accuracy: a task may have rewards below 0."""
    monkeypatch.setattr(steps, "on_first_rank", lambda work: work())
    monkeypatch.setattr(steps, "write_checkpoint", lambda run, progress, tensors: True)
    run = Run.__new__(Run)
    run.config, run.learners, run.world = Config(), {}, fsdp_utils.World(0, 1, torch.device("cpu"))
    for step, accuracy, best in ((1, None, -1), (2, -5.0, 2), (3, -6.0, 2), (4, -4.0, 4)):
        run.progress = dataclasses.replace(run.progress if step > 1 else Progress(), step=step)
        steps.save_checkpoint(run, accuracy)
        assert run.progress.best_step == best


def test_a_run_whose_end_could_not_be_saved_fails(tmp_path):
    run = Run.__new__(Run)
    run.config, run.progress, run.saved_step = Config(), Progress(step=3), 2
    run.log = SimpleNamespace(folder=tmp_path, close=lambda: None, print=print)
    run.engine = SimpleNamespace(close=lambda: None)
    with pytest.raises(OSError, match="step 3 could not be saved; the last one that was: .*step_000002"):
        steps.finish_training(run)


def test_a_best_checkpoint_that_is_gone_is_none(tmp_path, monkeypatch):
    """Resumed, from any folder, before the better one, for which the one that was best until then had been deleted."""
    config = Config(output_dir=str(tmp_path))
    for step, best in ((10, 10), (20, 10)):
        state = {"config": dataclasses.asdict(config), "log": {}, "progress": {"step": step, "best_step": best}}
        state["progress"]["started"] = "2024-02-29T23:59:59"
        folder = checkpoint.write(tmp_path, step, state, {"a": torch.zeros(2)}, lambda folder: None)
    found = resumable(checkpoint.read_saved(folder), config).progress
    assert found == Progress(step=20, best_step=10) and found.started == "2024-02-29T23:59:59"
    shutil.rmtree(tmp_path / "checkpoints/step_000010")
    monkeypatch.chdir(folder.parent)
    assert resumable(checkpoint.read_saved(Path(folder.name)), config).progress == Progress(step=20)
