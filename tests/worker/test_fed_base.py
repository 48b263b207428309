"""The bytes of a streamed base that are read again for a published model are the ones that passed before."""

from __future__ import annotations

import hashlib
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


def test_local_bytes_are_watched_by_their_files() -> None:
    into = bytearray(10)
    FedBase(Remote({})).read(NAME, 5, memoryview(into))
    assert into == CONTENT[5:15]
