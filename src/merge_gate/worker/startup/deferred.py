"""Packages that run when somebody wants something of them, and not when they are imported.

In: names of packages, and what of each is there before it runs (`Part`). Out: `Deferring`, a context for imports. Knows
no package.

1. An import of such a package finds it where it is, and makes its module, empty.
2. Whoever wants a name of it, or imports a module below it, runs it first, but for what its `Part` names. Names with
   underscores at both ends, which those want who look at every module, run nothing.
3. It runs by the interpreter's own import, into the module that is there: all who hold it hold the package, what was
   imported below it stays in its place, and other threads wait as they do for any import.

importlib.util.LazyLoader, which does this for a module, runs a package as soon as anything below it is imported.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NamedTuple, Self


class Part(NamedTuple):
    """What of a package is there before it runs.

    `below` are modules of it. `called` are functions that run it when they are called, and `marks` are decorators that
    leave a function as it is.
    """

    below: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


class Deferring:
    """A finder. What is imported in its context is deferred; it stays as long as a package has not run."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._is_open = False
        self._waiting: dict[str, _Deferred] = {}
        self._running: dict[str, _Deferred] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._is_open = True
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._leave()

    def _leave(self) -> None:
        if not (self._is_open or self._waiting or self._running):
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None) -> ModuleSpec | None:
        """As importlib asks for it."""
        package, below = name.rpartition(".")[::2]
        if package in self._waiting and below not in self._parts[package].below:
            self.run(package)
            return _as_loaded(sys.modules[name]) if name in sys.modules else PathFinder.find_spec(name, path)
        runs = name in self._running
        if not runs and not (self._is_open and name in self._parts):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            (self._load if runs else self._defer)(name, spec.loader)
        return spec

    def _defer(self, name: str, loader: Any) -> None:
        module = _Deferred(name, self._parts[name], partial(self.run, name))
        loader.create_module = lambda _: module
        loader.exec_module = lambda _: self._waiting.update({name: module})

    def _load(self, name: str, loader: Any) -> None:
        module, execute = self._running[name], loader.exec_module

        def load(module: _Deferred) -> None:
            module.empty()
            execute(module)
            module.__class__ = ModuleType  # type: ignore[assignment]
            del self._running[name]
            self._leave()

        loader.create_module = lambda _: module
        loader.exec_module = load

    def run(self, name: str) -> None:
        """Run a package, or wait for the thread that does."""
        with self._lock:
            if name in self._waiting:
                self._running[name] = self._waiting.pop(name)
                del sys.modules[name]
        importlib.import_module(name)


_STATE = "<deferred>"


class _Deferred(ModuleType):
    """A package that has not run."""

    def __init__(self, name: str, part: Part, run: Callable[[], None]) -> None:
        super().__init__(name)
        there = vars(self)
        there[_STATE] = part, run
        there.update({function: partial(_call, self, function, run) for function in part.called})
        there.update(dict.fromkeys(part.marks, mark))

    def empty(self) -> None:
        """Take away what stands in the place of the package's own."""
        part, _ = vars(self).pop(_STATE, (Part(), None))
        for name in (*part.called, *part.marks):
            del vars(self)[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        part, run = vars(self).get(_STATE, (Part(), partial(importlib.import_module, self.__name__)))
        if name in part.below:
            return importlib.import_module(f"{self.__name__}.{name}")
        run()
        if type(self) is ModuleType:
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")  # it runs, and has come no further


def _call(module: ModuleType, function: str, run: Callable[[], None], *given: Any, **named: Any) -> Any:
    run()
    return getattr(module, function)(*given, **named)


def mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments."""
    return (lambda marked: marked) if function is None else function


def _as_loaded(module: ModuleType) -> ModuleSpec | None:
    """A spec by which an import that is under way finds a module that is loaded by now."""
    loader: Any = module.__loader__

    def leave(_: ModuleType) -> None:
        del loader.create_module, loader.exec_module

    loader.create_module = lambda _: module
    loader.exec_module = leave
    return module.__spec__
