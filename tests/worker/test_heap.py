"""The worker's heap, with a libc that can give memory back and one that cannot."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from merge_gate.worker.startup.heap import give_back


@pytest.mark.parametrize("can", [True, False])
def test_pages_are_given_back_where_the_libc_can(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    libc = SimpleNamespace(malloc_trim=asked.append) if can else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    give_back()
    assert asked == ([0] if can else [])
