"""Where a verdict is reached: a name that tells somebody else where to look, and nothing of how a machine is laid out.

In: the environment of a CI system. Out: its name of this run, else the name of the machine.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

GIVEN = "MERGE_GATE_PLACE"
"""Set by the action, whose gate sees none of the runner's own variables."""
_LONGEST = 200
_RUNS = (
    ("GITHUB_REPOSITORY", "GITHUB_RUN_ID"),
    ("CI_PROJECT_PATH", "CI_JOB_ID"),
    ("JOB_NAME", "BUILD_NUMBER"),
)
"""Variables that name a project and a run of it: GitHub's (and Gitea's), GitLab's, Jenkins'."""


def this_place(environ: Mapping[str, str]) -> str:
    """`acme/adapters run 123`, or the machine's name."""
    if environ.get(GIVEN):
        return environ[GIVEN][:_LONGEST]
    for project, run in _RUNS:
        if environ.get(project) and environ.get(run):
            return f"{environ[project]} run {environ[run]}"[:_LONGEST]
    return platform.node()[:_LONGEST] or "unknown"
