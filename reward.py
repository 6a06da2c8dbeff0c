"""Tasks: problems in, prompt text out, completion text in, score out. Strings only.

A task is one row of `TASKS`: a function that lists its problems, and a function that scores a completion. To train on
your own data, write those two functions and add the row.

    arithmetic   two-digit sums, generated; what the tiny model of `tools/tiny_model.py` has learned, badly
    times_tables products of two small numbers, which a small pretrained model half knows
    gsm8k        grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168), downloaded once
    gsm8k_flexible  the same; an answer without a mark is read as the completion's last number
    math         problems with any expression for an answer, from files of yours, compared by math-verify
"""

import importlib.util
import json
import os
import random
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"
Message = dict[str, str]  # of a chat: its "role" and its "content"


@dataclass(frozen=True)
class Problem:
    prompt: str  # what the model is asked; an instruction may follow it, and a chat template be put around both
    answer: str  # the truth, in the form that the task's `extract` returns


@dataclass(frozen=True)
class Task:
    problems: Callable[[str, str, str], list[Problem]]  # (split "train" or "test", data_dir, cache_dir) -> problems
    score: Callable[[str, str], float]  # (completion, answer) -> reward
    extract: Callable[[str], str | None] = lambda completion: extract_answer(completion)  # its answer, to be shown
    instruction: str = ""  # follows each problem, unless the configuration has another
    # What the environment says to a conversation so far, such as a tool's result: the text of a user's message, or any
    # message; None ends the conversation. Scored is what the model says last.
    reply: Callable[[Problem, list[Message]], str | Message | None] | None = None


def load_problems(task: str, split: str, data_dir: str = "", cache_dir: str = ".cache") -> list[Problem]:
    """The "train" or "test" problems of a task. Raises ValueError or OSError (one line) on a bad name or file."""
    problems = find_task(task).problems(split, data_dir, cache_dir)
    if not problems:
        raise ValueError(f"task {task!r} has no {split} problems (data_dir={data_dir!r})")
    return problems


def score(task: str, completion: str, answer: str) -> float:
    """The reward of one completion.

    >>> score("gsm8k", "#### 72", "72"), score("gsm8k", "It is 72.", "72"), score("gsm8k_flexible", "It is 72.", "72")
    (1.0, 0.0, 1.0)
    """
    return find_task(task).score(completion, answer)


def find_task(task: str) -> Task:
    """The row of `TASKS`. Raises ValueError if there is none of that name."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
    return TASKS[task]


# ---- Answers --------------------------------------------------------------------------------------------------

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."  # as Qwen2.5 was trained

# What a final answer stands after: "####", "\boxed", "the answer is", "**Answer**:".
MARK = re.compile(r"####|\\boxed\s*|\banswer\b[^\w\n]*?(?:\bis\b|[:=])", re.IGNORECASE)

# From LaTeX and Markdown to plain text, one after the other.
PLAIN = [
    ("[\N{MINUS SIGN}\N{EN DASH}]", "-"),
    (r"\\(?:[,!]|(?:left|right|displaystyle)\b)|\^\s*\{?\\circ\}?", ""),
    (r"\{,\}", ","),
    (r"\*\*|~|\\(?:[ ;:()\[\]]|q?quad\b)", " "),
    (r"\\(?:text|math|mbox)\w*", " "),
    (r"\\(?:times|cdot|div)\b", "*"),
    (r"\\approx\b", "="),
    (r"(?<=\d)(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})", r"\1/\2"),
    (r"\\?[$€£¥{}]|\\(?=[%#])", ""),
]
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
NUMBER = rf"(?:(?<![\w)])[-+])?{DIGITS}(?:\s*/\s*{DIGITS})?"
# Between two numbers of one statement: an operator, perhaps after a unit; a comma, a space, a word; or a letter.
JOIN = r"[\s)%]*(?:[A-Za-z]+\s*)?[-+*/:=×÷]\s*\(?|\s*[\^,]\s*|\s+(?:(?:x|and|or|to)\s+)?|[A-Za-z_.(]"
# What makes a number a part of something: x2, x-5, \sqrt 2, x * 2, - 2, /2 and, to its right, 2\pi.
LEFT = r"(?:\\[A-Za-z]+\s*|[A-Za-z_)][-+]?|\w\s*\*\s*|[-+]\s+|[/^×÷]\s*)"
STATED = re.compile(rf"{LEFT}?{NUMBER}(?:(?:{JOIN}){NUMBER})*(?:\s*\\[A-Za-z])?")


def extract_answer(text: str, flexible: bool = False) -> str | None:
    r"""The number that a text ends in, in its normal form: what its last mark of a final answer is followed by.

    Marks are `####`, `\boxed{}` and "answer is" or "answer:"; one without any digit after it does not count. None
    without a mark, or where the last one has no single number. `flexible` then takes the text's last number, as do
    lm-evaluation-harness ("flexible-extract") and verl ("flexible").

    >>> extract_answer("so she pays #### $1,080."), extract_answer("It is \\boxed{\\frac{7}{2}\\text{ km}}.")
    ('1080', '3.5')
    >>> extract_answer("**Answer**: 12 apples"), extract_answer("#### 10 - 12 = -2"), extract_answer("#### 12:30")
    ('12', '-2', None)
    >>> extract_answer("#### 7 no, wait\n#### 8"), extract_answer("It is 8."), extract_answer("It is 8.", flexible=True)
    ('8', None, '8')
    """
    stated = next((statement for statement in marked(text) if re.search(r"\d", statement)), "")
    found = read_number(stated)
    if found is None and flexible:
        numbers = re.findall(NUMBER, plain(text))
        found = normal_form(numbers[-1]) if numbers else None
    return found


def marked(text: str) -> Iterator[str]:
    """What follows each mark of a final answer, the last mark first."""
    end = len(text)
    for mark in reversed(list(MARK.finditer(text))):
        tail, end = text[mark.end() : end], mark.start()
        if mark[0].startswith("\\"):
            yield braced(tail)
        else:  # on the mark's line or, after a mark alone, on the next one; "answer is" belongs to one sentence
            line = (tail.strip().splitlines() or [""])[0]
            yield line if mark[0] == "####" else re.split(r"[.!?](?:\s|$)", line)[0]


def braced(text: str) -> str:
    """The inside of the braces that a text begins with, else its first word; "" if they are not closed."""
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0]
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:place]
    return ""


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` of a text holds; None without one."""
    _, mark, tail = text.rpartition("\\boxed")
    return braced(tail.lstrip()) if mark else None


def plain(text: str) -> str:
    """A text without the LaTeX and Markdown that numbers are written with."""
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


def read_number(text: str) -> str | None:
    r"""The first number of a statement, or what its equation comes to; None where it is a part of something else.

    >>> read_number("$18 a day"), read_number("x = 3 \\times 6 = 18"), read_number("2 1/2"), read_number("2\\pi")
    ('18', '18', None, None)
    """
    found = STATED.search(plain(text))
    value = found[0].rpartition("=")[2].strip(" (") if found else ""
    return normal_form(value) if re.fullmatch(NUMBER, value) else None


def normal_form(number: str) -> str | None:
    """A number as a decimal without needless zeros, or else as a fraction in lowest terms; exact, None for x/0.

    >>> normal_form("1,080.50"), normal_form("6/8"), normal_form("2/6"), normal_form("-0")
    ('1080.5', '0.75', '1/3', '0')
    """
    top, _, bottom = re.sub(r"[,\s]", "", number).partition("/")
    if bottom and len(number) > 1000:  # nobody's answer, and reducing it takes time
        return None
    exact = Context(prec=5 * len(number), Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
    value = exact.divide(Decimal(top), Decimal(bottom or 1))
    if exact.flags[Inexact]:  # such as 1/3
        return str(Fraction(top) / Fraction(bottom))
    return f"{exact.normalize(exact.plus(value)):f}" if value.is_finite() else None  # plus: there is no -0


def exact_match(completion: str, answer: str, flexible: bool = False) -> float:
    """1.0 if the completion's extracted answer is the truth, else 0.0."""
    return float(extract_answer(completion, flexible) == answer)


# ---- arithmetic -----------------------------------------------------------------------------------------------

HELD_OUT = 256  # of the 8,100 pairs of two-digit numbers


def arithmetic_pairs(split: str) -> list[tuple[int, int]]:
    """All pairs of two-digit numbers in a fixed random order: the first `HELD_OUT` are "test", the others "train"."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs[:HELD_OUT] if split == "test" else pairs[HELD_OUT:]


def arithmetic_problems(split: str, data_dir: str, cache_dir: str) -> list[Problem]:
    """`47+85=`, to be answered by `12 13 #### 132`; only the number after #### is scored.

    >>> arithmetic_problems("test", "", "")[0]
    Problem(prompt='25+60=', answer='85')
    """
    return [Problem(f"{a}+{b}=", str(a + b)) for a, b in arithmetic_pairs(split)]


# ---- times_tables ---------------------------------------------------------------------------------------------


def times_tables_problems(split: str, data_dir: str, cache_dir: str) -> list[Problem]:
    """Products of 2 to 20 with 2 to 12, a third of them held out; 7 times 8 is on the side of 8 times 7.

    >>> times_tables_problems("test", "", "")[0]
    Problem(prompt='What is 2 times 3?', answer='6')
    """
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 13)]
    sets = sorted({tuple(sorted(pair)) for pair in pairs})
    held_out = set(random.Random(0).sample(sets, len(sets) // 3))
    chosen = [pair for pair in pairs if (tuple(sorted(pair)) in held_out) == (split == "test")]
    return [Problem(f"What is {a} times {b}?", str(a * b)) for a, b in chosen]


# ---- gsm8k and math, from files of one JSON object a line --------------------------------------------------------


def gsm8k_problems(split: str, data_dir: str, cache_dir: str) -> list[Problem]:
    """GSM8K from `data_dir`, else from the folder `$GSM8K_DIR`, else downloaded once into `cache_dir`."""
    folder = data_dir or os.environ.get("GSM8K_DIR", "")
    path = Path(folder or Path(cache_dir) / "gsm8k") / f"{split}.jsonl"
    if not folder and not path.exists():
        download(GSM8K_URL.format(split=split), path)
    return [gsm8k_problem(row, where) for row, where in read_jsonl(path)]


def gsm8k_problem(row: Any, where: str) -> Problem:
    """From the texts `question` and `answer`, which ends in `#### N`; ValueError unless N is one number."""
    question, answer = text_field(row, where, "question"), text_field(row, where, "answer")
    _, mark, end = answer.rpartition("####")
    number = plain(end).strip().rstrip("%.")
    truth = normal_form(number) if mark and re.fullmatch(NUMBER, number) else None
    if truth is None:
        raise ValueError(f"{where}: the answer must end in '#### N', N one number, found {answer[-80:]!r}")
    return Problem(question, truth)


def math_problems(split: str, data_dir: str, cache_dir: str) -> list[Problem]:
    """Problems as MATH has them (Hendrycks et al. 2021, arXiv 2103.03874), from `data_dir`."""
    if not importlib.util.find_spec("math_verify"):
        raise ValueError("task 'math' compares answers with math-verify, which is missing: pip install math-verify")
    if not data_dir:
        raise ValueError("task 'math' needs data_dir, a folder with train.jsonl and test.jsonl")
    return [math_problem(row, where) for row, where in read_jsonl(Path(data_dir, f"{split}.jsonl"))]


def math_problem(row: Any, where: str) -> Problem:
    """From the texts `problem` or `question`, and `answer` or `solution`, which ends in `\\boxed{...}`."""
    question, answer = text_field(row, where, "problem", "question"), text_field(row, where, "answer", "solution")
    truth = last_boxed(answer) or (answer.strip() if "answer" in row else "")
    if not truth:
        raise ValueError(f"{where}: the solution must end in '\\boxed{{...}}', found {answer[-80:]!r}")
    return Problem(question, truth)


def math_score(completion: str, answer: str) -> float:
    """1.0 if math-verify finds the completion's answer equal to the truth, else 0.0."""
    import math_verify

    return float(math_verify.verify(math_verify.parse(f"\\boxed{{{answer}}}"), math_verify.parse(completion)))


def download(url: str, path: Path) -> None:
    """Fetches a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        urllib.request.urlretrieve(url, unfinished)
    except OSError as error:
        way_out = f"set data_dir or GSM8K_DIR to a folder with {path.name}"
        raise OSError(f"cannot download {url} ({error}); {way_out}") from None
    unfinished.replace(path)


def read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    """What each line that is not empty holds, and where that is, for messages."""
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
                yield row, where


def text_field(row: Any, where: str, *names: str) -> str:
    """The text under the first of those names that a line has; ValueError saying `where` there is none."""
    name = next((name for name in names if isinstance(row, dict) and name in row), names[0])
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        raise ValueError(f"{where}: needs a text field {' or '.join(map(repr, names))}, found {str(row)[:80]!r}")
    if any("\ud800" <= character <= "\udfff" for character in row[name]):
        raise ValueError(f"{where}: {name!r} holds half a surrogate pair, which is no character")
    return row[name]


FLEXIBLE = partial(exact_match, flexible=True), partial(extract_answer, flexible=True)  # score and extract

TASKS = {
    "arithmetic": Task(arithmetic_problems, exact_match),
    "times_tables": Task(times_tables_problems, *FLEXIBLE, "Answer with the number alone."),
    "gsm8k": Task(gsm8k_problems, exact_match, instruction=BOXED),
    "gsm8k_flexible": Task(gsm8k_problems, *FLEXIBLE, BOXED),
    "math": Task(math_problems, math_score, last_boxed, BOXED),
}
