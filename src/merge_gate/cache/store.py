"""A directory of sealed documents that several runs share; whoever can write to it is not trusted with more than that.

In: a directory, a seal. Out: documents by kind and name, or None: one that is absent, damaged, sealed by another
secret, too large, a link or no plain file is not there. Each is written whole or not at all: to a name of its own, then
renamed. Without a sync: what a crash of the machine leaves half-written has no seal that fits. Knows nothing of what
they say.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.cache.key import canonical
from merge_gate.errors import UsageError
from merge_gate.report.formats.fields import UnreadableError
from merge_gate.report.formats.json_report import parsed
from merge_gate.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.cache.seal import Seal

Json = Any

KINDS = ("verdicts", "bases", "devices")
LONGEST_BYTES = 1 << 26
"""A document that is longer is none."""
ABANDONED_S = 86_400.0
"""Unfinished files that are older are of runs that were killed."""

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
"""The names that `whole_file` writes to. Users may keep other hidden files in a directory of the same name."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Store:
    """The documents of one directory, which is made if absent. `notify` is told, once, that nothing can be written."""

    def __init__(self, directory: str, seal: Seal, notify: Callable[[str], None]) -> None:
        self._directory, self._seal, self._notify = directory, seal, notify
        self._folders: dict[str, int] = {}
        self._is_told = False
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            for kind in KINDS:
                self._open(Path(directory, kind))
        except OSError as error:
            self.close()
            raise UsageError(
                f"cannot use the cache directory {directory}: {error.strerror or error}",
                hint="choose a directory that you may write to with --cache",
            ) from error

    def _open(self, folder: Path) -> None:
        """A kind that is absent where nothing may be written stays absent."""
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise
        except OSError:
            return
        self._folders[folder.name] = os.open(folder, _FOLDER)

    def close(self) -> None:
        """Let go of the directory; may be called more than once."""
        while self._folders:
            os.close(self._folders.popitem()[1])

    def is_empty(self, kind: str) -> bool:
        """Whether there is nothing of this kind."""
        folder = self._folders.get(kind)
        if folder is None:
            return True
        with os.scandir(folder) as entries:
            return not any(_NAME.fullmatch(entry.name) for entry in entries)

    def get(self, kind: str, name: str) -> Json | None:
        """The document, or None."""
        found = self.get_sealed(kind, name)
        return found[1] if found is not None else None

    def get_sealed(self, kind: str, name: str) -> tuple[str, Json] | None:
        """The document, with the seal that fits it before it; or None."""
        folder = self._folders.get(kind)
        if folder is None or not _NAME.fullmatch(name):
            return None
        try:
            seal, _, body = _read(folder, name).partition(b"\n")
            mark = seal.decode("ascii")
            return (mark, parsed(body)) if self._seal.fits(mark, kind, name, body) else None
        except (OSError, UnicodeDecodeError, UnreadableError):
            return None

    def put(self, kind: str, name: str, document: Json) -> None:
        """Write a document, in the place of one that is there."""
        folder = self._folders.get(kind)
        body = canonical(document)
        try:
            if folder is None:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with whole_file(Path(name), folder=folder) as file:
                file.write(self._seal.of(kind, name, body).encode() + b"\n" + body)
        except OSError as error:
            self._tell(error)

    def tidy(self) -> None:
        """Remove what runs that were killed have left unfinished, a day ago or longer."""
        for folder in self._folders.values():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if not _UNFINISHED.fullmatch(entry.name):
                        continue
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                            os.unlink(entry.name, dir_fd=folder)

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            self._notify(
                f"cannot write to the cache directory {self._directory}: {error.strerror or error}; "
                "verdicts of this run are not kept there"
            )
        self._is_told = True


def _read(folder: int, name: str) -> bytes:
    descriptor = os.open(name, _FILE, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LONGEST_BYTES:
            return b""
        return file.read(LONGEST_BYTES)
