"""What a merge imports, in less time: work that transformers does twice, and a library that it needs for training only.

In: nothing. Out: `quick_imports`, a context in which transformers and PEFT are imported. What was changed for that is
undone at its end; no name that transformers or PEFT hold afterwards does anything else than it would.

1. transformers reads the source of all its models to know what they export, once for itself and once for its `models`.
   The second reading is the first one's answer.
2. It imports scipy.optimize for one function, by which losses of object detection match boxes. That function imports
   it when it is called.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_STRUCTURES = "transformers.utils.import_utils"
_READING = "create_import_structure_from_path"
_OPTIMIZE = "scipy.optimize"


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of this process, before anything of transformers is imported."""
    finder, optimize = _Finder(), _Optimize(_OPTIMIZE)
    sys.meta_path.insert(0, finder)
    is_ours = sys.modules.setdefault(_OPTIMIZE, optimize) is optimize
    try:
        yield
    finally:
        finder.undo()
        sys.meta_path.remove(finder)
        if is_ours and sys.modules.get(_OPTIMIZE) is optimize:
            del sys.modules[_OPTIMIZE]


class _Finder:
    """Finds modules where they are; the one that reads the models' source gets a memory."""

    def __init__(self) -> None:
        self._undo: Callable[[], None] = lambda: None

    def find_spec(self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None) -> ModuleSpec | None:
        if name.startswith(f"{_OPTIMIZE}.") and isinstance(sys.modules.get(_OPTIMIZE), _Optimize):
            return PathFinder.find_spec(name, _real(_OPTIMIZE).__path__)  # whatever lies below the real one
        spec = PathFinder.find_spec(name, path) if name == _STRUCTURES else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_remember(module: ModuleType) -> None:
            load(module)
            read = getattr(module, _READING, None)
            if callable(read):
                setattr(module, _READING, _remembering(read))
                self._undo = lambda: setattr(module, _READING, read)

        spec.loader.exec_module = load_and_remember  # type: ignore[method-assign]
        return spec

    def undo(self) -> None:
        """The module has its own function again."""
        self._undo()


def _remembering(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def remembered(path: Any) -> Any:
        """A file stands for its directory, as it does for `read`."""
        place = os.fspath(path)
        place = os.path.dirname(place) if os.path.isfile(place) else place  # noqa: PTH113, PTH120
        if place not in known:
            known[place] = read(place)
        return copy.deepcopy(known[place])

    return remembered


class _Optimize(ModuleType):
    """In the place of scipy.optimize: one function of it; whoever wants another imports the real one."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    @staticmethod
    def linear_sum_assignment(*given: Any, **named: Any) -> Any:
        """scipy's, imported when it is called."""
        return _real(_OPTIMIZE).linear_sum_assignment(*given, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # who looks at every module wants none of it
            raise AttributeError(name)
        return getattr(_real(_OPTIMIZE), name)


def _real(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), _Optimize):
        del sys.modules[name]
    return importlib.import_module(name)
