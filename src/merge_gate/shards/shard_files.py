"""Directories as artifacts are downloaded → the reports of shards that lie there.

In: names of directories, each a shard's output or a directory of such. Out: `Found`, a report or the sentence that says
why there is none. What lies there came over a network and may be anything: no link is followed, no pipe waited for, and
size and number are bounded. Knows nothing of what the reports say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from merge_gate.earlier_reports import is_previous
from merge_gate.errors import GateError, UsageError
from merge_gate.records.report import Report
from merge_gate.records.terms import record
from merge_gate.regular_file import open_regular_file, read_all
from merge_gate.report.formats import json_report
from merge_gate.report.wording.untrusted import one_line

REPORT = "report.json"
LONGEST_BYTES = 256 << 20
"""As the action allows a report.json (action/docker/collect.py); 1,000 adapters make one of about 2 MB."""
MOST_DIRECTORIES = 1_000
"""In one directory: GitHub's matrix ends at 256 jobs."""

_LINK = "is a symbolic link, which is not followed, expected a directory"


@record
class Found:
    """One place where a report should be: the report, or why it is none."""

    place: str
    report: Report | None = None
    problem: str = ""
    file: tuple[int, int] | None = None


def found_in(directories: Sequence[str]) -> tuple[Found, ...]:
    """Every report in these directories and directly below them, each file once, in the order of their names."""
    known: set[tuple[int, int]] = set()
    found: list[Found] = []
    for directory in directories:
        for one in _in(Path(directory)):
            if one.file is None or one.file not in known:
                found.append(one)
            if one.file is not None:
                known.add(one.file)
    return tuple(found)


def refuse_overwriting(found: Sequence[Found], output: str) -> None:
    """Refuse to write over a report that was read.

    Raises:
        UsageError: the output directory is one of the shards'.
    """
    for one in found:
        if one.report is not None and Path(one.place).resolve() == Path(output).resolve():
            raise UsageError(
                f"--output {output} is the directory of a shard, whose report would be lost",
                hint="choose another directory with --output",
            )


def _in(directory: Path) -> Iterator[Found]:
    if directory.is_symlink():
        yield Found(place=str(directory), problem=_LINK)
        return
    try:
        with os.scandir(directory) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield Found(place=str(directory), problem=f"cannot be read: {error.strerror or error}")
        return
    places = [directory] if any(entry.name == REPORT for entry in inside) else []
    links = [entry.path for entry in inside if entry.is_symlink() and entry.name != REPORT]
    below = [
        Path(entry.path) for entry in inside if entry.is_dir(follow_symlinks=False) and not is_previous(entry.name)
    ]
    if not places and not below and not links:
        yield Found(place=str(directory), problem=f"holds no {REPORT}, and no directory that could")
    yield from (Found(place=link, problem=_LINK) for link in links[:MOST_DIRECTORIES])
    if len(below) > MOST_DIRECTORIES:
        yield Found(
            place=str(directory),
            problem=f"holds {len(below):,} directories; only {MOST_DIRECTORIES:,} of them were read",
        )
    yield from map(_read, [*places, *below[:MOST_DIRECTORIES]])


def _read(place: Path) -> Found:
    path = place / REPORT
    try:
        data, file = _bytes_of(path)
        report = json_report.read(data, str(path))
    except FileNotFoundError:
        return Found(place=str(place), problem=f"holds no {REPORT}")
    except OSError as error:
        return Found(place=str(place), problem=f"has a {REPORT} that cannot be read: {error.strerror}")
    except GateError as error:
        return Found(place=str(place), problem=f"has a {REPORT} that is none: {one_line(error.message, 300)}")
    return Found(place=str(place), report=report, file=file)


def _bytes_of(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The bytes of a regular file, and which file it is."""
    with open_regular_file(path) as file:
        status = os.fstat(file.fileno())
        return read_all(file, LONGEST_BYTES), (status.st_dev, status.st_ino)
