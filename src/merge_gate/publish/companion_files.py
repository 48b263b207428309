"""Reads the files of a base and its adapters that a published model is made of.

In: directories, which are hostile. Out: the bytes of the files next to the weights whose names are on the allow-list,
and the names of the others; size and digest of every file, for merge-gate.json. A link may lead to another file of the
directory or of its own repository in the Hub's cache, and no further.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from merge_gate.companion_names import TEMPLATES, Companion, companion_kind
from merge_gate.errors import NotPublishedError
from merge_gate.files import resolve
from merge_gate.files.base_watch import base_directory
from merge_gate.files.headers import shown
from merge_gate.files.identity import identity_of
from merge_gate.records.files import Entry, FileIdentity, FileRecord
from merge_gate.records.terms import record
from merge_gate.regular_file import open_regular_file, read_all

_MOST_BYTES = 256 * 1024 * 1024
Identities = Mapping[str, Mapping[str, FileIdentity]]
"""By directory, the files next to the weights as they were when the run began."""

_POINTER = b"version https://git-lfs"


@record
class CompanionFiles:
    """The files of one directory. `others` are the names that are not on the allow-list, without hidden files."""

    files: dict[str, bytes]
    others: tuple[str, ...] = ()

    @property
    def without_config(self) -> dict[str, bytes]:
        """The files without config.json: that of an adapter is not published."""
        return {name: data for name, data in self.files.items() if companion_kind(name) is not Companion.CONFIG}


def companion_identities(directory: str) -> dict[str, FileIdentity]:
    """The identities of the files that may be published. What cannot be looked at is left out, and is refused later."""
    found: dict[str, FileIdentity] = {}
    with contextlib.suppress(OSError):
        for name in _names(Path(directory)):
            if companion_kind(name) is not None:
                found[name] = identity_of(name, Path(directory, name).stat())
    return found


def read_companions(directory: str, owner: str, expected: Mapping[str, FileIdentity] | None = None) -> CompanionFiles:
    """The files next to the weights. `owner` is what messages call the directory's owner, such as `the base`.

    `expected` has the identities of the files when the run began; None accepts any.

    Raises:
        NotPublishedError: a file on the allow-list cannot be read, is too large, is a Git LFS pointer, is a link to
            another place, or is not the expected one.
    """
    folder = Path(directory)
    files: dict[str, bytes] = {}
    read: dict[str, FileIdentity] = {}
    others: list[str] = []
    try:
        for name in _names(folder):
            if companion_kind(name) is None:
                others.append(name)
            else:
                files[name], read[name] = _read(folder, name, owner)
                if sum(map(len, files.values())) > _MOST_BYTES:
                    raise NotPublishedError(
                        f"the files next to the weights of {owner} have more than {_MOST_BYTES:,} bytes",
                        hint=f"remove what is not needed from {shown(directory)}",
                    )
    except OSError as error:
        raise NotPublishedError(
            f"the directory of {owner} cannot be read: {error.strerror or error}",
            hint="check that the user who runs the gate may read it",
        ) from error
    if expected is not None and read != expected:
        other = min(name for name in {*read, *expected} if read.get(name) != expected.get(name))
        raise NotPublishedError(
            f"{shown(other)} of {owner} was added, removed, or written to during the run",
            hint="let nothing write to that directory during the run, and run the gate again",
        )
    return CompanionFiles(files=files, others=tuple(others))


def _names(folder: Path) -> list[str]:
    """The names in the directory, without hidden files, and those of the chat templates in their folder."""
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.name == TEMPLATES and entry.is_dir(follow_symlinks=False):
            names += [f"{TEMPLATES}/{template.name}" for template in os.scandir(entry.path)]
        else:
            names.append(entry.name + "/" * entry.is_dir())
    return sorted(names)


def _read(folder: Path, name: str, owner: str) -> tuple[bytes, FileIdentity]:
    what = f"{shown(name)} of {owner}"
    try:
        place = _within(folder, name, what)
        with open_regular_file(place) as file:
            data = read_all(file, _MOST_BYTES)
            identity = identity_of(name, os.fstat(file.fileno()))
    except OSError as error:
        raise NotPublishedError(
            f"{what} cannot be read: {error.strerror or error}",
            hint="correct that file, or remove it if the model does not need it",
        ) from error
    if data.startswith(_POINTER):
        raise NotPublishedError(
            f"{what} is a Git LFS pointer, expected the file itself",
            hint="fetch it with `git lfs pull`; in a workflow give actions/checkout `lfs: true`",
        )
    return data, identity


def _within(folder: Path, name: str, what: str) -> Path:
    """The file itself, if a link leads to it. The Hub's cache links from a snapshot to the repository's blobs."""
    top = folder.resolve()
    place = (top / name).resolve(strict=True)
    is_blob = top.parent.name == "snapshots" and top.parent.parent / "blobs" in place.parents
    is_companion = top in place.parents and companion_kind(place.relative_to(top).as_posix()) is not None
    if not is_blob and not is_companion:
        raise NotPublishedError(
            f"{what} is a link to {shown(str(place))}, expected such a file of its directory",
            hint="replace the link by a copy of the file: what a link leads to might not be meant for publication",
        )
    return place


# --- size and digest of every file -----------------------------------------------------------------------------------


def input_files(
    entry: Entry, weights: Iterable[FileRecord], base: CompanionFiles, *adapters: CompanionFiles
) -> list[tuple[FileRecord, ...]]:
    """The files of an entry's base, and those of each adapter, sorted by name: what the merge read, and what is copied.

    A base also has settings in JSON. Its code is not listed: a model that runs code is not published.

    `weights` are the base's weight files with the index. `base` and `adapters` are what a publication read of each.

    Raises:
        OSError: a file cannot be read.
    """
    directory = base_directory(entry)
    known = {file.path: file for file in (*weights, *_records(base.files))}
    settings = {name for name in resolve.base_setting_files(directory) if not name.endswith(".py")} - set(known)
    of_adapters = (
        {file.path: file for file in (*_records(own.without_config), *member.files)}
        for own, member in zip(adapters, entry.members, strict=True)
    )
    return [
        _sorted((*known.values(), *_digests(directory, settings))),
        *(_sorted(files.values()) for files in of_adapters),
    ]


def inputs_of(entry: Entry) -> list[tuple[FileRecord, ...]]:
    """Read the files of an entry: every byte of the base's weights, too.

    Raises:
        NotPublishedError: a file that would be copied cannot be.
        OSError: a file cannot be read.
    """
    directory = base_directory(entry)
    weights = tuple(_digests(directory, resolve.base_weight_files(directory)))
    adapters = (read_companions(member.directory, "the adapter") for member in entry.members)
    return input_files(entry, weights, read_companions(directory, "the base"), *adapters)


def _records(files: Mapping[str, bytes]) -> Iterator[FileRecord]:
    for name, data in files.items():
        yield FileRecord(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _digests(directory: str, names: Iterable[str]) -> Iterator[FileRecord]:
    for name in names:
        place = Path(directory, name)
        yield FileRecord(path=name, size_bytes=place.stat().st_size, sha256=resolve.digest_file(place))


def _sorted(files: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    return tuple(sorted(files, key=lambda file: file.path))
