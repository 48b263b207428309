"""The Docker SDK for Python that the action carries: wheels in its checkout, nothing is downloaded.

In: the directory of the wheels. Out: inside `available`, `import docker` finds them before whatever the runner has. A
merge-gate that pip installed has no such directory and uses what its extra `launcher` brought.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VENDOR = Path(__file__).resolve().parents[4] / "vendor"


@contextlib.contextmanager
def available(environ: Mapping[str, str], vendor: Path = VENDOR) -> Iterator[None]:
    """Put the wheels on the path. certifi unpacks its list of authorities on import: below RUNNER_TEMP, where set."""
    wheels = [str(wheel) for wheel in sorted(vendor.glob("*.whl"))]
    before = tempfile.tempdir
    tempfile.tempdir = environ.get("RUNNER_TEMP") or before
    sys.path[:0] = wheels
    importlib.invalidate_caches()
    try:
        yield
    finally:
        tempfile.tempdir = before
        for wheel in wheels:
            sys.path.remove(wheel)
