"""What goes wrong while a run runs: on real processes, with a fault put into one of them."""

import fcntl
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, on_ranks, read_rows, refused, torchrun, torchrun_command

import fsdp_utils
import reward
import train_grpo
from configs.base import Config
from configs.checks import resolve_config
from runtime import signals
from runtime.batching import make_updates
from runtime.checkpoint import Progress
from runtime.conversation import Completion
from runtime.evaluation import task_reward
from runtime.health import HealthMonitor

WITHIN = 60  # seconds in which one rank's failure must end all

FAULTY = """
import os, resource, signal, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
import torch
from vllm.v1.engine.llm_engine import LLMEngine
import fsdp_utils, reward, train_grpo
from runtime.launch import launch

fault, rank = sys.argv.pop(1), int(os.environ["RANK"])
steps = 0


def score(completion, answer):
    if rank == 1 and "+" not in answer:
        raise KeyError("no such answer")
    return 0.0


class Poison(torch.autograd.Function):
    "The identity, whose gradient is infinite."

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * float("inf")


honest = train_grpo.policy_loss


def poisoned(*arguments):
    "On one rank alone: in step 2 an infinite loss, whose gradients are finite; from step 4 on infinite gradients."
    global steps
    loss, info = honest(*arguments)
    steps += 1
    if rank == 1 and steps == 2:
        loss = loss + float("inf")
    if rank == 1 and steps >= 4:
        loss = Poison.apply(loss)
    if fault == "killed" and rank == 1 and steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss, info


def slow_step(engine):
    "Where there is a file `slow`, a step of vLLM takes 4 s, and so a rollout is longer than the 30 s of torchrun."
    if Path("slow").exists():
        Path("begun").touch()
        time.sleep(4)
    return quick_step(engine)


quick_step = LLMEngine.step
if fault == "signals":
    LLMEngine.step = slow_step
elif fault == "reward":
    reward.TASKS["arithmetic"] = reward.Task(reward.arithmetic_problems, score)
else:
    train_grpo.policy_loss = poisoned


def train(run):
    if fault == "numbers":  # no file may be larger, as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    train_grpo.train(run)


launch(train_grpo.setup_grpo, train)
"""


def start(fault: str, folder: Path, *options: str, **more) -> subprocess.Popen:
    """A short run on two ranks, one of which has a fault. more: arguments of `Popen`."""
    (folder / "faulty.py").write_text(FAULTY.format(root=str(ROOT)))
    arguments = f"{folder}/faulty.py {fault} --config {ROOT}/configs/arithmetic_cpu.py --output_dir {folder}/r"
    arguments += " --steps 9 --eval_problems 8 --eval_samples 1 --tokens_per_microbatch 65536"
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "process_group": 0} | more
    return subprocess.Popen(torchrun_command(2, *arguments.split(), *options), cwd=folder, **more)


def end(process: subprocess.Popen) -> tuple[str, str]:
    """What a failing run printed, and what torchrun's report gives as the root cause, in its last line."""
    first = None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if first is None and ("error: " in line or "SIGKILL" in line):
            first = time.time()
    assert process.wait() != 0
    assert time.time() - first < WITHIN, "one rank's failure ends all"
    report = [line.strip() for line in lines if line.strip(" =\n")]
    return "".join(lines), report[-1].removeprefix("traceback : ")


@pytest.mark.slow
def test_a_reward_that_raises_on_one_rank_ends_all(tmp_path):
    output, cause = end(start("reward", tmp_path, "--prompts_per_step", "4"))
    assert cause.startswith("error: the reward of task 'arithmetic' raised KeyError: 'no such answer' (")
    assert "faulty.py, line " in cause and "on Problem(prompt=" in cause and "and completion '" in cause
    assert output.count("\nerror: ") == 1, "the other rank has nothing to add"


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(tmp_path):
    """As by the kernel, for want of memory."""
    output, cause = end(start("killed", tmp_path))
    assert cause.startswith("Signal 9 (SIGKILL) received by PID")
    leftovers = subprocess.run(["pgrep", "-f", str(tmp_path / "faulty.py")], capture_output=True, text=True).stdout
    assert not leftovers, "no process stays behind"


@pytest.mark.slow
def test_what_a_run_survives_and_what_stops_it(tmp_path):
    """A full disk, and on one rank an infinite loss, are passed over; endless infinite gradients are not."""
    options = ["--save_every", "1"]
    output, cause = end(start("numbers", tmp_path, *options))
    metrics = read_rows(tmp_path / "r" / "metrics.jsonl")[1:]
    assert [row["skipped_updates"] for row in metrics] == [0, 1, 0, 1, 1, 1, 1, 1, 1]
    assert metrics[1]["loss"] is None and metrics[1]["grad_norm"] is None, "JSON has no infinity"
    assert all(row["loss"] is not None for row in metrics[3:]), "only the gradients were infinite"
    assert metrics[2]["sync/update_survival"] > 0.9, "the update before it was not touched"
    assert "were NaN or infinite in 6 updates, some in every" in cause and "grad_norm" in cause
    for step in range(1, 9):
        assert f"no checkpoint of step {step}: " in output and "File too large" in output
    assert list((tmp_path / "r" / "checkpoints").iterdir()) == [], "nothing half-written stays"


def steps_done(folder: Path) -> int:
    """The last step in the log; -1: none."""
    path = folder / "r" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def await_that(happens: Callable[[], object], process: subprocess.Popen, terminal: int | None = None) -> None:
    """Waits while the process runs; reads what it writes to a terminal."""
    deadline = time.time() + 240
    while not happens():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16) if terminal else None


def on_a_terminal() -> None:
    """In a new process: standard input becomes its terminal; SIGUSR1 is ignored, as by `trap '' USR1` in a shell."""
    fcntl.ioctl(0, termios.TIOCSCTTY)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def test_signals_to_torchrun(tmp_path):
    """SIGUSR1 saves and goes on. When the terminal is closed, and by SIGTERM, a run is saved in the middle of a rollout
    that takes longer than torchrun waits.
    """
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    pipes = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "process_group": None, "start_new_session": True}
    options = ["--steps", "1000", "--save_every", "0", "--eval_every", "0"]
    process = start("signals", tmp_path, *options, preexec_fn=on_a_terminal, **pipes)
    os.close(theirs)
    await_that(lambda: steps_done(tmp_path) > 0, process, ours)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for number in [process.pid, *map(int, ranks)]:  # as Slurm does
        os.kill(number, signal.SIGUSR1)
    await_that((tmp_path / "r" / "latest").exists, process, ours)
    saved = int((tmp_path / "r" / "latest").read_text()[-7:])
    await_that(lambda: steps_done(tmp_path) > saved, process, ours)

    (tmp_path / "slow").touch()
    await_that((tmp_path / "begun").exists, process, ours)
    os.close(ours)
    process.wait(timeout=60)
    last = steps_done(tmp_path)
    assert (tmp_path / "r" / "latest").read_text() == f"checkpoints/step_{last:06d}\n" and last > saved

    (tmp_path / "begun").unlink()
    (tmp_path / "slow").unlink()
    process = start("signals", tmp_path, *options, "--resume")
    await_that(lambda: steps_done(tmp_path) > last, process)
    (tmp_path / "slow").touch()
    await_that((tmp_path / "begun").exists, process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert f"resumed after step {last}" in output
    last = steps_done(tmp_path)
    assert f"stopped after step {last}, and saved. To go on, add --resume to the command." in output
    assert (tmp_path / "r" / "latest").read_text() == f"checkpoints/step_{last:06d}\n"
    assert "SIGKILL" not in output and "error: " not in output
    assert process.returncode == 1 and "SignalException" in output, "torchrun's own end, see docs/reliability.md"


@pytest.mark.parametrize(
    "result, words",
    [
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        (None, "returned None"),
        ("1.0", "returned '1.0'"),
        ([1.0], "returned [1.0]"),
        (1j, "returned 1j"),
        (torch.ones(2), "returned tensor([1., 1.])"),
        (10**400, "raised OverflowError"),
        (ZeroDivisionError("x"), "raised ZeroDivisionError: x"),
        (SystemExit(0), "raised SystemExit: 0"),
    ],
)
def test_what_a_reward_may_not_return(monkeypatch, result, words):
    def score(completion: str, answer: str) -> object:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setitem(reward.TASKS, "mine", reward.Task(reward.arithmetic_problems, score))
    with refused(words, "task 'mine'", "1+1=", "'it is 3'"):
        task_reward("mine", reward.Problem("1+1=", "2"), "it is 3")


def test_a_run_under_nohup_does_not_stop_with_its_terminal():
    code = "import signal; from runtime import signals; print(*(number.name for number in signals.STOPPING))"
    command = ["bash", "-c", f"trap '' HUP; exec {sys.executable} -c '{code}'"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SIGTERM", "SIGINT"]


def asked_to_stop(_number, _frame):
    """Unlike what ends a process."""


def run_in_a_sandbox() -> int:
    """What a sandbox does that a reward forks, and then stops for being late: its exit code."""
    signals.listen(asked_to_stop)
    sandbox = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    sandbox.start()
    time.sleep(0.2)
    sandbox.terminate()
    sandbox.join(10)
    code = sandbox.exitcode
    sandbox.kill()
    return code


def test_a_process_that_a_reward_forks_can_be_stopped(tmp_path):
    assert on_ranks(1, run_in_a_sandbox, folder=tmp_path) == [-signal.SIGTERM]


@pytest.mark.parametrize("value", [True, 1, 0.5, -3])
def test_what_a_reward_may_return(monkeypatch, value):
    monkeypatch.setitem(reward.TASKS, "mine", reward.Task(reward.arithmetic_problems, lambda *_: value))
    found = task_reward("mine", reward.Problem("1+1=", "2"), "3")
    assert found.total == found.correct == value


def test_a_mismatch_stops_a_run():
    monitor, progress = HealthMonitor(Config(), log=None), Progress()
    monitor.check({"mismatch/kl": 0.09}, progress)
    with pytest.raises(RuntimeError, match="differ by 0.11 nats per token, above 0.1"):
        monitor.check({"mismatch/kl": 0.11}, progress)
    progress.updates_skipped = 5
    with pytest.raises(RuntimeError, match="6 updates, some in every one of the last steps.*critic/loss nan"):
        monitor.check({"critic/skipped_updates": 1.0, "critic/loss": math.nan}, progress)


# ---- Nothing wrong, only unusual: it must simply work ---------------------------------------------------------


def empty_updates(tiny: str) -> dict[str, list[float]]:
    """Of every algorithm, gradient norms of updates in which some completions, or all, have no token."""
    from runtime.models import build_policy

    world, norms = fsdp_utils.init_world(), {}
    for name, algorithm in train_grpo.ALGORITHMS.items():
        small = {"group_size": 2, "lora_rank": 4, "tokens_per_microbatch": 64}
        config = Config(model=tiny, algorithm=name, dtype="float32", **small)
        config = resolve_config(config, algorithm)
        policy = build_policy(config, tiny, world, algorithm.prompt_head)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
        session = SimpleNamespace(policy=policy, config=config, optimizer=optimizer, world=world)
        steps = [[3, 0, 0, 0], [0, 0, 0, 0], [0, 2, 5, 1]]
        norms[name] = [update_norm(session, algorithm, lengths) for lengths in steps]
    return norms


def update_norm(session: SimpleNamespace, algorithm: train_grpo.Algorithm, lengths: list[int]) -> float:
    """The gradient norm of an update over two groups of two completions of those lengths."""
    config, world = session.config, session.world
    completions = [Completion(i // 2, [5, 6], [7] * n, [-1.0] * n, truncated=False) for i, n in enumerate(lengths)]
    advantages = algorithm.advantage(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)).flatten()
    useless = train_grpo.only_advantages_teach(config, algorithm)
    (batches,) = make_updates(completions, advantages, algorithm.weight, config, world, drop_useless=useless)
    for batch in batches if algorithm.reference else []:
        batch.ref_logprobs = session.policy(batch.packed).logprobs.detach()
    return train_grpo.update_policy(session, batches, algorithm.loss)["grad_norm"]


@pytest.mark.slow
def test_completions_without_a_token_teach_nothing(tmp_path):
    """One, a whole group, and all of a step."""
    (norms,) = on_ranks(1, empty_updates, str(TINY), folder=tmp_path)
    for name, found in norms.items():
        assert len(found) == 3 and all(math.isfinite(norm) for norm in found), (name, found)
        assert found[0] > 0 and found[1] == 0 and found[2] > 0, (name, found)


@pytest.mark.slow
def test_fewer_problems_than_a_batch(tmp_path):
    """Three problems in every script, eight prompts a step, four evaluated; prompts that are too long are left out."""
    questions = ["2+2?", "¿Cuánto son 2 más 2? 🦊", "二加二 \u0000\u200f", "long " * 200]
    for split in ("train", "test"):
        rows = [json.dumps({"question": question, "answer": "#### 4"}) for question in questions]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    options = f"--config configs/gsm8k_cpu.py --data {tmp_path} --output_dir {tmp_path}/r --steps 2"
    options += " --prompts_per_step 8 --group_size 2 --max_completion_length 8"
    done = torchrun(2, "train_grpo.py", *options.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 problems to train on, 3 held out" in done.stdout
    assert "768 tokens, are left out: 1 of 4 to train on, 1 of 4 held out" in done.stdout
    samples = read_rows(tmp_path / "r" / "samples.jsonl")
    assert {sample["prompt"].removesuffix("\n" + reward.BOXED) for sample in samples} == set(questions[:3])
