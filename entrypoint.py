"""The one door of the action and of the container: the environment, read once, and argv.

In: `action` as the only word: the action's first step, its inputs in MERGE_GATE_INPUT_*. Any other words: those of
`merge-gate`, inside the container, where standard input may carry a token. Out: an exit code. It decides nothing. The
first step runs it with the runner's own Python, like all of merge_gate.action.
"""
# ruff: noqa: PLC0415, T201

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

INPUTS = (
    "config", "runtime", "gpus", "device", "image", "pull", "hf-cache", "cache", "publish", "verify", "mounts",
    "memory", "shm-size", "cpus", "timeout-minutes", "working-directory", "fail-on", "upload-report",
    "artifact-name", "retention-days", "output", "shard", "args",
)  # fmt: skip
"""The action's inputs that travel as words. `hf-token` is not among them: a token stays in the environment."""


def words(environ: Mapping[str, str]) -> list[str]:
    """Return the inputs as `--name=value`."""
    return [f"--{name}={environ.get('MERGE_GATE_INPUT_' + name.upper().replace('-', '_'), '')}" for name in INPUTS]


def main() -> int:
    """Hand over to the action or to the command line."""
    environ = dict(os.environ)
    if sys.argv[1:] == ["action"]:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
        from merge_gate.action import step as action

        return action.main(words(environ), environ)

    from merge_gate.action.docker import canary, handover
    from merge_gate.cli import dispatch
    from merge_gate.errors import GateError

    try:
        os.environ.update(handover.read(environ, sys.stdin.buffer))
        for device in canary.verify(environ):
            print(f"merge-gate: sees {device}", flush=True)
    except GateError as error:
        print(f"merge-gate: {error.message}\n  {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    return dispatch.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
