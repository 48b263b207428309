"""A run that was killed, and how another one goes on from what it left.

In: an output directory. Out: the lines of the report that a killed run wrote, by their keys. What several killed runs
have left is put together in one file beside the report, so that a second kill loses nothing of the first; a run that
comes to its end removes it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.cache.verdicts import Line
from merge_gate.errors import UsageError
from merge_gate.report import json_report
from merge_gate.report.files import write_text

if TYPE_CHECKING:
    from merge_gate.records.report import AdapterReport, BaseReport, Report

LEFT = "resumed.json"
"""What is left of runs that were killed, while another one goes on from it."""


class Left:
    """The lines of earlier reports, by key: what each may rest on is every base of the same name."""

    def __init__(self, *reports: Report) -> None:
        self._lines: dict[str, list[Line]] = {}
        for report in reports:
            for adapter in report.adapters:
                if adapter.judged is not None:
                    lines = [Line(adapter=adapter, base=base) for base in report.bases if _is_on(adapter, base)]
                    self._lines[adapter.judged.key] = lines

    def __len__(self) -> int:
        return len(self._lines)

    def of(self, key: str) -> list[Line]:
        """The lines that were judged under this key; the bases of them differ."""
        return self._lines.get(key, [])


def _is_on(adapter: AdapterReport, base: BaseReport) -> bool:
    on = adapter.base
    same = (on.model, on.revision, on.dtype, on.quantization)
    return same == (base.model, base.revision, base.dtype, base.quantization)


def left_in(directory: str) -> Left:
    """What may be gone on from; to be called before the directory is cleared.

    Raises:
        UsageError: there is a report, and it cannot be read.
    """
    reports = [report for name in ("report.json", LEFT) if (report := _read(Path(directory, name))) is not None]
    if not reports:
        return Left()
    known = {one.judged.key for one in reports[0].adapters if one.judged is not None}
    more = [
        one for report in reports[1:] for one in report.adapters if one.judged is None or one.judged.key not in known
    ]
    bases = dict.fromkeys(base for report in reports for base in report.bases)
    union = replace(reports[0], complete=False, adapters=(*reports[0].adapters, *more), bases=tuple(bases))
    write_text(Path(directory, LEFT), json_report.render(union))
    return Left(union)


def forget(directory: str) -> None:
    """The run came to its end: nothing is left to go on from."""
    with suppress(OSError):
        Path(directory, LEFT).unlink(missing_ok=True)


def _read(path: Path) -> Report | None:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return json_report.read(path.read_bytes(), path.name)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read, so there is nothing to resume: {error.strerror or error}",
            hint="run without --resume",
        ) from error
