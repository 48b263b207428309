"""Tries an adapter's regular expressions on the base's module names under a time limit, before PEFT matches them.

It raises `Refused` with the expression that is invalid or takes too long. It must run in the main thread: the time
limit is a signal, which interrupts Python's matcher.
"""

from __future__ import annotations

import contextlib
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from merge_gate.records.files import Pattern
from merge_gate.records.refusals import Refused

TRIAL_LIMIT_S = 10.0
"""CPU seconds for all expressions of one adapter. A normal expression takes microseconds for each name."""


class _TimeOverError(Exception):
    """The CPU time is used up."""


def try_patterns(patterns: Sequence[Pattern], names: Sequence[str]) -> None:
    """Match every expression of the config against every name.

    Raises:
        Refused: an expression is invalid, or matching takes longer than `TRIAL_LIMIT_S`.
    """
    current = None
    try:
        with _limited(TRIAL_LIMIT_S):
            for current in patterns:
                expression = re.compile(current.expression)
                for name in names:
                    expression.match(name)
                    expression.fullmatch(name)
    except _TimeOverError:
        raise Refused("pattern_refused", pattern=current, names=len(names), seconds=TRIAL_LIMIT_S) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise Refused(
            "pattern_refused", pattern=current, names=len(names), seconds=TRIAL_LIMIT_S, problem=str(error)
        ) from None


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def on_alarm(_number: int, _frame: object) -> NoReturn:
        raise _TimeOverError

    before = signal.signal(signal.SIGVTALRM, on_alarm)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
