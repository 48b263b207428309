"""Downloads files of a Hugging Face repository into the cache, pinned to a commit.

A Hub id, a revision, and a function that chooses from the repository's file names go in; `Fetched` or a `ResolveError`
comes out. Only this module and features/stream import huggingface_hub.

1. One request resolves the revision to a commit and lists the repository's files. Their names are checked.
2. The caller chooses from the list. A file that it must read for that, such as an index, is fetched first.
3. The files are fetched at that commit, so later changes of the repository have no effect.
4. The files are compared with the digests that the Hub lists. Files with other bytes are removed from the cache.

Offline (HF_HUB_OFFLINE=1) the refs and listings in the cache replace the Hub. huggingface_hub finds the token itself
(HF_TOKEN, or the file that `hf auth login` writes). Errors of the Hub, of the network, and of the cache's disk become
`ResolveError`s by one table. Requests and headers are never quoted: they may hold a token.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import HfApi, constants, errors, get_session, hf_hub_url, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from merge_gate import __version__
from merge_gate._internal.errors import ResolveError
from merge_gate._internal.text import COMMIT, counted, is_inside
from merge_gate._internal.whole_file import whole_file
from merge_gate.files.base_files import SAFETENSORS_ENDING
from merge_gate.files.headers import shown
from merge_gate.limits.request_limits import AGENT, ConnectError, limit_requests
from merge_gate.records.files import Fetched
from merge_gate.records.terms import Access

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from huggingface_hub.hf_api import RepoSibling

    Choose = Callable[[frozenset[str], Callable[[str], Path]], tuple[str, ...]]

T = TypeVar("T")

PAUSES_S = (1.0, 4.0)
"""Seconds to wait before the second and the third attempt of a request that failed for a temporary reason."""

_REQUEST_TIMEOUT_S = 10.0
_DOWNLOAD_TIMEOUT_S = 8
"""Seconds without a byte. huggingface_hub gives up after six attempts, so in less than a minute."""

SPARE_DISK_BYTES = 2_000_000_000
"""With access `auto`, a base is streamed if a download would leave less of the disk free."""

CHECK_ENDPOINT = "check HF_ENDPOINT and any proxy"
_SET_TOKEN = "set HF_TOKEN to a token that may read it (in a workflow: the hf-token input)"  # noqa: S105
_PATHS = "relative paths start at the config file's directory"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_SERVER_ERROR = 500
_LONGEST_PAUSE_S = 60.0

_LISTED = 6
_DIGEST_CHARACTERS = 16
_REVISION = re.compile(r"(?!.*\.\.)[^\s/\\\x00-\x1f~^:?*\[][^\s\\\x00-\x1f~^:?*\[]*", re.ASCII)
"""What git allows as the name of a ref. The name becomes part of a path in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """One repository at one revision. Every exception that leaves its methods is a `ResolveError`.

    With another `access` than a download, safetensors files may be left to be read by ranges. If the fetch is only
    planned, nothing is written to the cache, except small files that `choose` reads.
    """

    repo_id: str
    revision: str | None
    notify: Callable[[str], None]
    access: Access = Access.DOWNLOAD
    is_plan: bool = False

    def __post_init__(self) -> None:
        _set_up_library()
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            raise ResolveError(
                f"{shown(self.revision)} is not the name of a revision of {shown(self.repo_id)}",
                hint="name a branch, a tag or a commit",
            )

    def fetch(self, choose: Choose) -> Fetched:
        """Fetch the files that `choose` selects from the repository's file names. Returns when all have arrived."""
        return self._from_cache(choose) if constants.HF_HUB_OFFLINE else self._from_network(choose)

    def _from_network(self, choose: Choose) -> Fetched:
        # 1. and 2. Resolve the revision to a commit, list its files, and let the caller choose.
        commit, files = self._listed()
        chosen = choose(frozenset(files), lambda name: self._fetch_first(files[name], commit))
        absent = tuple(name for name in chosen if not self._is_cached(name, commit))
        streamable = self._streamable(files, chosen, commit)
        fetched = Fetched(
            repo_id=self.repo_id,
            commit=commit,
            directory=str(self._cache / "snapshots" / commit),
            chosen=tuple(name for name in chosen if name not in streamable),
            streamable=streamable,
            withheld=tuple(sorted(files.keys() - {*chosen})),
            sizes={name: files[name].size or 0 for name in chosen},
            free_bytes=free_disk_bytes(constants.HF_HUB_CACHE),
        )
        if self.is_plan and absent:
            return replace(fetched, absent=absent, withheld=absent)
        # 3. Fetch at that commit. The revision's ref in the cache is for offline runs.
        total = _shown_bytes(sum(fetched.sizes[name] for name in fetched.chosen))
        if not self.is_plan:
            self.notify(f"fetching {self.what} at {commit[:12]}: {counted(len(fetched.chosen), 'file')}, {total}")
            self._write_ref(commit)
        max_sizes = self._max_sizes(files, fetched.chosen, commit)
        directory = self._ask(lambda: self._download(commit, fetched.chosen, local_files_only=self.is_plan), max_sizes)
        self._refuse_incomplete(directory, fetched.chosen)
        # 4. Compare the new files with the digests that the Hub lists.
        for name in (name for name in absent if name in fetched.chosen):
            self._compare(Path(directory, name), files[name])
        return replace(fetched, directory=directory)

    def _listed(self) -> tuple[str, dict[str, RepoSibling]]:
        api = HfApi(library_name=AGENT, library_version=__version__)
        info = self._ask(
            lambda: api.model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=_REQUEST_TIMEOUT_S
            )
        )
        commit = self._commit(info.sha)
        files = {file.rfilename: file for file in info.siblings or ()}
        outside = next((name for name in files if not is_inside(name)), None)
        if outside is not None:
            raise ResolveError(
                f"{host()} lists {shown(str(outside))} for {self.what}, which is no file of a repository",
                hint=CHECK_ENDPOINT,
            )
        return commit, files

    def _commit(self, name: str | None) -> str:
        """Check a commit before it becomes a part of a path in the cache."""
        if not name or not COMMIT.fullmatch(name):
            what = f"with the commit {shown(name)}, expected 40 hexadecimal digits," if name else "without a commit"
            raise ResolveError(f"{host()}, or the cache, answered {what} for {self.what}", hint=CHECK_ENDPOINT)
        return name

    def _max_sizes(self, files: Mapping[str, RepoSibling], names: Iterable[str], commit: str) -> dict[str, int]:
        """The most bytes of files, by the paths of their addresses."""
        paths = {name: urlsplit(hf_hub_url(self.repo_id, name, revision=commit)).path for name in names}
        sizes = {name: files[name].size for name in names}
        most = constants.MAX_HTTP_DOWNLOAD_SIZE
        return {unquote(paths[name]): most if size is None else size for name, size in sizes.items()}

    def _write_ref(self, commit: str) -> None:
        """Note the commit of the revision, as huggingface_hub does for a revision that it resolves itself."""
        revision = self.revision or constants.DEFAULT_REVISION
        ref = self._cache / "refs" / revision
        if revision != commit:
            with suppress(OSError):  # the download reports a cache that cannot be written
                ref.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(ref) as file:
                    file.write(commit.encode())

    @property
    def _cache(self) -> Path:
        return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self.repo_id, repo_type="model"))

    def _streamable(self, files: Mapping[str, RepoSibling], chosen: Sequence[str], commit: str) -> tuple[str, ...]:
        """The weight files that are to be read by ranges: all of them, or none if the cache has them already.

        With access `auto`, they are streamed if those that are absent do not fit on the disk.
        """
        weights = tuple(name for name in chosen if name.endswith(SAFETENSORS_ENDING))
        absent = [name for name in weights if not self._is_cached(name, commit)]
        if self.access is Access.STREAM and (pickles := [name for name in chosen if name.endswith(".bin")]):
            raise ResolveError(
                f"{self.what} has pickled weights only ({shown(pickles[0])}), which cannot be streamed",
                hint="set access: download, or use a revision with safetensors weights",
            )
        if self.access is Access.DOWNLOAD or not absent:
            return ()
        if self.access is Access.AUTO:
            size_bytes, free_bytes = (
                sum(files[name].size or 0 for name in absent),
                free_disk_bytes(constants.HF_HUB_CACHE),
            )
            if free_bytes is None or size_bytes <= free_bytes - SPARE_DISK_BYTES:
                return ()
            self.notify(
                f"{self.what}: {_shown_bytes(size_bytes)} do not fit on the disk, which has {_shown_bytes(free_bytes)} "
                "free: they are streamed"
            )
        return weights

    def _fetch_first(self, file: RepoSibling, commit: str) -> Path:
        """Fetch a file that the choice depends on."""
        is_new = not self._is_cached(file.rfilename, commit)
        max_sizes = self._max_sizes({file.rfilename: file}, (file.rfilename,), commit)
        path = Path(self._ask(lambda: self._download(commit, (file.rfilename,)), max_sizes), file.rfilename)
        if not path.exists():
            raise incomplete(self.what, (file.rfilename,))
        if is_new:
            self._compare(path, file)
        return path

    def _from_cache(self, choose: Choose) -> Fetched:
        directory = self._ask(lambda: self._download(self.revision, (), local_files_only=True))
        commit = self._commit(os.path.relpath(os.path.realpath(directory), os.path.realpath(self._cache / "snapshots")))
        listing = self._cached_listing(commit)
        paths = (Path(place, file) for place, _, files in os.walk(directory) for file in files)  # broken links count
        names = frozenset(path.relative_to(directory).as_posix() for path in paths) | (listing or frozenset())

        def cached(name: str) -> Path:
            path = Path(directory, name)
            if not path.exists():
                raise incomplete(self.what, (name,))
            return path

        chosen = choose(names, cached)
        self._refuse_incomplete(directory, chosen)
        return Fetched(
            repo_id=self.repo_id,
            commit=Path(directory).name,
            directory=directory,
            sizes={},
            chosen=chosen,
            withheld=tuple(sorted(names - set(chosen))),
            is_listed=listing is not None,
        )

    def _refuse_incomplete(self, directory: str, chosen: tuple[str, ...]) -> None:
        """Check that all files have arrived: huggingface_hub returns a partial snapshot if a request fails."""
        if absent := [name for name in chosen if not Path(directory, name).exists()]:
            raise incomplete(self.what, absent)

    def _is_cached(self, name: str, commit: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(self.repo_id, name, revision=commit), str)

    def _compare(self, path: Path, listed: RepoSibling) -> None:
        """Compare a file with its listed digest: SHA-256 for Git LFS, a blob's SHA-1 for git, none on some mirrors."""
        if listed.lfs is not None:
            kind, expected = "SHA-256", listed.lfs.sha256
            with path.open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
        elif listed.blob_id is not None:
            kind, expected = "SHA-1 in git", listed.blob_id
            content = path.read_bytes()
            got = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        else:
            return
        if got == expected:
            return
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise ResolveError(
            f"{shown(listed.rfilename)} of {self.what} arrived with other bytes than {host()} lists: its {kind} is "
            f"{got[:_DIGEST_CHARACTERS]}…, expected {shown(expected)[:_DIGEST_CHARACTERS]}…; it was removed from the "
            "cache",
            hint="run again; if it happens again, check HF_ENDPOINT and any proxy, which may change files",
        )

    def _cached_listing(self, commit: str) -> frozenset[str] | None:
        """The repository's files at the last download; None without a list in the cache (huggingface_hub 1)."""
        if not hasattr(huggingface_hub, "get_cached_repo_tree"):
            return None
        try:
            tree = huggingface_hub.get_cached_repo_tree(self.repo_id, revision=commit)
            return frozenset(file.path for file in tree if is_inside(file.path))
        except errors.CachedRepoTreeNotFoundError:
            return None

    def _download(self, revision: str | None, names: Sequence[str], *, local_files_only: bool = False) -> str:
        xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True  # its requests have no limits
        try:
            return snapshot_download(
                self.repo_id,
                revision=revision,
                allow_patterns=[glob.escape(n) for n in names],
                local_files_only=local_files_only,
                library_name=AGENT,
                library_version=__version__,
            )
        finally:
            constants.HF_HUB_DISABLE_XET = xet

    def _ask(self, request: Callable[[], T], max_sizes: Mapping[str, int] | None = None) -> T:
        """Call `request`. With `max_sizes` it is a download."""

        def wait(pause_s: float, refused: ResolveError) -> None:
            self.notify(f"{refused.message}; trying again in {pause_s:.0f} s")
            time.sleep(pause_s)

        return ask(request, f"{self.what} is not a directory here, and", PAUSES_S, wait, max_sizes)

    @property
    def what(self) -> str:
        return (
            shown(self.repo_id) if self.revision is None else f"{shown(self.repo_id)} (revision {shown(self.revision)})"
        )


def incomplete(what: str, absent: Sequence[str]) -> ResolveError:
    """The error for a cache that lacks files of a snapshot."""
    return ResolveError(
        f"the cache holds only a part of {what}: {', '.join(absent[:_LISTED])} is missing",
        hint="run once with network access (HF_HUB_OFFLINE unset) and the same cache to complete it",
    )


def _set_up_library() -> None:
    """Disable progress bars, which break the gate's own view, and set a timeout. The variables for both win.

    Without telemetry, huggingface_hub requests no list of coding agents, and does not name torch's version.
    """
    constants.HF_HUB_DISABLE_TELEMETRY = True
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = _DOWNLOAD_TIMEOUT_S


def free_disk_bytes(directory: str) -> int | None:
    """The free space on the disk of a directory that may not exist yet."""
    places = (Path(directory), *Path(directory).parents)
    with suppress(OSError, StopIteration):
        return shutil.disk_usage(next(place for place in places if place.exists())).free
    return None


def _shown_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"  # noqa: PLR2004


# --- errors --------------------------------------------------------------------------------------------------------


def host() -> str:
    """The Hub's host name alone: HF_ENDPOINT may contain credentials."""
    return urlsplit(constants.ENDPOINT).hostname or "the Hub"


def translate(error: Exception, opening: str) -> ResolveError | None:
    """Translate an error of huggingface_hub, its HTTP client (httpx, httpx2), or the disk; None for any other error.

    `opening` begins the message: what was to be fetched.
    """
    links = _chain(error)
    for applies, message, hint in _ROWS:
        for link in filter(applies, links):
            facts = {"host": host(), "cache": constants.HF_HUB_CACHE, "status": _status(link), "why": _why(link)}
            return ResolveError(f"{opening} {message.format(**facts)}", hint=hint)
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
            if pause_s is None or not _is_transient(error, transport=sizes is None or isinstance(error, ConnectError)):
                raise refused from error
            wait(max(pause_s, min(_retry_after_s(error), _LONGEST_PAUSE_S)), refused)


def _is_transient(error: Exception, *, transport: bool) -> bool:
    """Whether the same request may succeed later. `transport`: whether a lost connection counts."""
    links = _chain(error)
    statuses = [status for link in links if (status := _status(link)) is not None]
    is_transient = any(code in {408, 429} or code >= _SERVER_ERROR for code in statuses)
    is_transient = is_transient or any(map(_is_incomplete, links)) or (transport and any(map(is_transport, links)))
    return is_transient and not any(map(_is_distrust, links))


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


_is_distrust = _is(ssl.SSLCertVerificationError)


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
_ROWS: tuple[tuple[Callable[[BaseException], bool], str, str], ...] = (
    (_is_distrust, "the certificate of {host}, or of a proxy, is not trusted: {why}",
     "set SSL_CERT_FILE to the file of your company's certificate authorities"),
    (_of_the_disk(_DISK_FULL), "the disk is full: it does not fit into the cache ({cache})",
     "free space, or point HF_HOME at a larger disk"),
    (_of_the_disk(_NOT_WRITABLE), "the cache ({cache}) cannot be written: {why}",
     "point HF_HOME at a directory that the user who runs the gate may write to"),
    (_is(errors.HFValidationError), "it is not a valid Hub id (owner/name)",
     "check the spelling; relative paths start at the config file's directory"),
    (_is(errors.GatedRepoError), "it is gated: {host} does not give its files to this token, or needs a token",
     f"accept its terms on its page with the token's account, and {_SET_TOKEN}"),
    (_is(errors.RevisionNotFoundError), "it exists on {host}, but not that revision",
     "name a branch, a tag or a commit of the repository; without a revision, its main branch is used"),
    (_is(errors.RepositoryNotFoundError),
     "it was not found on {host}: it does not exist, or it is private and this token has no access",
     f"check the spelling: {_PATHS}, and a Hub id is owner/name; if it is private: {_SET_TOKEN}"),
    (_is(errors.DisabledRepoError), "it was disabled by {host}", "use another copy of it"),
    (_has_status(401), "{host} rejected the token (401)",
     "the token is wrong or has expired: set HF_TOKEN to a valid one, or unset it for public repositories"),
    (_has_status(403), "{host} does not allow this token to read it (403)",
     f"{_SET_TOKEN}; a fine-grained token needs read access to this repository"),
    (_has_status(429), "{host} limits the rate of requests (429)",
     "set HF_TOKEN (tokens have higher limits), or wait and run again; a persistent cache needs fewer requests"),
    (lambda error: (_status(error) or 0) >= _SERVER_ERROR, "{host} failed ({status})",
     "run again later; with a filled cache, HF_HUB_OFFLINE=1 needs no Hub"),
    (lambda error: _status(error) is not None, "{host} refused the request for it ({status})", CHECK_ENDPOINT),
    (_is_transport_with("timeout"), "{host} did not answer in time",
     "run again; for a slow connection, raise HF_HUB_DOWNLOAD_TIMEOUT (seconds, at most 60)"),
    (_is_transport_with("protocol"), "the connection to {host} was lost repeatedly",
     "run again: the files that have arrived are kept; check any proxy"),
    (is_transport, "{host} cannot be reached ({why})",
     "check the network and any proxy; with a filled cache, HF_HUB_OFFLINE=1 needs no network"),
    (_is_offline, "it is not in the cache, and HF_HUB_OFFLINE forbids requests to {host}",
     (f"for a directory, check the spelling: {_PATHS}; for a Hub id, fill the cache with one run that has network "
      "access, or unset HF_HUB_OFFLINE")),
    (_is(json.JSONDecodeError, TypeError, KeyError), "{host} sent an unexpected response", CHECK_ENDPOINT),
    (_is(errors.FileMetadataError, errors.EntryNotFoundError), "{host} did not deliver the files that it lists",
     CHECK_ENDPOINT),
    (lambda error: isinstance(error, ValueError) and "too large" in str(error),
     "it has a file that is too large for a download over HTTP",
     "set access: stream"),
    (_is_incomplete, "it arrived incomplete from {host}", "run again; check any proxy"),
    (_is(OSError), "it cannot be fetched into the cache ({cache}): {why}", ""),
)
# fmt: on
"""Kinds of errors: which one, the message, and the hint. `{host}`, `{cache}`, `{status}` and `{why}` are filled in.

The first row that applies to the error or to one of its causes is used.
"""
