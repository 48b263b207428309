"""Pins the files of adapters and bases, so that the judged, the hashed, and the reported bytes are the same.

1. Each file of an adapter is opened once. It must be the file that the preflight hashed (device, inode, size, times).
2. PEFT gets a directory of links to the open files, so that it never reads a file that replaces one of them.
3. After the merge, the open file is hashed. The digest must be the one that the report will name.
4. The file's name must still lead to the open file. Otherwise the report would describe another file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from merge_gate._internal.errors import EngineError
from merge_gate._internal.regular_file import NotRegularFileError, open_regular_file
from merge_gate.files.identity import base_identity, identity_of
from merge_gate.records.files import AdapterFiles, FileIdentity, HashedFile

OPEN_FILES = Path("/proc/self/fd")


@contextmanager
def pinned_adapter(files: AdapterFiles) -> Iterator[AdapterFiles]:
    """The adapter in a directory whose files cannot be replaced.

    Raises:
        EngineError: on entering or leaving, if a file is not the one that was hashed. An exception in between is its
            cause.
    """
    with ExitStack() as stack:
        # 1. Open each file once.
        opened = [(hashed, _open(files, hashed, stack)) for hashed in files.files]
        # 2. Link to the open files.
        private = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for hashed, descriptor in opened:
            private.joinpath(hashed.path).symlink_to(OPEN_FILES / str(descriptor))
        try:
            yield replace(files, directory=str(private)) if OPEN_FILES.is_dir() else files
        finally:
            for hashed, descriptor in opened:
                _verify(files, hashed, descriptor)


def _open(files: AdapterFiles, hashed: HashedFile, stack: ExitStack) -> int:
    try:
        file = stack.enter_context(open_regular_file(Path(files.directory, hashed.path), follow=True))
    except NotRegularFileError as error:
        raise _changed(hashed.path, "another file is in its place, or it was written to") from error
    except OSError as error:
        raise _changed(hashed.path, f"it can no longer be read ({error.strerror})") from error
    if identity_of(hashed.path, os.fstat(file.fileno())) != hashed.identity:
        raise _changed(hashed.path, "it was replaced or written to")
    return file.fileno()


def _verify(files: AdapterFiles, hashed: HashedFile, descriptor: int) -> None:
    try:
        by_name = identity_of(hashed.path, Path(files.directory, hashed.path).stat())
        # 3. Hash the open file.
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        now = identity_of(hashed.path, os.fstat(descriptor))
    except OSError as error:
        raise _changed(hashed.path, f"it can no longer be read ({error.strerror})") from error
    if not (by_name == now == hashed.identity):  # 4. The name still leads to it.
        raise _changed(hashed.path, "it was replaced or written to")
    if digest != hashed.sha256:
        raise _changed(hashed.path, f"its SHA-256 is {digest}, expected {hashed.sha256}")


def _changed(name: str, how: str) -> EngineError:
    return EngineError(
        f"{name} changed while it was judged: {how}; so a verdict could be about other bytes",
        hint="make sure that nothing writes to the adapter during the run, and run the gate again",
    )


@contextmanager
def pinned_directory(directory: str) -> Iterator[str]:
    """A name of a base's directory that stays valid if the directory is moved or replaced."""
    if not OPEN_FILES.is_dir():
        yield directory
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield str(OPEN_FILES / str(descriptor))
    finally:
        os.close(descriptor)


def verify_base(directory: str, label: str, identity: tuple[FileIdentity, ...]) -> None:
    """Compare a base's files with their identity before they were read.

    Raises:
        EngineError: a file has changed.
    """
    try:
        same = base_identity(directory) == identity
    except OSError:
        same = False
    if not same:
        raise base_changed(label)


def base_changed(label: str) -> EngineError:
    """The error that voids every measurement on this base."""
    return EngineError(
        f"base {label} changed while it was used: its files differ from those before it was loaded",
        hint="make sure that nothing writes to the base during the run, and run the gate again",
    )


def base_silent(label: str) -> EngineError:
    """The error for measurements on a base whose files could not be compared afterwards."""
    return EngineError(
        f"the files of base {label} could not be compared at the end of the run: their mount does not answer",
        hint="check the network file system that holds the base, then run again",
    )
