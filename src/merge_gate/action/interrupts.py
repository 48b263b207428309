"""Signals and a time limit, as one exception in the main thread.

In: a time limit in seconds, or none. Out: `Interrupted`, once, so that whoever waits can stop what it started. Keeps to
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


class Interrupted(BaseException):
    """A signal arrived, or the time limit is over. As KeyboardInterrupt, no error but a wish."""

    def __init__(self, number: int, time_limit_s: float | None) -> None:
        self.signal_name = signal.Signals(number).name
        over = f"the time limit of {(time_limit_s or 0) / 60:g} min is over"
        super().__init__(over if number == signal.SIGALRM else f"received {self.signal_name}")


@contextlib.contextmanager
def interruptible(time_limit_s: float | None = TIME_LIMIT_S) -> Iterator[None]:
    """Turn the first signal to stop, or the end of the time limit, into `Interrupted`; later ones find it stopping.

    The later ones are taken and dropped, not ignored by the system: Python reports a signal that arrived before it was
    ignored as an error. `nohup` stays in force.
    """
    is_stopping = False

    def stop(number: int, _frame: object) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise Interrupted(number, time_limit_s)

    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in wanted}
    try:
        signal.setitimer(signal.ITIMER_REAL, time_limit_s or 0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
