"""The whole program on real parts: vLLM, FSDP2 over two ranks, and accuracy that rises."""

import json
import math
import os
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, torchrun, train
from safetensors.torch import load_file

GSM8K = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "gsm8k"))


def test_arithmetic_learns(tmp_path):
    """Held-out accuracy climbs well above where the teacher left it, and everything promised is on disk."""
    options = f"--config {ROOT}/configs/arithmetic_cpu.py --steps 30 --eval_every 15 --save_every 15"
    (before, *metrics), run = train(2, f"train_grpo.py {options}", tmp_path)
    error = 0.5 / math.sqrt(256 * 4)  # one standard error of an accuracy, of so many samples, at most
    assert before["eval/accuracy"] == pytest.approx(0.35, abs=4 * error), "the teacher's, in the weights"
    assert metrics[-1]["eval/accuracy"] > before["eval/accuracy"] + 10 * error
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert all(row["mismatch/kl"] < 0.01 for row in metrics), "trainer and sampler run the same weights"
    assert all(row["sync/update_survival"] > 0.9 for row in metrics)
    phases = ("rollout", "reward", "logprobs", "update", "sync", "eval", "save")  # the last is of the step before
    for row in metrics:
        assert sum(row.get(f"time/{phase}", 0.0) for phase in phases) == pytest.approx(row["time/step"], rel=1e-3)
    assert (run / "latest").read_text().strip() == "checkpoints/step_000030"
    adapters = [load_file(run / f"checkpoints/step_0000{n}/adapter/adapter_model.safetensors") for n in (15, 30)]
    assert adapters[0].keys() == adapters[1].keys()
    assert any((adapters[0][key] != adapters[1][key]).any() for key in adapters[0])
    samples = read_rows(run / "samples.jsonl")
    assert {"train", "eval"} == {sample["kind"] for sample in samples}
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["steps"] == 30 and record["environment"]["versions"]["torch"].startswith("2.")


@pytest.mark.parametrize(
    "ranks, tensor_parallel_size",
    [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_gsm8k_runs(tmp_path, ranks, tensor_parallel_size):
    """The real problems through the tiny model, on one process, with TP, and with two engines of two ranks.

    Ranks that share an engine also share the rows of micro-batches.
    """
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K at {GSM8K}; set GSM8K_DIR")
    for rank in range(2) if tensor_parallel_size == 2 else ():  # what a killed engine leaves must not be in the way
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").write_bytes(bytes(64))
    sizes = ["--tensor_parallel_size", str(tensor_parallel_size), "--sequence_parallel_size", str(tensor_parallel_size)]
    options = ["--config", f"{ROOT}/configs/gsm8k_cpu.py", "--steps", "2", "--data", str(GSM8K), *sizes]
    done = torchrun(ranks, "train_grpo.py", *options, "--output_dir", f"{tmp_path}/run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    metrics, run = read_rows(tmp_path / "run" / "metrics.jsonl"), tmp_path / "run"
    assert not list(Path("/dev/shm").glob("*cpushm*"))
    assert len(metrics) == 3, "step 0, before training, and two steps"
    samples = read_rows(run / "samples.jsonl")
    assert all(sample["prompt"].endswith("put your final answer within \\boxed{}.") for sample in samples)


def test_your_own_data_and_rewards(tmp_path):
    """The command of the README, without a config file: the weighted sum of the parts is what is learned from."""
    sizes = "--steps 2 --prompts_per_step 8 --max_prompt_length 16 --max_completion_length 24 --learning_rate 2e-3"
    own = f"--data {ROOT}/examples/sums.csv --prompt_field question --answer_field label"
    rewards = f"--reward {ROOT}/examples/rewards.py:score {ROOT}/examples/rewards.py:short=0.5"
    (_, *metrics), run = train(2, f"train_grpo.py --model tiny {own} {rewards} {sizes}", tmp_path)
    assert "54 problems to train on, 6 held out" in (tmp_path / "rank_0.txt").read_text()
    for row in metrics:
        parts = row["reward/correct"] + row["reward/form"] + 0.5 * row["reward/short"]
        assert row["reward/mean"] == pytest.approx(parts, abs=1e-12) and row["reward/timeouts"] == 0
        assert row["reward/correct_std"] > 0 and row["reward/form"] <= 0.2
        assert -0.15 < row["reward/short"] < -0.05, "a sum and its end are 13 characters or fewer"
    samples = read_rows(run / "samples.jsonl")
    for sample in samples:
        truth = str(eval(sample["prompt"].rstrip("=")))
        right = sample["completion"].strip().endswith(f"#### {truth}")
        assert sample["parts"]["correct"] == right and sample["answer"] == truth
    evaluated = [sample["parts"]["correct"] for sample in samples if (sample["step"], sample["kind"]) == (2, "eval")]
    assert metrics[-1]["eval/accuracy"] == pytest.approx(sum(evaluated[:6]) / 6), "a part of form is no accuracy"
