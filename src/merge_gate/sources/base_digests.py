"""The digests of bases, taken beside the run: hashing a large base takes seconds that nobody should wait for.

In: directories of bases. Out: a SHA-256 for each, or None where it could not be taken, and the identity of the files
that were hashed. One thread per base; the worker imports, loads and merges meanwhile.
"""

from __future__ import annotations

import contextlib
import threading

from merge_gate.identity import base_identity
from merge_gate.records.files import FileIdentity
from merge_gate.sources import resolve


class BaseDigests:
    """Digests by directory, each taken once."""

    def __init__(self) -> None:
        self._threads: dict[str, threading.Thread] = {}
        self._digests: dict[str, str] = {}
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

    def is_of(self, directory: str, identity: tuple[FileIdentity, ...]) -> bool:
        """Whether the digest is of the files of that `identity`, and they are still there; True without a digest."""
        hashed = self._identities.get(directory, identity)
        try:
            return hashed == identity == base_identity(directory)
        except OSError:
            return False

    def wait(self) -> None:
        """Wait for all that have been started."""
        for thread in self._threads.values():
            thread.join()

    def _take(self, directory: str) -> None:
        with contextlib.suppress(Exception):  # the worker meets the same file and says what is wrong with it
            self._identities[directory] = base_identity(directory)  # what changes while it is hashed shows at the end
            self._digests[directory] = resolve.digest_directory(directory, resolve.base_weight_files(directory))
