"""Data: rows in, problems out. Rows come from files, from a folder of files, or from a dataset of the hub.

    problems.csv, problems.jsonl, problems.parquet   one file; a tenth of its prompts is held out
    folder/train.csv, folder/test.csv                a folder with splits, or their shards train-00001-of-00002.parquet
    folder/a.csv, folder/b.csv                       a folder without splits; a tenth of all prompts is held out
    openai/gsm8k:main                                a dataset of the hub, and the name of its configuration

A row maps columns to values. One column is the prompt: text or a list of chat messages. Another one is the answer. A
problem keeps all columns of its row for reward functions.
"""

import csv
import hashlib
import importlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.request import urlretrieve

PROMPT_FIELDS = ("prompt", "question", "problem")  # the first that a row has, unless `prompt_field` names another
ANSWER_FIELDS = ("answer", "reward_model.ground_truth", "solution")  # likewise; the second is verl's
HELD_OUT_NAMES = ("test", "validation", "valid", "val", "dev", "eval")  # of splits; the first that exists counts
MISSING = object()  # a field that a row does not have
MOST_HELD_OUT = 1000  # prompts that are held out where the data has no split for it

Rows = Iterable[tuple[Any, str]]  # each row, and where it is, for messages


@dataclass(frozen=True)
class Problem:
    prompt: str | list[dict[str, Any]]  # text, or chat messages; an instruction may follow it
    answer: Any = None  # the truth, in the form that the task's `extract` returns, or as it is in the data
    columns: dict[str, Any] = field(default_factory=dict, repr=False)  # the whole row
    task: str = field(default="", repr=False)  # whose it is: a row of reward.TASKS


class Source(NamedTuple):
    """Where rows are, and the columns of prompt and answer; "": the first of the usual names that a row has."""

    data: str = ""
    prompt_field: str = ""
    answer_field: str = ""


NO_SOURCE = Source()


def read_problems(source: Source, split: str, truth: Callable[[Any, str], Any] | None = None) -> list[Problem]:
    """The problems of the split "train" or "test"; without a test split, a tenth of the prompts is held out.

    truth: a function from a row's answer and its column's name to the answer that rewards get, or a ValueError. With
    None, answers stay as they are and may be missing. Raises ValueError or OSError (one line) that names file and row.
    """
    train, held_out = find_splits(source.data)
    parts = held_out if split == "test" and held_out else train
    problems = [make_problem(row, where, source, truth) for rows in parts for row, where in rows]
    return problems if held_out else cut(problems, split, source.data)


def cut(problems: list[Problem], split: str, name: str) -> list[Problem]:
    """The training problems in their order, or the held-out ones in random order.

    A hash of the prompt decides: problems with the same prompt are in the same split, and adding rows moves few others.
    """
    digests = [hashlib.sha256(json.dumps(problem.prompt, default=str).encode()).hexdigest() for problem in problems]
    prompts = sorted(set(digests))
    if len(prompts) == 1:
        raise ValueError(f"{name!r} has a single prompt: nothing can be held out; add rows, or a folder with splits")
    held_out = set(prompts[: min(max(1, len(prompts) // 10), MOST_HELD_OUT)])
    if split == "test":
        order = sorted(range(len(problems)), key=digests.__getitem__)
        return [problems[i] for i in order if digests[i] in held_out]
    return [problem for problem, digest in zip(problems, digests) if digest not in held_out]


# ---- Rows to problems -----------------------------------------------------------------------------------------


def make_problem(row: Any, where: str, source: Source, truth: Callable[[Any, str], Any] | None) -> Problem:
    """The problem of a row. Raises a ValueError that begins with `where`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object with fields, found {str(row)[:80]!r}")
    name, prompt = find_field(row, where, "prompt_field", source.prompt_field, PROMPT_FIELDS)
    texts = [message["content"] for message in prompt] if is_chat(prompt) else [prompt]
    if not all(isinstance(text, str) for text in texts) or not any(text.strip() for text in texts):
        raise ValueError(
            f"{where}: {name!r} must be text, or chat messages of role and content that end before the model's turn, "
            f"found {str(prompt)[:80]!r}"
        )
    for text in texts:
        check_characters(text, where, name)
    if not truth and not source.answer_field and all(lookup(row, name) is MISSING for name in ANSWER_FIELDS):
        return Problem(prompt, None, row)

    name, answer = find_field(row, where, "answer_field", source.answer_field, ANSWER_FIELDS)
    if answer is None or answer == "":
        raise ValueError(f"{where}: {name!r} is empty, and must hold the answer")
    check_characters(answer, where, name)
    try:
        return Problem(prompt, truth(answer, name) if truth else answer, row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def find_field(row: dict, where: str, option: str, chosen: str, usual: tuple[str, ...]) -> tuple[str, Any]:
    """Name and value of the chosen field or, without a choice, of the first of the usual ones that the row has;
    ValueError if it has none.
    """
    names = (chosen,) if chosen else usual
    for name in names:
        if (value := lookup(row, name)) is not MISSING:
            return name, value
    columns = ", ".join(map(str, row))[:200] or "none"
    raise ValueError(f"{where}: has no field {' or '.join(map(repr, names))} ({option}); its fields are: {columns}")


def lookup(row: dict, name: str) -> Any:
    """A field, which may be inside of others; MISSING if there is none.

    >>> lookup({"reward_model": {"ground_truth": "72"}}, "reward_model.ground_truth"), lookup({"a.b": 1}, "a.b")
    ('72', 1)
    """
    if name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    inside = row.get(head)
    return lookup(inside, rest) if dot and isinstance(inside, dict) else MISSING


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages, with the model's turn next."""
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in prompt)
        and prompt[-1]["role"] != "assistant"
    )


def check_characters(text: Any, where: str, name: str) -> None:
    """Raises ValueError for a text that cannot be written as UTF-8."""
    if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: {name!r} holds half a surrogate pair, which is no character")


# ---- Sources of rows ------------------------------------------------------------------------------------------


def find_splits(source: str) -> tuple[list[Rows], list[Rows]]:
    """The parts to train on and the parts that are held out, none if the source has no such split."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise FileNotFoundError(f"there is no {', '.join(READERS)} file in {source!r}")
        splits: dict[str, list[Rows]] = {}
        for file in files:
            splits.setdefault(re.split(r"-\d", file.stem)[0], []).append(read_file(file))
    elif path.exists():
        splits = {"train": [read_file(path)]}
    elif path.suffix in READERS or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no file or folder {source!r}")
    else:
        splits = read_hub(source)
    held_out = next((name for name in HELD_OUT_NAMES if name in splits), None)
    names = ["train"] if "train" in splits else [name for name in splits if name not in HELD_OUT_NAMES]
    if not names:
        raise ValueError(f"{source!r} has nothing to train on, only {', '.join(splits)}")
    return [rows for name in names for rows in splits[name]], splits.get(held_out, [])


def read_file(path: Path) -> Rows:
    """The rows of a file; its suffix is its format."""
    if path.suffix not in READERS:
        raise ValueError(f"data must be a {', '.join(READERS)} file, a folder, or a name on the hub, not {str(path)!r}")
    return READERS[path.suffix](path)


def read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    """The value of each line that is not empty."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = decode(line, where).strip()
            try:
                row = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if text:
                yield row, where


def read_csv(path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """The rows from row 2 on; row 1 names the columns."""
    csv.field_size_limit(2**31 - 1)
    number = 0
    with open(path, "rb") as file:
        lines = (decode(line, f"{path}, after row {number}") for line in file)
        rows = csv.reader(lines, strict=True)
        try:
            columns = next(rows, [])
            if len(set(columns)) < len(columns) or "" in columns:
                raise ValueError(f"{path}, row 1: must give each column a name of its own, found {columns}")
            for number, values in enumerate(rows, start=2):
                if values and len(values) != len(columns):
                    raise ValueError(
                        f"{path}, row {number}: has {len(values)} fields, and the first row {len(columns)}"
                    )
                if values:
                    yield dict(zip(columns, values)), f"{path}, row {number}"
        except csv.Error as error:
            raise ValueError(f"{path}, row {number + 1}: not CSV ({error})") from None


def read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows, counted from 1."""
    parquet = optional_package("pyarrow.parquet", "pyarrow", f"{str(path)!r} is read by pyarrow")
    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from numbered(rows, str(path))
    except Exception as error:  # of many kinds, all from pyarrow
        raise ValueError(f"{path}: not Parquet ({' '.join(str(error).split())[:200]})") from None


def read_hub(name: str) -> dict[str, list[Rows]]:
    """The splits of a dataset of the hub, `NAME` or `NAME:CONFIGURATION`."""
    path, _, configuration = name.partition(":")
    what = f"{name!r} is no file or folder, and datasets of the hub are read by datasets"
    datasets = optional_package("datasets", "datasets", what)
    try:
        splits = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of many kinds: no network, no such name, several configurations
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name!r} is no file or folder, and the hub does not give it: {reason}") from None
    if "train" not in splits:
        raise ValueError(f"{name!r} has no split named train; its splits are: {', '.join(splits)}")
    return {split: [numbered(rows, f"{name}, split {split}")] for split, rows in splits.items()}


def numbered(rows: Iterable[dict[str, Any]], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows, counted from 1."""
    for number, row in enumerate(rows, start=1):
        yield row, f"{where}, row {number}"


def download(url: str, path: Path) -> None:
    """Downloads a file, completely or not at all. Raises OSError, in one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            urlretrieve(url, partial := Path(folder, path.name))  # raises OSError if the file ends too soon
            partial.rename(path)
    except (OSError, HTTPException) as error:
        raise OSError(f"cannot download {url} ({error}); give the data's folder by --data") from None


def optional_package(module: str, package: str, purpose: str) -> ModuleType:
    """Imports a module that only some data needs; ValueError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(f"{purpose}, which is missing: pip install {package}") from None


def decode(line: bytes, where: str) -> str:
    """A line as text, without a byte order mark."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}, byte {error.start + 1})") from None


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}  # by the ending of a file's name
