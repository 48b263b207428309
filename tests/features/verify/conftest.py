"""What the tests of comparisons share: merges of adapters, and the gate that compares them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gating import one_thread
from tests.support.models import Shelf
from tests.support.verify.accounting import rich_base
from tests.support.verify.merges import Scene
from tests.support.verify.verification import Verifier


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def scene(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(shelf, tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="session")
def verifier() -> Verifier:
    return Verifier()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with all files that a model directory has. Copy it before editing."""
    return rich_base(tmp_path_factory.mktemp("accounts") / "base")


@pytest.fixture
def merged(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "merged")
    return tmp_path / "merged"
