"""Exit codes and the tree of errors that a user can meet.

In: nothing. Out: `ExitCode` and the exceptions below. Knows no other module of the package.

    GateError                 the gate cannot go on; carries what, where and what next
    ├── ConfigError           the YAML file, with every problem found in it        exit 2
    ├── UsageError            the command line or an input                         exit 2
    ├── ResolveError          a name cannot be turned into files                   verdict `error`
    ├── EngineError           this adapter or base could not be judged             verdict `error`
    └── LauncherError         the container could not be started or lost           exit 3

A broken adapter is a `Finding`, never a `GateError`. `Refused` and `Undecidable` carry a fact out of the engine; the
finding is made of it in `judging/`.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge_gate.records.config import Problem
    from merge_gate.records.refusals import Refusal


class ExitCode(IntEnum):
    """What the process returns; fixed for version 1."""

    PASS = 0
    FAIL = 1
    USAGE = 2
    ERROR = 3


LACKING = {
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), then run again",
    errno.ENFILE: "the machine has too many open files: end what holds them, then run again",
    errno.ENOMEM: "out of memory: use a larger runner",
    errno.ENOSPC: "no space left on a disk: free some, then run again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run again",
}
"""What the system had too little of, by the number of its error; nothing that the gate could have known better."""


class GateError(Exception):
    """Base of all errors that are reported in a sentence, without a traceback.

    `hint` says what to do next; it is printed after the message.
    """

    exit_code: ExitCode = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GateError):
    """The command line, or an input of the action, asks for something that does not exist."""

    exit_code = ExitCode.USAGE


class ConfigError(GateError):
    """The configuration is not valid. `problems` holds the first in the order of the file; there are `more`."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: tuple[Problem, ...], *, more: int = 0) -> None:
        rest = [f"and {more:,} more"] if more else []
        super().__init__("\n".join([*map(str, problems), *rest]))
        self.problems = problems
        self.more = more


class ResolveError(GateError):
    """A directory or a Hub id cannot be turned into files on disk.

    `check` is the id of the check of bases that says so (`base-incomplete`, …), None for everything else.
    """

    def __init__(self, message: str, *, hint: str = "", check: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.check = check


class EngineError(GateError):
    """This adapter or this base could not be judged (an unreadable file, no such device)."""


class Refused(Exception):  # noqa: N818 - not an error of the gate: it carries a fact about the adapter
    """The adapter cannot be loaded or merged; `refusal` is the fact that says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Undecidable(Exception):  # noqa: N818 - as above
    """The base cannot be loaded, or a tensor cannot be measured; `refusal` is the fact that says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class LauncherError(GateError):
    """The container engine, the image or a mount is not there, or the container was lost."""
