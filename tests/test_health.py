"""Nothing is learned in silence: what is said of steps that teach nothing, and when they end a run."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_rows, torchrun

from configs.base import Config
from runtime import steps
from runtime.checkpoint import Progress
from runtime.conversation import Completion
from runtime.evaluation import rollout_metrics
from runtime.health import HealthMonitor, describe_rewards, explain_survival, likely_causes, rewards_differ
from runtime.run import Run

NOTHING = {"reward/mixed_groups_frac": 0.0, "reward/min": 0.0, "reward/max": 0.0, "completion/truncated_frac": 0.25}
SAMPLE = {"completion": "It is\n72.", "extracted": None, "answer": "72", "reward": 0.0}


def completions(count: int) -> list[Completion]:
    return [Completion(i, [1], [2] * (i + 1), [0.0] * (i + 1), truncated=i == 0) for i in range(count)]


def test_groups_with_different_rewards_are_counted():
    scores = torch.tensor([0, 0, 1, 1, 0, 1, 0.1, 0.1, 0.1, -1], dtype=torch.float64)
    found = rollout_metrics(completions(10), scores, group_size=2)
    assert found["rollout/groups"] == 5 and found["reward/mixed_groups_frac"] == pytest.approx(2 / 5)
    assert (found["reward/min"], found["reward/max"]) == (-1, 1) and rewards_differ(found)
    solved_or_not = rollout_metrics(completions(4), scores[:4], group_size=2)
    assert not rewards_differ(solved_or_not), "each group has one reward"
    assert rewards_differ(rollout_metrics(completions(4), scores[:4], None)), "the step is compared as a whole"
    (alone,) = [rollout_metrics(completions(1), scores[:1], None)]
    assert "reward/std" not in alone and not rewards_differ(alone), "of one completion there is no deviation"
    assert rewards_differ({"my/metric": 1.0}), "a loop that does not measure rewards is not judged"


@pytest.mark.parametrize(
    "changes, samples, first, others",
    [
        ({}, [SAMPLE], "25% of the completions are cut off at max_completion_length 1024", "another format.* too hard"),
        ({"completion/truncated_frac": 0.0}, [SAMPLE], "another format.*none was found in 1 samples", "too hard"),
        ({"completion/truncated_frac": 0.0}, [SAMPLE | {"extracted": "7"}], "another format than the task reads", ""),
        ({"reward/min": 0.2, "reward/max": 0.2}, [SAMPLE | {"extracted": "7"}], "25%", "same part of the reward"),
        ({"reward/min": 1.0, "reward/max": 1.0}, [], "too easy", ""),
        ({"reward/max": 1.0}, [SAMPLE], "either always or never solved", "raise group_size, which is 8.*temperature"),
    ],
)
def test_likely_causes_follow_from_describe_rewards(changes, samples, first, others):
    causes = likely_causes(NOTHING | changes, samples, Config())
    assert re.search(first, causes[0]) and re.search(others, "; ".join(causes[1:])), causes
    assert ("too easy" in causes[0]) == (len(causes) == 1)


def reason_after(steps: int, metrics: dict[str, float], config: Config) -> str | None:
    """Why a run stops when so many steps have taught nothing."""
    monitor = HealthMonitor(config, SimpleNamespace(print=lambda line: None))
    return monitor.reason_to_stop(9, metrics, [SAMPLE], Progress(steps_useless=steps - 1))


def test_when_to_stop():
    config = Config(max_useless=3)
    assert reason_after(2, NOTHING, config) is None
    reason = reason_after(3, NOTHING, config)
    assert reason.startswith(
        "nothing to learn from in 3 steps in a row (max_useless): all rewards are 0. Likely causes: "
    )
    assert "See samples.jsonl" in reason and "\n" not in reason
    reason = reason_after(3, NOTHING | {"reward/timeouts": 4}, Config(max_useless=3, reward=["a.py:f"]))
    assert "4 rewards took longer than reward_timeout" in reason and "another format" not in reason
    assert reason_after(1000, NOTHING, Config(max_useless=0)) is None
    assert "only the critic learns" in describe_rewards(NOTHING | {"critic/loss": 1.0})


def unfinished_run(said: list[str], progress: Progress, config: Config) -> Run:
    """A run without a model, whose log is a list."""
    run = Run.__new__(Run)
    run.config, run.progress, run.samples, run.saved_step = config, progress, [SAMPLE], None
    run.log = SimpleNamespace(print=said.append, step=lambda *_: None, phase=lambda _: None)
    run.health, run.engine = HealthMonitor(config, run.log), SimpleNamespace(metrics=dict)
    run.complete_step = lambda step: setattr(run, "progress", dataclasses.replace(run.progress, step=step))
    run.stop = SimpleNamespace(check=lambda: None, take_save=lambda: False)
    return run


def test_a_run_says_it_once_in_full_counts_and_stops_saved(monkeypatch):
    """Also over a resume, which the count survives; one step that teaches anything begins the count anew."""
    said, config = [], Config(max_useless=4, steps=100, eval_every=0, save_every=0)
    monkeypatch.setattr(steps, "save_checkpoint", lambda run, accuracy: setattr(run, "saved_step", run.progress.step))
    run = unfinished_run(said, Progress(), config)
    learned = NOTHING | {"reward/mixed_groups_frac": 0.5, "reward/max": 1.0}
    for step, metrics in enumerate([NOTHING, learned, NOTHING, NOTHING], start=1):
        steps.finish_step(run, step, dict(metrics))
    assert said == [
        "  nothing to learn from in this step: all rewards are 0; 25% of the completions are cut off. "
        "A sample: 'It is 72.' (truth 72, reward 0)",
        "  nothing to learn from, 1 step in a row",
        "  nothing to learn from, 2 steps in a row",
    ]
    assert run.progress.steps_useless == 2
    saved = json.loads(json.dumps(dataclasses.asdict(run.progress)))
    run = unfinished_run(said, Progress(**saved), config)
    steps.finish_step(run, 5, dict(NOTHING))
    assert "A sample: " in said[-1], "who resumes has not read it"
    with pytest.raises(RuntimeError, match="in 4 steps in a row .*; the last step that was saved is 6"):
        steps.finish_step(run, 6, dict(NOTHING))


def test_a_run_whose_updates_are_lost_says_so_once_and_stops_saved(monkeypatch):
    """Ten syncs in a row may lose most of the update; what the trainer itself runs merged is not lost."""
    monkeypatch.setattr(steps, "save_checkpoint", lambda run, accuracy: setattr(run, "saved_step", run.progress.step))
    said, lost = [], NOTHING | {"reward/mixed_groups_frac": 0.5, "reward/max": 1.0, "sync/update_survival": 0.1}
    config = Config(steps=100, eval_every=0, save_every=0, sync="merged")
    run = unfinished_run(said, Progress(syncs_lost=5), config)
    steps.finish_step(run, 1, lost | {"sync/update_survival": 0.6})
    for step in range(2, 11):
        steps.finish_step(run, step, dict(lost))
    assert said == [f"  {explain_survival(0.6)}"] and run.saved_step is None
    with pytest.raises(RuntimeError, match="for 10 syncs in a row .* 0.5 .cosine.: .*; the last .* saved is 11"):
        steps.finish_step(run, 11, dict(lost))
    for setting in ({"max_useless": 0}, {"sync": "straight_through"}):
        run = unfinished_run(said, Progress(syncs_lost=9), dataclasses.replace(config, **setting))
        steps.finish_step(run, 1, dict(lost))


def test_a_real_run_stops(tmp_path):
    """Two tokens hold no answer, so all rewards are 0."""
    options = "--steps 9 --max_useless 2 --max_completion_length 2 --prompts_per_step 4 --group_size 2 --save_every 0"
    options += f" --eval_problems 4 --eval_samples 1 --output_dir {tmp_path}/silent"
    done = torchrun(1, "train_grpo.py", "--config", str(ROOT / "configs/arithmetic_cpu.py"), *options.split())
    assert done.returncode == 1
    (step, why, _, again) = done.stdout.splitlines()[-4:]
    assert "reward 0.000 | groups 0/4 | " in step and "nan" not in done.stdout
    assert why.startswith(
        "  nothing to learn from in this step: all rewards are 0; 100% of the completions are cut off"
    )
    assert again == "  nothing to learn from, 2 steps in a row"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "in 2 steps in a row (max_useless)" in line and "100% of the completions are cut off at" in line
    assert "\r" not in done.stderr, "a log file gets no progress bar"
    rows = read_rows(tmp_path / "silent/metrics.jsonl")
    assert [row.get("reward/mixed_groups_frac") for row in rows] == [None, 0, 0]
    assert "loss" not in rows[2] and "policy/entropy" not in rows[2], "what was not measured is not there"
    state = json.loads((tmp_path / "silent/checkpoints/step_000002/state.json").read_text())
    assert state["progress"]["steps_useless"] == 2
