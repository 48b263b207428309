"""The verdicts of runs that were killed, as a source of the cache (`--resume`).

In: an output directory. Out: the sealed verdicts in its reports and in those of `previous/`, `previous-2/`, and so on.
While the new run continues, they are also in one file next to its report, so that a second kill loses nothing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.cache.cached_verdict import CachedVerdict, is_sealed
from merge_gate.earlier_reports import RESUMED, is_own, places
from merge_gate.errors import UsageError
from merge_gate.regular_file import open_regular_file
from merge_gate.report.formats import json_report
from merge_gate.report.stored.report_files import read_report, write_text
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from merge_gate.cache.seal import Seal
    from merge_gate.records.report import Report

Json = Any

_NOTHING = "nothing to resume: the output directory holds no verdict of an earlier run, so every adapter is judged"


class ResumedVerdicts:
    """The verdicts in the earlier reports of one output directory.

    An entry of a report names its base, and several bases can have one name. The seal shows which of them is meant.
    """

    def __init__(self, directory: str, seal: Seal) -> None:
        self._directory, self._seal = Path(directory), seal
        self._reports: list[Report] = []
        self._verdicts: dict[str, list[CachedVerdict]] = {}
        used: list[Path] = []
        damaged: list[Path] = []
        for path in _reports_in(self._directory):
            report = _read(path)
            if report is None:
                damaged.append(path)
            elif self._add(report):
                used.append(path.parent)
        self.notes = [f"{path} is damaged, so none of its verdicts are reused" for path in damaged]
        places_used = listing(str(place) for place in dict.fromkeys(used))
        self.notes.append(_NOTHING if self.is_empty else f"--resume reuses the verdicts in {places_used}")

    @property
    def is_empty(self) -> bool:
        return not self._verdicts

    def find(self, key: str, material: Json) -> Iterator[CachedVerdict]:
        """The verdicts with this key whose seal fits."""
        return (judged for judged in self._verdicts.get(key, ()) if is_sealed(judged, material, self._seal))

    def preserve(self) -> None:
        """Write all verdicts to one file in the output directory, because a new run replaces their reports.

        Raises:
            UsageError: the file cannot be written.
        """
        if self.is_empty:
            return
        adapters = dict.fromkeys(
            adapter for report in self._reports for adapter in report.adapters if adapter.judged is not None
        )
        bases = dict.fromkeys(base for report in self._reports for base in report.bases)
        union = replace(self._reports[0], complete=False, adapters=tuple(adapters), bases=tuple(bases))
        write_text(self._directory / RESUMED, json_report.render(union))

    def _add(self, report: Report) -> bool:
        """Whether the report contains a verdict that can be reused."""
        adapters = [adapter for adapter in report.adapters if adapter.judged is not None]
        for adapter in adapters:
            if adapter.judged is not None:
                on = [CachedVerdict(adapter=adapter, base=base) for base in report.bases if adapter.base == base.key]
                self._verdicts.setdefault(adapter.judged.key, []).extend(on)
        if adapters:
            self._reports.append(report)
        return bool(adapters)


def forget(directory: str) -> None:
    """Remove the file that `ResumedVerdicts.preserve` wrote, because the run is complete."""
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
        with open_regular_file(path) as file:
            return read_report(file, path.name)
    except (OSError, UsageError):
        return None
