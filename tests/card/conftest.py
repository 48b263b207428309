"""The simulated card, built once. Without a compiler its tests are skipped; `make card` builds it first, or fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.card import build


@pytest.fixture(scope="session")
def card() -> Path:
    """The compiled library, for `build.environment`."""
    try:
        return build.library()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
