"""SIGTERM and SIGINT: noted when they come, obeyed where a run can be saved."""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

SAME_SIGNAL = 3.0  # seconds


class Stopped(Exception):
    """A signal asked the run to stop, and every rank has agreed to."""


@dataclass
class StopRequest:
    """Remembers the first signal until the run calls `check`."""

    time: float = math.inf  # time.monotonic() of the first signal

    def handle(self, number: int, _frame: Any) -> None:
        """Signal handler. A second signal ends the process at once.

        One Ctrl-C reaches each rank twice, from the terminal and from torchrun, so repeats within `SAME_SIGNAL` seconds
        are ignored.
        """
        if time.monotonic() > self.time + SAME_SIGNAL:
            os._exit(128 + number)
        self.time = min(self.time, time.monotonic())

    def check(self) -> None:
        """Raises Stopped on every rank if any rank was asked to stop. Collective."""
        asked = torch.tensor(int(self.time < math.inf))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked:
            raise Stopped


def listen(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    """Installs a handler for SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


os.register_at_fork(after_in_child=lambda: listen(signal.SIG_DFL))  # a signal still ends the children that rewards fork
