"""A runner's environment for the action's steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "gate.yml").write_text("version: 1\n", encoding="utf-8")
    (tmp_path / "temp").mkdir()
    return {
        "GITHUB_WORKSPACE": str(workspace),
        "RUNNER_TEMP": str(tmp_path / "temp"),
        "GITHUB_JOB": "release gate",
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "DOCKER_HOST": "unix:///nowhere/docker.sock",
        "PATH": os.environ["PATH"],
        **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")},
    }
