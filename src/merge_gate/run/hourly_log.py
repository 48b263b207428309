"""A line each hour for the log of a long run: its progress, and an estimate of the time left.

In: how many entries have a verdict, at any moment. Out: whether an hour has passed, and the sentence.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from merge_gate.report.wording.words import counted, duration

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY_S = 3600.0


class HourlyLog:
    """The hours of one run. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._next_s = self._began_s + EVERY_S
        self._first = 0

    def merging_begins(self, done: int) -> None:
        """Start the estimate here: the verdicts so far needed no merge."""
        self._first = done
        self._began_s = self._clock()

    @property
    def is_due(self) -> bool:
        """Whether an hour has passed since the last line."""
        return self._clock() >= self._next_s

    def line(self, done: int, total: int, failed: int) -> str:
        """The line of this hour."""
        now_s = self._clock()
        self._next_s = now_s + EVERY_S
        elapsed_s, judged = now_s - self._began_s, done - self._first
        left = f"; about {duration(round(elapsed_s * (total - done) / judged))} left" if judged > 0 else ""
        return (
            f"after {duration(round(elapsed_s))}: {done:,} of {counted(total, 'adapter')} judged, "
            f"{failed:,} failed{left}"
        )
