"""The one door of the action and of the container: the environment, read once, and argv.

In: `action` as the only word: the action's first step, its inputs in MERGE_GATE_INPUT_*. Any other words: those of
`merge-gate`, inside the container. Out: an exit code. It decides nothing. The first step runs it with the runner's
own Python, so it needs no more than Python 3.9 and imports what it hands over to only then.
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
    "config", "runtime", "gpus", "device", "image", "hf-cache", "fail-on", "upload-report", "artifact-name",
    "retention-days", "output", "args",
)  # fmt: skip
"""The action's inputs that travel as words. `hf-token` is not among them: a token stays in the environment."""


def words(environ: Mapping[str, str]) -> list[str]:
    """Return the inputs as `--name=value`."""
    return [f"--{name}={environ.get('MERGE_GATE_INPUT_' + name.upper().replace('-', '_'), '')}" for name in INPUTS]


def main() -> int:
    """Hand over to the action or to the command line."""
    environ = dict(os.environ)
    if sys.argv[1:] == ["action"]:
        if sys.version_info < (3, 9):  # noqa: UP036 # the runner's own
            print(f"::error title=merge-gate::python3 is {sys.version.split()[0]}, expected 3.9 or newer")
            return 1
        sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
        from merge_gate.action import step as action

        return action.main(words(environ), environ)

    from merge_gate import cli
    from merge_gate.action import canary
    from merge_gate.errors import GateError

    try:
        for device in canary.verify(environ):
            print(f"merge-gate: sees {device}", flush=True)
    except GateError as error:
        print(f"merge-gate: {error.message}\n  {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
