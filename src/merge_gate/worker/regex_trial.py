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
from merge_gate.files.regex_fields import shown
from merge_gate.records.files import Pattern
from merge_gate.records.measured import Refusal
from merge_gate.records.terms import Origin

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
        raise Refused(_endless(under_way, len(names))) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise Refused(_invalid(under_way, str(error))) from None


def _endless(pattern: Pattern | None, names: int) -> Refusal:
    what = f"{shown(pattern)}, a" if pattern is not None else "adapter_config.json holds a"
    return Refusal(
        check="config-invalid",
        message=f"{what} regular expression that was not matched against the {names:,} module names of the base within "
        f"{TRIAL_LIMIT_S:g} s of computing; PEFT would not come to an end",
        hint="write it without a repetition inside of a repetition, or use a list of names",
        origin=Origin.CONFIG,
    )


def _invalid(pattern: Pattern | None, why: str) -> Refusal:
    what = shown(pattern) if pattern is not None else "adapter_config.json holds an expression"
    return Refusal(
        check="config-invalid",
        message=f"{what}, which is not a valid regular expression: {why}",
        hint="use plain names",
        origin=Origin.CONFIG,
    )


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
