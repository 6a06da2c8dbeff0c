"""Tasks: problems in, prompt text out, completion text in, score out. Strings only.

A task is one row of `TASKS`: a function that lists its problems, and a function that scores a completion.
To train on your own data, write those two functions and add the row.

    arithmetic   two-digit sums, generated; what the tiny model of `tiny_model.py` has learned, badly
    gsm8k        grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168), downloaded once
"""

import json
import os
import random
import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"
GSM8K_INSTRUCTION = "\nThink step by step, then give the final answer after ####."


@dataclass(frozen=True)
class Problem:
    prompt: str  # what the model is asked; a chat template, if the tokenizer has one, is put around it
    answer: str  # the truth, in the form that `extract_answer` returns


@dataclass(frozen=True)
class Task:
    problems: Callable[[str, str, str], list[Problem]]  # (split "train" or "test", data_dir, cache_dir) -> problems
    score: Callable[[str, str], float]  # (completion, answer) -> reward


def load_problems(task: str, split: str, data_dir: str = "", cache_dir: str = ".cache") -> list[Problem]:
    """The "train" or "test" problems of a task. Raises ValueError or OSError (one line) on a bad name or file."""
    problems = find_task(task).problems(split, data_dir, cache_dir)
    if not problems:
        raise ValueError(f"task {task!r} has no {split} problems (data_dir={data_dir!r})")
    return problems


def score(task: str, completion: str, answer: str) -> float:
    """The reward of one completion.

    >>> score("gsm8k", "48 / 2 = 24, and 48 + 24 = 72.\\n#### 72", "72")
    1.0
    >>> score("gsm8k", "It is 72.", "72")
    0.0
    """
    return find_task(task).score(completion, answer)


def find_task(task: str) -> Task:
    """The row of `TASKS`, or ValueError naming those there are."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
    return TASKS[task]


# ---- Answers --------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def extract_answer(text: str) -> str | None:
    """The number after the last `####` that one follows, there or on the next line that is not empty, in one normal
    form; None where there is none.

    >>> extract_answer("so she pays #### $1,080.")
    '1080'
    >>> extract_answer("#### 12 apples"), extract_answer("#### 50%"), extract_answer("####-3.50")
    ('12', '50', '-3.5')
    >>> extract_answer("#### 7 no, wait\\n#### 8"), extract_answer("the answer is 8")
    ('8', None)
    """
    for tail in reversed(text.replace("\N{MINUS SIGN}", "-").split("####")[1:]):
        lines = tail.strip().splitlines()
        number = NUMBER.search(lines[0].replace("$", "")) if lines else None
        if number:
            value = Decimal(number[0].replace(",", ""))
            return f"{value.normalize() + 0:f}"  # + 0: there is no negative zero
    return None


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the completion's extracted answer is the truth, else 0.0."""
    return float(extract_answer(completion) == answer)


# ---- arithmetic -----------------------------------------------------------------------------------------------

HELD_OUT = 256  # of the 8,100 pairs of two-digit numbers


def arithmetic_pairs(split: str) -> list[tuple[int, int]]:
    """All pairs of two-digit numbers in a fixed random order: the first `HELD_OUT` are "test", the others "train"."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs[:HELD_OUT] if split == "test" else pairs[HELD_OUT:]


def arithmetic_solution(a: int, b: int, carry_slip: bool = False) -> str:
    """The worked sum: the units, the tens with their carry, the answer. `carry_slip` gets the carry wrong.

    >>> arithmetic_solution(47, 85)
    '12 13 #### 132'
    >>> arithmetic_solution(47, 85, carry_slip=True)
    '12 12 #### 122'
    """
    units = a % 10 + b % 10
    carry = units >= 10
    tens = a // 10 + b // 10 + (carry != carry_slip)
    return f"{units} {tens} #### {10 * tens + units % 10}"


def arithmetic_problems(split: str, data_dir: str, cache_dir: str) -> list[Problem]:
    """`47+85=`, to be answered by `12 13 #### 132`; only the number after #### is scored.

    >>> arithmetic_problems("test", "", "")[0]
    Problem(prompt='25+60=', answer='85')
    """
    return [Problem(f"{a}+{b}=", str(a + b)) for a, b in arithmetic_pairs(split)]


# ---- gsm8k ----------------------------------------------------------------------------------------------------


def gsm8k_problems(split: str, data_dir: str, cache_dir: str) -> list[Problem]:
    """GSM8K from `data_dir`, else from the folder `$GSM8K_DIR`, else downloaded once into `cache_dir`."""
    folder = data_dir or os.environ.get("GSM8K_DIR", "")
    path = Path(folder or Path(cache_dir) / "gsm8k") / f"{split}.jsonl"
    if not folder and not path.exists():
        download(GSM8K_URL.format(split=split), path)
    return read_jsonl(path)


def download(url: str, path: Path) -> None:
    """Fetches a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        urllib.request.urlretrieve(url, partial)
    except OSError as error:
        raise OSError(
            f"cannot download {url} ({error}); set data_dir or GSM8K_DIR to a folder with {path.name}"
        ) from None
    partial.replace(path)


def read_jsonl(path: Path) -> list[Problem]:
    """One problem per line: a JSON object with the texts `question` and `answer`, the answer ending in `#### N`."""
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.start + 1})") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if text:
                problems.append(read_row(row, where))
    return problems


def read_row(row: Any, where: str) -> Problem:
    """The problem of one line; ValueError saying `where` it cannot be right."""
    for field in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise ValueError(f"{where}: needs a text field {field!r}, found {str(row)[:80]!r}")
        if any("\ud800" <= character <= "\udfff" for character in row[field]):
            raise ValueError(f"{where}: {field!r} holds half a surrogate pair, which is no character")
    answer = extract_answer(row["answer"])
    if answer is None:
        raise ValueError(f"{where}: the answer must end in '#### N', found {row['answer'][-80:]!r}")
    return Problem(row["question"] + GSM8K_INSTRUCTION, answer)


TASKS = {
    "arithmetic": Task(arithmetic_problems, exact_match),
    "gsm8k": Task(gsm8k_problems, exact_match),
}
