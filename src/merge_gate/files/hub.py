"""The Hugging Face Hub: a repository and a revision into files in the cache, pinned to a commit.

In: a Hub id, a revision, and a function that chooses from the repository's file names. Out: `Fetched`, or a
`ResolveError` with what to do. Knows nothing of adapters and bases. With hub_errors.py the only module that imports
huggingface_hub.

1. One request turns the revision into a commit and lists the repository's files.
2. The caller chooses from the list. A file that it must read for that, such as an index, is fetched first.
3. These files are fetched at that commit: whatever moves in the repository meanwhile changes nothing.
4. What has arrived is compared with the digests that the Hub lists; other bytes leave the cache.

Offline (HF_HUB_OFFLINE=1) the cache's own refs and listings answer instead of the Hub.

The token comes from where huggingface_hub looks for it (HF_TOKEN, the file that `hf auth login` writes).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from merge_gate.errors import ResolveError
from merge_gate.files import hub_errors
from merge_gate.files.headers import shown
from merge_gate.files.hub_errors import CHECK_ENDPOINT, host, translate
from merge_gate.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from huggingface_hub.hf_api import RepoSibling

    Choose = Callable[[frozenset[str], Callable[[str], Path]], tuple[str, ...]]

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
            hint="name a branch, a tag or a commit",
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
            raise ResolveError(f"{host()} answered without a commit for {self.what}", hint=CHECK_ENDPOINT)
        files = {file.rfilename: file for file in info.siblings or ()}
        # 2. What is needed of it.
        names = frozenset(files)
        wanted = choose(names, lambda name: self._fetch_first(files[name], commit))
        new = [name for name in wanted if not self._is_cached(name, commit)]
        # 3. Fetch at that commit. The first call leaves the revision's ref in the cache, for offline runs; where the
        #    revision has moved on since step 1, the second goes back to the commit.
        total_bytes = sum(files[name].size or 0 for name in wanted)
        self.notify(
            f"fetching {self.what} at {commit[:12]}: {counted(len(wanted), 'file')}, {_shown_bytes(total_bytes)}"
        )
        directory = self._ask(lambda: self._download(self.revision, wanted), is_patient=True)
        if Path(directory).name != commit:
            directory = self._ask(lambda: self._download(commit, wanted), is_patient=True)
        fetched = self._check(directory, wanted, withheld=names - set(wanted))
        # 4. The bytes are those that the Hub lists.
        for name in new:
            self._compare(Path(directory, name), files[name])
        return fetched

    def _fetch_first(self, file: RepoSibling, commit: str) -> Path:
        """One file that the choice depends on."""
        is_new = not self._is_cached(file.rfilename, commit)
        path = Path(self._ask(lambda: self._download(commit, (file.rfilename,)), is_patient=True), file.rfilename)
        if not path.exists():
            raise incomplete(self.what, (file.rfilename,))
        if is_new:
            self._compare(path, file)
        return path

    def from_cache(self, choose: Choose) -> Fetched:
        directory = self._ask(lambda: self._download(self.revision, (), local_files_only=True))
        listing = self._cached_listing(commit=Path(directory).name)
        names = _files_below(directory) | (listing or frozenset())

        def cached(name: str) -> Path:
            path = Path(directory, name)
            if not path.exists():
                raise incomplete(self.what, (name,))
            return path

        wanted = choose(names, cached)
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
            f"{shown(listed.rfilename)} of {self.what} arrived with other bytes than {host()} lists: its {kind} is "
            f"{got[:_DIGEST_SHOWN]}…, expected {shown(expected)[:_DIGEST_SHOWN]}…; it was removed from the cache",
            hint="run again; if it stays so, something in between changes it: check HF_ENDPOINT, and any proxy",
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
        pauses = iter(PAUSES_S)
        while True:
            try:
                return request()
            except Exception as error:
                translated = translate(error, self.what)
                if translated is None:
                    raise
                wait_s = _pause(error, next(pauses, None), is_patient=is_patient)
                if wait_s is None:
                    raise translated from error
                self.notify(f"{translated.message}; trying again in {wait_s:.0f} s")
                time.sleep(wait_s)

    @property
    def what(self) -> str:
        return (
            shown(self.repo_id) if self.revision is None else f"{shown(self.repo_id)} (revision {shown(self.revision)})"
        )


def _files_below(directory: str) -> frozenset[str]:
    """Files of a snapshot and of its folders; a link to nothing counts, since the repository has that file."""
    found = (Path(place, file) for place, _, files in os.walk(directory) for file in files)
    return frozenset(path.relative_to(directory).as_posix() for path in found)


def incomplete(what: str, absent: Sequence[str]) -> ResolveError:
    """The error for a cache that lacks files of a snapshot."""
    return ResolveError(
        f"the cache holds {what} in part: {', '.join(absent[:_LISTED])} is not there",
        hint="run once with network access (HF_HUB_OFFLINE unset) and the same cache to complete it",
    )


def _set_up_library() -> None:
    """The gate has its own view, which bars would break, and its own patience. What a variable says stays."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = _DOWNLOAD_TIMEOUT_S


def _shown_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"  # noqa: PLR2004


def _pause(error: Exception, pause_s: float | None, *, is_patient: bool) -> float | None:
    """Seconds to wait before asking again, None when there is no point or no try left."""
    if pause_s is None or not hub_errors.is_passing(error, transport=not is_patient):
        return None
    return max(pause_s, min(hub_errors.retry_after_s(error), _LONGEST_PAUSE_S))
