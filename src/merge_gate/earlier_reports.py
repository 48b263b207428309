"""Moves the reports of earlier runs in an output directory aside, into `previous/` or a directory next to it.

Reports are recognized by their generator tag. The caller has locked the directory. It uses only the standard library of
Python 3.9, because the action uses it too.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.errors import UsageError
from merge_gate.output_files import OUTPUT_FILES, TAG_WITHIN_BYTES
from merge_gate.regular_file import open_regular_file

if TYPE_CHECKING:
    from collections.abc import Iterator

RESUMED = "resumed.json"
"""The verdicts of killed runs, while another run goes on from them. It has the format of report.json."""

REPORTS = tuple(row.name for row in OUTPUT_FILES)
PREVIOUS = "previous"

_TAGS = {row.name: row.tag for row in OUTPUT_FILES}
_TAGS[RESUMED] = _TAGS["report.json"]
_UNFINISHED = re.compile(rf"\.(?:{'|'.join(map(re.escape, _TAGS))})\.[0-9a-f]{{16}}\.tmp")
"""The names that `whole_file` writes to; a killed run may leave one."""

_SLOT = re.compile(rf"{PREVIOUS}(?:-([2-9]|[1-9][0-9]{{1,8}}))?")
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class EarlierReports:
    """The earlier reports of one output directory. `place` is the directory that holds them; None without any."""

    def __init__(self, directory: Path, place: Path | None) -> None:
        self._directory = directory
        self.place = place

    def replace_previous(self) -> None:
        """Let these reports replace those in `previous/`, because a new run judges.

        A directory that holds any other file keeps its name and its files; then `previous-2/` is the one to replace.
        If the reports cannot be moved once more, they stay where they are.
        """
        if self.place is None:
            return
        with contextlib.suppress(OSError):
            slot = next(slot for slot in _slots(self._directory) if slot == self.place or _is_free(slot))
            self.place.rename(slot)
            self.place = slot

    @property
    def line(self) -> str:
        """One line for the user, empty if nothing was moved."""
        return f"the report of an earlier run is now in {self.place}" if self.place else ""


def move_aside(directory: Path, *, chosen_by: str = "--output") -> EarlierReports:
    """Move the reports of earlier runs to the first directory of `previous/`, `previous-2/`, … that is free.

    Args:
        directory: an output directory that no other run writes to.
        chosen_by: the option or input that named it, for the hint.

    Raises:
        UsageError: a file has the name of a report and does not carry its tag. Nothing was moved.
        OSError: the directory cannot be changed.
    """
    refuse_foreign(directory, REPORTS, chosen_by=chosen_by)
    names = [name for name in _TAGS if is_own(directory / name)]
    for path in directory.iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
    if not names:
        return EarlierReports(directory, None)
    place = next(slot for slot in _slots(directory) if not os.path.lexists(slot))
    place.mkdir()
    try:
        for name in names:
            (directory / name).rename(place / name)
    except OSError:
        with contextlib.suppress(OSError):
            place.rmdir()  # fails if one of them was moved
        raise
    return EarlierReports(directory, place)


def refuse_foreign(directory: Path, names: tuple[str, ...], *, chosen_by: str = "--output") -> None:
    """Refuse to replace a file that merge-gate did not write.

    Raises:
        UsageError: it names the first such file.
    """
    for name in names:
        path = directory / name
        if os.path.lexists(path) and not is_own(path):
            raise UsageError(
                f"{path} is {kind_of(path)}, expected a report of merge-gate or nothing; it was not changed",
                hint=f"choose another directory with {chosen_by}, or move that file elsewhere",
            )


def is_own(path: Path, report: str = "") -> bool:
    """Whether merge-gate wrote this file: a regular file that begins with the tag of its name, or of `report`'s."""
    return _carries_tag(path, report=report)


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


def _slots(directory: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield _slot(directory, number)
        number += 1


def _carries_tag(path: Path, folder: int | None = None, *, report: str = "") -> bool:
    tag = _TAGS.get(report or path.name)
    if tag is None:
        return False
    try:
        with open_regular_file(path, folder=folder) as file:
            return tag.match(file.read(TAG_WITHIN_BYTES)) is not None
    except OSError:
        return False


def _is_free(slot: Path) -> bool:
    """Whether a directory can be renamed to `slot`. If it holds only reports, they are removed."""
    if not os.path.lexists(slot):
        return True
    try:
        folder = os.open(slot, _FOLDER)
    except OSError:
        return False
    try:
        names = os.listdir(folder)  # noqa: PTH208 - of an open directory
        if not all(_carries_tag(Path(name), folder) for name in names):
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
