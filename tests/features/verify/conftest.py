"""What the tests of comparisons share: merges of adapters, and the gate that compares them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.gating import one_thread
from tests.support.verify.merges import Scene
from tests.support.verify.verification import Verifier

if TYPE_CHECKING:
    from tests.support.models import Shelf


@pytest.fixture(scope="module")
def scene(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with one_thread():
        yield Scene(shelf, tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier()
