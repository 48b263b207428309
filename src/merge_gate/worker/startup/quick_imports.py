"""The imports of a merge, in less time: unused packages run only when they are called, and no source is read twice.

In: nothing. Out: `quick_imports`, a context for the import of transformers and PEFT. After it, every name in them does
what it does without it.

1. Packages that transformers and PEFT import and hardly use are deferred (deferred.py).
2. transformers reads the source of all its models to learn what they export, and then reads much of it again, because
   its cache holds fewer directories than there are. It gets a cache without a limit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from merge_gate.worker.startup.deferred import Deferring, Part, mark

_DEFERRED = {"scipy.optimize": Part(called=("linear_sum_assignment",))}  # for losses of object detection
_COMPILER = {  # transformers imports one of these modules. With torchvision installed, that imports the others
    "torch._dynamo": Part(
        below=("_trace_wrapped_higher_order_op", "config", "graph_utils", "metrics_context", "utils"),
        marks=("allow_in_graph", "assume_constant_result", "disable"),
    )
}
_USED_WITHOUT_IMPORT = "torch.distributed.tensor"
"""PEFT uses it without an import of its own: the compiler imports it, and some releases of transformers do."""
_STRUCTURES = "transformers.utils.import_utils"
_READS_SOURCE = "create_import_structure_from_path"

Change = Callable[[ModuleType], dict[str, Any]]
"""A module → the names that it has only while the imports last, with their values."""


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """To be entered before this process imports torch or transformers.

    If torch compiles nothing (TORCHDYNAMO_DISABLE), marks for its compiler have no reader, and `torch.compile` returns
    its argument. Then the compiler is deferred as well.
    """
    compiles = os.environ.get("TORCHDYNAMO_DISABLE") != "1"
    changes: dict[str, Change] = {_STRUCTURES: _with_unlimited_cache}
    if not compiles:
        changes["torch"] = lambda _: {"compile": mark}
    with Deferring(_DEFERRED if compiles else _DEFERRED | _COMPILER), _Changing(changes):
        yield
        if not compiles and "torch" in sys.modules and importlib.import_module("torch.distributed").is_available():
            importlib.import_module(_USED_WITHOUT_IMPORT)


class _Changing:
    """A finder. A module that is imported in its context has changed names until the context ends."""

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self._changes = changes
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        self._undo.close()

    def find_spec(self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None) -> ModuleSpec | None:
        """The interface that importlib calls."""
        spec = PathFinder.find_spec(name, path) if name in self._changes else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            for attribute, value in self._changes[name](module).items():
                self._undo.callback(setattr, module, attribute, getattr(module, attribute))
                setattr(module, attribute, value)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _with_unlimited_cache(module: ModuleType) -> dict[str, Any]:
    """Step 2. Nothing changes in a release of transformers whose function has no cache."""
    reads: Any = getattr(module, _READS_SOURCE, None)
    if not hasattr(reads, "cache_info"):
        return {}
    return {_READS_SOURCE: functools.lru_cache(maxsize=None)(reads.__wrapped__)}
