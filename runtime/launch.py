"""The start and the end of a process: an error becomes one line and an exit code, a signal becomes a saved run."""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import NoReturn, TypeVar

import torch.distributed as dist

from runtime.signals import Stopped, listen
from runtime.steps import finish_stopped

T = TypeVar("T")
ROOT_CAUSE = 3.0  # seconds that other ranks wait before they exit: torchrun reports the first exit as the root cause
EXIT_TIMEOUT = 20.0  # seconds that a failing process may take to exit
WATCH_EVERY = 2.0  # seconds between two looks at whether another rank has failed


def launch(prepare: Callable[[], T], train: Callable[[T], None]) -> None:
    """Runs `train(prepare())`. A user's error in `prepare` is one line and exit code 2; later ones exit with 1."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nothing to save yet; by default it would end the process
    with other_ranks_watched():
        run = None
        try:
            run = prepare()
            try:
                train(run)
            except Stopped:
                finish_stopped(run)
        except KeyboardInterrupt:  # during preparation: there is nothing to save
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            fail(error, code=2 if run is None and isinstance(error, (ValueError, OSError)) else 1)


def fail(error: Exception, code: int) -> NoReturn:
    """Ends this process, and so the run. The first rank to fail prints the error as its last line.

    Other ranks print nothing: they mostly fail because the first one is gone.
    """
    faulthandler.dump_traceback_later(EXIT_TIMEOUT, exit=True, file=open(os.devnull, "w"))  # if the exit hangs
    listen(signal.SIG_DFL)
    if first_to_fail():
        if code != 2:
            traceback.print_exc()
        line = "error: " + (" ".join(str(error).split()) or type(error).__name__)
        print(line, file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's report then ends with the same line
            cause = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": cause}))
    else:
        time.sleep(ROOT_CAUSE)
    sys.exit(code)


def first_to_fail() -> bool:
    """True on the first rank that calls this, False on all others."""
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"  # of each machine: the others may have no error
    try:
        return common_store().add("first_to_fail", 1) == 1
    except RuntimeError:  # the machine that keeps the store is gone
        return True


def common_store() -> dist.Store:
    """The store of all processes: worlds (runtime/generators.py) have prefixes in it."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


@contextmanager
def other_ranks_watched() -> Iterator[None]:
    """A thread watches the other ranks during the block. It must end before Python does, which would abort."""
    over = Event()
    watcher = Thread(target=watch_other_ranks, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(EXIT_TIMEOUT)


def watch_other_ranks(over: Event) -> None:
    """Ends this process if another rank has failed and this one still waits for it. Returns when `over` is set.

    torchrun does so for the ranks of one machine. A rank of another machine may wait for hours for a new process group
    that the failed rank never joins: there, no open connection breaks.
    """
    while not dist.is_initialized():
        if over.wait(WATCH_EVERY):
            return
    store = common_store().clone()  # a waiting rank keeps the store's own connection busy
    with suppress(RuntimeError):  # the machine that keeps the store is gone
        while not store.check(["first_to_fail"]):
            if over.wait(WATCH_EVERY):
                return
    if over.wait(EXIT_TIMEOUT):  # a rank that notices the failure by itself has a better message
        return
    print("error: another rank has failed, or its machine is gone", file=sys.stderr, flush=True)
    os._exit(1)
