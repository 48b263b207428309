"""The imports of a merge, in less time. After them, every name of the libraries does what it does without this module.

In: nothing. Out: `quick_imports`, a context for the first import of transformers and PEFT in this process.

1. transformers imports SciPy's optimizers for one function, which only losses of object detection call. Until they are
   used, another module is in their place.
2. transformers reads the source of all its models to learn what they export, and then reads much of it again, because
   its cache holds fewer directories than there are. While it is imported, the cache has no limit.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_OPTIMIZERS, _FUNCTION = "scipy.optimize", "linear_sum_assignment"
_EXECUTE = "<execute>"
STRUCTURES, _READS_SOURCE = "transformers.utils.import_utils", "create_import_structure_from_path"


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import transformers and PEFT inside of this context. It changes nothing that is imported already."""
    with contextlib.ExitStack() as undo:
        finder = _Finder(undo)
        sys.meta_path.insert(0, finder)
        try:
            yield
        except BaseException:
            sys.meta_path.remove(finder)
            raise


class _Finder:
    """Finds both modules as usual, once, and changes what their import does. It stays for modules below step 1's."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo
        self._executes: dict[str, Callable[..., None]] = {_OPTIMIZERS: _defer, STRUCTURES: self._without_limit}

    def find_spec(self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None) -> ModuleSpec | None:
        """The interface that importlib calls."""
        package = sys.modules.get(_OPTIMIZERS)
        if name.startswith(_OPTIMIZERS + ".") and isinstance(package, _Deferred):
            package.run()
            return _loaded(sys.modules[name]) if name in sys.modules else None
        execute = self._executes.pop(name, None)
        spec = PathFinder.find_spec(name, path) if execute else None
        if spec is not None and spec.loader is not None and execute is not None:
            spec.loader.exec_module = functools.partial(execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _without_limit(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Step 2. Nothing changes in a release of transformers whose function has no cache."""
        execute(module)
        reads: Any = getattr(module, _READS_SOURCE, None)
        if hasattr(reads, "cache_info"):
            self._undo.callback(setattr, module, _READS_SOURCE, reads)
            setattr(module, _READS_SOURCE, functools.lru_cache(maxsize=None)(reads.__wrapped__))


class _Deferred(ModuleType):
    """Step 1's module, until its first use runs it."""

    _lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and self.run():  # inspect looks for `__wrapped__` in every module
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def run(self) -> bool:
        """Whether the module's code has run by now. It runs once, and other threads wait."""
        with _Deferred._lock:
            execute = vars(self).pop(_EXECUTE, None)
            if execute is not None:
                del vars(self)[_FUNCTION]
                execute(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
            return type(self) is ModuleType


def _defer(execute: Callable[[ModuleType], None], module: Any) -> None:
    def assign(*args: Any, **options: Any) -> Any:
        _Deferred.run(module)
        return getattr(module, _FUNCTION)(*args, **options)

    vars(module).update({_EXECUTE: execute, _FUNCTION: assign})
    module.__class__ = _Deferred


def _loaded(module: ModuleType) -> ModuleSpec | None:
    """A spec with which an import in progress gets a module that is loaded by now."""
    loader: Any = module.__loader__

    def leave(_: ModuleType) -> None:
        del loader.create_module, loader.exec_module

    loader.create_module, loader.exec_module = (lambda _: module), leave
    return module.__spec__
