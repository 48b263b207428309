"""Reads the event that started the workflow: whether a fork can decide its content, and what the run may do then.

The variables of the runner go in. `Event` comes out. Anything that is not known to be trusted counts as a fork.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_TRUSTED = ("push", "schedule", "workflow_dispatch", "repository_dispatch", "merge_group", "release")
"""Events that only users with write access to the repository can cause."""
_MOST_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Event:
    """The event that started the workflow.

    Attributes:
        name: GitHub's name of the event, such as `pull_request`.
        is_trusted: whether only users with write access decide what runs: a branch or a pull request of this
            repository.
        is_fork: whether it is a pull request from another repository. GitHub passes no secrets to `pull_request` then.
        pull_request: number of the pull request; 0 for any other event.
        is_private: whether the repository is known to be private.
    """

    name: str
    is_trusted: bool
    is_fork: bool
    pull_request: int
    is_private: bool


def read_event(environ: Mapping[str, str]) -> Event:
    """Return the event of this run. A missing or unreadable payload is that of a public repository."""
    name, payload = environ.get("GITHUB_EVENT_NAME", ""), _payload(environ.get("GITHUB_EVENT_PATH", ""))
    pull_request = _mapping(payload, "pull_request")
    head = _mapping(_mapping(pull_request, "head"), "repo").get("full_name")
    is_own = isinstance(head, str) and head == environ.get("GITHUB_REPOSITORY")
    number = pull_request.get("number")
    is_pull_request = name == "pull_request"
    return Event(
        name=name,
        is_trusted=name in _TRUSTED or (is_pull_request and is_own),
        is_fork=is_pull_request and not is_own,
        pull_request=number if is_pull_request and isinstance(number, int) else 0,
        is_private=_mapping(payload, "repository").get("private") is True,
    )


def _payload(path: str) -> Mapping[str, Any]:
    try:
        with Path(path).open("rb") as file:
            payload = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return payload if isinstance(payload, dict) else {}


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    return value if isinstance(value, dict) else {}
