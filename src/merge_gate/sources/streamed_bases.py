"""Bases on the Hub whose weights are not downloaded: their headers are laid out on disk, their bytes come by ranges.

In: a repository at a commit, the names of its weight files, and a directory with its other files. Out: in that
directory, a stub for each weight file, with the true header, the true length, and no data; and `HubFiles`, which has
the data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import copyfile

from merge_gate.files.headers import MAX_HEADER_BYTES, shown
from merge_gate.files.identity import base_identity
from merge_gate.records.files import Fetched, FileIdentity
from merge_gate.sources.feed import SourceError
from merge_gate.sources.hub_file import HubFile
from merge_gate.sources.read_ahead import refuse_excess

_FIRST_READ_BYTES = 1 << 20
_PREFIX_BYTES = 8

MOST_HEADER_BYTES = 1 << 28
"""The headers of all files of a base are kept during the run. Those of a 405 B base have a few megabytes."""


class HubFiles:
    """The weight files of one base on the Hub.

    Attributes:
        sizes: the size of each file in bytes.
        sha256: the digest of each file that the Hub lists.
        identity: that of the files that were laid out.
    """

    def __init__(self, files: Mapping[str, HubFile]) -> None:
        self._files = files
        self.sizes: Mapping[str, int] = {name: file.size_bytes for name, file in files.items()}
        self.sha256: Mapping[str, str] = {name: file.sha256 for name, file in files.items() if file.sha256}
        refuse_excess(self.sizes)
        self.identity: tuple[FileIdentity, ...] = ()
        self._heads: dict[str, bytes] = {}
        for name, file in files.items():
            self._heads[name] = _head(file)
            if sum(map(len, self._heads.values())) > MOST_HEADER_BYTES:
                raise SourceError(
                    f"{file.label}: the headers of the base's weight files have more than {MOST_HEADER_BYTES:,} bytes",
                    hint="check the base: a header of a large model has some hundred kilobytes",
                )

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `start` on. Of a header, these are the bytes that were laid out.

        Raises:
            SourceError: these bytes could not be had.
        """
        head = self._heads[file][start : start + len(into)]
        into[: len(head)] = head
        if len(head) < len(into):
            self._files[file].read_into(start + len(head), into[len(head) :])

    def lay_out(self, directory: Path) -> None:
        """Write a stub of each file.

        Raises:
            OSError: a stub cannot be written.
        """
        for name, head in self._heads.items():
            place = directory / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as stub:
                stub.write(head)
                stub.truncate(self.sizes[name])
        self.identity = base_identity(str(directory))


def lay_out(base: Fetched, parent: str) -> tuple[str, HubFiles]:
    """Make a directory in `parent`, with the base's small files and a stub of each weight file.

    Raises:
        SourceError: the Hub does not give the headers, or lists no digest.
    """
    hub_files = {name: HubFile(base.repo_id, base.commit, name) for name in base.streamable}
    for file in hub_files.values():
        if file.sha256 is None:
            raise SourceError(
                f"{file.label}: the Hub lists no SHA-256 of it, so streamed bytes could not be checked",
                hint="set access: download",
            )
    files = HubFiles(hub_files)
    directory = tempfile.mkdtemp(dir=parent, prefix="base-")
    try:
        _copy(base.directory, directory, base.chosen)
        files.lay_out(Path(directory))
    except OSError as error:
        raise SourceError(
            f"the headers of {shown(base.repo_id)} cannot be written to {parent}: {error.strerror}",
            hint="free space there, or point TMPDIR at another disk",
        ) from error
    return directory, files


def _copy(source: str, directory: str, names: Iterable[str]) -> None:
    for name in names:
        place = Path(directory, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        copyfile(Path(source, name), place)


def _head(file: HubFile) -> bytes:
    """The header of a safetensors file, with its length. Of any other file the first bytes, which show what it is."""
    head = bytearray(min(_FIRST_READ_BYTES, file.size_bytes))
    if head:
        file.read_into(0, memoryview(head))
    length = int.from_bytes(head[:_PREFIX_BYTES], "little") + _PREFIX_BYTES
    if length > min(file.size_bytes, MAX_HEADER_BYTES + _PREFIX_BYTES):
        return bytes(head)
    rest = bytearray(max(0, length - len(head)))
    if rest:
        file.read_into(len(head), memoryview(rest))
    return bytes(head + rest)[:length]
