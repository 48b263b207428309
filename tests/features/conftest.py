"""A directory to publish in, for runs with a played worker."""

from pathlib import Path

import pytest

from tests.support.played_merges import lay


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a base and one adapter."""
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, names=["one"])
    return tmp_path
