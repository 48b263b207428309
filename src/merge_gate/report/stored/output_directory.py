"""Creates and locks the output directory for one run, and moves the report of an earlier run to `previous/`.

Errors of the system become sentences.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.earlier_reports import locked_for_run
from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.interrupts import Interrupted
from merge_gate._internal.text import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
)


@contextlib.contextmanager
def begun_run(directory: str | None, begins: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Lock `directory` for one run that judges, and move the report of an earlier run to `previous/`.

    The directory is created if it is missing, and removed again if the run wrote nothing. None is a run without files.
    `begins` is called before anything is moved, when no usage error can follow.

    Raises:
        UsageError: the directory cannot be used, holds another tool's file under the name of a report, or is in use by
            another run. Nothing was changed.
        GateError: the disk fails.
    """
    if directory is None:
        begins()
        yield
        return
    folder = Path(directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(made_directory(folder))
        with explained(f"cannot use the output directory {folder}"):
            stack.enter_context(locked_for_run(folder, begins))
        try:
            yield
        except Interrupted as stop:
            stop.output = directory
            raise


@contextlib.contextmanager
def made_directory(folder: Path, make: Callable[[Path], None] | None = None) -> Iterator[None]:
    """Create a directory if it is missing (`make`: how), and remove it at the end if it is empty."""
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    (make or make_directory)(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()  # fails unless it is empty


def make_directory(folder: Path) -> None:
    """Create the output directory if it is missing. A link is refused."""
    refuse_other_kinds(folder)
    with explained(f"cannot create the output directory {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


def refuse_other_kinds(folder: Path) -> None:
    """Refuse an output directory that is a link or a file."""
    with explained(f"cannot create the output directory {folder}"):
        if folder.is_symlink():
            raise UsageError(
                f"the output directory {folder} is a symbolic link, expected a directory",
                hint=f"remove the link, or give --output the directory that it points to ({folder.readlink()})",
            )
        if folder.exists() and not folder.is_dir():
            raise UsageError(
                f"the output directory {folder} is a file, expected a directory",
                hint="choose a directory that you may write to with --output",
            )


def refuse_input(folder: str | Path, inputs: Iterable[tuple[str, str]], option: str = "--output") -> None:
    """Refuse a directory to write to that is one of `inputs`: pairs of a directory and what it belongs to.

    Raises:
        UsageError: what is written would be released with the adapter.
    """
    for directory, owner in inputs:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samefile(folder, directory):  # noqa: PTH121 - an invalid name is no input
                raise UsageError(
                    f"{option} leads into {folder}, the directory of {owner}: what is written would be among its files",
                    hint=f"choose another directory with {option}",
                )


def refuse_report(folder: str | Path, names: Iterable[str], inputs: Iterable[str]) -> None:
    """Refuse to gate the output directory, or a file in it with one of `names`: the run would move it."""
    reports = {Path(folder), *(Path(folder, name) for name in names)}
    for argument in inputs:
        with contextlib.suppress(OSError, ValueError):
            if any(os.path.lexists(path) and path.samefile(argument) for path in reports):
                raise UsageError(
                    f"this run would write its report to {quoted(argument)}, so it cannot be an input",
                    hint="name a configuration or adapters; to show a report: merge-gate report show "
                    f"{shlex.quote(str(folder))}",
                )


@contextlib.contextmanager
def explained(what: str, hint: str = "", *, chosen_by: str = " with --output") -> Iterator[None]:
    """Turn errors of the system into sentences that begin with `what`. Reading has a `hint`, and writing a default."""
    try:
        yield
    except OSError as error:
        message = f"{what}: {error.strerror or error}"
        if error.errno in _DISK:
            of_disk = f"free some space on that disk, or choose another directory{chosen_by}"
            raise GateError(message, hint="check that disk, then run again" if hint else of_disk) from error
        raise UsageError(message, hint=hint or f"choose a directory that you may write to{chosen_by}") from error
