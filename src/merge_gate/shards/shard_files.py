"""Finds the reports of shards in downloaded directories.

In: directories, each the output of a shard, or a directory of outputs. Out: for each place a report, or a sentence that
says why there is none. The files came over a network: no link is followed, no pipe is waited for, and size and number
are bounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from merge_gate.earlier_reports import is_previous
from merge_gate.errors import GateError, UsageError
from merge_gate.records.report import Report
from merge_gate.records.terms import record
from merge_gate.regular_file import open_regular_file
from merge_gate.report.stored.report_files import read_report
from merge_gate.report.wording.untrusted import one_line

REPORT = "report.json"
MOST_DIRECTORIES = 1_000
"""The most directories that are read in one directory. A matrix of GitHub has at most 256 jobs."""

_LINK = "is a symbolic link, which is not followed, expected a directory"


@record
class FoundReport:
    """A place of a report: the report, or the problem with it. `file` is the device and inode of the file."""

    place: str
    report: Report | None = None
    problem: str = ""
    file: tuple[int, int] | None = None


def found_in(directories: Sequence[str]) -> tuple[FoundReport, ...]:
    """Every report in these directories and directly below them, each file once, in the order of their names."""
    seen: set[tuple[int, int]] = set()
    reports: list[FoundReport] = []
    for directory in directories:
        for place in _in(Path(directory)):
            if place.file is None or place.file not in seen:
                reports.append(place)
            if place.file is not None:
                seen.add(place.file)
    return tuple(reports)


def refuse_overwriting(reports: Sequence[FoundReport], output: str) -> None:
    """Refuse to replace a report that was read.

    Raises:
        UsageError: the output directory is the directory of a shard.
    """
    for place in reports:
        if place.report is not None and Path(place.place).resolve() == Path(output).resolve():
            raise UsageError(
                f"--output {output} is the directory of a shard, whose report would be lost",
                hint="choose another directory with --output",
            )


def _in(directory: Path) -> Iterator[FoundReport]:
    if directory.is_symlink():
        yield FoundReport(place=str(directory), problem=_LINK)
        return
    try:
        with os.scandir(directory) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield FoundReport(place=str(directory), problem=f"cannot be read: {error.strerror or error}")
        return
    places = [directory] if any(entry.name == REPORT for entry in inside) else []
    links = [entry.path for entry in inside if entry.is_symlink() and entry.name != REPORT]
    below = [
        Path(entry.path) for entry in inside if entry.is_dir(follow_symlinks=False) and not is_previous(entry.name)
    ]
    if not places and not below and not links:
        yield FoundReport(place=str(directory), problem=f"has no {REPORT}, and no directory with one")
    yield from (FoundReport(place=link, problem=_LINK) for link in links[:MOST_DIRECTORIES])
    if len(below) > MOST_DIRECTORIES:
        yield FoundReport(
            place=str(directory),
            problem=f"has {len(below):,} directories; only {MOST_DIRECTORIES:,} of them were read",
        )
    yield from map(_read, [*places, *below[:MOST_DIRECTORIES]])


def _read(place: Path) -> FoundReport:
    path = place / REPORT
    try:
        with open_regular_file(path) as file:
            status = os.fstat(file.fileno())
            report = read_report(file, str(path))
    except FileNotFoundError:
        return FoundReport(place=str(place), problem=f"has no {REPORT}")
    except OSError as error:
        return FoundReport(place=str(place), problem=f"has a {REPORT} that cannot be read: {error.strerror}")
    except GateError as error:
        return FoundReport(
            place=str(place), problem=f"has a {REPORT} that is not valid: {one_line(error.message, 300)}"
        )
    return FoundReport(place=str(place), report=report, file=(status.st_dev, status.st_ino))
