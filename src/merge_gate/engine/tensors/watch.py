"""Refuses writes into memory that must not change, before they happen.

In: named tensors. Out: `Memory`, which knows whose memory an address is, and `Watch`, a `with` block in which torch
writes into none of it. Knows no models.

A watch sees what torch's dispatcher sees: operations in place, `out=`, through `.data`, a view, or a tensor that `set_`
has moved there, in its own thread and in threads that are started in the block. It does not see `numpy()`, and native
code that gets an address.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from merge_gate.engine.tensors.measure import shares_storage
from merge_gate.records.refusals import Refused


class Memory:
    """Tensors whose memory must not change, by name. They stay in use. `beneath` is other such memory."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]] = (), beneath: Memory | None = None) -> None:
        spans = ((tensor.data_ptr(), name, tensor) for name, tensor in tensors)
        self._spans = sorted((span for span in spans if span[0]), key=_start)
        self._beneath = beneath

    def protect(self, name: str, *tensors: torch.Tensor) -> None:
        """Add tensors."""
        for tensor in tensors:
            if tensor.data_ptr():
                bisect.insort(self._spans, (tensor.data_ptr(), name, tensor), key=_start)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name of the tensor in whose memory this one lies."""
        address = tensor.data_ptr()
        place = bisect.bisect(self._spans, address, key=_start) - 1
        if place >= 0:
            start, name, known = self._spans[place]
            if address < start + known.nbytes:
                return name
        return None if self._beneath is None else self._beneath.name_of(tensor)


def _start(span: tuple[int, str, torch.Tensor]) -> int:
    return span[0]


class _OfThread(threading.local):
    """The watches that a thread is in, and how many `unwatched` blocks."""

    def __init__(self) -> None:
        self.watches: list[Watch] = []
        self.pauses = 0


_OF_THREAD = _OfThread()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Let this thread write anywhere in the `with` block: the gate fills tensors of the base."""
    _OF_THREAD.pauses += 1
    try:
        yield
    finally:
        _OF_THREAD.pauses -= 1


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside of the `with` block, refuse what this thread, and each that it starts, writes into `memory`.

    `step` names what runs in the block.

    Raises:
        Refused: code wanted to write there. It is raised again at the end of the block, if it was caught.
    """

    def __init__(self, memory: Memory, step: str, refused: list[Refused] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._step = memory, step
        self._refused = [] if refused is None else refused

    def __enter__(self) -> Self:
        _OF_THREAD.watches.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        _OF_THREAD.watches.remove(self)
        if self._refused and not isinstance(error, Refused):  # it was caught, or raised in another thread
            raise self._refused[0] from error

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside of this `with` block, the watch is off, and costs nothing: the gate works on tensors of its own."""
        _OF_THREAD.watches.remove(self)
        try:
            with _disable_current_modes():
                yield
        finally:
            _OF_THREAD.watches.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        written = written_arguments(func)
        if written and not _OF_THREAD.pauses:
            for place, name in written:
                given = args[place] if place < len(args) else named.get(name)
                for tensor in given if isinstance(given, list | tuple) else (given,):
                    self._refuse(func, tensor, args)
        return func(*args, **named)

    def _refuse(self, func: Any, tensor: Any, args: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            return
        name = self._memory.name_of(tensor)
        if name is None or (func is _COPY and shares_storage(tensor, args[1])):  # torch loads a counter onto itself
            return
        self._refused.append(
            Refused("base_written", tensor=name, operation=func.overloadpacket.__name__, step=self._step)
        )
        raise self._refused[-1]

    def of_thread(self) -> Watch:
        """A watch over the same memory for another thread. The block of this one raises what it refuses."""
        return Watch(self._memory, self._step, self._refused)


_COPY = torch.ops.aten.copy_.default


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes to, by position and name. `set_` writes nothing: it moves a tensor."""
    if func.overloadpacket is torch.ops.aten.set_:
        return ()
    arguments = enumerate(func._schema.arguments)
    return tuple(
        (place, arg.name) for place, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write
    )


def _started_watched(start: Any) -> Any:
    """`Thread.start`, whose threads have the watch of the thread that starts them. A dispatch mode has one thread."""

    @functools.wraps(start)
    def start_watched(thread: threading.Thread) -> None:
        if _OF_THREAD.watches and not _OF_THREAD.pauses:
            run, watch = thread.run, _OF_THREAD.watches[-1].of_thread()

            def run_watched() -> None:
                with contextlib.suppress(Refused), watch:
                    run()

            thread.run = run_watched  # type: ignore[method-assign]
        start(thread)

    return start_watched


threading.Thread.start = _started_watched(threading.Thread.start)  # type: ignore[method-assign]
