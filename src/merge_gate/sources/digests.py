"""The SHA-256 of files whose bytes pass in order, compared with the digests that are expected of them.

In: the bytes of files, from the first to the last. Out: the digest of each file, or a `SourceError` if another one was
expected. Bytes that are read again must be the same as before.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping

from merge_gate.files.headers import shown
from merge_gate.sources.feed import SourceError

CHUNK_BYTES = 1 << 20
"""The unit in which bytes that are read again are compared with the first ones."""

_DIGEST_CHARACTERS = 16


class Digests:
    """The digests of one base's files.

    Args:
        sizes: the size of each file in bytes.
        expected: the SHA-256 of files for which it is known. These are also compared whenever they are read again.
    """

    def __init__(self, sizes: Mapping[str, int], expected: Mapping[str, str]) -> None:
        self._sizes, self._expected = sizes, expected
        self._adding = threading.Lock()
        self._chunks: dict[tuple[str, int], bytes] = {}
        self.known: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Start a pass: every file that is not yet known begins with its first byte."""
        with self._adding:
            self._hashes = {file: hashlib.sha256() for file in self._sizes if file not in self.known}
            self._hashed = dict.fromkeys(self._hashes, 0)

    @property
    def are_complete(self) -> bool:
        return len(self.known) == len(self._sizes)

    def add(self, file: str, start: int, content: memoryview) -> None:
        """Add the next bytes of a file. Bytes out of order, or of a file that is known, are only compared.

        Raises:
            SourceError: the file has another digest than expected, or its bytes changed.
        """
        self.compare(file, start, content)
        with self._adding:
            self._add(file, start, content)

    def _add(self, file: str, start: int, content: memoryview) -> None:
        if self._hashed.get(file) != start or file in self.known:
            return
        self._hashes[file].update(content)
        self._hashed[file] += len(content)
        if self._hashed[file] < self._sizes[file]:
            return
        got = self._hashes[file].hexdigest()
        expected = self._expected.get(file, got)
        if got != expected:
            raise SourceError(
                f"{shown(file)} arrived with other bytes than the Hub lists: its SHA-256 is "
                f"{got[:_DIGEST_CHARACTERS]}…, expected {expected[:_DIGEST_CHARACTERS]}…",
                hint="run again; if it happens again, check HF_ENDPOINT and any proxy, which may change files",
            )
        self.known[file] = got

    def compare(self, file: str, start: int, content: memoryview) -> None:
        """Compare whole chunks with what passed before, for files with an expected digest.

        Raises:
            SourceError: they differ.
        """
        if file not in self._expected:
            return
        for offset in range(-start % CHUNK_BYTES, len(content), CHUNK_BYTES):
            chunk = content[offset : offset + CHUNK_BYTES]
            if len(chunk) < CHUNK_BYTES and start + offset + len(chunk) < self._sizes[file]:
                return
            digest = hashlib.sha256(chunk).digest()  # not a checksum: a hostile server would forge it
            if self._chunks.setdefault((file, start + offset), digest) != digest:
                raise SourceError(
                    f"{shown(file)} changed while it was read: its bytes from {start + offset:,} are different now",
                    hint="run again; if it happens again, check HF_ENDPOINT and any proxy, which may change files",
                )


def widened(start: int, end: int, size_bytes: int) -> tuple[int, int]:
    """The whole chunks that hold a range of a file of this size."""
    return start - start % CHUNK_BYTES, min(end + -end % CHUNK_BYTES, size_bytes)
