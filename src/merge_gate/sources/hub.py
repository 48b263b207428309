"""The Hugging Face Hub: a repository and a revision into files in the cache, pinned to a commit.

In: a Hub id, a revision, and a function that chooses from the repository's file names. Out: `Fetched`, or a
`ResolveError` with what to do. Knows nothing of adapters and bases. The only module that imports huggingface_hub.

1. One request turns the revision into a commit and lists the repository's files.
2. The caller chooses from the list.
3. These files are fetched at that commit: whatever moves in the repository meanwhile changes nothing.
4. What has arrived is compared with the digests that the Hub lists; other bytes leave the cache.

Offline (HF_HUB_OFFLINE=1) the cache's own refs and listings answer instead of the Hub.

The token comes from where huggingface_hub looks for it (HF_TOKEN, the file that `hf auth login` writes). Messages are
written here and quote neither requests nor headers, so that they cannot hold it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from merge_gate.errors import ResolveError
from merge_gate.sources.headers import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from huggingface_hub.hf_api import RepoSibling

    Choose = Callable[[frozenset[str]], tuple[str, ...]]

T = TypeVar("T")

PAUSES_S = (1.0, 4.0)
"""Waits before the second and the third try of a request that failed for a passing reason."""

_LONGEST_PAUSE_S = 60.0
_REQUEST_TIMEOUT_S = 10.0
_DOWNLOAD_TIMEOUT_S = 8
"""Without a byte; huggingface_hub asks six times before it gives up, which so takes less than a minute."""

_LISTED = 6
_DIGEST_SHOWN = 16
_REVISION = re.compile(r"(?!.*\.\.)[^\s/\\\x00-\x1f~^:?*\[][^\s\\\x00-\x1f~^:?*\[]*", re.ASCII)
"""What git allows as the name of a ref; it becomes part of a path in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A snapshot in the cache. `withheld` are the repository's files that were not chosen (with their folders).

    `is_listed` False: the repository could not be asked what it holds, and the cache does not say either.
    """

    directory: str
    commit: str
    withheld: tuple[str, ...]
    is_listed: bool = True


def fetch(
    repo_id: str, revision: str | None, choose: Choose, *, token: str | None, notify: Callable[[str], None]
) -> Fetched:
    """Fetch what `choose` picks from the names of the repository's files; all of it is there when this returns."""
    _set_up_library()
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ResolveError(
            f"{shown(revision)} is not the name of a revision of {shown(repo_id)}",
            hint="Name a branch, a tag or a commit.",
        )
    repository = _Repository(repo_id=repo_id, revision=revision, token=token, notify=notify)
    return repository.from_cache(choose) if constants.HF_HUB_OFFLINE else repository.from_network(choose)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    """One repository at one revision. Every exception that leaves its methods is a `ResolveError`."""

    repo_id: str
    revision: str | None
    token: str | None
    notify: Callable[[str], None]

    def from_network(self, choose: Choose) -> Fetched:
        # 1. The commit, and what it holds.
        api = HfApi(token=self.token, library_name="merge-gate")
        info = self._ask(
            lambda: api.model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=_REQUEST_TIMEOUT_S
            )
        )
        commit = info.sha
        if not commit:
            raise ResolveError(f"{_host()} answered without a commit for {self.what}", hint=_CHECK_ENDPOINT)
        files = {file.rfilename: file for file in info.siblings or ()}
        # 2. What is needed of it.
        names = frozenset(files)
        wanted = choose(names)
        new = [name for name in wanted if not self._is_cached(name, commit)]
        # 3. Fetch at that commit. The first call leaves the revision's ref in the cache, for offline runs; where the
        #    revision has moved on since step 1, the second goes back to the commit.
        total_bytes = sum(files[name].size or 0 for name in wanted)
        self.notify(f"fetching {self.what} at {commit[:12]}: {len(wanted)} files, {_shown_bytes(total_bytes)}")
        directory = self._ask(lambda: self._download(self.revision, wanted), is_patient=True)
        if Path(directory).name != commit:
            directory = self._ask(lambda: self._download(commit, wanted), is_patient=True)
        fetched = self._check(directory, wanted, withheld=names - set(wanted))
        # 4. The bytes are those that the Hub lists.
        for name in new:
            self._compare(Path(directory, name), files[name])
        return fetched

    def from_cache(self, choose: Choose) -> Fetched:
        directory = self._ask(lambda: self._download(self.revision, (), local_files_only=True))
        listing = self._cached_listing(commit=Path(directory).name)
        names = frozenset(path.name for path in Path(directory).iterdir()) | (listing or frozenset())
        wanted = choose(names)
        return self._check(directory, wanted, withheld=names - set(wanted), is_listed=listing is not None)

    def _check(
        self, directory: str, wanted: Sequence[str], *, withheld: Iterable[str], is_listed: bool = True
    ) -> Fetched:
        """What was wanted must be there: huggingface_hub returns a snapshot in part when a request fails."""
        if absent := [name for name in wanted if not Path(directory, name).exists()]:
            raise incomplete(self.what, absent)
        commit = Path(directory).name
        return Fetched(directory=directory, commit=commit, withheld=tuple(sorted(withheld)), is_listed=is_listed)

    def _is_cached(self, name: str, commit: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(self.repo_id, name, revision=commit), str)

    def _compare(self, path: Path, listed: RepoSibling) -> None:
        """Git LFS lists the SHA-256 of the content, git the SHA-1 of a blob; a mirror may list neither."""
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
            f"{shown(listed.rfilename)} of {self.what} arrived with other bytes than {_host()} lists: its {kind} is "
            f"{got[:_DIGEST_SHOWN]}…, expected {shown(expected)[:_DIGEST_SHOWN]}…; it was removed from the cache",
            hint="Run again. If it stays so, something in between changes it: check HF_ENDPOINT, and any proxy.",
        )

    def _cached_listing(self, commit: str) -> frozenset[str] | None:
        """The repository's files as the last download saw them; None where huggingface_hub 1 kept no list."""
        if not hasattr(huggingface_hub, "get_cached_repo_tree"):
            return None
        try:
            return frozenset(file.path for file in huggingface_hub.get_cached_repo_tree(self.repo_id, revision=commit))
        except errors.CachedRepoTreeNotFoundError:
            return None

    def _download(self, revision: str | None, names: Sequence[str], *, local_files_only: bool = False) -> str:
        return snapshot_download(
            self.repo_id,
            revision=revision,
            allow_patterns=[glob.escape(n) for n in names],
            local_files_only=local_files_only,
            token=self.token,
            library_name="merge-gate",
        )

    def _ask(self, request: Callable[[], T], *, is_patient: bool = False) -> T:
        """`request()`, tried again after passing failures, its errors translated.

        `is_patient`: it has tried lost connections and silence again by itself, where the file broke off.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return request()
            except Exception as error:
                translated = translate(error, self.what)
                if translated is None:
                    raise
                wait_s = _pause(error, pause_s, is_patient=is_patient)
                if wait_s is None:
                    raise translated from error
                self.notify(f"{translated.message}; trying again in {wait_s:.0f} s")
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    @property
    def what(self) -> str:
        return (
            shown(self.repo_id) if self.revision is None else f"{shown(self.repo_id)} (revision {shown(self.revision)})"
        )


def incomplete(what: str, absent: Sequence[str]) -> ResolveError:
    """The error for a cache that lacks files of a snapshot."""
    return ResolveError(
        f"the cache holds {what} in part: {', '.join(absent[:_LISTED])} is not there",
        hint="Run once with network access (HF_HUB_OFFLINE unset) and the same cache to complete it.",
    )


def _set_up_library() -> None:
    """The gate has its own view, which bars would break, and its own patience. What a variable says stays."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = _DOWNLOAD_TIMEOUT_S


def _shown_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"  # noqa: PLR2004


def _host() -> str:
    """The Hub's host name; HF_ENDPOINT may carry credentials, which must not be shown."""
    return urlsplit(constants.ENDPOINT).hostname or "the Hub"


# --- huggingface_hub's errors --------------------------------------------------------------------------------------

_CHECK_ENDPOINT = "Check HF_ENDPOINT, and any proxy in between."
_SET_TOKEN = "Set HF_TOKEN to a token that may read it (in a workflow: the hf-token input)"  # noqa: S105
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_SERVER_ERROR = 500


def _chain(error: BaseException) -> tuple[BaseException, ...]:
    """The error and what it was raised from: huggingface_hub wraps a lost connection in "not in the cache"."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return tuple(chain)


def translate(error: Exception, what: str) -> ResolveError | None:
    """The sentence for an error of huggingface_hub, of its HTTP client (httpx, httpx2) or of the disk; else None."""
    if isinstance(error, ResolveError):
        return error
    chain = _chain(error)
    for translate in (
        _translate_certificate,
        _translate_disk,
        _translate_repository,
        _translate_status,
        _translate_transport,
        _translate_cache,
        _translate_answer,
    ):
        for link in chain:
            if translated := translate(link, what):
                return translated
    return None


def _translate_certificate(error: BaseException, what: str) -> ResolveError | None:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return None
    return ResolveError(
        f"the certificate of {_host()}, or of a proxy before it, is not trusted: {error.verify_message}; "
        f"{what} was not fetched",
        hint="name the file of your company's certificate authorities in SSL_CERT_FILE",
    )


def _translate_disk(error: BaseException, what: str) -> ResolveError | None:
    """An error of TLS is an OSError too, with numbers of its own."""
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    if number in _DISK_FULL:
        return ResolveError(
            f"the disk is full: {what} does not fit into the cache ({constants.HF_HUB_CACHE})",
            hint="Free space, or point HF_HOME at a larger disk.",
        )
    if number in _NOT_WRITABLE:
        return ResolveError(
            f"the cache ({constants.HF_HUB_CACHE}) cannot be written for {what}: {os.strerror(number or 0)}",
            hint="Point HF_HOME at a directory that the user who runs the gate may write to.",
        )
    return None


def _translate_repository(error: BaseException, what: str) -> ResolveError | None:

    if isinstance(error, errors.HFValidationError):
        return ResolveError(
            f"{what} is neither an existing directory nor a valid Hub id (owner/name)",
            hint="Check the spelling; relative paths start at the config file's directory.",
        )
    if isinstance(error, errors.GatedRepoError):
        return ResolveError(
            f"{what} is gated: {_host()} does not give its files to this token, or to no token",
            hint=f"Accept its terms on its page with the token's account. {_SET_TOKEN}.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ResolveError(
            f"{what} exists on {_host()}, but not that revision",
            hint="Name a branch, a tag or a commit that the repository has; without one, its main branch is used.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ResolveError(
            f"{what} was not found on {_host()}: it does not exist, or it is private and this token may not see it",
            hint=f"Check the spelling. If it is private: {_SET_TOKEN[0].lower()}{_SET_TOKEN[1:]}.",
        )
    if isinstance(error, errors.DisabledRepoError):
        return ResolveError(f"{what} was disabled by {_host()}", hint="Use another copy of it.")
    return None


def _translate_status(error: BaseException, what: str) -> ResolveError | None:
    status = _status(error)
    if status is None:
        return None
    if status == 401:  # noqa: PLR2004
        return ResolveError(
            f"{_host()} rejected the token for {what} (401)",
            hint="The token is wrong or has expired: set HF_TOKEN to a valid one, or unset it for public repositories.",
        )
    if status == 403:  # noqa: PLR2004
        return ResolveError(
            f"{_host()} does not allow this token to read {what} (403)",
            hint=f"{_SET_TOKEN}; a fine-grained token needs read access to this repository.",
        )
    if status == 429:  # noqa: PLR2004
        return ResolveError(
            f"{_host()} limits the rate of requests (429) while asking for {what}",
            hint="Set HF_TOKEN (tokens have higher limits), or wait and run again; a kept cache needs fewer requests.",
        )
    if status >= _SERVER_ERROR:
        return ResolveError(
            f"{_host()} failed ({status}) while asking for {what}",
            hint="Run again later; with a filled cache, HF_HUB_OFFLINE=1 needs no Hub.",
        )
    return ResolveError(f"{_host()} refused the request for {what} ({status})", hint=_CHECK_ENDPOINT)


def _status(error: BaseException) -> int | None:

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status: int = error.response.status_code
    return status


def _translate_transport(error: BaseException, what: str) -> ResolveError | None:
    if not _is_transport(error):
        return None
    if "timeout" in type(error).__name__.lower():
        return ResolveError(
            f"{_host()} did not answer in time for {what}",
            hint="Run again; a slow line may need a longer HF_HUB_DOWNLOAD_TIMEOUT (seconds).",
        )
    if "Protocol" in type(error).__name__:
        return ResolveError(
            f"the connection to {_host()} broke off again and again while {what} was fetched",
            hint="Run again: what has arrived is kept, and the rest is asked for. Check any proxy in between.",
        )
    return ResolveError(
        f"{_host()} cannot be reached to fetch {what} ({type(error).__name__})",
        hint="Check the network and any proxy; with a filled cache, HF_HUB_OFFLINE=1 needs no network.",
    )


def _is_transport(error: BaseException) -> bool:
    """Whether the connection failed: by name, since huggingface_hub 1 speaks through httpx and 2 through httpx2."""
    names = {cls.__name__ for cls in type(error).__mro__}
    failures = {"TransportError", "ConnectionError", "TimeoutError", "SSLError"}
    return "OfflineModeIsEnabled" not in names and bool(names & failures)


def _is_incomplete(error: BaseException) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _translate_cache(error: BaseException, what: str) -> ResolveError | None:
    if constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return ResolveError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to ask {_host()}",
            hint="Fill the cache by one run with network access, or unset HF_HUB_OFFLINE.",
        )
    return None


def _translate_answer(error: BaseException, what: str) -> ResolveError | None:
    """What a server says that is no Hub, a broken proxy, or whatever else the file system has to say."""
    if isinstance(error, json.JSONDecodeError | TypeError | KeyError):
        return ResolveError(f"{_host()} did not answer as a Hub does when asked for {what}", hint=_CHECK_ENDPOINT)
    if isinstance(error, errors.FileMetadataError | errors.EntryNotFoundError):
        return ResolveError(f"{_host()} did not deliver the files that it lists for {what}", hint=_CHECK_ENDPOINT)
    if _is_incomplete(error):
        return ResolveError(f"{what} arrived incomplete from {_host()}", hint="Run again; check any proxy in between.")
    if isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
        return ResolveError(f"{what} cannot be fetched into the cache ({constants.HF_HUB_CACHE}): {reason}")
    return None


def _pause(error: Exception, pause_s: float | None, *, is_patient: bool) -> float | None:
    """Seconds to wait before asking again, None when there is no point or no try left."""
    chain = _chain(error)
    statuses = [status for link in chain if (status := _status(link)) is not None]
    is_passing = any(s in {408, 429} or s >= _SERVER_ERROR for s in statuses) or any(map(_is_incomplete, chain))
    is_passing = is_passing or (any(map(_is_transport, chain)) and not is_patient)
    is_distrust = any(isinstance(link, ssl.SSLCertVerificationError) for link in chain)
    if pause_s is None or not is_passing or is_distrust:
        return None
    return max(pause_s, min(_retry_after(chain), _LONGEST_PAUSE_S))


def _retry_after(chain: Iterable[BaseException]) -> float:
    headers = (link.response.headers for link in chain if _status(link) is not None)  # type: ignore[attr-defined]
    return max((float(value) for h in headers if (value := h.get("Retry-After", "")).isdecimal()), default=0.0)
