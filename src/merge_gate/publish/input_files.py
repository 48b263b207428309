"""The files of the base and adapter that make a published model, each with its size and digest.

In: the directories of a base and of adapters, which are hostile. Out: `InputFiles`, for merge-gate.json, and the
differences between two of them. A base also has settings in JSON. Its code is not listed: a model that runs code is not
published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from merge_gate.files import resolve
from merge_gate.files.base_watch import base_directory
from merge_gate.publish.companion_files import CompanionFiles, read_companions
from merge_gate.records.files import Entry, FileRecord
from merge_gate.records.terms import record
from merge_gate.report.wording.untrusted import one_line

_CODE = ".py"


@record
class InputFiles:
    """The files of a base, and those of each adapter in their order, sorted by name."""

    base: tuple[FileRecord, ...] = ()
    adapters: tuple[tuple[FileRecord, ...], ...] = ()


def input_files(
    entry: Entry, weights: Iterable[FileRecord], base: CompanionFiles, *adapters: CompanionFiles
) -> InputFiles:
    """The files of an entry: those that were read for the merge, and those that a publication copies.

    `weights` are the base's weight files with the index. `base` and `adapters` are what a publication read of each.

    Raises:
        OSError: a file cannot be read.
    """
    directory = base_directory(entry)
    known = {file.path: file for file in (*weights, *_records(base.files))}
    settings = {name for name in resolve.base_setting_files(directory) if not name.endswith(_CODE)} - set(known)
    of_adapters = (
        {file.path: file for file in (*_records(own.without_config), *member.files)}
        for own, member in zip(adapters, entry.members, strict=True)
    )
    return InputFiles(
        base=_sorted((*known.values(), *_read(directory, settings))),
        adapters=tuple(_sorted(files.values()) for files in of_adapters),
    )


def inputs_of(entry: Entry) -> InputFiles:
    """Read the files of an entry: every byte of the base's weights, too.

    Raises:
        NotPublishedError: a file that would be copied cannot be.
        OSError: a file cannot be read.
    """
    directory = base_directory(entry)
    weights = tuple(_read(directory, resolve.base_weight_files(directory)))
    adapters = (read_companions(member.directory, "the adapter") for member in entry.members)
    return input_files(entry, weights, read_companions(directory, "the base"), *adapters)


def different_files(got: Iterable[FileRecord], expected: Iterable[FileRecord], owner: str) -> Iterator[str]:
    """One sentence for each file that differs. `owner` is what they call the directory, such as `the base`."""
    here, listed = ({file.path: file for file in files} for files in (got, expected))
    for name in sorted({*here, *listed}):
        one, other = here.get(name), listed.get(name)
        if one != other:
            has = f"has {_shown(one)}" if one else "is missing"
            yield f"{one_line(name, 200)} of {owner} {has}, expected {_shown(other) if other else 'no such file'}"


def _shown(file: FileRecord) -> str:
    return f"{file.size_bytes:,} bytes with SHA-256 {one_line(file.sha256, 64)}"


def _records(files: Mapping[str, bytes]) -> Iterator[FileRecord]:
    for name, data in files.items():
        yield FileRecord(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read(directory: str, names: Iterable[str]) -> Iterator[FileRecord]:
    for name in names:
        place = Path(directory, name)
        yield FileRecord(path=name, size_bytes=place.stat().st_size, sha256=resolve.digest_file(place))


def _sorted(files: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    return tuple(sorted(files, key=lambda file: file.path))
