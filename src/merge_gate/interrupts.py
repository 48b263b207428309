"""Signals and a time limit, as one exception in the main thread.

In: a time limit in seconds, or none. Out: `Interrupted`, once, while somebody waits for it; at any other time a signal
is only noted, so that nothing that has begun to clear away is cut short.
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


class Signals:
    """The first signal that arrived, and whether somebody waits for it."""

    def __init__(self, time_limit_s: float | None) -> None:
        self._time_limit_s = time_limit_s
        self._first: int | None = None
        self._is_waiting = False

    def note(self, number: int, _frame: object) -> None:
        """Note the first signal, and raise it where somebody waits; later ones find it stopping.

        They are taken and dropped, not ignored by the system: Python reports a signal that arrived before it was
        ignored as an error.
        """
        if self._first is None:
            self._first = number
            if self._is_waiting:
                self._raise(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` inside, at once where a signal came before."""
        self._is_waiting = True
        try:
            self.check()
            yield
        finally:
            self._is_waiting = False

    def check(self) -> None:
        """Raise `Interrupted` where a signal came before."""
        if self._first is not None:
            self._raise(self._first)

    def _raise(self, number: int) -> None:
        self._is_waiting = False
        raise Interrupted(number, self._time_limit_s)


@contextlib.contextmanager
def held(time_limit_s: float | None = TIME_LIMIT_S) -> Iterator[Signals]:
    """Note signals to stop and the end of the time limit; handlers are as before afterwards. `nohup` stays in force."""
    signals = Signals(time_limit_s)
    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    previous = {number: signal.signal(number, signals.note) for number in wanted}
    try:
        signal.setitimer(signal.ITIMER_REAL, time_limit_s or 0)
        yield signals
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(time_limit_s: float | None = TIME_LIMIT_S) -> Iterator[None]:
    """Turn the first signal to stop, or the end of the time limit, into `Interrupted`."""
    with held(time_limit_s) as signals, signals.interruptible():
        yield
