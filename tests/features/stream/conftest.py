"""What tests of streams share: a Hub on the loopback interface, and pieces that are small."""

import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate.features.stream import read_ahead
from merge_gate.worker import parent_feed
from tests.support.hub import LoopbackHub


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is a page, and a chunk is half of one."""
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", mmap.PAGESIZE // 2)
    for module in (read_ahead, parent_feed):
        monkeypatch.setattr(module, "PIECE_BYTES", mmap.PAGESIZE)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before another try, which take no time."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pauses: list[float]) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.serve_this_process(monkeypatch, tmp_path / "cache")
        yield server
