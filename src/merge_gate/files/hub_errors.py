"""Translates errors of the Hub, of the network, and of the cache's disk into `ResolveError`s, by one table.

It also repeats a request whose error may pass. Requests and headers are never quoted: they may hold a
token.
"""

from __future__ import annotations

import errno
import json
import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants, errors, get_session

from merge_gate.errors import ResolveError
from merge_gate.limits.request_limits import ConnectError, limit_requests

T = TypeVar("T")

CHECK_ENDPOINT = "check HF_ENDPOINT and any proxy"
_SET_TOKEN = "set HF_TOKEN to a token that may read it (in a workflow: the hf-token input)"  # noqa: S105
_PATHS = "relative paths start at the config file's directory"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_SERVER_ERROR = 500
_LONGEST_PAUSE_S = 60.0


class _Row(NamedTuple):
    """One kind of error. `{host}`, `{cache}`, `{status}` and `{why}` are filled in."""

    applies: Callable[[BaseException], bool]
    message: str
    hint: str = ""


def host() -> str:
    """The Hub's host name alone: HF_ENDPOINT may contain credentials."""
    return urlsplit(constants.ENDPOINT).hostname or "the Hub"


def translate(error: Exception, opening: str) -> ResolveError | None:
    """Translate an error of huggingface_hub, its HTTP client (httpx, httpx2), or the disk; None for any other error.

    `opening` begins the message: what was to be fetched.
    """
    links = _chain(error)
    for row in _ROWS:
        for link in filter(row.applies, links):
            facts = {"host": host(), "cache": constants.HF_HUB_CACHE, "status": _status(link), "why": _why(link)}
            return ResolveError(f"{opening} {row.message.format(**facts)}", hint=row.hint)
    return None


def ask(
    request: Callable[[], T],
    opening: str,
    pauses_s: Iterable[float],
    wait: Callable[[float, ResolveError], None],
    sizes: Mapping[str, int] | None = None,
) -> T:
    """Call `request` with limits, and again after each of the pauses as long as its error may pass.

    `wait` gets the seconds and the error. With the `sizes` of its files it is a download, in which huggingface_hub has
    already retried lost connections and timeouts.

    Raises:
        ResolveError: the last error. `opening` begins the message.
    """
    pauses = iter(pauses_s)
    while True:
        limit_requests(get_session(), sizes)
        try:
            return request()
        except ResolveError as error:
            raise ResolveError(f"{opening} {error.message}", hint=error.hint) from error
        except Exception as error:
            refused, pause_s = translate(error, opening), next(pauses, None)
            if refused is None:
                raise
            if pause_s is None or not _is_passing(error, transport=sizes is None or isinstance(error, ConnectError)):
                raise refused from error
            wait(max(pause_s, min(_retry_after_s(error), _LONGEST_PAUSE_S)), refused)


def _is_passing(error: Exception, *, transport: bool) -> bool:
    """Whether the same request may succeed later. `transport`: whether a lost connection counts."""
    links = _chain(error)
    statuses = [status for link in links if (status := _status(link)) is not None]
    passing = any(code in {408, 429} or code >= _SERVER_ERROR for code in statuses) or any(map(_is_incomplete, links))
    passing = passing or (transport and any(map(is_transport, links)))
    return passing and not any(map(_is_distrust, links))


def _retry_after_s(error: Exception) -> float:
    """The longest wait that a server asked for."""
    headers = (link.response.headers for link in _chain(error) if isinstance(link, errors.HfHubHTTPError))
    return max((float(value) for h in headers if (value := h.get("Retry-After", "")).isdecimal()), default=0.0)


# --- kinds of errors -----------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> tuple[BaseException, ...]:
    """The error and its causes: huggingface_hub wraps a lost connection in "not in the cache"."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return tuple(chain)


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _status(error: BaseException) -> int | None:
    return int(error.response.status_code) if isinstance(error, errors.HfHubHTTPError) else None


def _has_status(number: int) -> Callable[[BaseException], bool]:
    return lambda error: _status(error) == number


def _why(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if is_transport(error) or not isinstance(error, OSError):
        return type(error).__name__
    return error.strerror or (os.strerror(error.errno) if error.errno else type(error).__name__)


def _is_distrust(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError)


def _of_the_disk(numbers: set[int]) -> Callable[[BaseException], bool]:
    """Match errors of the disk. TLS errors are also OSErrors, with other numbers."""
    return lambda error: isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno in numbers


def is_transport(error: BaseException) -> bool:
    """Whether the connection failed. Compared by name, since huggingface_hub 1 uses httpx and 2 uses httpx2."""
    names = {cls.__name__ for cls in type(error).__mro__}
    failures = {"TransportError", "ConnectionError", "TimeoutError", "SSLError"}
    return "OfflineModeIsEnabled" not in names and bool(names & failures)


def _is_transport_with(word: str) -> Callable[[BaseException], bool]:
    return lambda error: is_transport(error) and word in type(error).__name__.lower()


def _is_incomplete(error: BaseException) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _is_offline(error: BaseException) -> bool:
    missing = errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled
    return constants.HF_HUB_OFFLINE and isinstance(error, missing)


# fmt: off
_ROWS = (
    _Row(_is_distrust, "the certificate of {host}, or of a proxy, is not trusted: {why}",
         "set SSL_CERT_FILE to the file of your company's certificate authorities"),
    _Row(_of_the_disk(_DISK_FULL), "the disk is full: it does not fit into the cache ({cache})",
         "free space, or point HF_HOME at a larger disk"),
    _Row(_of_the_disk(_NOT_WRITABLE), "the cache ({cache}) cannot be written: {why}",
         "point HF_HOME at a directory that the user who runs the gate may write to"),
    _Row(_is(errors.HFValidationError), "it is not a valid Hub id (owner/name)",
         "check the spelling; relative paths start at the config file's directory"),
    _Row(_is(errors.GatedRepoError), "it is gated: {host} does not give its files to this token, or needs a token",
         f"accept its terms on its page with the token's account, and {_SET_TOKEN}"),
    _Row(_is(errors.RevisionNotFoundError), "it exists on {host}, but not that revision",
         "name a branch, a tag or a commit of the repository; without a revision, its main branch is used"),
    _Row(_is(errors.RepositoryNotFoundError),
         "it was not found on {host}: it does not exist, or it is private and this token has no access",
         f"check the spelling: {_PATHS}, and a Hub id is owner/name; if it is private: {_SET_TOKEN}"),
    _Row(_is(errors.DisabledRepoError), "it was disabled by {host}", "use another copy of it"),
    _Row(_has_status(401), "{host} rejected the token (401)",
         "the token is wrong or has expired: set HF_TOKEN to a valid one, or unset it for public repositories"),
    _Row(_has_status(403), "{host} does not allow this token to read it (403)",
         f"{_SET_TOKEN}; a fine-grained token needs read access to this repository"),
    _Row(_has_status(429), "{host} limits the rate of requests (429)",
         "set HF_TOKEN (tokens have higher limits), or wait and run again; a persistent cache needs fewer requests"),
    _Row(lambda error: (_status(error) or 0) >= _SERVER_ERROR, "{host} failed ({status})",
         "run again later; with a filled cache, HF_HUB_OFFLINE=1 needs no Hub"),
    _Row(lambda error: _status(error) is not None, "{host} refused the request for it ({status})", CHECK_ENDPOINT),
    _Row(_is_transport_with("timeout"), "{host} did not answer in time",
         "run again; for a slow connection, raise HF_HUB_DOWNLOAD_TIMEOUT (seconds, at most 60)"),
    _Row(_is_transport_with("protocol"), "the connection to {host} was lost repeatedly",
         "run again: the files that have arrived are kept; check any proxy"),
    _Row(is_transport, "{host} cannot be reached ({why})",
         "check the network and any proxy; with a filled cache, HF_HUB_OFFLINE=1 needs no network"),
    _Row(_is_offline, "it is not in the cache, and HF_HUB_OFFLINE forbids requests to {host}",
         f"for a directory, check the spelling: {_PATHS}; for a Hub id, fill the cache with one run that has network "
         "access, or unset HF_HUB_OFFLINE"),
    _Row(_is(json.JSONDecodeError, TypeError, KeyError), "{host} sent an unexpected response", CHECK_ENDPOINT),
    _Row(_is(errors.FileMetadataError, errors.EntryNotFoundError), "{host} did not deliver the files that it lists",
         CHECK_ENDPOINT),
    _Row(lambda error: isinstance(error, ValueError) and "too large" in str(error),
         "it has a file that is too large for a download over HTTP",
         "set access: stream"),
    _Row(_is_incomplete, "it arrived incomplete from {host}", "run again; check any proxy"),
    _Row(_is(OSError), "it cannot be fetched into the cache ({cache}): {why}"),
)
# fmt: on
"""The first row that applies to the error or to one of its causes is used."""
