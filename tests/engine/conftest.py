"""Fixtures of tests that merge in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gating import Bench, one_thread


@pytest.fixture
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Bases and adapters, each made on first use, and a gate that keeps the bases it has loaded."""
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("bench"))
