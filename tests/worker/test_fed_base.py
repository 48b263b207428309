"""The bytes of a streamed base that are read again for a published model are the ones that passed before."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import pytest

from merge_gate.records.files import FileIdentity
from merge_gate.sources.digests import CHUNK_BYTES
from merge_gate.sources.feed import SourceError
from merge_gate.worker.feed_service import FedBase

NAME = "model.safetensors"
CONTENT = bytes(range(256)) * (CHUNK_BYTES // 128)


class Remote:
    """One file, whose bytes may change."""

    def __init__(self, sha256: Mapping[str, str]) -> None:
        self.content = bytearray(CONTENT)
        self.sizes, self.sha256 = {NAME: len(CONTENT)}, sha256
        self.identity: tuple[FileIdentity, ...] = ()

    def read(self, file: str, start: int, into: memoryview) -> None:
        into[:] = self.content[start : start + len(into)]


@pytest.mark.parametrize("place", [0, CHUNK_BYTES - 3, len(CONTENT) - 10])
def test_bytes_that_changed_are_refused(place: int) -> None:
    remote = Remote({NAME: hashlib.sha256(CONTENT).hexdigest()})
    base = FedBase(remote)
    base.digests.add(NAME, 0, memoryview(CONTENT))
    into = bytearray(10)
    base.read(NAME, place, memoryview(into))
    assert into == CONTENT[place : place + 10]
    remote.content[place + 9] ^= 1
    with pytest.raises(SourceError):
        base.read(NAME, place, memoryview(into))


def forged(content: bytes, crc: int) -> bytes:
    """The content with other bytes in the middle, and four bytes after them that give it this CRC-32."""
    head, tail = bytearray(content[: len(content) // 2]), content[len(content) // 2 + 4 :]
    head[:4] = b"evil"
    columns = [zlib.crc32(bytes(head) + (1 << bit).to_bytes(4, "little") + tail) for bit in range(32)]
    zero = zlib.crc32(bytes(head) + bytes(4) + tail)
    rows = [(column ^ zero, 1 << bit) for bit, column in enumerate(columns)]
    wanted, patch = crc ^ zero, 0
    basis: dict[int, tuple[int, int]] = {}
    for row in rows:  # Gauss over the 32 bits: the CRC is linear
        value, bits = row
        while value and (top := value.bit_length()) in basis:
            value, bits = value ^ basis[top][0], bits ^ basis[top][1]
        if value:
            basis[value.bit_length()] = value, bits
    while wanted:
        wanted, patch = wanted ^ basis[wanted.bit_length()][0], patch ^ basis[wanted.bit_length()][1]
    return bytes(head) + patch.to_bytes(4, "little") + tail


@pytest.mark.attempt("S13", "a second read gets other bytes with the same CRC-32", "changed while it was read")
@pytest.mark.attempt("S09", "the same, for bytes that are read again for a publication", "changed while it was read")
def test_a_forged_checksum_does_not_help() -> None:
    remote = Remote({NAME: hashlib.sha256(CONTENT).hexdigest()})
    base = FedBase(remote)
    base.digests.add(NAME, 0, memoryview(CONTENT))
    chunk = CONTENT[:CHUNK_BYTES]
    remote.content[:CHUNK_BYTES] = forged(chunk, zlib.crc32(chunk))
    assert remote.content != CONTENT
    assert zlib.crc32(remote.content[:CHUNK_BYTES]) == zlib.crc32(chunk)
    with pytest.raises(SourceError):
        base.read(NAME, 0, memoryview(bytearray(10)))


def test_local_bytes_are_watched_by_their_files() -> None:
    into = bytearray(10)
    FedBase(Remote({})).read(NAME, 5, memoryview(into))
    assert into == CONTENT[5:15]
