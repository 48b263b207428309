"""Tries the regular expressions of a config on the names of a base's modules, with a limit on the time.

In: patterns and names. Out: nothing, or a refusal. It must run in the main thread of the worker.
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

TRIAL_TIMEOUT_S = 10.0
"""CPU seconds for all expressions of one adapter. A normal expression takes microseconds for each name."""


class _TimeOverError(Exception):
    """The CPU time is used up."""


def try_patterns(patterns: Sequence[Pattern], names: Sequence[str], timeout_s: float = TRIAL_TIMEOUT_S) -> None:
    """Match every expression of a config against every name of a base's modules, before PEFT does without a limit.

    It must run in the main thread: the limit is a signal, which interrupts Python's matcher.

    Raises:
        Refused: an expression is invalid, or matching takes longer than `timeout_s`.
    """
    current = None
    try:
        with _limited(timeout_s):
            for current in patterns:
                expression = re.compile(current.expression)
                for name in names:
                    expression.match(name)
                    expression.fullmatch(name)
    except _TimeOverError:
        raise Refused("pattern_refused", pattern=current, names=len(names), seconds=timeout_s) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise Refused(
            "pattern_refused", pattern=current, names=len(names), seconds=timeout_s, problem=str(error)
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
