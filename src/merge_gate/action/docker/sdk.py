"""Makes the Docker SDK importable from the wheels in the action's checkout. Nothing is downloaded.

Inside `available`, `import docker` finds the wheels before any package of the runner. A merge-gate installed by pip has
no wheels, and uses the SDK of its extra `launcher`.
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
    """Put the wheels on the path. certifi unpacks its file on import, below RUNNER_TEMP if that is set."""
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
