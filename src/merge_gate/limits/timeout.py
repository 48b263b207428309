"""Bounds the time of reads of files that may be on a mount that does not answer.

In: a function that reads. Out: its result. It imports the standard library only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ANSWER_TIMEOUT_S = 30.0
"""How long the file system may take to tell the size and the times of a base's files."""


def within(timeout_s: float, read: Callable[[], T]) -> T:
    """Read for at most this time. A read that hangs keeps its thread, and no one waits for it.

    Raises:
        TimeoutError: the time is over.
        Exception: what `read` raises.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(read())
        except Exception as error:  # noqa: BLE001 - it is raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {timeout_s:g} s")
    return results[0]
