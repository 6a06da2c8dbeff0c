"""Rows of files, folders and the hub become problems, the same ones every time; a bad row is named."""

import csv
import http.server
import importlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import reward
from runtime.data import Problem, Source, download, read_problems

ROWS = [{"question": f'What, "{i}"\nsquared?', "label": str(i * i), "level": "é"} for i in range(40)]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0},
}


def write(path: Path, rows: list[dict]) -> str:
    """A file of rows, in the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def both(data: str, *fields: str) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on, and those that are held out."""
    train, test = (read_problems(Source(data, *fields), split) for split in ("train", "test"))
    return train, test


# ---- Files, folders and the hub -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_every_row_of_a_file_is_a_problem_with_all_its_columns(tmp_path, form):
    train, test = both(write(tmp_path / f"rows.{form}", ROWS), "question", "label")
    assert len(train) == 36 and len(test) == 4
    found = sorted((*train, *test), key=lambda problem: int(problem.answer))
    assert [(problem.prompt, problem.answer) for problem in found] == [(r["question"], r["label"]) for r in ROWS]
    assert [problem.columns for problem in found] == ROWS


def test_what_is_held_out_depends_on_the_prompts_alone(tmp_path):
    """Not on the order of rows; twice the same prompt is on one side; new rows hardly move old ones."""
    train, test = both(write(tmp_path / "a.jsonl", ROWS), "question", "label")
    assert both(write(tmp_path / "b.jsonl", ROWS[::-1] + ROWS), "question", "label")[1][::2] == test
    more = ROWS + [{"question": f"new {i}", "label": "1", "level": ""} for i in range(400)]
    _, later = both(write(tmp_path / "c.jsonl", more), "question", "label")
    assert len(later) == 44
    _, large = both(write(tmp_path / "d.jsonl", [{"prompt": str(i)} for i in range(20_000)]))
    assert len(large) == 1000 and [int(p.prompt) for p in large] != sorted(int(p.prompt) for p in large)
    with pytest.raises(ValueError, match="a single prompt: nothing can be held out"):
        both(write(tmp_path / "e.jsonl", ROWS[:1] * 9), "question", "label")


def test_folders(tmp_path):
    """Splits by name, in shards or not, of any form; without a test split a tenth is held out; other files are not."""
    parts = [ROWS[:10], ROWS[10:20], ROWS[20:30], ROWS[30:]]
    names = "train-00000-of-00002.csv", "train-00001-of-00002.csv", "validation.jsonl", "extra.jsonl"
    for name, rows in zip(names, parts):
        write(tmp_path / "splits" / name, rows)
    (tmp_path / "splits" / "README.md").write_text("x")
    train, test = both(str(tmp_path / "splits"), "question", "label")
    assert [p.columns for p in train] == ROWS[:20] and [p.columns for p in test] == ROWS[20:30]
    for name, rows in zip(("a.csv", "b.csv", "c.jsonl", "testimony.jsonl"), parts):
        write(tmp_path / "pool" / name, rows)
    assert [len(part) for part in both(str(tmp_path / "pool"), "question", "label")] == [36, 4]
    write(tmp_path / "only" / "test.csv", ROWS)
    with pytest.raises(ValueError, match="nothing to train on, only test"):
        both(str(tmp_path / "only"), "question", "label")


def test_a_dataset_of_the_hub(monkeypatch):
    """By the library `datasets`, which need not be there; of its splits, train and the first held-out one are taken."""
    asked = []

    def load_dataset(*names):
        asked.append(names)
        if names[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such'\ndoesn't exist")
        return {"validation": ROWS[:5], "train": ROWS[5:], "test": ROWS[:3]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, test = both("me/squares:small", "question", "label")
    assert asked[0] == ("me/squares", "small") and len(train) == 35 and len(test) == 3
    with pytest.raises(ValueError, match=r"me/squares, split train, row 1: has no field 'ask' \(prompt_field\)"):
        both("me/squares", "ask")
    with pytest.raises(ValueError, match="'no/such' is no file or folder, and the hub does not give it: Dataset 'no"):
        both("no/such")


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    for module in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    (tmp_path / "x.parquet").write_bytes(b"")
    for data, words in (
        (tmp_path / "x.parquet", "x.parquet' is read by pyarrow, which is missing: pip install pyarrow"),
        ("me/squares", "'me/squares' is no file or folder.*which is missing: pip install datasets"),
        (tmp_path / "x.csv", "there is no file or folder '.*x.csv'"),
        (__file__, "data must be a .jsonl, .csv, .parquet file, a folder, or a name on the hub"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            both(str(data))


def test_a_download_is_whole_or_not_there(tmp_path):
    """The server announces 100 bytes and sends 10: torch's `download_url_to_file` keeps those."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * (10 if self.path == "/short" else 100))

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(OSError, match="cannot download .*/short .* give the data's folder by --data"):
            download(f"{address}/short", tmp_path / "train.jsonl")
        assert not list(tmp_path.iterdir())
        download(f"{address}/long", tmp_path / "train.jsonl")
        assert (tmp_path / "train.jsonl").read_bytes() == b"x" * 100
        server.shutdown()


# ---- Rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_verls_layout_loads_as_it_is(tmp_path, form):
    rows = [VERL, VERL | {"prompt": [{"role": "user", "content": "2+2?"}]}]
    (problem,), (other,) = both(write(tmp_path / f"verl.{form}", rows))
    assert sorted((problem, other), key=lambda p: len(p.prompt)) == [
        Problem(row["prompt"], "2", row) for row in rows[::-1]
    ]


def test_answers_are_as_in_the_data_unless_a_task_reads_them(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"prompt": str(i), "answer": {"value": i, "tags": ["x"]}} for i in range(9)])
    assert {type(problem.answer) for problem in both(data)[0]} == {dict}
    assert {problem.answer for problem in both(data, "", "answer.value")[0]} <= set(range(9))
    assert both(write(tmp_path / "b.jsonl", [{"prompt": "1"}, {"prompt": "2"}]))[0][0].answer is None
    numbers = write(tmp_path / "c.csv", [{"prompt": str(i), "label": f"{i:,}.50"} for i in range(1000, 1009)])
    problems = reward.load_problems("gsm8k_flexible", "train", Source(numbers, "", "label"))
    assert {problem.answer for problem in problems} <= {f"{i}.5" for i in range(1000, 1009)}


MESSAGES = '{"prompt": [{"role": "user", "content": "q"}%s], "answer": 1}'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "prompt,answer\nq,1\nq,1,2\n", "row 3: has 3 fields, and the first row 2"),
        ("a.csv", "prompt,answer\nq,1\nq\n", "row 3: has 1 fields, and the first row 2"),
        ("a.csv", 'prompt,answer\nq,1\n"q,1\n', "row 3: not CSV"),
        ("a.csv", 'prompt,answer\n"a\nb",1\nq,\n', "row 3: 'answer' is empty"),
        ("a.csv", "prompt,prompt\nq,1\n", "row 1: must give each column a name of its own"),
        ("a.csv", "prompt,\nq,1\n", "row 1: must give each column a name of its own"),
        ("a.csv", b"prompt,answer\nq,1\n\xff,1\n", "after row 2: not UTF-8"),
        ("a.csv", "prompt,answer\nq,1\n  ,1\n", "row 3: 'prompt' must be text, or chat messages"),
        ("a.csv", "ask,answer\nq,1\n", "row 2: has no field 'prompt' or 'question' or 'problem'.*are: ask, answer"),
        ("a.jsonl", '{"prompt": "q", "answer": 1}\n{"prompt": 7}', "line 2: 'prompt' must be text"),
        ("a.jsonl", '{"prompt": "q", "answer": null}', "line 1: 'answer' is empty"),
        ("a.jsonl", MESSAGES % ', {"role": "assistant", "content": "a"}', "line 1: .* end before the model's turn"),
        ("a.jsonl", MESSAGES % ', {"role": "user"}', "line 1: .* chat messages of role and content"),
        ("a.jsonl", MESSAGES % ', {"role": "user", "content": null}', "line 1: .* chat messages of role and content"),
        ("a.jsonl", MESSAGES % ', {"role": "user", "content": "\\ud800"}', "line 1: .* half a surrogate pair"),
        ("a.jsonl", '{"prompt": [], "answer": 1}', "line 1: .* chat messages of role and content"),
        ("a.parquet", b"PAR1", ": not Parquet"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, content, words):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}.*{words}") as error:
        both(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_column_that_is_named_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"has no field 'label' \(answer_field\)"):
        both(write(tmp_path / "good.jsonl", [{"prompt": "q"}]), "", "label")
