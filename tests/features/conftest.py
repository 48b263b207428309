"""A directory to publish in, for runs with a played worker."""

from pathlib import Path

import pytest

from tests.support.played_merges import lay


@pytest.fixture
def place(tmp_path: Path, cwd) -> Path:
    """The current directory, with a base and one adapter."""
    lay(tmp_path, names=["one"])
    return tmp_path
