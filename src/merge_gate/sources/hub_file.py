"""One file on the Hub at a commit, read by byte ranges. Nothing is written to disk.

In: a repository, a commit, a file name, and the token. Out: exactly the requested bytes, or a `SourceError`. Runs in
the process that has the token and the network.

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
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, get_session, get_token, hf_hub_url

from merge_gate import __version__
from merge_gate.errors import ResolveError
from merge_gate.files.headers import shown
from merge_gate.files.hub import ask, is_transport
from merge_gate.limits.request_limits import AGENT, LEAST_BYTES_PER_S, MOST_BYTES, REQUEST_LIMIT_S, limit_requests
from merge_gate.records.terms import record
from merge_gate.sources.feed import SourceError
from merge_gate.text import counted

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
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


@record
class HubAddress:
    """Where the bytes of a file are. `etag` is the SHA-256 of a file in Git LFS, and git's digest of another file."""

    url: str
    size_bytes: int
    etag: str
    is_on_hub: bool

    @property
    def sha256(self) -> str | None:
        return self.etag if _SHA256.fullmatch(self.etag) else None


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
        self._address = self._resolve()
        self.size_bytes, self.sha256 = self._address.size_bytes, self._address.sha256

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
            if spent_s > REQUEST_LIMIT_S and done < LEAST_BYTES_PER_S * spent_s:
                raise SourceError(
                    f"{self.label}: {done:,} bytes arrived in {spent_s:.0f} s, which is too slow", hint=_LATER
                )
            address = self._address
            began_s = time.monotonic()
            try:
                received = self._request(address, start + done, buffer[done:])
                reason, pause_s = "the connection ended", None
            except _PassingError as error:
                received, reason, pause_s = error.received, str(error), error.pause_s
            except _ExpiredError as error:
                received, reason, pause_s = 0, str(error), 0.0
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

    def _resolve(self) -> HubAddress:
        url = hf_hub_url(self._repository, self._name, revision=self._commit)
        try:
            found = ask(
                lambda: get_hf_file_metadata(
                    url, token=self._token or False, library_name=AGENT, library_version=__version__
                ),
                f"{self.label}:",
                (2.0**tries for tries in range(1, MOST_TRIES)),
                lambda pause_s, _: time.sleep(min(pause_s, LONGEST_PAUSE_S)),
            )
        except ResolveError as error:
            raise SourceError(error.message, hint=error.hint) from error
        address = self._checked(found, url)
        if not address.is_on_hub:
            refuse_private(address.url, constants.ENDPOINT)
        return address

    def _checked(self, found: HfFileMetadata, url: str) -> HubAddress:
        if found.commit_hash is not None and found.commit_hash != self._commit:
            raise self._changed(f"the Hub answers for commit {found.commit_hash[:12]}")
        if found.size is None or found.etag is None:
            raise SourceError(
                f"{self.label}: the server states no size or no digest, so its bytes cannot be checked",
                hint="set access: download",
            )
        on_hub = _origin(found.location) == _origin(url)
        return HubAddress(url=found.location, size_bytes=found.size, etag=found.etag, is_on_hub=on_hub)

    def _renew(self, expired: HubAddress) -> None:
        """Ask the resolver again, once for all threads that read the same expired address."""
        with self._lock:
            if self._address is not expired:
                return
            address = self._resolve()
            if (address.size_bytes, address.etag) != (expired.size_bytes, expired.etag):
                raise self._changed("its digest is another one now")
            self._address, self._served = address, None

    def _changed(self, how: str) -> SourceError:
        return SourceError(
            f"{self.label} changed while it was read: {how}",
            hint="pin base.revision to a commit, and run the gate again",
        )

    # --- 2. and 3. -------------------------------------------------------------------------------------------------

    def _request(self, address: HubAddress, start: int, buffer: memoryview) -> int:
        """Read as many of these bytes as arrive over one connection."""
        end = start + len(buffer) - 1
        agent = f"{AGENT}/{__version__}"
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity", "User-Agent": agent}
        if address.is_on_hub and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        done = 0
        most = {MOST_BYTES: sys.maxsize}  # `_refuse_excess` knows better
        limit_requests(get_session())
        try:
            with get_session().stream(
                "GET", address.url, headers=headers, follow_redirects=False, timeout=TIMEOUT_S, extensions=most
            ) as answer:
                self._check(answer, address, start, end)
                for part in answer.iter_raw():
                    self._refuse_excess(len(part), len(buffer) - done)
                    buffer[done : done + len(part)] = part
                    done += len(part)
        except Exception as error:
            if not is_transport(error):
                raise
            raise _PassingError(f"the connection failed ({type(error).__name__})", received=done) from error
        return done

    def _check(self, answer: Any, address: HubAddress, start: int, end: int) -> None:
        status = answer.status_code
        if status in _EXPIRED:
            raise _ExpiredError(f"the server refused with status {status}")
        if status in _PASSING:
            pause_s = answer.headers.get("Retry-After")  # digits: request_limits.py drops what is none
            raise _PassingError(f"the server answered with status {status}", pause_s=pause_s and float(pause_s))
        if status != _PARTIAL_CONTENT:
            raise self._wrong(f"status {status}, expected 206 for a range")
        place = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if place is None or [int(part) for part in place.groups()] != [start, end, address.size_bytes]:
            expected = f"bytes {start}-{end}/{address.size_bytes}"
            raise self._wrong(f"Content-Range {answer.headers.get('Content-Range')!r:.80}, expected {expected}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise self._wrong("compressed bytes")
        with self._lock:
            etag = answer.headers.get("ETag")
            self._served = self._served or etag
            if etag != self._served:
                raise self._changed("two ranges come from two files")

    def _refuse_excess(self, size_bytes: int, room_bytes: int) -> None:
        if size_bytes > room_bytes:
            raise self._wrong(f"{counted(size_bytes - room_bytes, 'byte')} more than requested")

    def _wrong(self, what: str) -> SourceError:
        return SourceError(
            f"{self.label}: the server sent {what}",
            hint="a proxy or mirror in between may not support ranges: set access: download",
        )


class _PassingError(Exception):
    def __init__(self, message: str, *, received: int = 0, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.received, self.pause_s = received, pause_s


class _ExpiredError(Exception):
    pass


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
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:  # a proxy may know it; without one the request fails
        return False
    return any(not ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_global for address in found)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
