"""Watches the bases of a run: hashes each one in a thread, and names the verdicts that are void because a base changed.

In: directories of bases, and the identity of the files that each base was loaded from. Out: the SHA-256 of each base
and of its weight files, or None if it could not be computed. At the end: the
entries whose base is not the one that was hashed and loaded.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge_gate.files import resolve
from merge_gate.files.identity import base_identity
from merge_gate.files.json_object import read_as_transformers
from merge_gate.limits.timeout import ANSWER_TIMEOUT_S, within
from merge_gate.records.config import ALL_WEIGHTS
from merge_gate.records.files import BaseContent, Entry, FileIdentity, HashedFile

_Identity = tuple[FileIdentity, ...]

SILENCE_TIMEOUT_S = 120.0
"""How long the file system may take to give the next bytes of a base that is hashed, before no one waits for them."""

_ASKED_EVERY_S = 1.0


class RememberedDigests(Protocol):
    """Digests that earlier runs computed, of files that cannot have changed since."""

    def lookup(self, directory: str, identity: tuple[FileIdentity, ...]) -> Mapping[str, str] | None:
        """The digests of the weight files in `directory`, if its files still have this identity."""

    def store(
        self, directory: str, identity: tuple[FileIdentity, ...], digests: Mapping[str, str], began_ns: int
    ) -> None:
        """Remember the digests. Hashing began at `began_ns`, when the files had this identity."""


@dataclass(frozen=True)
class _Digests:
    """The digests of a base: of each weight file, by name, and of the settings; None if these have no digest."""

    files: Mapping[str, str]
    settings: str | None

    @property
    def weights(self) -> str:
        return resolve.digest_of_digests(self.files)


class BaseWatch:
    """The bases of one run, by directory. Each is hashed once, while the worker imports, loads, and merges.

    For a plan, no base is hashed: only the digests that earlier runs computed are known, which are `remembered`.
    """

    def __init__(self, *, is_plan: bool = False, silence_timeout_s: float = SILENCE_TIMEOUT_S) -> None:
        self._is_plan, self._silence_timeout_s = is_plan, silence_timeout_s
        self.remembered: RememberedDigests | None = None  # set by the feature that remembers them
        self._threads: dict[str, threading.Thread] = {}
        self._heard_s: dict[str, float] = {}  # when a thread asked for the next bytes
        self._hashed: dict[str, _Identity] = {}
        self._digests: dict[str, _Digests] = {}
        self._listed: dict[str, _Digests] = {}
        self._loads: dict[int, tuple[str, set[_Identity]]] = {}
        self._read_whole: set[str] = set()
        self._silent: set[str] = set()
        self._again: set[str] = set()

    # --- digests ---------------------------------------------------------------------------------------------------

    def start(self, directory: str) -> None:
        """Start to hash the base in `directory`, unless it was started before."""
        if self._is_plan:
            self.recall(directory)
        elif directory not in self._threads and directory not in self._digests and directory not in self._listed:
            thread = threading.Thread(target=self._hash, args=(directory,), daemon=True)
            self._heard_s[directory] = time.monotonic()
            with contextlib.suppress(RuntimeError):  # no thread is available: the report lacks this digest
                thread.start()
                self._threads[directory] = thread

    def hash_again(self, directory: str) -> None:
        """Believe no digest of an earlier run: this one is compared with a pin, or published."""
        self._again.add(directory)

    def recall(self, directory: str) -> None:
        """Take a digest that an earlier run computed, if the files cannot have changed since. Reads no weights."""
        if self.remembered is None or directory in self._again | self._threads.keys() | self._digests.keys():
            return
        with contextlib.suppress(OSError):  # the worker reads the same files, and reports what is wrong with them
            identity = within(ANSWER_TIMEOUT_S, lambda: base_identity(directory))
            files = self.remembered.lookup(directory, identity)
            if files is not None:
                settings = within(ANSWER_TIMEOUT_S, lambda: _settings_digest(directory))
                self._hashed[directory] = identity
                self._digests[directory] = _Digests(files, settings)

    def listed(self, directory: str, identity: _Identity, sha256: Mapping[str, str]) -> None:
        """The Hub lists these digests of the weight files of a base that is streamed; `identity` is that of its stubs.

        The base has no digest of its own until all of its bytes have passed.
        """
        self._hashed[directory] = identity
        self._listed[directory] = _Digests(_weight_digests(directory, sha256), _settings_digest(directory))

    def read_whole(self, directory: str, identity: _Identity, sha256: Mapping[str, str]) -> None:
        """All bytes of a base's weight files passed through this process, with these digests.

        Other digests than the Hub lists do not count.
        """
        if directory in self._read_whole:
            return
        with contextlib.suppress(Exception):  # then the base is hashed
            files = _weight_digests(directory, sha256)
            if directory in self._listed and files != self._listed[directory].files:
                return
            self._read_whole.add(directory)
            self._hashed.setdefault(directory, identity)
            self._digests.setdefault(directory, _Digests(files, _settings_digest(directory)))

    def is_only_listed(self, directory: str) -> bool:
        """Whether the Hub lists the digests of a base, and not all of its bytes have passed through this process."""
        return directory in self._listed and directory not in self._read_whole

    def wait(self) -> None:
        """Wait until every base that was started is hashed. One whose mount gives no more bytes has no digest."""
        for directory, thread in self._threads.items():
            while thread.is_alive() and time.monotonic() - self._heard_s[directory] < self._silence_timeout_s:
                thread.join(_ASKED_EVERY_S)

    @property
    def is_hashing(self) -> bool:
        return any(thread.is_alive() for thread in self._threads.values())

    def digest(self, directory: str) -> str | None:
        """The digest of the weights, if it is known by now."""
        return self._digests[directory].weights if directory in self._digests else None

    def files(self, directory: str) -> tuple[HashedFile, ...]:
        """The weight files with their sizes and digests, by name; empty if they are not known by now."""
        if directory not in self._digests:
            return ()
        sizes = {file.name: file.size_bytes for file in self._hashed[directory]}
        return tuple(
            HashedFile(path=name, size_bytes=sizes[name], sha256=digest)
            for name, digest in sorted(self._digests[directory].files.items())
            if name in sizes
        )

    def identity(self, directory: str) -> tuple[FileIdentity, ...]:
        """The files of a base that was hashed, as they were then."""
        return self._hashed.get(directory, ())

    def pinned(self, directory: str, names: Iterable[str]) -> dict[str, str] | None:
        """The digests of these files, as far as they exist, and of all weights; None if the weights have none.

        The digests that the Hub lists of a streamed base count: its bytes are compared with them when they pass.
        """
        known = self._digests.get(directory) or self._listed.get(directory)
        if known is None:
            return None
        others = [name for name in names if name not in known.files and Path(directory, name).is_file()]
        return {ALL_WEIGHTS: known.weights, **known.files, **resolve.digest_files(directory, others)}

    def content(self, directory: str) -> BaseContent | None:
        """The digests of all that the base contains; None if one is missing, or if the files have changed since."""
        known = self._digests.get(directory) or self._listed.get(directory)
        if known is None or known.settings is None or not self._is_as_hashed(directory):
            return None
        return BaseContent(weights=known.weights, settings=known.settings)

    # --- changes ---------------------------------------------------------------------------------------------------

    def loaded(self, directory: str, identity: tuple[FileIdentity, ...], entries: Iterable[int]) -> None:
        """The worker loaded the base from files of this identity; the verdicts on these entries depend on it."""
        for entry in entries:
            identities = self._loads.setdefault(entry, (directory, set()))[1]
            if len(identities) <= 1:  # with two, the verdicts are void
                identities.add(identity)

    def reused(self, directory: str, entry: int) -> None:
        """The cached verdict on this entry depends on the files that were hashed, or that the Hub lists."""
        if directory in self._listed:
            self._digests.setdefault(directory, self._listed[directory])
        self.loaded(directory, self._hashed[directory], (entry,))

    def is_unchanged(self, entry: int) -> bool:
        """Whether the base of an entry was loaded, each time, from the files that were hashed and are still there."""
        if entry not in self._loads:
            return False
        directory, identities = self._loads[entry]
        return self._is_same(directory, identities, self._identity_now(directory))

    def void(self) -> dict[str, list[int]]:
        """The entries whose verdicts are void, by the directory of the base that changed. Call `wait` first."""
        now = {directory: self._identity_now(directory) for directory, _ in self._loads.values()}
        void: dict[str, list[int]] = {}
        for entry, (directory, identities) in self._loads.items():
            if not self._is_same(directory, identities, now[directory]):
                void.setdefault(directory, []).append(entry)
        return void

    def is_silent(self, directory: str) -> bool:
        """Whether the mount of a base did not answer when its files were to be compared."""
        return directory in self._silent

    def _is_same(self, directory: str, identities: set[_Identity], now: _Identity | None) -> bool:
        return {*identities, self._hashed.get(directory, now)} == {now}

    def _is_as_hashed(self, directory: str) -> bool:
        return self._hashed[directory] == self._identity_now(directory)

    def _identity_now(self, directory: str) -> _Identity | None:
        """The files' identity now; None if they cannot be read, or their mount does not answer."""
        if directory in self._silent:
            return None
        try:
            return within(ANSWER_TIMEOUT_S, lambda: base_identity(directory))
        except TimeoutError:
            self._silent.add(directory)
            return None
        except OSError:
            return None

    def _hash(self, directory: str) -> None:
        with contextlib.suppress(Exception):  # the worker reads the same files, and reports what is wrong with them
            began_ns = time.time_ns()
            identity = base_identity(directory)
            self._hashed[directory] = identity  # first, so that a change during the hashing shows at the end
            files = (
                self.remembered.lookup(directory, identity)
                if self.remembered and directory not in self._again
                else None
            )
            if files is None:
                files = resolve.digest_files(
                    directory,
                    resolve.base_weight_files(directory),
                    lambda: self._heard_s.update({directory: time.monotonic()}),
                )
                if self.remembered and self._is_as_hashed(directory):
                    self.remembered.store(directory, identity, files, began_ns)
            self._digests[directory] = _Digests(files, _settings_digest(directory))


def base_directory(entry: Entry) -> str:
    """The directory of the base that an entry is merged into. Only entries that have a base are looked up or merged."""
    if entry.base is None:
        raise AssertionError("an entry without a base is judged before its base is used")
    return entry.base.directory


def _weight_digests(directory: str, sha256: Mapping[str, str]) -> dict[str, str]:
    """The digests of a base's weight files, if those of the large ones are known. An index is read."""
    names = resolve.base_weight_files(directory)
    read = resolve.digest_files(directory, (name for name in names if name not in sha256))
    return read | {name: sha256[name] for name in names if name in sha256}


def _settings_digest(directory: str) -> str | None:
    """None if the base runs code of another repository, which no digest here covers."""
    try:
        config = read_as_transformers(Path(directory, "config.json"))
        if config is None or "--" in json.dumps(config.get("auto_map")):
            return None
        return resolve.digest_directory(directory, resolve.base_setting_files(directory))
    except Exception:  # noqa: BLE001 - whatever it is, no verdict on this base is stored
        return None
