"""Rewards from your own files: `--reward my_reward.py:score`, several of them with weights (`my_reward.py:short=0.5`).

A function's parameter names decide how it is called:

    def score(completion, answer, **columns)        one completion at a time -> a number, or a dict of named numbers
    def score(prompts, completions, **columns)      many at once, as in TRL -> a list of such values

`columns` are the columns of the data's row (lists in the second form). A function gets those that it names, and all of
them with `**`. It may also name `prompt`, and verl's `solution_str` (completion) and `ground_truth` (answer).
Completions are texts. In the second form, a completion is a list of one chat message if its prompt is a list of
messages. An `async def` function scores up to 64 completions at a time. A batch call may get only a part of a step's
completions, but always whole groups.

Functions run in worker processes, so that one that hangs can be killed. After `reward_timeout` seconds, or if the
function raises TimeoutError, its completion counts 0. Any other failure ends the run. Workers import your file, but
neither torch nor vLLM.
"""

import asyncio
import ctypes
import importlib.util
import inspect
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

ROOT = str(Path(__file__).resolve().parent.parent)
SPEC = re.compile(r"(.+\.py):([A-Za-z_]\w*)(?:=(.+))?")
CORRECT = "correct"  # the part that says whether an answer is right: 1 or more
METRICS = ("mean", "std", "min", "max", "mixed_groups_frac", "kl_ref", "timeouts")  # reward/...; a part has other names
CONCURRENT = 64  # completions that an async function scores at a time
MOST_WORKERS = 16  # per rank
START_SECONDS = 600.0  # the time limit for importing a file
GRACE_SECONDS = 2.0  # after an async function's own timeouts, before its worker is killed
PR_SET_PDEATHSIG = 1  # see prctl(2)

Row = dict[str, Any]  # one completion: prompt, completion, answer, and the columns of its problem
Parts = dict[str, float]


class Reward(NamedTuple):
    """The reward of a completion."""

    total: float  # the weighted sum of the parts, from which the policy learns
    parts: Parts = {}  # by name, unweighted, for the log
    correct: float | None = None  # 1 or more: a right answer; less: a wrong one; None: unknown
    timeouts: tuple[str, ...] = ()  # the functions that took too long


class WrongValue(ValueError):
    """A function returned something that is not a reward."""


def finite(value: Any) -> float:
    """A number as a float. Raises WrongValue for anything but a finite number."""
    if getattr(value, "shape", None) == ():  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise WrongValue(f"returned {repr(value)[:80]}, which is no finite number")
    return float(value)


def named_parts(value: dict[Any, Any]) -> Parts:
    """The dict's parts as floats. Raises WrongValue for other values, and for names that other metrics have."""
    parts = {str(name): finite(part) for name, part in value.items()}
    for name in parts:
        if name in METRICS or name.endswith("_std") or not re.fullmatch(r"[\w.-]+", name):
            raise WrongValue(f"has a part {name!r}: reward/{name} is another metric's name, or none; choose another")
    return parts


class Spec(NamedTuple):
    """One value of the option `reward`: a function and its weight."""

    text: str  # FILE.py:FUNCTION
    weight: float

    @property
    def path(self) -> Path:
        return Path(self.text.rpartition(":")[0])

    @property
    def name(self) -> str:
        return self.text.rpartition(":")[2]


def parse(text: str) -> Spec:
    """FILE.py:FUNCTION or FILE.py:FUNCTION=WEIGHT. Raises ValueError.

    >>> parse("rewards.py:short=0.5")
    Spec(text='rewards.py:short', weight=0.5)
    """
    match = SPEC.fullmatch(text)
    try:
        weight = float(match[3] or 1)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"reward must be FILE.py:FUNCTION or FILE.py:FUNCTION=WEIGHT, not {text!r}")
    return Spec(f"{match[1]}:{match[2]}", weight)


# ---- In a worker ----------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a function is called."""

    batch: bool  # many completions at once
    concurrent: bool  # async, one completion at a time
    required: list[str]  # parameters without a default


class Function:
    """A function of yours, ready to be called. Raises ValueError if it has neither form."""

    def __init__(self, spec: Spec):
        self.spec, self.call = spec, load(spec)
        parameters = inspect.signature(self.call).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {parameter.name for parameter in named}
        self.takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        batch, single = ({"prompts", "completions"} & self.names), ({"completion", "solution_str"} & self.names)
        if bool(batch) == bool(single):
            raise ValueError(
                f"reward {spec.text} must have a parameter `completion`, for one at a time, or `completions`, for many "
                f"at once, and its parameters are: {', '.join(parameter.name for parameter in parameters) or 'none'}"
            )
        self.is_async = inspect.iscoroutinefunction(self.call)
        required = [parameter.name for parameter in named if parameter.default is parameter.empty]
        self.form = Form(bool(batch), self.is_async and not batch, required)

    def run(self, rows: list[Row], timeout: float, runner: asyncio.Runner) -> list[Parts | None]:
        """The parts of each row's reward; None: a timeout. Raises ValueError (one line) for any other failure."""
        if self.form.batch:
            return self.run_batch(rows, runner)
        if self.form.concurrent:
            return runner.run(self.run_concurrently(rows, timeout))
        (row,) = rows
        with self.explained(row):
            try:
                return [self.parts(self.call(**self.single_arguments(row)))]
            except TimeoutError:
                return [None]

    async def run_concurrently(self, rows: list[Row], timeout: float) -> list[Parts | None]:
        """A call for each completion, up to `CONCURRENT` at a time."""
        gate = asyncio.Semaphore(CONCURRENT)

        async def run_one(row: Row) -> Parts | None:
            async with gate:
                with self.explained(row):
                    try:
                        return self.parts(await asyncio.wait_for(self.call(**self.single_arguments(row)), timeout))
                    except TimeoutError:
                        return None

        return await asyncio.gather(*map(run_one, rows))

    def run_batch(self, rows: list[Row], runner: asyncio.Runner) -> list[Parts | None]:
        """One call for all rows, as in TRL."""
        with self.explained(rows[0], f" and {len(rows) - 1} more" if len(rows) > 1 else ""):
            try:
                values = self.call(**self.batch_arguments(rows))
                values = runner.run(values) if self.is_async else values
            except TimeoutError:
                return [None] * len(rows)
            if isinstance(values, (str, dict)) or not hasattr(values, "__len__") or len(values) != len(rows):
                raise WrongValue(
                    f"must return a list of {len(rows)} values, one per completion, not {repr(values)[:80]}"
                )
        parts = []
        for value, row in zip(values, rows):
            with self.explained(row):
                parts.append(self.parts(value))
        return parts

    def parts(self, value: Any) -> Parts:
        """The parts of a returned value; a number is a single part with the function's name."""
        return named_parts(value if isinstance(value, dict) else {self.spec.name: value})

    def single_arguments(self, row: Row) -> dict[str, Any]:
        values = {"solution_str": row["completion"], "ground_truth": row.get("answer")} | row
        return {name: value for name, value in values.items() if name in self.names or (self.takes_all and name in row)}

    def batch_arguments(self, rows: list[Row]) -> dict[str, Any]:
        """The arguments that a function in TRL's form names; columns are lists, with None where a row lacks one."""
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
        columns = {name: [row.get(name) for row in rows] for name in names}
        columns["prompts"] = [row["prompt"] for row in rows]
        columns["completions"] = [
            [{"role": "assistant", "content": row["completion"]}]
            if isinstance(row["prompt"], list)
            else row["completion"]
            for row in rows
        ]
        return {name: value for name, value in columns.items() if self.takes_all or name in self.names}

    @contextmanager
    def explained(self, row: Row, more: str = "") -> Iterator[None]:
        """Turns any exception into a ValueError that names the function and the completion."""
        try:
            yield
        except (Exception, SystemExit) as error:
            texts = (repr(row[name])[:300] for name in ("prompt", "completion"))
            place = f"on {' and completion '.join(texts)}{more}"
            raise ValueError(f"reward {self.spec.text} {raised(error)}, {place}") from None


def raised(error: BaseException) -> str:
    """An exception and its place, as the end of a message that begins with the name of the function."""
    if isinstance(error, WrongValue):
        return str(error)
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
    return f"raised {type(error).__name__}: {error}{place}"


def load(spec: Spec) -> Callable:
    """Imports the function from its file, which may import modules beside it. Raises ValueError."""
    sys.path.insert(0, str(spec.path.resolve().parent))
    name = f"user_{spec.path.stem}"
    if name not in sys.modules or sys.modules[name].__file__ != str(spec.path.resolve()):
        found = importlib.util.spec_from_file_location(name, spec.path.resolve())
        sys.modules[name] = module = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(f"reward file {str(spec.path)!r} {raised(error)}") from None
    function = getattr(sys.modules[name], spec.name, None)
    if not callable(function):
        there = [key for key, value in vars(sys.modules[name]).items() if getattr(value, "__module__", "") == name]
        raise ValueError(f"reward file {str(spec.path)!r} has no function {spec.name!r}; it has: {', '.join(there)}")
    return function


class Job(NamedTuple):
    function: int  # index
    places: Sequence[int]  # the rows' indices among all rows
    rows: list[Row]
    seed: int  # for random numbers in the function: a resumed run draws the same


def serve(descriptor: int) -> None:
    """The main loop of a worker, which answers jobs until its rank is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ends this process even while a reward hangs
    connection = Connection(descriptor)
    with asyncio.Runner() as runner, suppress(EOFError, OSError):
        specs, timeout = connection.recv()
        try:
            functions = [Function(spec) for spec in specs]
            connection.send([function.form for function in functions])
        except ValueError as error:
            connection.send(str(error))
        while True:
            job = connection.recv()
            random.seed(job.seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(job.seed)
            if "torch" in sys.modules:
                sys.modules["torch"].manual_seed(job.seed)
            try:
                answer = functions[job.function].run(job.rows, timeout, runner)
            except ValueError as error:
                answer = str(error)
            connection.send(answer)


# ---- In a rank ------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs your functions."""

    def __init__(self, specs: list[Spec], timeout: float):
        """Raises ValueError if a file or a function is wrong."""
        self.connection, theirs = multiprocessing.Pipe()
        code = f"import sys; sys.path.insert(0, {ROOT!r}); from runtime.user_rewards import serve"
        command = [sys.executable, "-c", f"{code}; serve({theirs.fileno()})"]
        # In its own session, Ctrl-C does not reach it before the run is saved, and a kill includes its children.
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self.forms: list[Form] | None = self.ask((specs, timeout), START_SECONDS)
        if self.forms is None:
            raise ValueError(f"{', '.join(spec.text for spec in specs)}: not imported within {START_SECONDS:.0f} s")

    def ask(self, message: Any, seconds: float) -> Any:
        """The worker's answer. If that takes longer, the worker is killed, and the answer is None.

        Raises ValueError if the answer is an error message, or if the process has died.
        """
        try:
            with suppress(BrokenPipeError):  # the process has died, but an answer may still be in the pipe
                self.connection.send(message)
            answer = self.connection.recv() if self.connection.poll(seconds) else self.kill()
        except (EOFError, OSError):
            raise ValueError(f"a process of the reward died, with exit code {self.process.wait()}") from None
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class UserRewards:
    """The functions of the option `reward`, in worker processes, which are started as they are needed."""

    def __init__(self, texts: list[str], timeout: float):
        """Imports the files. Raises ValueError or OSError (one line)."""
        self.specs, self.timeout = [parse(text) for text in texts], timeout
        for spec in self.specs:
            if not spec.path.is_file():
                raise FileNotFoundError(f"there is no file {str(spec.path)!r} for reward {spec.text!r}")
        self.idle = [Worker(self.specs, timeout)]
        self.forms = self.idle[0].forms
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.pool = ThreadPool(max(1, min(cores, MOST_WORKERS)))  # each thread waits for one worker at a time

    def check_columns(self, row: Row) -> None:
        """Raises ValueError if a function needs what the row does not have."""
        for spec, form in zip(self.specs, self.forms):
            given = {"prompts", "completions"} if form.batch else {"prompt", "completion", "solution_str"}
            if "answer" in row and not form.batch:
                given.add("ground_truth")
            missing = [name for name in form.required if name not in given | (row.keys() - {"prompt", "completion"})]
            if missing:
                fix = "; answer_field names the answer's" if {"answer", "ground_truth"} & set(missing) else ""
                columns = ", ".join(map(str, row))
                raise ValueError(
                    f"reward {spec.text} needs {', '.join(missing)}, and there are: {columns}{fix}; "
                    f"the first without is {str(row['prompt'])[:80]!r}"
                )

    def score(self, rows: list[Row]) -> list[Reward]:
        """The rewards of completions. A timeout counts 0; any other failure raises ValueError."""
        everywhere = range(len(rows))
        jobs = [
            Job(index, places, [rows[i] for i in places], random.getrandbits(32))
            for index, form in enumerate(self.forms)
            for places in ([everywhere] if form.batch or form.concurrent else [[i] for i in everywhere])
            if places
        ]
        parts: list[Parts] = [{} for _ in rows]
        totals, timeouts = [0.0] * len(rows), [()] * len(rows)
        # Unordered, so that an error need not wait for earlier jobs; added up in order, so that sums are reproducible.
        answers = dict(self.pool.imap_unordered(lambda number: (number, self.answer(jobs[number])), range(len(jobs))))
        for number, job in enumerate(jobs):
            spec = self.specs[job.function]
            for i, answer in zip(job.places, answers[number]):
                if answer is None:
                    timeouts[i] += (spec.text,)
                elif again := answer.keys() & parts[i].keys():
                    raise ValueError(f"reward {spec.text} has a part {min(again)!r}, and so has another: rename one")
                else:
                    parts[i] |= answer
                    totals[i] += spec.weight * sum(answer.values())
        return [Reward(t, p, p.get(CORRECT), late) for t, p, late in zip(totals, parts, timeouts)]

    def answer(self, job: Job) -> list[Parts | None]:
        """A worker's answer to a job; all None if it takes too long."""
        seconds = self.timeout
        if self.forms[job.function].concurrent:
            seconds = seconds * math.ceil(len(job.rows) / CONCURRENT) + GRACE_SECONDS
        try:
            worker = self.idle.pop()
        except IndexError:
            worker = Worker(self.specs, self.timeout)
        answers = worker.ask(job, seconds)
        if answers is None:
            return [None] * len(job.rows)
        self.idle.append(worker)
        return answers
