"""The streams of the command: whole lines, inert, in an encoding that can say them; no reader who goes away ends a run.

In: lines. Out: standard output and standard error. Knows no command and no format.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import IO

from merge_gate._internal.text import WIDEST, repeatable
from merge_gate.report.wording.untrusted import inert, safe_text


def say(line: str) -> None:
    write(sys.stderr, safe_text(repeatable(line)) + "\n")


def tell(line: str, stream: IO[str] | None = None) -> None:
    """Write a line to `stream`, by default to standard output."""
    write(stream or sys.stdout, inert(line) + "\n")


def mend_streams() -> None:
    """A stream that the caller closed becomes /dev/null, else the first file to be opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def write(stream: IO[str], message: str) -> None:
    """Write at once. A reader who has gone, or a full disk behind a redirection, must not end a run."""
    try:
        stream.write(encodable(message, stream))
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        silence(stream)


def silence(stream: IO[str]) -> None:
    """Send what a broken stream still holds, and all that follows, nowhere: Python flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def encodable(message: str, stream: IO[str]) -> str:
    """Replace what the stream's encoding cannot say: a log in the C locale must not end the run."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return message.encode(encoding, "replace").decode(encoding)


def width_of(stream: IO[str], most: int = WIDEST) -> int:
    """The columns of text for people: those of a terminal, and no more than are good to read. A log has `WIDEST`."""
    return min(shutil.get_terminal_size((WIDEST, 0)).columns, most) if stream.isatty() else WIDEST


def is_ascii(stream: IO[str]) -> bool:
    """Whether marks, bars and the ellipsis are to be plain, since the stream cannot say others."""
    return encodable("✓✗━─⠋…", stream) != "✓✗━─⠋…"
