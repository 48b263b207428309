"""Reads one or two stored reports, and returns the text of `merge-gate report` and its exit code.

It loads no model and does not import torch. `UsageError` is raised for a file that cannot be read or is not a report.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.earlier_reports import PREVIOUS, is_own
from merge_gate.errors import ExitCode, UsageError
from merge_gate.report.formats import json_report, terminal_text
from merge_gate.report.stored import compare
from merge_gate.report.stored.report_files import FORMATS, WORDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merge_gate.records.report import Report

_COMPARED = {"terminal": compare.render_text, "markdown": compare.render_markdown}


def show(names: Sequence[str], word: str) -> tuple[str, ExitCode]:
    """Render one report in another format (exit code 0), or the changes between two."""
    if len(names) == 1:
        report = stored(names[0])
        return (terminal_text.render(report, "") if word == "terminal" else FORMATS[WORDS[word]](report)), ExitCode.PASS
    if len(names) != 2:  # noqa: PLR2004
        raise UsageError(
            f"got {len(names)} reports, expected one, or two to compare", hint="name the older report first"
        )
    if word not in _COMPARED:
        raise UsageError(
            f"got two reports, but --format {word} shows one", hint=f"compare two as {' or '.join(_COMPARED)}"
        )
    changes = compare.compare(stored(names[0]), stored(names[1]))
    return _COMPARED[word](changes), changes.exit_code


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
