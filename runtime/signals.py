"""Signals are remembered when they arrive, and obeyed where the run can be saved.

SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) stop a run. SIGUSR1 makes it save a checkpoint and go on.
docs/reliability.md describes what torchrun does with them.
"""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Not those that the parent has told this process to ignore, as nohup does with SIGHUP.
STOPPING = [
    number
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
]
SAME_SIGNAL = 3.0  # seconds


class Stopped(Exception):
    """A signal asked the run to stop; raised on all ranks."""


@dataclass
class StopRequest:
    """Remembers signals until the run checks for them."""

    time: float = math.inf  # time.monotonic() of the first signal to stop
    save: bool = False  # a signal asked for a checkpoint

    def listen(self) -> None:
        """Installs the handlers."""
        listen(self.handle)
        signal.signal(signal.SIGUSR1, self.handle_save)

    def handle(self, number: int, _frame: Any) -> None:
        """Signal handler. A second signal ends the process at once.

        A scheduler's signal reaches each rank twice, directly and from torchrun, so repeats within `SAME_SIGNAL`
        seconds are ignored.
        """
        if time.monotonic() > self.time + SAME_SIGNAL:
            os._exit(128 + number)
        self.time = min(self.time, time.monotonic())

    def handle_save(self, _number: int, _frame: Any) -> None:
        """Signal handler."""
        self.save = True

    @property
    def came(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.time < math.inf

    def asked(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether any rank of the group (None: of all) was asked to stop. Collective."""
        return any_rank(self.came, group)

    def check(self) -> None:
        """Raises Stopped on every rank if any rank was asked to stop. Collective."""
        if self.asked():
            raise Stopped

    def take_save(self) -> bool:
        """Whether any rank was asked to save since the last call. Collective."""
        save, self.save = self.save, False
        return any_rank(save)


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set on any rank. Collective."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found)


def listen(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    """Installs a handler for the signals that stop a run."""
    for number in STOPPING:
        signal.signal(number, handler)


os.register_at_fork(after_in_child=lambda: listen(signal.SIG_DFL))  # a signal still ends the children that rewards fork
