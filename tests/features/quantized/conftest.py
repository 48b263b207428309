"""What the tests of quantized releases share: a base with adapters and their merges."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gating import one_thread
from tests.support.quantized.releases import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("quantized"))
