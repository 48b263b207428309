"""The one entry of the action and of the container: the environment, read once, and argv.

In: the name of one of the action's steps (`prepare`, `action` or `comment`) as the only word, with the inputs in
MERGE_GATE_INPUT_*. Any other words are those of `merge-gate`, inside the container, whose standard input may carry a
token. Out: an exit code. The steps run it with the runner's own Python, like all of merge_gate.action.
"""
# ruff: noqa: PLC0415, T201

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def step(name: str, environ: Mapping[str, str]) -> int:
    """Run one of the action's steps."""
    from merge_gate.action import caches, comment, workflow
    from merge_gate.action import step as action

    if name == "action":
        return action.main(environ)
    if name == "comment":
        return comment.main(environ)
    workflow.write_outputs(environ.get("GITHUB_OUTPUT", ""), caches.outputs(environ))
    return 0


def main() -> int:
    """Hand over to the action or to the command line."""
    environ = dict(os.environ)
    if sys.argv[1:] in (["prepare"], ["action"], ["comment"]):
        sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
        return step(sys.argv[1], environ)

    from merge_gate._internal.errors import GateError
    from merge_gate.action.docker import handover
    from merge_gate.cli import dispatch

    try:
        os.environ.update(handover.read(environ, sys.stdin.buffer))
        for device in handover.verify(environ):
            print(f"merge-gate: sees {device}", flush=True)
    except GateError as error:
        print(f"merge-gate: {error.message}\n  {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    return dispatch.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
