"""Recognizes reports of merge-gate by their generator tag, and moves the report of an earlier run to `previous/`.

In: an output directory. Out: its lock, and no report in it. It uses only the standard library of Python 3.9, because
the action uses it too.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.locked_directory import AlreadyLockedError, locked_directory
from merge_gate._internal.output_files import OUTPUT_FILES, TAG_WITHIN_BYTES
from merge_gate._internal.regular_file import NotRegularFileError, open_regular_file, read_regular_file
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REPORTS = tuple(row.name for row in OUTPUT_FILES)
PREVIOUS = "previous"

_REPORT, *_RENDERED = REPORTS
_TAGS = {row.name: row.tag for row in OUTPUT_FILES}
_UNFINISHED = re.compile(rf"\.(?:{'|'.join(map(re.escape, REPORTS))})\.[0-9a-f]{{16}}\.tmp")
"""The names that `whole_file` writes to; a killed run may leave one."""


@contextlib.contextmanager
def locked_for_run(
    directory: Path, begins: Callable[[], object] = lambda: None, *, chosen_by: str = "--output"
) -> Iterator[None]:
    """Lock an output directory for one run, and move the report of an earlier run to `previous/`.

    On a file system without locks the caller has to prevent a second run.

    Args:
        directory: the output directory. It is created if it is missing.
        begins: called before anything is moved, when no usage error of the directory can follow.
        chosen_by: the option or input that named the directory, for the hint.

    Raises:
        UsageError: a run that has not ended writes to the directory, or a file that merge-gate did not write has the
            name of a report. Nothing was changed.
        OSError: the directory cannot be used.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_directory(directory))
        except AlreadyLockedError as error:
            raise UsageError(
                f"another run of merge-gate writes to {directory} and has not ended",
                hint=f"wait for it, or choose another directory with {chosen_by}",
            ) from error
        refuse_foreign(directory, REPORTS, chosen_by=chosen_by)
        own = [name for name in REPORTS if os.path.lexists(directory / name)]
        if own:
            _refuse_previous(directory / PREVIOUS, chosen_by)
        begins()
        for path in directory.iterdir():
            if _UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
        _move(own, directory, directory / PREVIOUS)
        yield


def _move(own: list[str], directory: Path, previous: Path) -> None:
    """Move the files of a report one by one, report.json first, in place of the report that is in `previous`.

    Without a report.json, the other files belong to the one in `previous`: a run was killed while it moved them.
    """
    if own:
        previous.mkdir(exist_ok=True)
    for name in own:
        (directory / name).rename(previous / name)
        if name == _REPORT:
            for other in _RENDERED:
                (previous / other).unlink(missing_ok=True)


def _refuse_previous(previous: Path, chosen_by: str) -> None:
    if os.path.lexists(previous) and (previous.is_symlink() or not previous.is_dir()):
        raise UsageError(
            f"{previous} is a link or a file, expected the directory of the previous report; it was not changed",
            hint=f"choose another directory with {chosen_by}, or move that file elsewhere",
        )
    refuse_foreign(previous, REPORTS, chosen_by=chosen_by)


def refuse_run(directory: Path, *, chosen_by: str = "--output") -> None:
    """Refuse an output directory with the report of a run: a verification does not replace it."""
    for path in (directory / _REPORT, directory / PREVIOUS / _REPORT):
        if not is_own(path):
            continue
        with contextlib.suppress(OSError, InvalidJsonError):
            if parse_strictly(read_regular_file(path, OUTPUT_FILES[0].max_bytes)).get("is_comparison") is True:
                continue
        raise UsageError(
            f"{path} is the report of a run, and a verification does not replace it",
            hint=f"choose another directory with {chosen_by}",
        )


def refuse_foreign(directory: Path, names: tuple[str, ...], *, chosen_by: str = "--output") -> None:
    """Refuse to replace a file that merge-gate did not write."""
    for name in names:
        path = directory / name
        if os.path.lexists(path) and (kind := kind_of(path)):
            raise UsageError(
                f"{path} is {kind}, expected a report of merge-gate or nothing; it was not changed",
                hint=f"choose another directory with {chosen_by}, or move that file elsewhere",
            )


def is_own(path: Path, report: str = "") -> bool:
    """Whether merge-gate wrote this file: a regular file that begins with the tag of its name, or of `report`'s."""
    return not kind_of(path, report)


def holds_run(directory: Path) -> bool:
    """Whether a run wrote its report here: in each format, or in `previous/`. Copies have the formats of a choice."""
    return all(is_own(directory / name) for name in REPORTS) or directory.name == PREVIOUS


def kind_of(path: Path, report: str = "") -> str:
    """What a file is that merge-gate did not write, in words; empty if `is_own`."""
    tag = _TAGS.get(report or path.name)
    try:
        with open_regular_file(path) as file:
            is_tagged = tag is not None and tag.match(file.read(TAG_WITHIN_BYTES)) is not None
    except NotRegularFileError as error:
        return error.kind
    except OSError:
        return "a file that cannot be read"
    return "" if is_tagged else "a file without the generator tag of merge-gate"
