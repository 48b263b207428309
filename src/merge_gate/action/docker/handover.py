"""Passes secrets (a token, proxies with passwords) to the container through its standard input.

The launcher writes one line (`written`), and the entrypoint reads it (`read`). The secrets never appear in the
container's description, in its arguments, or on a disk.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, BinaryIO

from merge_gate.errors import LauncherError
from merge_gate.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKER = "MERGE_GATE_HANDOVER"
"""Set inside the container if a line will follow."""
_LIMIT_BYTES = 65_536


def written(variables: Mapping[str, str]) -> bytes:
    """Return the line for `read`. Raises `LauncherError` if it is too long."""
    line = json.dumps(dict(variables)).encode("ascii") + b"\n"
    if len(line) > _LIMIT_BYTES:
        raise LauncherError(
            f"the token and the proxies for the container have {len(line)} bytes, expected at most {_LIMIT_BYTES}"
        )
    return line


def read(environ: Mapping[str, str], stream: BinaryIO) -> dict[str, str]:
    """Return the variables; none if `environ` announces none. Raises `LauncherError`."""
    if not environ.get(MARKER):
        return {}
    line = stream.readline(_LIMIT_BYTES)
    try:
        variables = json.loads(line)
        return {str(name): str(value) for name, value in variables.items()}
    except (ValueError, AttributeError) as error:
        raise LauncherError(
            f"the container did not receive the token: got {counted(len(line), 'byte')} on standard input, expected "
            "one line",
            hint="run again: the launcher was stopped during the start, or the engine lost the container's input",
        ) from error
