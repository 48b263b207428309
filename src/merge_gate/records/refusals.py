"""Why an adapter could not be loaded, merged, or judged, on its way from the engine to `judging/`.

The engine raises `Refused` or `CannotJudge` with a kind and facts, and without a sentence. The kind is the name of a
function in `REFUSALS` of a file of `judging/`, which makes the finding; the facts are its arguments.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import field

from merge_gate.records.files import Pattern
from merge_gate.records.terms import Origin, record

MOST_OF_LOG = 8_000
"""The last characters of a traceback, or of what a process printed, that are kept."""


def log_of(error: Exception) -> str:
    """The end of an exception's traceback. Names from a file can make its message as long as the file."""
    return "".join(traceback.format_exception(error))[-MOST_OF_LOG:]


@record
class Caught:
    """An exception of a library. `kinds` are the names of its class and of those that it inherits from.

    `text` is the line of its message that says most, and `detail` more of the message, for telling errors apart. `log`
    is its traceback, if the exception may be a bug of the gate.
    """

    kinds: tuple[str, ...]
    text: str
    detail: str = ""
    log: str | None = None

    def is_a(self, *kinds: str) -> bool:
        return not set(kinds).isdisjoint(self.kinds)

    def __str__(self) -> str:
        return f"{self.kinds[0]}: {self.text}"


_Single = str | float | bool | None | Caught | Pattern
Fact = _Single | tuple[_Single | tuple[_Single, ...], ...]


@record
class Refusal:
    """Why an adapter or a base was refused; tests/judging/test_refusals.py compares kinds and fields with their use."""

    kind: str
    fields: Mapping[str, Fact] = field(hash=False)


@record
class NotJudged:
    """An error of the gate itself, in its own words. `log` is the end of what a process printed that died."""

    message: str
    hint: str = ""
    origin: Origin = Origin.RUNTIME
    log: str | None = None


class _CarriesRefusal(Exception):  # noqa: N818 - not an error of the gate: it carries facts
    def __init__(self, kind: str, **fields: Fact) -> None:
        super().__init__(kind, fields)
        self.refusal = Refusal(kind=kind, fields=fields)


class Refused(_CarriesRefusal):
    """The adapter cannot be loaded or merged; `refusal` says why."""


class CannotJudge(_CarriesRefusal):
    """The base cannot be loaded, or a tensor cannot be measured; `refusal` says why."""
