"""One line on the terminal during long work: its name, progress and time.

The line is gone when the work is done. Where standard error is no terminal (a log file, a test), nothing is written;
of several ranks, the first one writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tqdm import tqdm

SHOWN_AFTER = 2.0  # seconds; shorter work shows no bar
REDRAWN_EVERY = 1.0  # seconds; the clock also runs during a long part


@contextmanager
def progress_bar(label: str, total: int | None = None, unit: str = "", **options) -> Iterator[tqdm]:
    """Shows a bar within the block, which calls its `update`; without a total only the clock. `options`: tqdm's."""
    first_rank = os.environ.get("RANK", "0") == "0"
    shape = "{desc}: {n_fmt}/{total_fmt} {unit} |{bar}| {elapsed}, {remaining} to go" if total else "{desc}: {elapsed}"
    bar = tqdm(
        total=total,
        desc=label,
        unit=unit,
        bar_format=shape,
        leave=False,
        dynamic_ncols=True,
        delay=SHOWN_AFTER,
        mininterval=REDRAWN_EVERY,
        disable=None if first_rank else True,  # None: tqdm asks whether standard error is a terminal
        **options,
    )
    done = Event()
    clock = Thread(target=redraw, args=(bar, done), daemon=True)
    try:
        if not bar.disable:
            clock.start()
        yield bar
    finally:
        done.set()
        if not bar.disable:
            clock.join()
        bar.close()


def redraw(bar: tqdm, done: Event) -> None:
    """Redraws the bar regularly, also while `update` is not called."""
    wait = SHOWN_AFTER
    while not done.wait(wait):
        wait, bar.delay = REDRAWN_EVERY, 0.0  # tqdm removes a bar only if it is past its delay
        bar.refresh()
