"""Defines exit codes and the errors that users can see. Messages repeat no long text.

```text
GateError                 the gate cannot go on; carries a message and a hint
├── ConfigError           an invalid YAML file, with all problems          exit 2
├── UsageError            a wrong command line or input                    exit 2
├── ResolveError          a name cannot be resolved to files               verdict `error`
├── EngineError           this adapter or base could not be judged         verdict `error`
│   └── SourceError       bytes of a base could not be had                 verdict `error`
├── NotPublishedError     this merge passed and cannot be published        verdict `error`
├── NoPlainLoraError      this adapter has no plain LoRA to export         exit 1
└── LauncherError         the container could not be started, or was lost  exit 3
```

A broken adapter is a `Finding`, never a `GateError`.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import TYPE_CHECKING

from merge_gate._internal.text import repeatable

if TYPE_CHECKING:
    from merge_gate.records.config import Problem


class ExitCode(IntEnum):
    """The exit codes of the process. They are fixed for version 1."""

    PASS = 0
    FAIL = 1
    USAGE = 2
    ERROR = 3


SHORTAGES = {
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), then run again",
    errno.ENFILE: "too many open files on this machine: close programs that keep files open, then run again",
    errno.ENOMEM: "out of memory: use a larger runner",
    errno.ENOSPC: "no space left on a disk: free some space, then run again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run again",
}
"""The message for each error number that means a shortage of resources, which is not a fault of the gate."""


class GateError(Exception):
    """The base class of all errors that are reported in a sentence, without a traceback.

    `hint` says what to do next, and is printed after the message.
    """

    exit_code: ExitCode = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = repeatable(message), repeatable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}; to do: {self.hint}" if self.hint else self.message


class UsageError(GateError):
    """The command line or an input of the action is wrong."""

    exit_code = ExitCode.USAGE


class ConfigError(GateError):
    """The configuration is invalid. `problems` are the first in the order of the file; `more` counts the others."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: tuple[Problem, ...], *, more: int = 0) -> None:
        rest = [f"and {more:,} more"] if more else []
        super().__init__("\n".join([*map(str, problems), *rest]))
        self.problems = problems
        self.more = more


class ResolveError(GateError):
    """A directory or a Hub id cannot be resolved to files on disk.

    `check` is the id of the check of bases that fires (`base-incomplete`, …); None for any other error.
    """

    def __init__(self, message: str, *, hint: str = "", check: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.check = check


class EngineError(GateError):
    """This adapter or this base could not be judged (an unreadable file, no such device)."""


class SourceError(EngineError):
    """The bytes of a file could not be had: the message has the file, the place, and what was expected."""


class NotPublishedError(GateError):
    """The adapter passed, and its merge cannot be published."""


class NoPlainLoraError(GateError):
    """No plain LoRA has the effect of this adapter, so it cannot be exported."""

    exit_code = ExitCode.FAIL


class CardError(BaseException):
    """A GPU, its driver, or one of its libraries failed. The process ends, so `except Exception` does not catch it."""


class LauncherError(GateError):
    """The container engine, the image, or a mount is missing, or the container was lost."""
