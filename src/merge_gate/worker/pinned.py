"""Files that cannot be exchanged under a merge: the judged, the hashed, and the reported bytes are the same.

In: what the preflight read of an adapter, or the directory of a base. Out: the same, under names that stay with the
files that are open now, and an `EngineError` where they are not the files that were hashed.

1. Each file is opened once, and must be the one that the preflight hashed (device, inode, size, times).
2. PEFT is given a directory of links to the open files: what is put at their old names meanwhile is not read.
3. After the merge the open file is hashed, and must have the digest that the report will name.
4. The old name must still lead to it: else the report would speak of a file that is not there.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from merge_gate.errors import EngineError
from merge_gate.files.identity import base_identity, identity_of
from merge_gate.records.files import AdapterFiles, FileIdentity, FileRecord
from merge_gate.regular_file import NotRegularFileError, open_regular_file

_OPEN_FILES = Path("/proc/self/fd")


@contextmanager
def pinned_adapter(files: AdapterFiles) -> Iterator[AdapterFiles]:
    """The adapter as it can be merged without being exchanged.

    Raises:
        EngineError: on entering or leaving, where a file is not the one that was hashed; whatever went wrong in between
            is then its cause.
    """
    with ExitStack() as stack:
        opened = [(record, _open(files, record, stack)) for record in files.files]
        private = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for record, descriptor in opened:
            private.joinpath(record.path).symlink_to(_OPEN_FILES / str(descriptor))
        try:
            yield replace(files, directory=str(private)) if _OPEN_FILES.is_dir() else files
        finally:
            for record, descriptor in opened:
                _verify(files, record, descriptor)


def _open(files: AdapterFiles, record: FileRecord, stack: ExitStack) -> int:
    try:
        file = stack.enter_context(open_regular_file(Path(files.directory, record.path), follow=True))
    except NotRegularFileError as error:
        raise _changed(record.path, "another file is in its place, or it was written to") from error
    except OSError as error:
        raise _changed(record.path, f"it can no longer be read ({error.strerror})") from error
    if identity_of(record.path, os.fstat(file.fileno())) != record.identity:
        raise _changed(record.path, "another file is in its place, or it was written to")
    return file.fileno()


def _verify(files: AdapterFiles, record: FileRecord, descriptor: int) -> None:
    try:
        at_its_name = identity_of(record.path, Path(files.directory, record.path).stat())
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        now = identity_of(record.path, os.fstat(descriptor))
    except OSError as error:
        raise _changed(record.path, f"it can no longer be read ({error.strerror})") from error
    if not (at_its_name == now == record.identity):
        raise _changed(record.path, "another file is in its place, or it was written to")
    if digest != record.sha256:
        raise _changed(record.path, f"its SHA-256 was {record.sha256}, and is {digest}")


def _changed(name: str, how: str) -> EngineError:
    return EngineError(
        f"{name} changed while it was judged: {how}; what the report would say of it is not known to be true",
        hint="let nothing write to an adapter while it is gated, and gate it again",
    )


@contextmanager
def pinned_directory(directory: str) -> Iterator[str]:
    """Another name of a base's directory, which stays with it wherever it is moved, and whatever takes its place."""
    if not _OPEN_FILES.is_dir():
        yield directory
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield str(_OPEN_FILES / str(descriptor))
    finally:
        os.close(descriptor)


def verify_base(directory: str, label: str, identity: tuple[FileIdentity, ...]) -> None:
    """Hold a base's files against what they were before they were read.

    Raises:
        EngineError: they are not the same.
    """
    try:
        same = base_identity(directory) == identity
    except OSError:
        same = False
    if not same:
        raise base_changed(label)


def base_changed(label: str) -> EngineError:
    """Why nothing that was measured on this base counts."""
    return EngineError(
        f"base {label} changed while it was used: its files are not those that were there before it was loaded",
        hint="let nothing write to a base while adapters are gated on it, and gate them again",
    )
