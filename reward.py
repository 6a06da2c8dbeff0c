"""Tasks: problems in, completion text in, score out. Strings only.

A task is one row of `TASKS`: a function that lists its problems, and a function that scores a completion. Your own
data (runtime/data.py) replaces its problems; your own functions (runtime/user_rewards.py) replace its score.

    own          problems from files of yours, scored by functions of yours
    arithmetic   two-digit sums, generated; the tiny model of `tools/tiny_model.py` has learned them badly
    times_tables products of two small numbers, which a small pretrained model half knows
    gsm8k        grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168), downloaded once
    gsm8k_flexible  the same; an answer without a mark is read as the completion's last number
    math         problems with any expression for an answer, from files of yours, compared by math-verify
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from runtime.data import NO_SOURCE, Problem, Source, download, optional_package, read_problems

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"
Message = dict[str, str]  # of a chat: its "role" and its "content"


@dataclass(frozen=True)
class Task:
    problems: Callable[[str], list[Problem]] | None  # of the split "train" or "test"; None: needs your data
    # (completion, answer) -> a number, 1 for right; or a dict of parts, which are added, of which "correct" is that
    score: Callable[[str, Any], float | dict[str, float]] | None
    extract: Callable[[str], str | None] = lambda completion: extract_answer(completion)  # its answer, to be shown
    instruction: str = ""  # follows each problem, unless the configuration has another
    truth: Callable[[Any, str], Any] | None = lambda answer, field: number_truth(answer, field)  # see `read_problems`
    # The environment's reply in a conversation, such as a tool's result: the text of a user message, or a message. None
    # ends the conversation. The model's last turn is scored.
    reply: Callable[[Problem, list[Message]], str | Message | None] | None = None


def load_problems(task: str, split: str, source: Source = NO_SOURCE) -> list[Problem]:
    """The "train" or "test" problems: rows of `source`, else the task's own.

    Raises ValueError or OSError (one line) on a bad name, file or row.
    """
    row = find_task(task)
    if not source.data and not row.problems:
        raise ValueError(
            f"task {task!r} has no problems of its own: add --data FILE, a folder or a name on the hub; train it alone"
        )
    problems = read_problems(source, split, row.truth) if source.data else row.problems(split)
    if not problems:
        raise ValueError(f"task {task!r} has no {split} problems (data={source.data!r})")
    return problems


def score(task: str, completion: str, answer: Any) -> float | dict[str, float]:
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

# The marks before a final answer: "####", "\boxed", "the answer is", "**Answer**:".
MARK = re.compile(r"####|\\boxed\s*|\banswer\b[^\w\n]*?(?:\bis\b|[:=])", re.IGNORECASE)

# Replacements, made in this order, from LaTeX and Markdown to plain text.
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
# Text before a number that makes it a part of something else: x2, x-5, \sqrt 2, x * 2, - 2, /2; after it, 2\pi.
LEFT = r"(?:\\[A-Za-z]+\s*|[A-Za-z_)][-+]?|\w\s*\*\s*|[-+]\s+|[/^×÷]\s*)"
STATED = re.compile(rf"{LEFT}?{NUMBER}(?:(?:{JOIN}){NUMBER})*(?:\s*\\[A-Za-z])?")


def extract_answer(text: str, flexible: bool = False) -> str | None:
    r"""A text's final answer: the number after its last mark, in normal form.

    Marks are `####`, `\boxed{}` and "answer is" or "answer:". A mark without a digit after it does not count. None
    without a mark, or if the last one has no single number. `flexible` then takes the text's last number, like
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
    """The text after each mark of a final answer, the last mark first."""
    end = len(text)
    for mark in reversed(list(MARK.finditer(text))):
        tail, end = text[mark.end() : end], mark.start()
        if mark[0].startswith("\\"):
            yield braced(tail)
        else:  # on the mark's line or, after a mark alone, on the next one; "answer is" belongs to one sentence
            line = next((line for line in tail.splitlines() if re.search(r"\w", line)), "")
            yield line if mark[0] == "####" else re.split(r"[.!?](?:\s|$)", line)[0]


def braced(text: str) -> str:
    """The inside of the braces at the text's beginning, "" if they are not closed; without braces its first word."""
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0]
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:place]
    return ""


def last_boxed(text: str) -> str | None:
    """The content of a text's last `\\boxed{}`; None without one."""
    _, mark, tail = text.rpartition("\\boxed")
    return braced(tail.lstrip()) if mark else None


def plain(text: str) -> str:
    """A text without the LaTeX and Markdown that numbers are written with."""
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


def read_number(text: str) -> str | None:
    r"""The first number of a statement, or its equation's result; None if the number is a part of something else.

    >>> read_number("$18 a day"), read_number("x = 3 \\times 6 = 18"), read_number("2 1/2"), read_number("2\\pi")
    ('18', '18', None, None)
    """
    found = STATED.search(plain(text))
    value = found[0].rpartition("=")[2].strip(" (") if found else ""
    return normal_form(value) if re.fullmatch(NUMBER, value) else None


def normal_form(number: str) -> str | None:
    """A number exactly, as a decimal without needless zeros or as a fraction in lowest terms; None for x/0.

    >>> normal_form("1,080.50"), normal_form("6/8"), normal_form("2/6"), normal_form("-0")
    ('1080.5', '0.75', '1/3', '0')
    """
    top, _, bottom = re.sub(r"[,\s]", "", number).partition("/")
    if bottom and len(number) > 1000:  # not an answer, and slow to reduce
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


def arithmetic_problems(split: str) -> list[Problem]:
    """`47+85=`, with the answer `12 13 #### 132`, of which only the number after #### is scored.

    >>> arithmetic_problems("test")[0]
    Problem(prompt='25+60=', answer='85')
    """
    return [Problem(f"{a}+{b}=", str(a + b)) for a, b in arithmetic_pairs(split)]


# ---- times_tables ---------------------------------------------------------------------------------------------


def times_tables_problems(split: str) -> list[Problem]:
    """Products of 2 to 20 with 2 to 12, a third of them held out; 7 times 8 and 8 times 7 are in the same split.

    >>> times_tables_problems("test")[0]
    Problem(prompt='What is 2 times 3?', answer='6')
    """
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 13)]
    sets = sorted({tuple(sorted(pair)) for pair in pairs})
    held_out = set(random.Random(0).sample(sets, len(sets) // 3))
    chosen = [pair for pair in pairs if (tuple(sorted(pair)) in held_out) == (split == "test")]
    return [Problem(f"What is {a} times {b}?", str(a * b)) for a, b in chosen]


# ---- gsm8k and math -------------------------------------------------------------------------------------------


def gsm8k_problems(split: str) -> list[Problem]:
    """GSM8K from the folder `$GSM8K_DIR`, else downloaded once into .cache."""
    given = os.environ.get("GSM8K_DIR", "")
    folder = Path(given or ".cache/gsm8k")
    for file in (folder / "train.jsonl", folder / "test.jsonl"):
        if given and not file.exists():
            raise FileNotFoundError(f"there is no file {str(file)!r}, and GSM8K_DIR is {given!r}")
        if not file.exists():
            download(GSM8K_URL.format(split=file.stem), file)
    return read_problems(Source(str(folder)), split, number_truth)


def number_truth(answer: Any, field: str) -> str:
    r"""A row's answer: one number, or a text that ends in `#### N`, as in GSM8K; ValueError for anything else.

    >>> number_truth("3 + 4 = 7\n#### 7", "answer"), number_truth("1,080", "answer"), number_truth(2.5, "answer")
    ('7', '1080', '2.5')
    """
    number = plain(str(answer).rpartition("####")[2]).strip().rstrip("%.")
    truth = normal_form(number) if re.fullmatch(NUMBER, number) and not isinstance(answer, bool) else None
    if truth is None:
        raise ValueError(f"{field!r} must be one number, or end in '#### N', N one number, found {str(answer)[-80:]!r}")
    return truth


def math_truth(answer: Any, field: str) -> str:
    """A row's answer: any expression, or the last `\\boxed{...}` of its solution; ValueError without one."""
    optional_package("math_verify", "math-verify", "task 'math' compares answers with math-verify")
    truth = last_boxed(str(answer)) or (str(answer).strip() if field != "solution" else "")
    if not truth:
        raise ValueError(f"{field!r} must end in '\\boxed{{...}}', found {str(answer)[-80:]!r}")
    return truth


def math_score(completion: str, answer: str) -> float:
    """1.0 if math-verify finds the completion's answer equal to the truth, else 0.0."""
    import math_verify

    return float(math_verify.verify(math_verify.parse(f"\\boxed{{{answer}}}"), math_verify.parse(completion)))


FLEXIBLE = partial(exact_match, flexible=True), partial(extract_answer, flexible=True)  # score and extract

TASKS = {
    "arithmetic": Task(arithmetic_problems, exact_match),
    "times_tables": Task(times_tables_problems, *FLEXIBLE, "Answer with the number alone."),
    "gsm8k": Task(gsm8k_problems, exact_match, instruction=BOXED),
    "gsm8k_flexible": Task(gsm8k_problems, *FLEXIBLE, BOXED),
    "math": Task(None, math_score, last_boxed, BOXED, math_truth),
    "own": Task(None, None, lambda completion: None, truth=None),
}
