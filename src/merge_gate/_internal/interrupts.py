"""Turns signals and a time limit into one exception, `Interrupted`, in the main thread.

It is raised once, and only inside `interruptible`. At any other time a signal is only recorded, so that no cleanup is
cut short.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_GRACE_S = 5
"""A canceled job has 7.5 s between SIGINT and SIGTERM, and 2.5 s more (actions/runner, ProcessInvoker.cs)."""
TIMEOUT_S = 6 * 60 * 60.0
"""The time limit of a job on a hosted runner."""


class Interrupted(BaseException):
    """A signal arrived, or the time limit is over: a request to stop, not an error, like KeyboardInterrupt.

    `output` is the directory with the report of the run that it stopped; empty if no run had begun.
    """

    def __init__(self, number: int, timeout_s: float | None) -> None:
        self.signal_name, self.output = signal.Signals(number).name, ""
        over = f"the time limit of {(timeout_s or 0) / 60:g} min is over"
        super().__init__(over if number == signal.SIGALRM else f"received {self.signal_name}")


class Signals:
    """Records the first signal that arrives, and raises it if the code is interruptible."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._first: int | None = None
        self._is_interruptible = False

    def receive(self, number: int, _frame: object) -> None:
        """Record the first signal, and raise it if the code is interruptible. Later signals are dropped.

        They are handled and not set to SIG_IGN: Python reports a signal that arrived before SIG_IGN as an error.
        """
        if self._first is None:
            self._first = number
            if self._is_interruptible:
                self._raise(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` inside, at once if a signal has already arrived."""
        self._is_interruptible = True
        try:
            self.check()
            yield
        finally:
            self._is_interruptible = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self._first is not None:
            self._raise(self._first)

    def _raise(self, number: int) -> None:
        self._is_interruptible = False
        raise Interrupted(number, self._timeout_s)


@contextlib.contextmanager
def deferred_signals(timeout_s: float | None = TIMEOUT_S) -> Iterator[Signals]:
    """Record signals to stop and the end of the time limit. Handlers are restored at the end; `nohup` keeps working."""
    signals = Signals(timeout_s)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, signals.receive) for number in numbers}
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s or 0)
        yield signals
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(timeout_s: float | None = TIMEOUT_S) -> Iterator[None]:
    """Turn the first signal to stop, or the end of the time limit, into `Interrupted`."""
    with deferred_signals(timeout_s) as signals, signals.interruptible():
        yield
