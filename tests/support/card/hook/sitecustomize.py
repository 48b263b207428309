"""Runs at the start of a process whose PYTHONPATH names this folder: torch's import then installs the simulated card.

Nothing is imported for it before torch is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


class _Finder:
    """Finds torch and bitsandbytes as usual, and wraps their execution."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in {"torch", "bitsandbytes"}:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        import simulated_cuda  # noqa: PLC0415 - it imports what only a process with torch needs

        execute = simulated_cuda.import_torch if name == "torch" else simulated_cuda.import_bitsandbytes
        spec.loader.exec_module = functools.partial(execute, spec.loader.exec_module)
        return spec


def _run_the_next() -> None:
    """Run the `sitecustomize` that this one hides, if there is one."""
    here, whole = str(Path(__file__).parent), sys.path
    mine = sys.modules.pop(__name__)
    sys.path = [entry for entry in whole if entry != here]
    try:
        with contextlib.suppress(ModuleNotFoundError):
            __import__(__name__)
    finally:
        sys.path = whole
        sys.modules[__name__] = mine


if "TORCH_SIMULATED_CARD" in os.environ:
    sys.meta_path.insert(0, _Finder())
_run_the_next()
