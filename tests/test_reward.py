"""Answers are found in whatever a model writes; data files are read strictly."""

import json
import os
import re
from pathlib import Path

import pytest

import reward

GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[2] / "shared" / "gsm8k"))


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#### 72", "72"),
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
    ],
)
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer


def test_score_is_exact_match_of_the_extracted_number():
    assert reward.score("gsm8k", "so #### 1,000.0", "1000") == 1.0
    assert reward.score("gsm8k", "so #### 1001", "1000") == 0.0
    assert reward.score("gsm8k", "1000", "1000") == 0.0


def test_arithmetic_solutions_are_right_and_slips_are_wrong():
    for a, b in reward.arithmetic_pairs("test"):
        assert reward.extract_answer(reward.arithmetic_solution(a, b)) == str(a + b)
        assert reward.extract_answer(reward.arithmetic_solution(a, b, carry_slip=True)) != str(a + b)


def test_arithmetic_held_out_problems_are_held_out():
    train, test = (set(reward.arithmetic_pairs(split)) for split in ("train", "test"))
    assert len(train) + len(test) == 8100 and not train & test


def test_gsm8k_answers_agree_with_an_independent_reading():
    """All 8,792 answers, against a regular expression of GSM8K's own documentation."""
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K at {GSM8K}; set GSM8K_DIR")
    total = 0
    for split in ("train", "test"):
        problems = reward.load_problems("gsm8k", split, str(GSM8K))
        rows = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text().splitlines()]
        for problem, row in zip(problems, rows, strict=True):
            assert problem.answer == re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])[1].replace(",", "")
            assert problem.prompt.startswith(row["question"])
        total += len(problems)
    assert total == 8792


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"question": "q"}', "needs a text field 'answer'"),
        ('{"answer": "#### 1"}', "needs a text field 'question'"),
        ('{"question": 1, "answer": "#### 1"}', "needs a text field 'question'"),
        ('{"question": "q", "answer": "1"}', "must end in '#### N'"),
        ('["q", "#### 1"]', "needs a text field"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3: ") as error:
        reward.load_problems("gsm8k", "train", str(tmp_path))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_and_a_missing_final_newline_are_no_matter(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "#### 1"}')
    assert [problem.answer for problem in reward.load_problems("gsm8k", "train", str(tmp_path))] == ["1"]


def test_no_problems_or_no_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        reward.load_problems("gsm8k", "train", str(tmp_path))
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no train problems"):
        reward.load_problems("gsm8k", "train", str(tmp_path))
    with pytest.raises(ValueError, match="unknown task 'gsm'; there are: arithmetic, gsm8k"):
        reward.load_problems("gsm", "train")
