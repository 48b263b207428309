"""Runs several models that share hollow tensors at the same time, so that each tensor is filled once for all of them.

In: models, their inputs, and the hollow tensors (hollow.py). Out: a `Run` for each model: what it returned, or its
exception. Knows no adapter. A model without hollow tensors runs as it would alone.

1. Each model runs in a thread of its own, and only one thread runs at a time.
2. Before an operation reads a hollow tensor, its thread waits.
3. When all threads wait, the tensor that comes first in the model is filled. Each thread that waits for it goes on
   until it waits for another tensor. Then the tensor is emptied.

An operation reads its tensors, whichever module they belong to. So a model that reads a layer's weight without calling
the layer runs like any other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

MOST_OPERATIONS = 200_000
"""The limit of one model's operations, for code that loops. A Llama with 80 layers needs about 10,000."""

Filled = Callable[[Iterable[str]], AbstractContextManager[None]]
Own = Callable[[str], torch.Tensor | None]


@dataclass(slots=True, kw_only=True)
class Run:
    """One model's forward pass. `own` gives this model's values of a hollow tensor, or None for the tensor's own.

    `returned` is what the model returned. `error` is why it returned nothing.
    """

    model: Any
    inputs: Mapping[str, Any]
    own: Own | None = None
    returned: Any = None
    error: Exception | None = None


def run_together(runs: Sequence[Run], tensors: Mapping[str, torch.Tensor], filled: Filled) -> None:
    """Run all of them, each as if it ran alone, with seed 0.

    Args:
        runs: the models. One that fails has its exception in `error`; the others go on.
        tensors: the hollow tensors in the order in which a model uses them, which decides which is filled next.
        filled: gives the tensors of these names values for a `with` block. Its exceptions are raised.
    """
    places = {
        tensor.untyped_storage().data_ptr(): (number, name) for number, (name, tensor) in enumerate(tensors.items())
    }
    threads = [_Thread(run, places) for run in runs]
    try:
        for thread in threads:
            thread.go_on()
        while waiting := [thread for thread in threads if thread.wanted]:  # 3.
            wanted = min(thread.wanted for thread in waiting)
            with filled(name for _, name in wanted):
                for thread in waiting:
                    if thread.wanted <= wanted:
                        thread.go_on(wanted)
    finally:
        for thread in threads:
            thread.stop()


class _Stopped(BaseException):
    """Ends a thread that waits for a tensor that will not come."""


Wanted = tuple[tuple[int, str], ...]


class _Thread:
    """Steps 1 and 2. `wanted` are the tensors that it waits for, sorted; empty if it has ended."""

    def __init__(self, run: Run, places: Mapping[int, tuple[int, str]]) -> None:
        self.wanted: Wanted = ()
        self._run, self.places = run, places
        self._open: frozenset[tuple[int, str]] = frozenset()
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._is_stopped = False
        self._random = torch.Generator().manual_seed(0).get_state()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def go_on(self, open_tensors: Wanted = ()) -> None:
        """Let the model run until it waits for a tensor that is not open, or ends."""
        self._open, self.wanted = frozenset(open_tensors), ()
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        self._turn.release()
        self._pause.acquire()
        self._random = torch.get_rng_state()
        torch.set_rng_state(before)

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._is_stopped = True
        self._turn.release()
        self._thread.join()

    def wait_for(self, names: frozenset[tuple[int, str]]) -> None:
        """Called by the model's own thread before it reads these tensors."""
        if not names <= self._open:
            self.wanted = tuple(sorted(names))
            self._pause.release()
            self._turn.acquire()
            if self._is_stopped:
                raise _Stopped

    def values(self, name: str) -> torch.Tensor | None:
        return self._run.own(name) if self._run.own is not None else None

    def _work(self) -> None:
        self._turn.acquire()
        try:
            if not self._is_stopped:
                with torch.no_grad(), _Reads(self):
                    self._run.returned = self._run.model(**self._run.inputs)
        except _Stopped:
            pass
        except Exception as error:  # a model's own code
            self._run.error = error
        finally:
            self._pause.release()


class _Reads(TorchDispatchMode):
    """Waits before each operation that reads a hollow tensor, and gives the operation the model's own values of it."""

    def __init__(self, thread: _Thread) -> None:
        super().__init__()
        self._thread, self._left = thread, MOST_OPERATIONS

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError(f"more than {MOST_OPERATIONS} operations")
        kwargs = kwargs or {}
        if not self._thread.places or _returns_views(function):
            return function(*args, **kwargs)
        names = frozenset(filter(None, map(self._place, _pytree.tree_leaves((args, kwargs)))))
        if names:
            self._thread.wait_for(names)
            args, kwargs = _pytree.tree_map(self._replaced, (args, kwargs))
        return function(*args, **kwargs)

    def _place(self, value: Any) -> tuple[int, str] | None:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.numel():
            return None
        return self._thread.places.get(value.untyped_storage().data_ptr())

    def _replaced(self, value: Any) -> Any:
        """The same view of the model's own values, if it has some."""
        place = self._place(value)
        own = self._thread.values(place[1]) if place is not None else None
        if own is None:
            return value
        return own.as_strided(value.shape, value.stride(), own.storage_offset() + value.storage_offset())


@functools.cache
def _returns_views(function: Any) -> bool:
    """Whether an operation reads no values: what it returns are views of what it gets."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
