"""The one door through which reports reach the disk.

In: a `records.Report` and the output directory. Out: one file per format, each written whole or not at all. Raises
`UsageError` where the directory cannot be used, `GateError` where the disk gives out. Knows no format's inside.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from merge_gate.errors import UsageError
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.report.directory import explained, make_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from merge_gate.records.report import Report

FORMATS: Mapping[str, Callable[[Report], str]] = MappingProxyType(
    {one.name: import_module(f"merge_gate.report.{one.made_by}").render for one in OUTPUT_FILES}
)
"""File name and renderer of each format, the one that must not be lost first."""

WORDS: Mapping[str, str] = MappingProxyType({one.word: one.name for one in OUTPUT_FILES if one.word})
"""What a person asks for with `merge-gate report --format`, and the file that a run writes of it."""


def write_report(report: Report, directory: str | Path, *, formats: Iterable[str] = tuple(FORMATS)) -> tuple[Path, ...]:
    """Write `formats` into `directory`, which is made if absent, and return the files' paths.

    A reader sees the old file or the new one, never a part (write to a temporary name, fsync, rename, fsync of the
    directory). A renderer that raises leaves its old file and everything written before it as it is. Written at the
    start of a run with all formats, it also replaces what an earlier run left there.
    """
    folder = Path(directory)
    make_directory(folder)
    return tuple(write_text(folder / name, FORMATS[name](report)) for name in formats)


def write_text(path: Path, text: str) -> Path:
    """Write one file of the output directory, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with explained(f"cannot write {path}"):
        _check_target(path)
        try:
            _write(temporary, text.encode("utf-8"))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return path


def _check_target(path: Path) -> None:
    kind = "a symbolic link" if path.is_symlink() else "a directory" if path.is_dir() else None
    if kind:
        raise UsageError(
            f"{path} is {kind}, expected a file or nothing; the report is not written through it",
            hint="remove it, or choose another directory with --output",
        )


def _write(path: Path, data: bytes) -> None:
    """Create `path` anew (never through a link), with the permissions that the caller's umask leaves."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    """Make the rename last. Some file systems cannot; the file itself is safe there all the same."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
