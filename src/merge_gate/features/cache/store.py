"""A directory of sealed documents that several runs share, and that others may write to.

In: a directory, and the secret that the environment may contain. Out: documents by kind and name. A document is None if
it is absent, damaged, too large, sealed with another secret, or not a regular file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import MOST_FOREIGN, counted, quoted
from merge_gate._internal.whole_file import whole_file
from merge_gate.features.cache.declared import SECRET
from merge_gate.run.verdict_key import Json, canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SHORTEST = 16
_NO_SECRET = b"merge-gate: no secret"

KINDS = ("verdicts", "bases", "devices")
LONGEST_BYTES = 1 << 26
"""A longer file is not read."""
ABANDONED_S = 86_400.0
"""Older unfinished files are from runs that were killed."""

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
"""The names that `whole_file` writes to. Users may have other hidden files in the directory."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Seal:
    """Makes and verifies seals, which show whether a stored document is what an earlier run wrote.

    A seal has 64 hexadecimal digits: an HMAC (SHA-256) under the secret. Without a secret it shows damage but not
    forgery: anyone can make it.
    """

    def __init__(self, secret: str = "") -> None:
        if secret and len(secret.encode()) < SHORTEST:
            raise UsageError(
                f"{SECRET} has {counted(len(secret.encode()), 'byte')}, expected at least {SHORTEST}",
                hint="make one with `openssl rand -hex 32`, or unset it",
            )
        self._key = hashlib.sha256(b"merge-gate seal\0" + secret.encode()).digest() if secret else _NO_SECRET

    def of(self, kind: str, name: str, body: bytes) -> str:
        """The seal of a document. It does not fit if the document gets another name."""
        return hmac.new(self._key, f"{kind}/{name}\n".encode() + body, hashlib.sha256).hexdigest()

    def fits(self, seal: str, kind: str, name: str, body: bytes) -> bool:
        """Whether this is the seal of the document."""
        return hmac.compare_digest(self.of(kind, name, body).encode(), seal.encode("utf-8", "replace"))


def from_environment(environ: Mapping[str, str]) -> Seal:
    """The seal of this run.

    Raises:
        UsageError: the secret is too short.
    """
    return Seal(environ.get(SECRET, ""))


class Store:
    """The documents of one directory, which is created if absent. `notify` gets one line if nothing can be written.

    If it is `read_only`, nothing is created, changed, or removed in it.
    """

    def __init__(self, directory: str, seal: Seal, notify: Callable[[str], None], *, read_only: bool = False) -> None:
        self._directory, self._seal, self._notify, self._read_only = directory, seal, notify, read_only
        self._folders: dict[str, int] = {}
        self._has_notified = False
        try:
            if not read_only:
                Path(directory).mkdir(parents=True, exist_ok=True)
            for kind in KINDS:
                self._open(Path(directory, kind))
        except OSError as error:
            self.close()
            raise UsageError(
                f"cannot use the cache directory {quoted(str(directory), MOST_FOREIGN, '')}: {error.strerror or error}",
                hint="choose a directory that you may write to with --cache",
            ) from error

    def _open(self, folder: Path) -> None:
        """Without permission to write, a missing folder stays missing."""
        try:
            if not self._read_only:
                folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise
        except OSError:
            return
        with contextlib.suppress(FileNotFoundError):
            self._folders[folder.name] = os.open(folder, _FOLDER)

    def close(self) -> None:
        """Release the directory. It may be called more than once."""
        while self._folders:
            os.close(self._folders.popitem()[1])

    def is_empty(self, kind: str) -> bool:
        """Whether there is no document of this kind."""
        folder = self._folders.get(kind)
        if folder is None:
            return True
        with os.scandir(folder) as entries:
            return not any(_NAME.fullmatch(entry.name) for entry in entries)

    def get(self, kind: str, name: str) -> Json | None:
        """The document, or None."""
        folder = self._folders.get(kind)
        if folder is None or not _NAME.fullmatch(name):
            return None
        try:
            line, _, body = read_regular_file(name, LONGEST_BYTES, folder=folder).partition(b"\n")
            seal = line.decode("ascii")
            return parse_strictly(body) if self._seal.fits(seal, kind, name, body) else None
        except (OSError, UnicodeDecodeError, InvalidJsonError):
            return None

    def put(self, kind: str, name: str, document: Json) -> None:
        """Write or replace a document, whole or not at all. It needs no sync: a damaged file has no seal that fits."""
        if self._read_only:
            return
        folder = self._folders.get(kind)
        body = canonical(document)
        try:
            if folder is None:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with whole_file(Path(name), folder=folder) as file:
                file.write(self._seal.of(kind, name, body).encode() + b"\n" + body)
        except OSError as error:
            self._notify_once(error)

    def tidy(self) -> None:
        """Remove unfinished files of killed runs that are older than a day."""
        for folder in () if self._read_only else self._folders.values():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if not _UNFINISHED.fullmatch(entry.name):
                        continue
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                            os.unlink(entry.name, dir_fd=folder)

    def _notify_once(self, error: OSError) -> None:
        if not self._has_notified:
            self._notify(
                f"cannot write to the cache directory {self._directory}: {error.strerror or error}; "
                "the verdicts of this run are not stored there"
            )
        self._has_notified = True
