"""What the container must not show to those who inspect it: a token, proxies with passwords, by standard input.

In, outside: variables, as one line (`written`). Out, inside: the same variables in the process that read them
(`read`). Nothing of it is in the container's description, in its arguments, or on a disk.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, BinaryIO

from merge_gate.errors import LauncherError
from merge_gate.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKER = "MERGE_GATE_HANDOVER"
"""Set inside where a line will come."""
_LIMIT_BYTES = 65_536


def written(variables: Mapping[str, str]) -> bytes:
    """Return the line that `read` understands. Raises `LauncherError` where it would be too long."""
    line = json.dumps(dict(variables)).encode("ascii") + b"\n"
    if len(line) > _LIMIT_BYTES:
        raise LauncherError(
            f"the token and the proxies for the container have {len(line)} bytes, expected at most {_LIMIT_BYTES}"
        )
    return line


def read(environ: Mapping[str, str], stream: BinaryIO) -> dict[str, str]:
    """Return the variables that were handed over, none where `environ` promises none. Raises `LauncherError`."""
    if not environ.get(MARKER):
        return {}
    line = stream.readline(_LIMIT_BYTES)
    try:
        variables = json.loads(line)
        return {str(name): str(value) for name, value in variables.items()}
    except (ValueError, AttributeError) as error:
        raise LauncherError(
            f"the token was not handed over: got {counted(len(line), 'byte')} on standard input, expected one line",
            hint="the launcher was stopped while it started the container, or the engine lost its standard input",
        ) from error
