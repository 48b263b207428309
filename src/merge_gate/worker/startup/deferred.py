"""Packages that run at the first use of one of their names, and not at their import.

In: names of packages, and the parts of each that exist before it runs (`Part`). Out: `Deferring`, a context for
imports. Knows no package by name.

1. An import of such a package finds it as usual, but makes an empty module.
2. Reading a name of the module, or importing a module below it, runs the package first. What its `Part` names is an
   exception. So are names with double underscores, which code reads that looks at every module.
3. The interpreter's own import runs the package, into the module that exists. So every reference to the module stays
   valid, modules below it stay in place, and other threads wait as for any import.
"""

# importlib.util.LazyLoader does this for a module, but runs a package as soon as anything below it is imported.

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
    """The parts of a package that exist before it runs.

    `below` names modules of the package. `called` names functions, which run the package when they are called. `marks`
    names decorators, which return their function unchanged.
    """

    below: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


class Deferring:
    """A finder. It defers packages that are imported in its context, and stays until the last of them has run."""

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
        """The interface that importlib calls."""
        package, below = name.rpartition(".")[::2]  # 2.
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
        """Step 3: run a package, or wait for the thread that does."""
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
        """Remove the stand-ins of the package's own names."""
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
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}"
        )  # the package is still running, and has not defined the name


def _call(module: ModuleType, function: str, run: Callable[[], None], *given: Any, **named: Any) -> Any:
    run()
    return getattr(module, function)(*given, **named)


def mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator that changes nothing, with or without arguments."""
    return (lambda marked: marked) if function is None else function


def _as_loaded(module: ModuleType) -> ModuleSpec | None:
    """A spec with which an import in progress finds a module that is loaded by now."""
    loader: Any = module.__loader__

    def leave(_: ModuleType) -> None:
        del loader.create_module, loader.exec_module

    loader.create_module = lambda _: module
    loader.exec_module = leave
    return module.__spec__
