"""The run at wandb. wandb may fail or hang at any time: one line reports it, and training goes on without it.

All calls to wandb are made here. A thread makes those that concern a run, so that they cannot stop or slow a step.
"""

import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, get_args
from urllib.parse import urlsplit

import wandb

MODES = get_args(wandb.Settings.model_fields["mode"].annotation)
REJECTED = re.compile(r"API key|invalid credentials|error 40[13]")  # in wandb's messages; others concern the network
TIMEOUT = 15  # seconds, for the connection at the start and for uploads at the end
WAITING = 10_000  # calls that may wait for the thread; later ones are dropped
logging.raiseExceptions = False  # otherwise wandb's own log prints a traceback per line when the disk is full


def choose_mode() -> None:
    """Sets WANDB_MODE if it is not set: online if the user is logged in and the server answers, else offline.

    Raises ValueError for a mode or an API key that wandb would refuse later.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode not in (None, *MODES):
        raise ValueError(f"WANDB_MODE must be one of {', '.join(MODES)}, not {mode!r}")
    if mode in ("offline", "dryrun", "disabled"):
        return
    if not logged_in():
        if mode:
            raise ValueError(f"WANDB_MODE {mode} needs an API key: set WANDB_API_KEY, or run `wandb login`")
        os.environ["WANDB_MODE"] = "offline"
        return
    problem = login_problem()
    if problem and (mode or REJECTED.search(problem)):
        raise ValueError(f"wandb: {problem}; to train without its server, set WANDB_MODE=offline")
    if problem:
        print(f"wandb's server does not answer, so WANDB_MODE is offline: {problem}", flush=True)
    os.environ["WANDB_MODE"] = "offline" if problem else mode or "online"


def logged_in() -> bool:
    """Whether there are credentials for wandb's server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with suppress(OSError, netrc.NetrcParseError):
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    return False


def login_problem() -> str | None:
    """Why wandb's server refuses the credentials, in one line; None if it accepts them. wandb waits ten seconds."""
    try:
        wandb.login(verify=True)
    except Exception as error:
        return " ".join(str(error).split())[:300] or type(error).__name__  # a proxy may answer with a page
    finally:
        with suppress(Exception):
            wandb.teardown()  # ends its process; the run starts one with other settings
    return None


class WandbRun:
    """A wandb run. Its first failure is reported by `say`; later ones are not."""

    def __init__(self, folder: Path, run_id: str | None, say: Callable[[str], None], **options: Any):
        """run_id: the run to continue; None: a new one. options: of `wandb.init`."""
        self.id = run_id or secrets.token_hex(4)
        self.say, self.failed = say, False
        self.calls: Queue[Callable[[wandb.Run], None] | None] = Queue(WAITING)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # a home may be missing, full or read-only
            os.environ.setdefault(name, str(folder.absolute() / "wandb"))
        options |= {"dir": folder, "id": self.id, "resume": "allow"}
        self.thread = Thread(target=self.work, args=(options,), daemon=True)
        self.thread.start()

    def work(self, options: dict[str, Any]) -> None:
        """The thread: starts the run, and makes all calls in order."""
        settings = {"silent": True, "console": "off", "init_timeout": TIMEOUT, "finish_timeout": TIMEOUT}
        run = self.attempt(lambda: wandb.init(**options, settings=wandb.Settings(**settings)))
        while call := self.calls.get():
            if run:
                self.attempt(lambda: call(run))
        if run:
            self.attempt(run.finish)
        self.attempt(wandb.teardown)  # wandb would do it at exit, where nothing catches its errors

    def attempt(self, call: Callable[[], Any]) -> Any:
        """The result of the call; None if it fails."""
        try:
            return call()
        except Exception as error:
            self.complain(f"{type(error).__name__}: {error}")

    def complain(self, reason: str) -> None:
        if not self.failed:
            self.say(f"wandb fails ({' '.join(reason.split())}); the run goes on, and metrics.jsonl has everything")
        self.failed = True

    def send(self, call: Callable[[wandb.Run], None]) -> None:
        """Passes the call to the thread."""
        try:
            self.calls.put_nowait(call)
        except Full:
            self.complain(f"{WAITING} calls wait for it")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.send(lambda run: run.log(metrics, step=step))

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self.send(lambda run: run.log({name: wandb.Table(columns=columns, data=rows)}, step=step))

    def finish(self) -> None:
        """Ends the run. Data that is not uploaded in time stays on the disk."""
        with suppress(Full):
            self.calls.put_nowait(None)
        self.thread.join(2 * TIMEOUT)
        if self.thread.is_alive():
            self.complain("it does not end; `wandb sync` uploads what is on the disk")
