"""The verdicts of runs that were killed, and how another run goes on from them.

In: an output directory. Out: the verdicts of the reports in it, in `previous/`, and in its neighbors, by their keys. A
run that goes on from them keeps them together in one file next to its report, so that a second kill loses nothing.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.cache.verdicts import Line
from merge_gate.earlier_reports import RESUMED, is_own, places
from merge_gate.errors import UsageError
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.report.formats import json_report
from merge_gate.report.stored.report_files import write_text
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from merge_gate.records.report import AdapterReport, BaseReport, Report


LONGEST_BYTES = OUTPUT_FILES[0].limit_bytes
_NOTHING = "nothing to resume: the output directory holds no verdict of an earlier run, so all is judged"


class Left:
    """The verdicts of earlier reports, by key. Each may rest on every base of the same name.

    `places` are the directories of these reports, `unusable` the files that could not be read.
    """

    def __init__(self, *reports: Report, places: tuple[Path, ...] = (), unusable: tuple[Path, ...] = ()) -> None:
        self.places, self.unusable = places, unusable
        self._reports = reports
        self._lines: dict[str, list[Line]] = {}
        for report in reports:
            for adapter in report.adapters:
                if adapter.judged is not None:
                    lines = [Line(adapter=adapter, base=base) for base in report.bases if _is_on(adapter, base)]
                    self._lines.setdefault(adapter.judged.key, []).extend(lines)

    def __len__(self) -> int:
        return len(self._lines)

    def of(self, key: str) -> list[Line]:
        """The verdicts with this key; their bases differ."""
        return self._lines.get(key, [])

    @property
    def notes(self) -> list[str]:
        """Which reports the verdicts come from, and which could not be read."""
        damaged = [f"{path} is damaged, so none of its verdicts are reused" for path in self.unusable]
        if not self:
            return [*damaged, _NOTHING]
        return [*damaged, f"--resume reuses the verdicts in {listing(map(str, self.places))}"]

    def keep(self, directory: str) -> None:
        """Write all of them to one file in `directory`, because the reports they come from will be replaced.

        Raises:
            UsageError: the file cannot be written.
        """
        if not self:
            return
        first = self._reports[0]
        adapters = dict.fromkeys(one for report in self._reports for one in report.adapters if one.judged is not None)
        bases = dict.fromkeys(base for report in self._reports for base in report.bases)
        union = replace(first, complete=False, adapters=tuple(adapters), bases=tuple(bases))
        write_text(Path(directory, RESUMED), json_report.render(union))


def _is_on(adapter: AdapterReport, base: BaseReport) -> bool:
    return adapter.base == base.key


def left_in(directory: str) -> Left:
    """The verdicts in the reports at the top level of `directory` and in its directories of earlier reports."""
    reports, used, unusable = [], [], []
    for path in _reports_in(Path(directory)):
        report = _read(path)
        if report is None:
            unusable.append(path)
        elif any(one.judged is not None for one in report.adapters):
            reports.append(report)
            used.append(path.parent)
    return Left(*reports, places=tuple(dict.fromkeys(used)), unusable=tuple(unusable))


def forget(directory: str) -> None:
    """Remove the file that `Left.keep` wrote: the run came to its end."""
    path = Path(directory, RESUMED)
    with suppress(OSError):
        if is_own(path):
            path.unlink()


def _reports_in(directory: Path) -> Iterator[Path]:
    for place in places(directory):
        if place == directory or not place.is_symlink():
            yield from (path for name in ("report.json", RESUMED) if is_own(path := place / name))


def _read(path: Path) -> Report | None:
    """The report in a file; None if it is damaged, too large, or not a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > LONGEST_BYTES:
                return None
            return json_report.read(file.read(LONGEST_BYTES), path.name)
    except (OSError, UsageError):
        return None
