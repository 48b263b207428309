"""Marks the report of an earlier run in an output directory as stale, and moves it to `previous/` once a run judges.

Reports are recognized by their generator tag. The caller has locked the directory. It uses only the standard library of
Python 3.9, because the action uses it too.

A stale report.json has `"complete": false`, and `stale` has its result. The other formats have hidden names meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.output_files import OUTPUT_FILES, TAG_WITHIN_BYTES
from merge_gate._internal.regular_file import open_regular_file, read_regular_file
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator

REPORTS = tuple(row.name for row in OUTPUT_FILES)
PREVIOUS = "previous"

_REPORT, *_RENDERED = REPORTS
_HIDDEN = {name: f".{name}.stale" for name in _RENDERED}
"""The names of the other formats of a stale report, which no program looks for."""

_TAGS = {row.name: row.tag for row in OUTPUT_FILES}
_TAGS.update({hidden: _TAGS[name] for name, hidden in _HIDDEN.items()})
_UNFINISHED = re.compile(rf"\.(?:{'|'.join(map(re.escape, REPORTS))})\.[0-9a-f]{{16}}\.tmp")
"""The names that `whole_file` writes to; a killed run may leave one."""

_SLOT = re.compile(rf"{PREVIOUS}(?:-([2-9]|[1-9][0-9]{{1,8}}))?")
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_INCOMPLETE = b"incomplete"
_HEAD = re.compile(
    rb'"complete":\s*(true|false),\s*(?:"stale":\s*(?:null|"([a-z]{1,16})"),\s*)?"result":\s*"([a-z]{1,16})"'
)


class EarlierReports:
    """The report of an earlier run in one output directory. `place` is the directory that it was moved to, if any."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._is_there = is_own(directory / _REPORT)
        self.place: Path | None = None

    def replace_previous(self) -> None:
        """Move the report to `previous/`, and replace the report there, because a new run judges.

        A directory that holds any other file keeps its name and its files; then `previous-2/` is the one to replace.

        Raises:
            GateError: it cannot be moved, and the new report would replace it.
        """
        files = [(self._directory / hidden, name) for name, hidden in _HIDDEN.items()]
        files += [(self._directory / _REPORT, _REPORT)]  # last: a killed run leaves it here or there, and none loses it
        files = [(path, name) for path, name in files if is_own(path)]
        if not files:
            return
        try:
            slots = (_slot(self._directory, number) for number in itertools.count(1))
            slot = next(slot for slot in slots if not os.path.lexists(slot) or (self._is_there and _is_free(slot)))
            slot.mkdir(exist_ok=True)
            for path, name in files:
                path.rename(slot / name)
            _write_stale(slot / _REPORT, is_stale=False)
        except OSError as error:
            raise GateError(
                f"cannot move the report of an earlier run aside in {self._directory}: {error.strerror or error}",
                hint="free some space on that disk, or choose another directory for the report",
            ) from error
        self.place = slot

    @property
    def line(self) -> str:
        """One line for the user, empty if there is no such report."""
        if self.place is not None:
            return f"the report of an earlier run is now in {self.place}"
        report = self._directory / _REPORT
        return f"{report} is of an earlier run, and is marked as stale" if self._is_there else ""


def mark_stale(directory: Path, *, chosen_by: str = "--output") -> EarlierReports:
    """Mark the report of an earlier run, so that it does not stand for a run that judges nothing. Nothing is lost.

    Args:
        directory: an output directory that no other run writes to.
        chosen_by: the option or input that named it, for the hint.

    Raises:
        UsageError: a file has the name of a report and does not carry its tag. Nothing was marked.
        OSError: the directory cannot be changed.
    """
    refuse_foreign(directory, (*REPORTS, *_HIDDEN.values()), chosen_by=chosen_by)
    for path in directory.iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
    _write_stale(directory / _REPORT, is_stale=True)
    for name, hidden in _HIDDEN.items():
        with contextlib.suppress(FileNotFoundError):
            (directory / name).replace(directory / hidden)
    return EarlierReports(directory)


def _write_stale(report: Path, *, is_stale: bool) -> None:
    """Change the first fields of a report.json, if there is one: `complete`, `stale`, and `result`."""
    if not is_own(report):
        return
    data = read_regular_file(report, OUTPUT_FILES[0].limit_bytes)
    head = _HEAD.search(data[:TAG_WITHIN_BYTES])
    if head is None or is_stale == (head[2] is not None):
        return
    complete, before, result = head.groups()
    if is_stale:
        before = result if complete == b"true" else _INCOMPLETE
        fields = (b"false", b'"%b"' % before, b"fail" if result == b"fail" else b"error")
    else:
        fields = (b"false", b"null", result) if before == _INCOMPLETE else (b"true", b"null", before)
    with whole_file(report) as file:
        file.write(data[: head.start()] + b'"complete": %b,\n  "stale": %b,\n  "result": "%b"' % fields)
        file.write(data[head.end() :])


def refuse_run(directory: Path, *, chosen_by: str = "--output") -> None:
    """Refuse an output directory with the report of a run: a verification does not replace it."""
    for path in (place / _REPORT for place in places(directory)):
        if not is_own(path):
            continue
        with contextlib.suppress(OSError, InvalidJsonError):
            if parse_strictly(read_regular_file(path, OUTPUT_FILES[0].limit_bytes)).get("is_comparison") is True:
                continue
        raise UsageError(
            f"{path} is the report of a run, and a verification does not replace it",
            hint=f"choose another directory with {chosen_by}",
        )


def refuse_foreign(directory: Path, names: tuple[str, ...], *, chosen_by: str = "--output") -> None:
    """Refuse to replace a file that merge-gate did not write."""
    for name in names:
        path = directory / name
        if os.path.lexists(path) and not is_own(path):
            raise UsageError(
                f"{path} is {kind_of(path)}, expected a report of merge-gate or nothing; it was not changed",
                hint=f"choose another directory with {chosen_by}, or move that file elsewhere",
            )


def is_own(path: Path, report: str = "", *, folder: int | None = None) -> bool:
    """Whether merge-gate wrote this file: a regular file that begins with the tag of its name, or of `report`'s.

    `folder` is the descriptor of its directory if `path` is only its name.
    """
    tag = _TAGS.get(report or path.name)
    if tag is None:
        return False
    try:
        with open_regular_file(path, folder=folder) as file:
            return tag.match(file.read(TAG_WITHIN_BYTES)) is not None
    except OSError:
        return False


def holds_run(directory: Path) -> bool:
    """Whether a run wrote its report here: in each format, or in `previous/`. Copies have the formats of a choice."""
    formats = ((directory / name, directory / hidden) for name, hidden in _HIDDEN.items())
    is_whole = is_own(directory / _REPORT) and all(any(map(is_own, paths)) for paths in formats)
    return is_whole or is_previous(directory.name)


def places(directory: Path) -> Iterator[Path]:
    """The directories that may hold earlier reports: this one itself, `previous/`, `previous-2/` and so on."""
    yield directory
    with contextlib.suppress(OSError):
        names = [_SLOT.fullmatch(path.name) for path in directory.iterdir()]
        numbers = sorted(int(match[1] or 1) for match in names if match)
        yield from (_slot(directory, number) for number in numbers)


def is_previous(name: str) -> bool:
    """Whether a directory of this name holds earlier reports."""
    return _SLOT.fullmatch(name) is not None


def _slot(directory: Path, number: int) -> Path:
    return directory / (PREVIOUS if number == 1 else f"{PREVIOUS}-{number}")


def _is_free(slot: Path) -> bool:
    """Whether `slot` is a directory that reports can be moved to. If it holds only reports, they are removed."""
    try:
        folder = os.open(slot, _FOLDER)
    except OSError:
        return False
    try:
        names = os.listdir(folder)  # noqa: PTH208 - of an open directory
        if not all(is_own(Path(name), folder=folder) for name in names):
            return False
        for name in names:
            os.unlink(name, dir_fd=folder)
        return True
    finally:
        os.close(folder)


def kind_of(path: Path) -> str:
    """What a file that is not a report of merge-gate is, in words."""
    if path.is_symlink():
        return "a symbolic link"
    if path.is_dir():
        return "a directory"
    if not os.access(path, os.R_OK):
        return "a file that cannot be read"
    return "a file without the generator tag of merge-gate"
