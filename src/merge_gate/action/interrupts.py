"""Signals and a time limit, as one exception in the main thread.

In: a time limit in seconds. Out: `Interrupted`, once, so that whoever waits can stop what it started. Keeps to
Python 3.9.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_GRACE_S = 5
"""A cancelled job has 7.5 s between SIGINT and SIGTERM, and 2.5 s more (actions/runner, ProcessInvoker.cs)."""
TIME_LIMIT_S = 6 * 60 * 60.0
"""As long as a job on a hosted runner may take."""


class Interrupted(Exception):  # noqa: N818 # as KeyboardInterrupt: no error, a wish
    """A signal arrived, or the time limit is over; the text says which."""


@contextlib.contextmanager
def interruptible(time_limit_s: float = TIME_LIMIT_S) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or end of the time limit into `Interrupted`; later ones find it stopping."""

    def interrupted(number: int, _frame: object) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        over = f"the time limit of {time_limit_s / 60:g} min is over"
        raise Interrupted(over if number == signal.SIGALRM else f"received {signal.Signals(number).name}")

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        for number in previous:
            signal.signal(number, interrupted)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
