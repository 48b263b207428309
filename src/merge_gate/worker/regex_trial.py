"""A trial of an adapter's regular expressions on the base's real names, before PEFT matches them without end.

In: the expressions of an adapter's config, and the base's module names. Out: nothing, or `Refused` that names the
expression. Must run in the main thread: the time limit is a signal, which Python's matcher lets in.
"""

from __future__ import annotations

import contextlib
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from merge_gate.errors import Refused
from merge_gate.records.files import Pattern
from merge_gate.records.refusals import PatternRefused

TRIAL_LIMIT_S = 10.0
"""Computing time for all expressions of one adapter; an honest one needs microseconds for each name."""


class _TimeOverError(Exception):
    """The computing time is used up."""


def try_patterns(patterns: Sequence[Pattern], names: Sequence[str]) -> None:
    """Match every expression of the config against every name.

    Raises:
        Refused: one is not valid, or they are not through after `TRIAL_LIMIT_S`.
    """
    under_way = None
    try:
        with _limited(TRIAL_LIMIT_S):
            for under_way in patterns:
                expression = re.compile(under_way.expression)
                for name in names:
                    expression.match(name)
                    expression.fullmatch(name)
    except _TimeOverError:
        raise Refused(PatternRefused(pattern=under_way, names=len(names), seconds=TRIAL_LIMIT_S)) from None
    except (re.error, OverflowError, RecursionError) as error:
        fact = PatternRefused(pattern=under_way, names=len(names), seconds=TRIAL_LIMIT_S, problem=str(error))
        raise Refused(fact) from None


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def over(_number: int, _frame: object) -> NoReturn:
        raise _TimeOverError

    before = signal.signal(signal.SIGVTALRM, over)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
