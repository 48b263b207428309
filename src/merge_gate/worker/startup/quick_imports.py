"""What a merge imports, in less time: packages that it never calls run when they are called, and nothing is read twice.

In: nothing. Out: `quick_imports`, a context in which transformers and PEFT are imported. No name that they hold
afterwards does anything else than it would.

1. Packages that they import and hardly use are deferred (deferred.py).
2. transformers reads the source of all its models to know what they export, and then once more: its memory holds fewer
   directories than there are. It gets one without a limit.
3. In each of these files it looks for the last `__all__` from the first line on. It gets the file from there on.
4. torch, fsspec and bitsandbytes look through all that is installed for plugins, four times: it is looked through once.
5. torch notes the file and line of each operator, and reads that file for it: it notes them without.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from merge_gate.worker.startup.deferred import Deferring, Part, mark

_DEFERRED = {"scipy.optimize": Part(called=("linear_sum_assignment",))}  # by losses of object detection
_COMPILER = {  # transformers uses one module of it, where torchvision is installed that uses another, which needs three
    "torch._dynamo": Part(
        below=("_trace_wrapped_higher_order_op", "config", "graph_utils", "metrics_context", "utils"),
        marks=("allow_in_graph", "assume_constant_result", "disable"),
    )
}
_USED_UNASKED = "torch.distributed.tensor"
"""The compiler imports it, and PEFT uses it without importing it; transformers does in some releases."""
_STRUCTURES = "transformers.utils.import_utils"
_PLACES = "torch._library.utils"
_READING, _NAMES = "create_import_structure_from_path", "fetch__all__"
_TWO_LISTS = '__all__ = ["first"]\n\n__all__ = [\n    "last",\n]\n'

Change = Callable[[ModuleType], dict[str, Any]]
"""What names of a module are while the imports last."""


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of this process, before anything of torch and transformers is imported.

    Where torch compiles nothing (TORCHDYNAMO_DISABLE) nobody reads marks for its compiler, and `torch.compile` gives
    back what it gets: what is imported then is not told of a compiler at all.
    """
    compiles = os.environ.get("TORCHDYNAMO_DISABLE") != "1"
    changes: dict[str, Change] = {_STRUCTURES: _read_once, _PLACES: _place_without_source}
    if not compiles:
        changes["torch"] = lambda _: {"compile": mark}
    with Deferring(_DEFERRED if compiles else _DEFERRED | _COMPILER), _Changing(changes), _looked_through_once():
        yield
        if not compiles and "torch" in sys.modules and importlib.import_module("torch.distributed").is_available():
            importlib.import_module(_USED_UNASKED)


class _Changing:
    """A finder. Modules that are imported in its context have other names than usual until its end."""

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self._changes = changes
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        self._undo.close()

    def find_spec(self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None) -> ModuleSpec | None:
        """As importlib asks for it."""
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


def _read_once(module: ModuleType) -> dict[str, Any]:
    read: Any = getattr(module, _READING, None)
    names: Any = getattr(module, _NAMES, None)
    changed: dict[str, Any] = {}
    if hasattr(read, "cache_info"):
        changed[_READING] = functools.lru_cache(maxsize=None)(read.__wrapped__)
    if callable(names) and names(_TWO_LISTS) == names(from_last_list(_TWO_LISTS)):
        changed[_NAMES] = lambda text: names(from_last_list(text))
    return changed


def from_last_list(text: str) -> str:
    """A module's source from its last line that begins with `__all__` on, or from one before; all of it without one."""
    return text[max(text.rfind("\n__all__"), 0) :]


def _place_without_source(module: ModuleType) -> dict[str, Any]:
    place: Any = getattr(module, "get_source", None)

    def quick(stacklevel: int) -> str:
        caller = inspect.getframeinfo(sys._getframe(stacklevel), context=0)
        return f"{caller.filename}:{caller.lineno}"

    return {"get_source": quick} if callable(place) and place(1) == quick(1) else {}


@contextlib.contextmanager
def _looked_through_once() -> Iterator[None]:
    look = importlib.metadata.entry_points
    found, is_over = functools.cache(look), False

    def remembered(**wanted: Any) -> Any:
        """Whoever keeps this function looks anew afterwards."""
        return look(**wanted) if is_over else found().select(**wanted)

    importlib.metadata.entry_points = remembered
    try:
        yield
    finally:
        importlib.metadata.entry_points = look
        is_over = True
