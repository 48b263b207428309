"""Counts the processors that this process may use. It uses only the standard library."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The processors that this process may use; all of the machine if the system knows no affinity (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
