"""Bases on the Hub whose weights are not downloaded: their headers are laid out on disk, their bytes come by ranges.

In: a repository at a commit, the names of its weight files, a directory with its other files, and the token. Out: in
that directory, a stub for each weight file, with the true header, the true length, and no data; and `HubFiles`, which
has the data: exactly the requested bytes, or a `SourceError`. Runs in the process that has the token and the network.

1. One request to the resolver gives the size, the digest, and the address of the bytes.
2. Each read is one request for one range. Status, Content-Range, and ETag must be the expected ones.
3. A read that breaks off goes on where it stopped, unless it is too slow. 429 and 5xx wait as long as the server asks.
4. 401 and 403 mean that the address has expired: the resolver is asked again.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, get_session, get_token, hf_hub_url

from merge_gate import __version__
from merge_gate._internal.errors import ResolveError, SourceError
from merge_gate._internal.text import counted
from merge_gate.features.stream.read_ahead import refuse_excess
from merge_gate.files.headers import MAX_HEADER_BYTES, shown
from merge_gate.files.hub import ask, is_transport
from merge_gate.files.identity import base_identity
from merge_gate.limits import request_limits
from merge_gate.limits.request_limits import AGENT, LEAST_BYTES_PER_S, MOST_BYTES, limit_requests
from merge_gate.records.files import Fetched, FileIdentity

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

MOST_TRIES = 6
"""Tries in a row that bring no new byte."""

LONGEST_PAUSE_S = 60.0
TIMEOUT_S = 30.0
"""Seconds without a byte."""

_LATER = "run the gate again later, or set access: download"
_PARTIAL_CONTENT = 206

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EXPIRED = frozenset({401, 403})
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


_FIRST_READ_BYTES = 1 << 20
_PREFIX_BYTES = 8

MOST_HEADER_BYTES = 1 << 28
"""The headers of all files of a base are kept during the run. Those of a 405 B base have a few megabytes."""


class HubFile:
    """Reads ranges of one file. Several threads may read at a time, each over a connection of its own.

    huggingface_hub finds the token (HF_TOKEN, or the file that `hf auth login` writes).

    Attributes:
        size_bytes: of the whole file.
        sha256: the digest that the Hub lists; None for a file that is not in Git LFS.

    Raises:
        SourceError: the resolver cannot be asked, or has another commit.
    """

    def __init__(self, repository: str, commit: str, name: str) -> None:
        self._repository, self._commit, self._name = repository, commit, name
        self._token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        self._lock = threading.Lock()
        self._served: str | None = None
        self._url = hf_hub_url(repository, name, revision=commit)
        self._address = self._resolve()
        self.size_bytes, etag = self._address.size or 0, self._address.etag or ""
        self.sha256 = etag if _SHA256.fullmatch(etag) else None  # of a file in Git LFS; others have git's digest

    @property
    def label(self) -> str:
        """What messages call the file."""
        return f"{shown(self._name)} of {shown(self._repository)} at {self._commit[:12]}"

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on.

        Raises:
            SourceError: the bytes cannot be had, or the server sends others than asked for.
        """
        done = tries = 0
        spent_s = 0.0
        while done < len(buffer):
            if spent_s > request_limits.REQUEST_TIMEOUT_S and done < LEAST_BYTES_PER_S * spent_s:
                raise SourceError(
                    f"{self.label}: {done:,} bytes arrived in {spent_s:.0f} s, which is too slow", hint=_LATER
                )
            address = self._address
            began_s = time.monotonic()
            try:
                received = self._request(address, start + done, buffer[done:])
                reason, pause_s = "the connection ended", None
            except _TransientError as error:
                received, reason, pause_s = error.received, str(error), error.pause_s
                if error.is_expired:
                    self._renew(address)
            except ResolveError as error:
                raise SourceError(f"{self.label}: {error.message}", hint=error.hint) from error
            done += received
            spent_s += time.monotonic() - began_s
            tries = 0 if received else tries + 1
            if done < len(buffer) and tries >= MOST_TRIES:
                raise SourceError(
                    f"{self.label}: {reason}, {MOST_TRIES} times in a row at byte {start + done:,}",
                    hint=_LATER,
                )
            if done < len(buffer) and not received:
                time.sleep(min(2.0**tries, LONGEST_PAUSE_S) if pause_s is None else min(pause_s, LONGEST_PAUSE_S))

    # --- 1. and 4. -------------------------------------------------------------------------------------------------

    def _resolve(self) -> HfFileMetadata:
        try:
            metadata = ask(
                lambda: get_hf_file_metadata(
                    self._url, token=self._token or False, library_name=AGENT, library_version=__version__
                ),
                f"{self.label}:",
                (2.0**tries for tries in range(1, MOST_TRIES)),
                lambda pause_s, _: time.sleep(min(pause_s, LONGEST_PAUSE_S)),
            )
        except ResolveError as error:
            raise SourceError(error.message, hint=error.hint) from error
        if metadata.commit_hash is not None and metadata.commit_hash != self._commit:
            raise self._changed(f"the Hub answers for commit {metadata.commit_hash[:12]}")
        if metadata.size is None or metadata.etag is None:
            raise SourceError(
                f"{self.label}: the server states no size or no digest, so its bytes cannot be checked",
                hint="set access: download",
            )
        if not self._is_on_hub(metadata):
            refuse_private(metadata.location, constants.ENDPOINT)
        return metadata

    def _is_on_hub(self, address: HfFileMetadata) -> bool:
        return _origin(address.location) == _origin(self._url)

    def _renew(self, expired: HfFileMetadata) -> None:
        """Ask the resolver again, once for all threads that read the same expired address."""
        with self._lock:
            if self._address is not expired:
                return
            address = self._resolve()
            if (address.size, address.etag) != (expired.size, expired.etag):
                raise self._changed("its digest is another one now")
            self._address, self._served = address, None

    def _changed(self, how: str) -> SourceError:
        return SourceError(
            f"{self.label} changed while it was read: {how}",
            hint="pin base.revision to a commit, and run the gate again",
        )

    # --- 2. and 3. -------------------------------------------------------------------------------------------------

    def _request(self, address: HfFileMetadata, start: int, buffer: memoryview) -> int:
        """Read as many of these bytes as arrive over one connection."""
        end = start + len(buffer) - 1
        agent = f"{AGENT}/{__version__}"
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity", "User-Agent": agent}
        if self._is_on_hub(address) and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        done = 0
        most = {MOST_BYTES: sys.maxsize}  # `_refuse_more` has a closer limit
        limit_requests(get_session())
        try:
            with get_session().stream(
                "GET", address.location, headers=headers, follow_redirects=False, timeout=TIMEOUT_S, extensions=most
            ) as answer:
                self._check(answer, start, end)
                for part in answer.iter_raw():
                    self._refuse_more(len(part), len(buffer) - done)
                    buffer[done : done + len(part)] = part
                    done += len(part)
        except Exception as error:
            if not is_transport(error):
                raise
            raise _TransientError(f"the connection failed ({type(error).__name__})", received=done) from error
        return done

    def _check(self, answer: Any, start: int, end: int) -> None:
        status = answer.status_code
        if status in _EXPIRED:
            raise _TransientError(f"the server refused with status {status}", pause_s=0.0, is_expired=True)
        if status in _TRANSIENT:
            pause_s = answer.headers.get("Retry-After")  # digits: request_limits.py drops anything else
            raise _TransientError(f"the server answered with status {status}", pause_s=pause_s and float(pause_s))
        if status != _PARTIAL_CONTENT:
            raise self._wrong(f"status {status}, expected 206 for a range")
        place = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if place is None or [int(part) for part in place.groups()] != [start, end, self.size_bytes]:
            expected = f"bytes {start}-{end}/{self.size_bytes}"
            raise self._wrong(f"Content-Range {answer.headers.get('Content-Range')!r:.80}, expected {expected}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise self._wrong("compressed bytes")
        with self._lock:
            etag = answer.headers.get("ETag")
            self._served = self._served or etag
            if etag != self._served:
                raise self._changed("two ranges come from two files")

    def _refuse_more(self, size_bytes: int, room_bytes: int) -> None:
        if size_bytes > room_bytes:
            raise self._wrong(f"{counted(size_bytes - room_bytes, 'byte')} more than requested")

    def _wrong(self, what: str) -> SourceError:
        return SourceError(
            f"{self.label}: the server sent {what}",
            hint="a proxy or mirror in between may not support ranges: set access: download",
        )


class _TransientError(Exception):
    def __init__(
        self, message: str, *, received: int = 0, pause_s: float | None = None, is_expired: bool = False
    ) -> None:
        super().__init__(message)
        self.received, self.pause_s, self.is_expired = received, pause_s, is_expired


def refuse_private(url: str, endpoint: str) -> None:
    """Refuse an address inside of a private network, unless the Hub itself is a mirror there.

    Raises:
        SourceError: the server redirects to a private address.
    """
    name = urlsplit(url).hostname or ""
    if not _is_private(name) or _is_private(urlsplit(endpoint).hostname or ""):
        return
    raise SourceError(
        f"the Hub redirects to {name[:100]}, which is a private address",
        hint="if that is a mirror of yours, set HF_ENDPOINT to it",
    )


def _is_private(name: str) -> bool:
    try:
        addresses = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:  # a proxy may know it; without one the request fails
        return False
    return any(not ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_global for address in addresses)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


# --- the base -----------------------------------------------------------------------------------------------------


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
        """Fill `into` with the file's bytes from `start` on. A header has the bytes that were laid out.

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
    """The header of a safetensors file, with its length. For another file, its first bytes, which show what it is."""
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
