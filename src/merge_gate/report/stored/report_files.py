"""Writes reports to disk: one file per format, each whole or not at all. Only this module writes reports.

Also reads a report.json of unknown origin. Raises `UsageError` if the directory cannot be used, and `GateError` if the
disk fails.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from merge_gate.earlier_reports import refuse_foreign
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.regular_file import read_all
from merge_gate.report.formats import json_report
from merge_gate.report.stored.output_directory import explained, make_directory
from merge_gate.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from io import BufferedReader

    from merge_gate.records.report import Report
    from merge_gate.report.formats.json_report import RenderedAdapters

FORMATS: Mapping[str, Callable[..., str]] = MappingProxyType(
    {file.name: import_module(f"merge_gate.report.formats.{file.made_by}").render for file in OUTPUT_FILES}
)
"""File name and renderer of each format. The most important file is first."""

WORDS: Mapping[str, str] = MappingProxyType({file.word: file.name for file in OUTPUT_FILES})
"""The words of `--report` and `merge-gate report show --format`, each with the name of its file."""


def write_report(
    report: Report,
    directory: str | Path,
    *,
    formats: Iterable[str] = tuple(FORMATS),
    rendered: RenderedAdapters | None = None,
) -> tuple[Path, ...]:
    """Write `formats` into `directory`, which is created if it is missing, and return the files' paths.

    `rendered` holds the texts of the run's last report.json. A reader sees the old file or the new file, never a part.
    If a renderer raises, its old file and all files written before it stay.
    """
    folder = Path(directory)
    make_directory(folder)
    return tuple(
        write_text(
            folder / name,
            json_report.render(report, rendered) if name == OUTPUT_FILES[0].name else FORMATS[name](report),
        )
        for name in formats
    )


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


def read_report(file: BufferedReader, name: str) -> Report:
    """Read a report.json of unknown origin; `name` is its name in messages.

    Raises:
        OSError: the file cannot be read, or is too large.
        UsageError: it is not a report.
    """
    return json_report.read(read_all(file, OUTPUT_FILES[0].limit_bytes), name)
