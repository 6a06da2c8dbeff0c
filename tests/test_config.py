"""The command line: what is wrong is said in one line, with exit code 2 and no traceback."""

import dataclasses
import subprocess
import sys

import pytest
from conftest import ROOT

import train_grpo
from configs.base import Config
from runtime.command_line import parse_config

ARITHMETIC = ["--config", str(ROOT / "configs" / "arithmetic_cpu.py")]


def test_the_file_is_over_the_defaults_and_options_over_the_file():
    config = parse_config([*ARITHMETIC, "--steps", "7", "--target_modules", "q_proj", "v_proj"], "")
    assert (config.task, config.steps, config.target_modules) == ("arithmetic", 7, ["q_proj", "v_proj"])
    assert config.temperature == Config().temperature


def test_a_learning_rate_that_nobody_names_is_the_rules():
    """Ten times that of all weights for adapters, whatever their rank."""
    rates = {}
    for rank in ("0", "1", "32", "256"):
        given = ["--config", str(ROOT / "configs" / "qwen2_5_3b_gsm8k.py"), "--lora_rank", rank]
        rates[rank] = train_grpo.configure(given)[0].learning_rate
    assert rates == {"0": 3e-6, "1": 3e-5, "32": 3e-5, "256": 3e-5}
    assert train_grpo.configure([*given, "--learning_rate", "1e-4"])[0].learning_rate == 1e-4


def test_every_field_is_an_option_with_a_line_of_help():
    for field in dataclasses.fields(Config):
        assert 5 < len(field.metadata["help"]) < 110, field.name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_short(path):
    assert isinstance(parse_config(["--config", str(path)], ""), Config)
    listed = path.read_text().split("\nconfig = ", 1)[1].strip().splitlines()
    assert len(listed) <= 27, "at most 25 settings"


FORK = """
import dataclasses
import train_grpo
from configs.arithmetic_cpu import config as default

train_grpo.ALGORITHMS["mine"] = train_grpo.Algorithm(train_grpo.center, train_grpo.clip_token, train_grpo.all_tokens)
config = dataclasses.replace(default, algorithm="mine")
"""


def test_a_user_sees_one_line(tmp_path):
    """On standard error, with exit code 2, whether the option or what it names is wrong.

    A config file may add an algorithm to the script that runs it, so the second run only lacks its model.
    """
    (tmp_path / "mine.py").write_text(FORK)
    mistakes = {"--steps": ["--stepz", "3"]}
    mistakes["/no/such/model"] = ["--config", str(tmp_path / "mine.py"), "--model", "/no/such/model"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    runs = [subprocess.Popen([sys.executable, "train_grpo.py", *ARITHMETIC, *m], **pipes) for m in mistakes.values()]
    for word, run in zip(mistakes, runs):
        out, err = run.communicate(timeout=120)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert run.returncode == 2 and word in line
        assert "Traceback" not in err and not out


def test_a_model_is_named_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    """An adapter's folder names its base: a folder absolutely, a model of the hub as it is called there."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Config(model="base").model_source == str(tmp_path / "base")
    assert Config(model="Qwen/Qwen2.5-3B-Instruct").model_source == "Qwen/Qwen2.5-3B-Instruct"
