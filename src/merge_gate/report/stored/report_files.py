"""The one door through which reports reach the disk.

In: a `records.Report` and the output directory. Out: one file per format, each written whole or not at all. Raises
`UsageError` where the directory cannot be used, `GateError` where the disk gives out. Knows no format's inside.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from merge_gate.earlier_reports import refuse_foreign
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.report.stored.output_directory import explained, make_directory
from merge_gate.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from merge_gate.records.report import Report

FORMATS: Mapping[str, Callable[[Report], str]] = MappingProxyType(
    {one.name: import_module(f"merge_gate.report.formats.{one.made_by}").render for one in OUTPUT_FILES}
)
"""File name and renderer of each format, the one that must not be lost first."""

WORDS: Mapping[str, str] = MappingProxyType({one.word: one.name for one in OUTPUT_FILES if one.word})
"""What a person asks for with `merge-gate report --format`, and the file that a run writes of it."""


def write_report(report: Report, directory: str | Path, *, formats: Iterable[str] = tuple(FORMATS)) -> tuple[Path, ...]:
    """Write `formats` into `directory`, which is made if absent, and return the files' paths.

    A reader sees the old file or the new one, never a part. If a renderer raises, its old file and everything written
    before it stay as they are.
    """
    folder = Path(directory)
    make_directory(folder)
    return tuple(write_text(folder / name, FORMATS[name](report)) for name in formats)


def write_text(path: Path, text: str) -> Path:
    """Write one file of the output directory, whole or not at all.

    Raises:
        UsageError: a file that merge-gate did not write has its name, or the directory cannot be used.
        GateError: the disk fails.
    """
    refuse_foreign(path.parent, (path.name,))
    with explained(f"cannot write {path}"), whole_file(path, lasts=True) as file:
        file.write(text.encode("utf-8"))
    return path
