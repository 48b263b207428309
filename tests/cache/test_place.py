"""Where a verdict is reached: a run that can be looked up, else a machine; never a path."""

from __future__ import annotations

import platform

import pytest

from merge_gate.cache.place import this_place


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"GITHUB_REPOSITORY": "acme/adapters", "GITHUB_RUN_ID": "7"}, "acme/adapters run 7"),
        ({"CI_PROJECT_PATH": "acme/adapters", "CI_JOB_ID": "8"}, "acme/adapters run 8"),
        ({"JOB_NAME": "gate", "BUILD_NUMBER": "9"}, "gate run 9"),
        ({"MERGE_GATE_PLACE": "acme/adapters run 7", "CI_PROJECT_PATH": "x", "CI_JOB_ID": "8"}, "acme/adapters run 7"),
        ({"GITHUB_REPOSITORY": "acme/adapters"}, platform.node()),
        ({}, platform.node()),
        ({"MERGE_GATE_PLACE": "x" * 1000}, "x" * 200),
    ],
)
def test_the_run_or_the_machine(environ: dict[str, str], place: str) -> None:
    assert this_place(environ) == place
