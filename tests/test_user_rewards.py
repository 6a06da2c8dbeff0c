"""Functions of users' files: how they are called, what they may return, and what happens when they fail or hang."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, on_ranks, serving
from transformers import AutoTokenizer

import fsdp_utils
from configs.base import Config
from runtime.conversation import Completion
from runtime.data import Problem
from runtime.evaluation import Evaluation, compute_rewards, make_scorer, part_metrics, total_rewards
from runtime.run import Prompt
from runtime.user_rewards import UserRewards

FUNCTIONS = """
import asyncio, os, random, time
import numpy
from dataclasses import dataclass
import helper  # beside this file

@dataclass
class Right:  # looks its own module up in sys.modules
    value: float

def equal(completion, answer): return Right(completion == answer).value
def parts(completion, *, answer, level=None, **columns):
    assert sorted(columns) == ["label", "prompt"], columns
    return {"correct": completion == answer, "form": helper.FORM}
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float((data_source, solution_str == ground_truth) == ("here", True))
def trl(prompts, completions, label, **kwargs):
    assert len(prompts) == len(label) == len(kwargs["level"]) and "completion" not in kwargs
    return [len(c) if isinstance(c, str) else len(c[0]["content"]) + (c[0]["role"] == "assistant") for c in completions]
async def slow(completion):
    await asyncio.sleep(0.5)
    return 1
async def slow_batch(completions):
    await asyncio.sleep(0)
    return [{"a": 1, "b": i} for i, _ in enumerate(completions)]
def hang(completion):
    while completion == "hang": pass
    return 1
async def hang_async(completion):
    await asyncio.sleep(0 if completion != "hang" else 1000)
    return 1
def hang_batch(completions): time.sleep(1000)
def late(completion): raise TimeoutError
def draw(completion): return random.random()
def nan(completion): return float("nan")
def of_numpy(completion): return numpy.isclose(float(completion), 2)
def text(completion): return "1"
def nothing(completion): pass
def raises(completion): return {}[completion]
def leaves(completion): raise SystemExit(0)
def dies(completion): os._exit(3)
def few(completions): return [1]
def number(completions): return 1
def taken(completion): return {"mean": 1}
def odd(completion): return {"a b": 1}
def needs(completion, difficulty): return 1
def neither(output, answer): return 1
def group(completions): return [len(completions)] * len(completions)
"""
ROWS = [{"prompt": "1+1=", "completion": text, "answer": "2", "label": "2", "level": 1} for text in ("2", "hang", "3")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """`file("equal", "trl=0.5")` are options of functions of the file above."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "helper.py").write_text("FORM = 0.25\n")
    return lambda *names: [f"{folder}/functions.py:{name}" for name in names]


def score(options: list[str], rows: list[dict] = ROWS, timeout: float = 30.0) -> list:
    rewards = UserRewards(options, timeout)
    rewards.check_columns(rows[0])
    return rewards.score(rows)


# ---- How functions are called -----------------------------------------------------------------------------------


def test_totals_are_weighted_sums_of_parts(file):
    """In every form, sync and async; the numbers are counted by hand."""
    rewards = score(file("equal=2", "parts", "trl=0.5", "slow", "slow_batch=0"))
    assert [r.total for r in rewards] == [2 + 1.25 + 0.5 + 1, 0.25 + 2 + 1, 0.25 + 0.5 + 1]
    assert rewards[0].parts == {"equal": 1, "correct": 1, "form": 0.25, "trl": 1, "slow": 1, "a": 1, "b": 0}
    assert [r.correct for r in rewards] == [1, 0, 0] and not any(r.timeouts for r in rewards)
    metrics = part_metrics(rewards)
    assert metrics["reward/form"] == 0.25 and metrics["reward/timeouts"] == 0
    assert metrics["reward/b"] == 1 and metrics["reward/b_std"] == 1
    assert metrics["reward/trl"] == pytest.approx((1 + 4 + 1) / 3)


def test_chats_and_verls_names(file):
    """If the prompt is a list of messages, so is the completion in TRL's form."""
    chats = [{"prompt": [{"role": "user", "content": "?"}], "completion": "abc", "label": 1, "level": 2}]
    assert score(file("trl"), chats)[0].total == 4
    row = {"prompt": "?", "completion": "7", "answer": "7", "data_source": "here", "reward_model": {}}
    assert [r.total for r in score(file("compute_score"), [row, row | {"completion": "8"}])] == [1, 0]


def test_numbers_of_numpy_are_numbers(file):
    assert [r.total for r in score(file("of_numpy"), [ROWS[0], ROWS[2]])] == [1, 0]


def test_async_completions_are_scored_at_the_same_time(file):
    start = time.monotonic()
    assert sum(reward.total for reward in score(file("slow"), ROWS * 20)) == 60
    assert time.monotonic() - start < 15, "and not 30 s"


def test_random_rewards_follow_the_seed(file):
    draws = []
    for seed in (1, 1, 2):
        random.seed(seed)
        draws.append([reward.total for reward in score(file("draw"))])
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 3


def test_what_is_learned_from_and_what_is_counted_as_right(file, monkeypatch):
    """With 0.25 for form and no right answer, accuracy is 0; without a part that says what is right, there is none."""
    problems = [Problem("1+1=", "2", {"label": "2", "level": 1})] * 2
    texts = list(zip(problems * 3, ["3", "2", "3", "3", "3", "2"]))  # two samples of each, then greedy ones
    metrics = Evaluation([], make_scorer(Config(reward=file("parts")), problems)(texts), 2, 1.0).metrics()
    assert metrics["accuracy"] == 0.25 and metrics["reward"] == pytest.approx(0.5)
    assert metrics["accuracy_greedy"] == 0.5 and metrics["accuracy_stderr"] == pytest.approx(0.25)
    plain = Evaluation([], make_scorer(Config(reward=file("equal")), problems)(texts), 2, 1.0).metrics()
    assert plain == {"reward": 0.25, "reward_greedy": 0.5}
    with pytest.raises(ValueError, match="task 'own' has no score of its own: add --reward"):
        make_scorer(Config(), problems)


# ---- What goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hang", "hang_async", "late", "hang_batch"])
def test_a_timeout_is_a_named_and_counted_zero(file, name):
    """Only the completion that hangs counts 0, and in TRL's form the whole call does; other functions' rewards stay."""
    rewards = score(file(name, "equal"), timeout=1.0)
    late = {"late": [1, 1, 1], "hang_batch": [1, 1, 1]}.get(name, [0, 1, 0])
    assert [r.timeouts for r in rewards] == [tuple(file(name)) * count for count in late]
    assert [r.total for r in rewards] == [1 + 1 - late[0], 0, 1 - late[2]]
    assert part_metrics(rewards)["reward/timeouts"] == sum(late)


@pytest.mark.parametrize(
    "name, words",
    [
        ("nan", "nan returned nan, which is no finite number, on '1.1=' and completion '2'"),
        ("text", "text returned '1', which is no finite number"),
        ("nothing", "returned None, which is no finite number"),
        ("raises", r"raises raised KeyError: '2' \(.*functions.py, line \d+\), on '1.1=' and completion '2'"),
        ("leaves", "leaves raised SystemExit: 0"),
        ("dies", "a process of the reward died, with exit code 3"),
        ("few", r"few must return a list of 3 values, one per completion, not \[1\]"),
        ("number", "number must return a list of 3 values, one per completion, not 1"),
        ("taken", "taken has a part 'mean': reward/mean is another metric's name"),
        ("odd", "odd has a part 'a b'"),
        ("needs", "needs needs difficulty, and there are: prompt, completion, answer, label, level"),
        ("neither", "must have a parameter `completion`.* or `completions`.*its parameters are: output, answer"),
        ("scores", "has no function 'scores'; it has: Right, equal, parts"),
        ("equal=much", "must be FILE.py:FUNCTION or FILE.py:FUNCTION=WEIGHT, not"),
    ],
)
def test_mistakes_are_one_line(file, name, words):
    with pytest.raises(ValueError, match=words) as error:
        score(file(name))
    assert "\n" not in str(error.value)


def test_mistakes_of_files(file, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "missing.py").write_text("import no_such_module\n")
    for option, words in (
        ("broken.py:f", "broken.py' raised SyntaxError"),
        ("missing.py:f", "missing.py' raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("nowhere.py:f", "there is no file '.*nowhere.py' for reward"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            UserRewards([f"{tmp_path}/{option}"], 1.0)
    with pytest.raises(ValueError, match="needs answer.*answer_field names the answer's"):
        score(file("equal"), [{"prompt": "?", "completion": "7"}])
    with pytest.raises(ValueError, match="needs ground_truth.*answer_field names the answer's"):
        score(file("compute_score"), [{"prompt": "?", "completion": "7", "data_source": "here"}])
    with pytest.raises(ValueError, match="has a part 'equal', and so has another"):
        score(file("equal", "equal=0.5"))


def score_on_ranks(options: list[str]) -> list:
    """The rewards of six completions of three prompts, as a rank of a run has them."""
    world, tokenizer = fsdp_utils.init_world(), AutoTokenizer.from_pretrained(TINY)
    problems = [Problem("1+1=", "2", {"label": "2", "level": 1})] * 3
    texts = ["2", "3", "hang", "2", "1", "2"]
    scorer = make_scorer(Config(reward=options, reward_timeout=2.0), problems)
    prompts = [Prompt(problem, tokenizer.encode(problem.prompt)) for problem in problems]
    completions = [Completion(i // 2, [1], tokenizer.encode(text), [], False) for i, text in enumerate(texts)]
    return compute_rewards(prompts, completions, scorer, tokenizer, world)


def test_ranks_agree_about_parts_and_timeouts(file, tmp_path):
    """Random rewards, too; and a group of completions is scored by one process."""
    one, other = on_ranks(2, score_on_ranks, file("hang", "parts=2", "draw", "group"), folder=tmp_path)
    assert one == other and [len(reward.timeouts) for reward in one] == [0, 0, 1, 0, 0, 0]
    assert [reward.parts["correct"] for reward in one] == [1, 0, 0, 1, 0, 1]
    assert [reward.parts["group"] % 2 for reward in one] == [0] * 6
    assert (
        "functions.py:hang took longer than reward_timeout: 1 of 6 count as 0" in (tmp_path / "rank_0.txt").read_text()
    )
    assert "reward_timeout" not in (tmp_path / "rank_1.txt").read_text()


def test_workers_end_with_their_rank(file):
    """Also one whose reward hangs, when the rank is killed."""
    code = "import sys; from runtime.user_rewards import UserRewards as U; u = U(sys.argv[1:], 600.0)\n"
    code += "print(u.idle[0].process.pid, flush=True); u.score([{'prompt': 'p', 'completion': 'hang'}])"
    rank = subprocess.Popen([sys.executable, "-c", code, *file("hang")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(rank.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlives its rank")


# ---- Examples ---------------------------------------------------------------------------------------------------


def wise(path: str, body: bytes) -> tuple[int, dict]:
    """Answers as OpenAI's API does: so many points as the answer has letters a; "slow" takes too long."""
    request = json.loads(body)
    answer = request["messages"][0]["content"].partition("Answer: ")[2].partition("\n")[0]
    time.sleep(3 if answer == "slow" else 0)
    assert path == "/v1/chat/completions" and request["model"] == "wise"
    return 200, {"choices": [{"message": {"content": f"I give {answer.count('a')} points."}}]}


def test_the_judge(monkeypatch):
    """examples/judge.py against a server; one reply that does not come in time counts 0 and stops nothing."""
    with serving(wise) as address:
        monkeypatch.setenv("JUDGE_URL", f"{address}/v1")
        monkeypatch.setenv("JUDGE_MODEL", "wise")
        rows = [{"prompt": "q", "completion": text} for text in ("banana", "x", "slow", "a" * 30)]
        rewards = score([str(ROOT / "examples" / "judge.py:judge")], rows, timeout=2.0)
    assert total_rewards(rewards).tolist() == [0.3, 0.0, 0.0, 1.0] and total_rewards(rewards).dtype == torch.float64
    assert [len(reward.timeouts) for reward in rewards] == [0, 0, 1, 0]


def test_the_functions_in_the_page(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    (tmp_path / "page.py").write_text(code)
    assert [r.total for r in score([f"{tmp_path}/page.py:score", f"{tmp_path}/page.py:lengths=10"])] == [
        0.99,
        -0.04,
        -0.01,
    ]


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 50, path.name
