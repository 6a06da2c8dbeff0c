"""evaluate.py: its estimators by brute force, and the same policy by every way into vLLM."""

import dataclasses
import json
import math
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, TINY, on_ranks, read_rows, refused, train
from safetensors.torch import load_file, save_file
from test_lora import saved_adapter
from transformers import AutoTokenizer

from configs.base import Config
from runtime import adapter_files, files
from runtime.evaluation import Evaluation, evaluate_prompts, mean_and_stderr
from runtime.user_rewards import Reward
from tools import adapter, evaluate


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 8):
        right = torch.tensor([[float(i < c) for i in range(n)] for c in range(n + 1)]).flip(1)
        for k in range(1, n + 1):
            subsets = [list(subset) for subset in combinations(range(n), k)]
            shares = [sum(row[subset].any().item() for subset in subsets) / len(subsets) for row in right]
            assert evaluate.pass_at_k(right, k)[:, 0].tolist() == pytest.approx(shares, abs=1e-12)


def test_pass_at_k_of_large_n():
    """Against exact integers, which overflow a float64 from n of about 1,030 on."""
    n, k = 20_000, 1_024
    right = torch.zeros(4, n)
    for row, c in enumerate(counts := [1, 3, 500, n - k + 1]):
        right[row, :c] = 1
    exact = [1 - math.comb(n - c, k) / math.comb(n, k) for c in counts]
    assert evaluate.pass_at_k(right, k)[:, 0].tolist() == pytest.approx(exact, rel=1e-9)


def test_errors_count_problems_and_scores_below_one_are_wrong():
    """Four samples of each of two problems are two observations; 0.2 for good form is no fifth of a right answer."""
    scores = [1.0, 1.2, 0.2, 0.2] + [0.2] * 4 + [1.0, 0.2]
    metrics = Evaluation([], [Reward(value, correct=value) for value in scores], problems=2, seconds=1.0).metrics()
    assert metrics["accuracy"] == 0.25 and metrics["reward"] == pytest.approx(3.4 / 8)
    assert metrics["accuracy_stderr"] == pytest.approx(0.25)  # of 0.5 and 0: standard deviation 0.354, over root 2
    assert metrics["accuracy_greedy"] == 0.5 and metrics["reward_greedy"] == 0.6
    assert mean_and_stderr("x", torch.ones(1, 3)) == {"x": 1.0}, "one problem has no standard error"


# ---- Real vLLM ------------------------------------------------------------------------------------------------


def evaluate_a_run(run: Path, out: Path) -> dict[str, list[list[int]]]:
    """`evaluate.py --run_folder RUN`; then completions of its adapter as trained, of its export, of it on the base in
    16 bits, and of that base alone, which is then stopped by a text and by a token.
    """
    sys.argv = ["evaluate.py", *f"--run_folder {run} --eval_problems 32 --out {out}".split()]
    sampler, folder = evaluate.setup()
    evaluate.evaluate(sampler, folder)
    adapter.export(str(TINY), sampler.config.lora_adapter_path, f"{out}/model")
    plain = dataclasses.replace(sampler.config, dtype="bfloat16")
    streams = {
        "trained": evaluate.policy_weights(sampler.config, TINY),
        "exported": files.read_model(out / "model"),
        "16-bit": evaluate.policy_weights(plain, TINY),
        "base": evaluate.policy_weights(dataclasses.replace(plain, lora_adapter_path=""), TINY),
    }
    found = {}
    for name, stream in streams.items():
        sampler.engine.load_weights(stream)
        found[name] = [completion.token_ids for completion in evaluate_prompts(sampler).completions]
    for name, texts, token_ids in (("text", ["## "], []), ("token", [], sampler.tokenizer.encode("####"))):
        sampler.engine.stop_texts, sampler.engine.stop_token_ids = texts, token_ids
        completions = evaluate_prompts(sampler).completions
        found[name] = [completion.token_ids for completion in completions]
        assert all(len(completion.logprobs) == len(completion.token_ids) for completion in completions)
    return found


def until(stop: list[int], ids: list[int]) -> list[int]:
    """The tokens up to the first place where these stand, with them."""
    ends = [i for i in range(len(stop), len(ids) + 1) if ids[i - len(stop) : i] == stop]
    return ids[: ends[0]] if ends else ids


def test_a_checkpoint_is_evaluated_as_its_run_was_and_so_is_its_export(tmp_path):
    """Trained with QLoRA, whose base is not that of the model's files: two evaluations of one policy are equal only if
    weights, prompts and seeds all are.
    """
    options = "--steps 2 --learning_rate 0.02 --dtype nf4 --eval_problems 32 --eval_samples 3"
    metrics, run = train(1, f"train_grpo.py --config {ROOT}/configs/arithmetic_cpu.py {options}", tmp_path)
    (found,) = on_ranks(1, evaluate_a_run, run, tmp_path / "out", folder=tmp_path)
    results = json.loads((tmp_path / "out/results.json").read_text())
    logged = {name.removeprefix("eval/"): value for name, value in metrics[-1].items() if name.startswith("eval/")}
    assert logged.items() <= results["metrics"].items() and metrics[-1]["eval/accuracy"] != metrics[0]["eval/accuracy"]
    assert found["trained"] == found["exported"] != found["16-bit"]
    encode = AutoTokenizer.from_pretrained(TINY).encode
    for name, stop in (("token", encode("####")), ("text", encode("#### "))):  # one token, and another one after it
        assert found[name] == [until(stop, ids) for ids in found["base"]] != found["base"]

    samples = read_rows(tmp_path / "out/samples.jsonl")
    rights = [[s["reward"] for s in samples if s["problem"] == i and s["kind"] == "sampled"] for i in range(32)]
    assert results["metrics"]["pass@1"] == pytest.approx(sum(map(sum, rights)) / 96)
    assert results["metrics"]["pass@3"] == pytest.approx(sum(map(max, rights)) / 32)
    assert all((eval(s["prompt"].rstrip("=")) == int(s["extracted"] or -1)) == s["reward"] for s in samples)


def test_what_is_evaluated(model_folder, tmp_path):
    """An adapter brings its base and scale; a checkpoint its run's settings, which options override."""
    saved_adapter(model_folder("llama"), tmp_path / "adapter", rank=4, alpha=12)
    config, _, doubts = evaluate.parse(["--adapter", str(tmp_path / "adapter"), "--task", "arithmetic"])
    assert (config.model, config.lora_rank, config.lora_alpha) == (str(model_folder("llama")), 4, 12)
    settings = Config(
        task="arithmetic", model="elsewhere", temperature=0.7, eval_problems=5, fsdp_size=8, sequence_parallel_size=4
    )
    state = {"config": dataclasses.asdict(settings), "progress": {}, "log": {}}
    assert "does not say how its base was stored" in doubts[0]
    (tmp_path / "state.json").write_text(json.dumps(state))
    config, *_ = evaluate.parse(["--adapter", str(tmp_path / "adapter"), "--temperature", "0.5"])
    assert (config.model, config.task, config.temperature, config.lora_rank) == ("elsewhere", "arithmetic", 0.5, 4)
    assert config.eval_problems == evaluate.ALL
    assert (config.fsdp_size, config.sequence_parallel_size) == (0, 1), "it asks for no number of processes"
    assert evaluate.parse(["--model", "tiny", "--sync", "adapter"])[0].sync == "merged", "there is no adapter"
    model = saved_adapter(model_folder("llama"), tmp_path / "other" / "adapter")
    adapter_files.save_adapter(model, tmp_path / "other" / "adapter", base_model="elsewhere", base_dtype="nf4")
    config, _, doubts = evaluate.parse(["--adapter", str(tmp_path / "other" / "adapter"), "--task", "arithmetic"])
    assert (config.model, config.dtype, doubts) == ("elsewhere", "nf4", [])
    given = ["--lora_adapter_path", str(tmp_path / "other" / "adapter"), "--model", "tiny", "--dtype", "bfloat16"]
    config, _, doubts = evaluate.parse(given)
    assert config.lora_rank == 16 and "elsewhere" in doubts[0] and "nf4" in doubts[1]
    assert config.sends_adapter
    file = tmp_path / "other" / "adapter" / "adapter_model.safetensors"
    save_file({f"_orig_mod.{key}": tensor for key, tensor in load_file(file).items()}, file)
    assert not evaluate.parse(given)[0].sends_adapter, "vLLM would not find its keys"


def test_a_checkpoint_is_found_from_anywhere_and_on_another_task(model_folder, tmp_path, monkeypatch):
    """Another task than the run's brings its own data, reward and instruction; the adapter's rank is its file's."""
    saved_adapter(model_folder("llama"), tmp_path / "adapter", rank=4)
    settings = Config(data="mine.csv", answer_field="a", reward=["r.py:f"], instruction="Be brief.", temperature=0.7)
    state = {"config": dataclasses.asdict(settings), "progress": {}, "log": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    monkeypatch.chdir(tmp_path / "adapter")
    config, *_ = evaluate.parse(["--adapter", "."])
    assert (config.task, config.data, config.reward, config.temperature) == ("own", "mine.csv", ["r.py:f"], 0.7)
    config, *_ = evaluate.parse(["--adapter", ".", "--task", "arithmetic"])
    assert (config.task, config.data, config.reward, config.instruction) == ("arithmetic", "", [], None)
    assert (config.answer_field, config.temperature) == ("", 0.7)
    (tmp_path / "full.py").write_text(
        "from configs.base import Config\nconfig = Config(lora_rank=0, task='arithmetic')"
    )
    assert evaluate.parse(["--config", str(tmp_path / "full.py"), "--adapter", "."])[0].lora_rank == 4


def test_torchrun_takes_none_of_its_options_for_its_own():
    """As it does with every option that is the beginning of one of its own, such as --run of --run-path."""
    fields = [f"--{field.name}" for field in dataclasses.fields(Config)]
    options = [*fields, *re.findall(r'add_argument\("(--\w+)"', Path(evaluate.__file__).read_text())]
    for option in options:
        given = torch.distributed.run.get_args_parser().parse_args(["tools/evaluate.py", option, "x"])
        assert given.training_script_args == [option, "x"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--adaptor", "x"], ["'--adaptor'", "--adapter"]),
        (["--run_folder", "runs/nothing"], ["'runs/nothing'", "latest"]),
        (["--run_folder", "runs/nothing", "--checkpoint", "30"], ["step_000030"]),
        (["--run_folder", "runs/nothing", "--checkpoint", "first"], ["latest, best or a step", "'first'"]),
        (["--run_folder", "x", "--adapter", "y"], ["--run_folder", "--adapter"]),
        (["--checkpoint", "best"], ["'best'", "--run_folder"]),
        (["--adapter", "nowhere"], ["'nowhere'", "adapter_config.json"]),
        (["--eval_samples", "0"], ["eval_samples", "at least 1"]),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with refused(*words):
        evaluate.parse(arguments)
