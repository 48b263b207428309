"""The digests of bases, taken beside the run: hashing a large base takes seconds that nobody should wait for.

In: directories of bases. Out: a SHA-256 for each, or None where it could not be taken, and the identity of the files
that were hashed. One thread per base; the worker imports, loads and merges meanwhile. `seen` may know a digest already.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Protocol

from merge_gate.files import resolve
from merge_gate.files.identity import base_identity
from merge_gate.records.files import BaseContent, FileIdentity


class Seen(Protocol):
    """Digests that were taken earlier, of files that cannot have changed since."""

    def known(self, directory: str, identity: tuple[FileIdentity, ...]) -> str | None:
        """The digest of the weights in `directory`, if its files still have this identity."""

    def learned(self, directory: str, identity: tuple[FileIdentity, ...], digest: str, began_ns: int) -> None:
        """Note a digest that was begun at `began_ns`, of files that had this identity then."""


class BaseDigests:
    """Digests by directory, each taken once."""

    def __init__(self, seen: Seen | None = None) -> None:
        self._seen = seen
        self._threads: dict[str, threading.Thread] = {}
        self._digests: dict[str, str] = {}
        self._settings: dict[str, str | None] = {}
        self._identities: dict[str, tuple[FileIdentity, ...]] = {}

    def start(self, directory: str) -> None:
        """Begin to hash the weights in `directory`, unless that has begun already."""
        if directory not in self._threads:
            thread = threading.Thread(target=self._take, args=(directory,), daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had: the report goes without this digest
                thread.start()
                self._threads[directory] = thread

    def of(self, directory: str) -> str | None:
        """The digest, as far as it is known by now."""
        return self._digests.get(directory)

    def content(self, directory: str) -> BaseContent | None:
        """All that the base holds, as far as it is known by now; None as well where no digest says it all."""
        weights = self.of(directory)
        if weights is None:
            return None
        if directory not in self._settings:
            self._settings[directory] = _settings_digest(directory)
        settings = self._settings[directory]
        return BaseContent(weights=weights, settings=settings) if settings is not None else None

    def is_of(self, directory: str, identity: tuple[FileIdentity, ...]) -> bool:
        """Whether the digest is of the files of that `identity`, and they are still there; True without a digest."""
        hashed = self._identities.get(directory, identity)
        try:
            return hashed == identity == base_identity(directory)
        except OSError:
            return False

    def holds(self, directory: str) -> bool:
        """Whether the files that were hashed are still there, and nothing was written to them."""
        identity = self._identities.get(directory)
        return identity is not None and self.is_of(directory, identity)

    @property
    def are_taken(self) -> bool:
        """Whether none is being taken."""
        return not any(thread.is_alive() for thread in self._threads.values())

    def wait(self) -> None:
        """Wait for all that have been started."""
        for thread in self._threads.values():
            thread.join()

    def _take(self, directory: str) -> None:
        with contextlib.suppress(Exception):  # the worker meets the same file and says what is wrong with it
            began_ns = time.time_ns()
            identity = base_identity(directory)
            self._identities[directory] = identity  # what changes while it is hashed shows at the end
            digest = self._seen.known(directory, identity) if self._seen else None
            if digest is None:
                digest = resolve.digest_directory(directory, resolve.base_weight_files(directory))
                if self._seen and self.holds(directory):
                    self._seen.learned(directory, identity, digest, began_ns)
            self._digests[directory] = digest


def _settings_digest(directory: str) -> str | None:
    """None where code from another repository takes part, which lies elsewhere."""
    try:
        config = json.loads(Path(directory, "config.json").read_bytes())
        if "--" in json.dumps(config.get("auto_map") or {}):
            return None
        return resolve.digest_directory(directory, resolve.base_setting_files(directory))
    except Exception:  # noqa: BLE001 - whatever it is, no verdict on this base is kept
        return None
