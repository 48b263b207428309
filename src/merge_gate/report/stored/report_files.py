"""Writes reports to disk: one file per format, each whole or not at all. Only this module writes reports.

Also reads a report.json of unknown origin, and writes the copies of a report outside of the output directory. Raises
`UsageError` if the directory cannot be used, and `GateError` if the disk fails.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from merge_gate._internal.earlier_reports import holds_run, is_own, kind_of, refuse_foreign
from merge_gate._internal.errors import UsageError
from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate._internal.regular_file import read_all
from merge_gate._internal.text import quoted
from merge_gate._internal.whole_file import whole_file
from merge_gate.report.formats import json_report
from merge_gate.report.stored.output_directory import explained, make_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
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
    return json_report.read(read_all(file, OUTPUT_FILES[0].max_bytes), name)


# --- copies: --report FORMAT=FILE ------------------------------------------------------------------------------------

# A copy is written once, at the end. Its earlier file is removed when a run begins: a killed run leaves no old verdict,
# and a mistake removes none.

STANDARD_OUTPUT = "-"


class ReportCopy(NamedTuple):
    """One `--report`: the word of a format, and a file or `-`, which is standard output."""

    word: str
    place: str

    @property
    def is_printed(self) -> bool:
        return self.place == STANDARD_OUTPUT


def is_any_printed(copies: Iterable[ReportCopy]) -> bool:
    return any(copy.is_printed for copy in copies)


def refuse_copies(copies: Sequence[ReportCopy], output: str | None = None) -> None:
    """Refuse copies that would replace a file of someone else, or of another run.

    Args:
        copies: the requested copies.
        output: the output directory, whose files are written without being asked for.

    Raises:
        UsageError: merge-gate did not write a file, another run's output directory holds it, or two reports would
            have one place.
    """
    places = [STANDARD_OUTPUT if copy.is_printed else os.path.realpath(copy.place) for copy in copies]
    taken = {os.path.realpath(Path(output, file.name)) for file in OUTPUT_FILES} if output is not None else set()
    for copy, place in zip(copies, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(
                f"--report names {quoted(copy.place)} twice", hint="give each report a file of its own, or `-` for one"
            )
        if place in taken:
            raise UsageError(
                f"--report names {quoted(copy.place)}, which is a file of the output directory",
                hint="name another file; the output directory has every format anyway",
            )
    for path, name in _files(copies):
        if os.path.lexists(path) and (kind := kind_of(path, name)):
            raise UsageError(
                f"--report names {quoted(str(path), 200)}, {kind}, expected a report of that format or "
                "nothing; it was not changed",
                hint="name another file, or move that one elsewhere",
            )
        if holds_run(path.absolute().parent):
            raise UsageError(
                f"--report names {quoted(str(path), 200)}, a file in the output directory of another run; it was not "
                "changed",
                hint="name a file elsewhere",
            )


def remove_copies(copies: Sequence[ReportCopy]) -> None:
    """Remove the copies that an earlier run wrote, and make the directories of the new ones.

    Raises:
        UsageError: a directory cannot be written to. Nothing was removed.
        GateError: the disk fails.
    """
    for path, _ in _files(copies):
        with explained(f"cannot write {path}", chosen_by=" with --report"):
            path.parent.mkdir(parents=True, exist_ok=True)
    for path, name in _files(copies):
        if is_own(path, name):
            with explained(f"cannot write {path}", chosen_by=" with --report"):
                path.unlink()


def _files(copies: Iterable[ReportCopy]) -> list[tuple[Path, str]]:
    """The copies that are not printed: the file of each, and the name of its format."""
    return [(Path(copy.place), WORDS[copy.word]) for copy in copies if not copy.is_printed]


def write_copies(report: Report, copies: Iterable[ReportCopy]) -> str:
    """Write the files, and return the text of the copy that is printed; empty if there is none.

    Raises:
        UsageError: a directory cannot be written to.
        GateError: the disk fails.
    """
    printed = ""
    for copy in copies:
        text = FORMATS[WORDS[copy.word]](report)
        if copy.is_printed:
            printed = text
            continue
        cannot = f"cannot write {copy.place}"
        with explained(cannot, chosen_by=" with --report"), whole_file(Path(copy.place), lasts=True) as file:
            file.write(text.encode("utf-8"))
    return printed
