"""Reads stored reports, and returns the texts of `merge-gate report show` and `merge-gate report diff`.

It loads no model and does not import torch. `UsageError` is raised for a file that cannot be read or is not a report.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.earlier_reports import PREVIOUS, is_own
from merge_gate.errors import ExitCode, UsageError
from merge_gate.regular_file import open_regular_file
from merge_gate.report.formats import terminal_text
from merge_gate.report.stored import compare
from merge_gate.report.stored.report_files import FORMATS, WORDS, read_report
from merge_gate.text import quoted

if TYPE_CHECKING:
    from merge_gate.records.report import Report

_NAME_IT = "name the report.json that a run wrote, or its directory"


def shown(name: str, word: str, *, width: int = 100) -> str:
    """The report in another format. `width`: columns of the format `terminal`."""
    report = stored(name)
    return terminal_text.render(report, "", width=width) if word == "terminal" else FORMATS[WORDS[word]](report)


def compared(old: str, new: str, word: str, *, width: int = 100) -> tuple[str, ExitCode]:
    """The changes from one report to another, and the exit code that they ask for. `width`: as in `shown`."""
    changes = compare.compare(stored(old), stored(new))
    is_text = word == "terminal"
    text = compare.render_text(changes, width=width) if is_text else compare.render_markdown(changes)
    return text, changes.exit_code


def stored(name: str) -> Report:
    """Read the report in a file, or in a run's output directory.

    Raises:
        UsageError: the file cannot be read or is not a report.
    """
    path = Path(name, "report.json") if os.path.isdir(name) else Path(name)  # noqa: PTH112 (pathlib raises)
    try:
        with open_regular_file(path, follow=True) as file:
            return read_report(file, str(path))
    except FileNotFoundError as error:
        earlier = Path(name, PREVIOUS)
        hint = f"the report of an earlier run is in {earlier}" if is_own(earlier / "report.json") else ""
        raise UsageError(f"there is no report {quoted(str(path), 200)}", hint=hint or _NAME_IT) from error
    except OSError as error:
        raise UsageError(
            f"{quoted(str(path), 200)} cannot be read: {error.strerror or error}", hint=_NAME_IT
        ) from error
