"""The output directory: made, held by one run at a time, and without an earlier report at its top level.

In: its path. Out: a directory that is ready for the reports of one run, and the errors of the system in sentences.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from merge_gate.claimed_directory import claimed_directory
from merge_gate.earlier_reports import EarlierReports, move_aside
from merge_gate.errors import GateError, UsageError
from merge_gate.records.terms import Result
from merge_gate.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
)


@contextlib.contextmanager
def claimed(directory: str | Path) -> Iterator[EarlierReports]:
    """Hold `directory` for one run; the reports of earlier runs are moved aside.

    The directory is made if it is absent, and removed again if the run wrote nothing.

    Raises:
        UsageError: it cannot be used, it holds a file of another tool under the name of a report, or another run that
            has not ended writes to it.
    """
    folder = Path(directory)
    made = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    make_directory(folder)
    try:
        with contextlib.ExitStack() as stack:
            with explained(f"cannot use the output directory {folder}"):
                stack.enter_context(claimed_directory(folder))
            with explained(f"cannot move the report of an earlier run aside in {folder}"):
                earlier = move_aside(folder)
            yield earlier
    finally:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()  # fails unless it is empty


def make_directory(folder: Path) -> None:
    """Make the output directory if it is absent; never through a link."""
    with explained(f"cannot make the output directory {folder}"):
        if folder.is_symlink():
            raise UsageError(
                f"the output directory {folder} is a symbolic link and could lead anywhere, expected a directory",
                hint=f"remove the link, or give --output the directory it points to ({folder.readlink()})",
            )
        if folder.exists() and not folder.is_dir():
            raise UsageError(
                f"the output directory {folder} is a file, expected a directory",
                hint="choose a directory that you may write to with --output",
            )
        folder.mkdir(parents=True, exist_ok=True)


def refuse_input(folder: str | Path, inputs: Iterable[tuple[str, str]]) -> None:
    """Refuse an output directory that is one of `inputs`, each a directory and what it is of.

    Raises:
        UsageError: the report would be released with the adapter.
    """
    with contextlib.suppress(OSError):
        own = Path(folder).stat()
        for directory, what in inputs:
            with contextlib.suppress(OSError, ValueError):
                if os.path.samestat(own, os.stat(directory)):  # noqa: PTH116 - a name that no system takes is none
                    raise UsageError(
                        f"the output directory {folder} is that of {what}: the report would lie among its files",
                        hint="choose another directory with --output",
                    )


def refuse_report(folder: str | Path, names: Iterable[str], inputs: Iterable[str]) -> None:
    """Refuse to gate the output directory, or one of the files called `names` in it: the run would move them.

    Raises:
        UsageError: a report was taken for a config or an adapter.
    """
    reports = {Path(folder), *(Path(folder, name) for name in names)}
    for given in inputs:
        with contextlib.suppress(OSError, ValueError):
            if any(os.path.lexists(one) and one.samefile(given) for one in reports):
                raise UsageError(
                    f"{quoted(given)} is where this run would write its report, in place of what is there",
                    hint="a run takes a configuration or adapters; to see a report: merge-gate report "
                    f"{shlex.quote(str(folder))}",
                )


class Written(NamedTuple):
    """What report.json says of a run."""

    complete: bool
    result: Result


def written(directory: str | Path) -> Written | None:
    """What the report in `directory` says; None if there is none that can be read."""
    try:
        document = json.loads(Path(directory, "report.json").read_bytes())
        return Written(complete=document["complete"] is True, result=Result(document["result"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def explained(what: str, *, chosen_by: str = " with --output") -> Iterator[None]:
    """Turn the system's errors into sentences."""
    try:
        yield
    except OSError as error:
        message = f"{what}: {error.strerror or error}"
        if error.errno in _DISK:
            hint = f"free some space on that disk, or choose another directory{chosen_by}"
            raise GateError(message, hint=hint) from error
        raise UsageError(message, hint=f"choose a directory that you may write to{chosen_by}") from error
