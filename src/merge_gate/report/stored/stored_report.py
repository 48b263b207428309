"""Reads stored reports, and returns the texts of `merge-gate report show` and `merge-gate report diff`.

It loads no model and does not import torch. `UsageError` is raised for a file that cannot be read or is not a report.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from merge_gate.earlier_reports import PREVIOUS, is_own
from merge_gate.errors import ExitCode, UsageError
from merge_gate.report.formats import json_report, terminal_text
from merge_gate.report.stored import compare
from merge_gate.report.stored.report_files import FORMATS, WORDS

if TYPE_CHECKING:
    from merge_gate.records.report import Report

DIFF_FORMATS = MappingProxyType({"terminal": compare.render_text, "markdown": compare.render_markdown})
"""The words of `merge-gate report diff --format`, each with its renderer."""


def shown(name: str, word: str) -> str:
    """The report in another format."""
    report = stored(name)
    return terminal_text.render(report, "") if word == "terminal" else FORMATS[WORDS[word]](report)


def compared(old: str, new: str, word: str) -> tuple[str, ExitCode]:
    """The changes from one report to another, and the exit code that they ask for."""
    changes = compare.compare(stored(old), stored(new))
    return DIFF_FORMATS[word](changes), changes.exit_code


def stored(name: str) -> Report:
    """Read the report in a file, or in a run's output directory.

    Raises:
        UsageError: the file cannot be read or is not a report.
    """
    try:
        path = Path(name, "report.json") if Path(name).is_dir() else Path(name)
        data = path.read_bytes()
    except OSError as error:
        earlier = Path(name, PREVIOUS)
        hint = f"the report of an earlier run is in {earlier}" if is_own(earlier / "report.json") else ""
        raise UsageError(
            f"{error.filename or name} cannot be read: {error.strerror or error}",
            hint=hint or "name the report.json that a run wrote, or its directory",
        ) from error
    return json_report.read(data, str(path))
