"""Answers are found in whatever a model writes; data files are read strictly."""

import importlib.util
import json
import os
import random
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

import reward
from runtime.data import Source
from tools.tiny_model import arithmetic_solution

WAYS = ("#### N", "\\(\\boxed{N}\\)", "The answer is **$N**.", "**Answer:** N eggs.\n\nThat is all.")
GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[2] / "shared" / "gsm8k"))


MARKED = [
    ("#### 72", "72"),
    ("The answer is:\n5", "5"),
    ("**The answer is:**\n\n$18", "18"),
    ("Answer:\n```\n5\n```", "5"),
    ("####72", "72"),
    ("work\n#### 1,234", "1234"),
    ("#### $1,080.", "1080"),
    ("#### 50%", "50"),
    ("#### 12 apples", "12"),
    ("#### -5", "-5"),
    ("#### \N{MINUS SIGN}5", "-5"),
    ("#### -$5", "-5"),
    ("#### 3.50", "3.5"),
    ("#### .5", "0.5"),
    ("#### 10.00", "10"),
    ("#### 100", "100"),
    ("#### 007", "7"),
    ("#### -0", "0"),
    ("#### 7\n#### 8", "8"),
    ("#### 7\n#### none", "7"),
    ("#### \n 9", "9"),
    ("#### the answer is 9, not 10", "9"),
    ("#### ", None),
    ("####", None),
    ("", None),
    ("72", None),
    ("### 72", None),
    ("#### seventy-two", None),
    ("#### ,,,", None),
    ("The answer is 18.", "18"),
    ("The answer is $18. 5 of them are left.", "18"),
    ("the answer is: \\(18\\)", "18"),
    ("The final answer is **18**", "18"),
    ("**Answer:** $1,234.50", "1234.5"),
    ("**Answer**: 12 eggs", "12"),
    ("### Final Answer:\n\n18 eggs", "18"),
    ("The answer is $\\boxed{18}$.", "18"),
    ("The answer is 18, for 2 + 4 = 6 and 3 * 6 = 18", "18"),
    ("The answer is 16 eggs - 3 eggs = 13 eggs.", "13"),
    ("The answer is yes. There are 3.", None),
    ("\\boxed{5} or rather \\boxed{6}", "6"),
    ("\\boxed{5}\nThe answer is correct.", "5"),
    ("#### 5\nThe answer is 6.", "6"),
    ("The answer is 6.\n#### 5", "5"),
    ("#### \\boxed{7}", "7"),
    ("\\boxed{5}, so \\boxed{x + 1}", None),  # it has changed its mind, though not to a number
    # Endings of Qwen2.5-Coder-0.5B-Instruct at temperature 1.
    ("the cost of the boots is \\(\\boxed{-98}\\).", "-98"),
    ("The original price of the book is \\(\\boxed{30.00}\\).", "30"),
    ("```output\n119000\n```\nJill's annual salary is \\(\\boxed{119000}\\).", "119000"),
    ("So, John spends \\boxed{35} hours a week taking care of dogs.", "35"),
    ("   \\[\n   \\boxed{42.50 + 67.50 + 126.00}\n   \\]", None),
    ("the total cost Terry spends on yogurt over 30 days is:\n\\[ \\boxed{", None),
    ("the final chopped measurements are:\n- Full hour (500 cm)", None),
    ("\\boxed{18", None),
    ("answers to 18 questions", None),
    ("#### 10 - 12 = -2", "-2"),
    ("#### $10 - $12 = -$2", "-2"),
    ("#### 72 (48 + 24)", "72"),
    ("#### 3/4", "0.75"),
    ("#### -\N{EURO SIGN}5", "-5"),
    *((f"#### {text}", None) for text in ("10 - 12", "12:30", "2 1/2", "6.02e23", "12 000", "- 5", "1,5", "5 or 6")),
    ("#### " * 100_000, None),
    ("\\boxed{" * 100_000, None),
]
BOXED = [  # what is inside
    ("18", "18"),
    (r"\$18", "18"),
    (r"\$1,\!000", "1000"),
    (r"12\,000", "12000"),
    (r"1{,}234.50", "1234.5"),
    (r"18\text{ dollars}", "18"),
    (r"\text{The answer is } 18", "18"),
    (r"\text{18 eggs, all \textbf{large}}", "18"),
    (r"18 \ \mathrm{cm}^2", "18"),
    (r"50\%", "50"),
    (r"45^{\circ}", "45"),
    (r"\mathbf{{18}}", "18"),
    (r"\boxed{18}", "18"),
    (r"-\dfrac{1}{3}", "-1/3"),
    (r"\frac{3}{4}", "0.75"),
    (r"\frac{6}{8}\text{ of it}", "0.75"),
    (r"\frac34", "0.75"),
    (r"0.750", "0.75"),
    (r"\frac{1,000}{2}", "500"),
    (r"x = 5", "5"),
    (r"3 \times 6 = 18", "18"),
    (r"\frac{55}{3} \approx 18.33", "18.33"),
    (r"20\text{ h} = 1200\text{ min}", "1200"),
    (r"2\frac{1}{2}", None),
    (r"2\sqrt{3}", None),
    (r"\frac{\sqrt{2}}{2}", None),
    (r"2\pi", None),
    (r"10^{6}", None),
    (r"x^2", None),
    (r"x - 5", None),
    (r"(3, 4)", None),
    (r"3:4", None),
    (r"\frac{1}{0}", None),
    (r"\text{Yes}", None),
    ("", None),
]


@pytest.mark.parametrize(
    "text, answer",
    [*MARKED, *((f"So $$\\boxed{{{inside}}}$$ for 7 days.", answer) for inside, answer in BOXED)],
    ids=lambda value: repr(value)[:40],
)
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer


def test_flexible_is_the_last_number_where_no_mark_has_one():
    assert reward.score("gsm8k_flexible", "16 - 3 = 13, so she has 13 eggs.", "13") == 1.0
    assert reward.extract_answer("from 16 eggs 3-5 to -$1,080.50.", flexible=True) == "-1080.5"
    assert reward.extract_answer("\\boxed{\\frac{3}{4}} of 8", flexible=True) == "0.75"
    assert reward.extract_answer("none", flexible=True) is None
    assert reward.find_task("gsm8k_flexible").extract("It is 8.") == "8"


def test_normal_forms_are_equal_where_numbers_are():
    """Against Python's own fractions: 2,000 random pairs, of which many are equal, and numbers of many digits."""
    draw = random.Random(0)

    def write() -> tuple[str, Fraction]:
        """A small number, as an integer, a decimal or a fraction."""
        top, bottom = draw.randint(-30, 30), draw.choice([1, 2, 3, 4, 5, 6, 8, 10, 12])
        value = Fraction(top, bottom)
        decimal = f"{float(value):.{draw.randint(4, 8)}f}"
        return draw.choice(
            [f"{top}/{bottom}", f"{2 * top} / {2 * bottom}", *[decimal] * (bottom in (1, 2, 4, 5, 10))]
        ), value

    for _ in range(2000):
        (a, one), (b, other) = write(), write()
        assert (reward.normal_form(a) == reward.normal_form(b)) == (one == other), (a, b)
        assert Fraction(reward.normal_form(a)) == one
    for digits in ("9" * 1_000_000, "1" + "0" * 40 + ".5", "0." + "0" * 40 + "1"):
        assert reward.extract_answer(f"#### {digits}") == digits
    assert reward.normal_form("1" * 50 + "/3") == "1" * 50 + "/3" and reward.normal_form("9" * 50 + "/3") == "3" * 50


def test_score_is_exact_match_of_the_extracted_number():
    assert reward.score("gsm8k", "so #### 1,000.0", "1000") == 1.0
    assert reward.score("gsm8k", "so #### 1001", "1000") == 0.0
    assert reward.score("gsm8k", "1000", "1000") == 0.0


def test_arithmetic_solutions_are_right_and_slips_are_wrong():
    for a, b in reward.arithmetic_pairs("test"):
        assert reward.extract_answer(arithmetic_solution(a, b)) == str(a + b)
        assert reward.extract_answer(arithmetic_solution(a, b, carry_slip=True)) != str(a + b)


def test_arithmetic_held_out_problems_are_held_out():
    train, test = (set(reward.arithmetic_pairs(split)) for split in ("train", "test"))
    assert len(train) + len(test) == 8100 and not train & test


def test_gsm8k_answers_agree_with_an_independent_reading():
    """All 8,792 answers, against a regular expression of GSM8K's own documentation; also as models would give them."""
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K at {GSM8K}; set GSM8K_DIR")
    total = 0
    for split in ("train", "test"):
        problems = reward.load_problems("gsm8k", split, Source(str(GSM8K)))
        rows = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text().splitlines()]
        for problem, row in zip(problems, rows, strict=True):
            written = re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])[1]
            assert problem.answer == written.replace(",", "") and problem.prompt == row["question"]
            solution = row["answer"].split("####")[0]
            for ending in WAYS:
                assert reward.extract_answer(solution + ending.replace("N", written)) == problem.answer, ending
            latex = written.replace(",", "{,}")
            assert reward.extract_answer(f"{solution}\\[\\boxed{{\\${latex}\\text{{ a day}}}}\\]") == problem.answer
        total += len(problems)
    assert total == 8792


# ---- math -----------------------------------------------------------------------------------------------------


def write_math(folder: Path, *rows: dict) -> Source:
    """A folder with these rows to train on."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(folder))


def test_math_is_compared_by_math_verify(tmp_path):
    if not importlib.util.find_spec("math_verify"):
        pytest.skip("math-verify is not installed")
    solution = r"As $\sin 60^\circ$ is known, $\boxed{\frac{\sqrt{3}}{2}}$."
    rows = {"problem": "p", "solution": solution}, {"question": "q", "answer": r"\text{east}", "solution": "so"}
    first, second = reward.load_problems("math", "train", write_math(tmp_path, *rows))
    assert (first.answer, second.answer) == (r"\frac{\sqrt{3}}{2}", r"\text{east}")
    for completion, value in {
        r"\boxed{\sqrt{3}/2}": 1.0,
        r"\boxed{\sqrt{0.75}}": 1.0,
        r"\boxed{1}": 0.0,
        "no": 0.0,
    }.items():
        assert reward.score("math", completion, first.answer) == value
    assert reward.score("math", r"thus \boxed{\text{East}}", second.answer) == 1.0
    assert reward.find_task("math").extract(r"so $\boxed{\frac{1}{2}}$") == r"\frac{1}{2}"


def test_what_is_wrong_with_math_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install math-verify"):
        reward.load_problems("math", "train", write_math(tmp_path, {"problem": "p", "answer": "1"}))
    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace())
    with pytest.raises(ValueError, match="task 'math' has no problems of its own: add --data"):
        reward.load_problems("math", "train")
    for row, words in (
        ({"problem": "p"}, "'answer' or .*'solution'"),
        ({"problem": "p", "solution": "It is 1."}, r"must end in '\\+boxed"),
        ({"problem": "p", "answer": " "}, "found ' '"),
    ):
        with pytest.raises(ValueError, match="train.jsonl, line 1: .*" + words):
            reward.load_problems("math", "train", write_math(tmp_path, row))
