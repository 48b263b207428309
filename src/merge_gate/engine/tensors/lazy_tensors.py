"""Tensors with addresses and no memory: each gets its values when it is used, and is emptied again.

In: `LazyGroup`s, which are tensors that get their values together. Out: `LazyTensors`, whose tensors behave like any
other, but cost no memory until they are `filled`. Knows nothing of models.

1. The system gives addresses, not memory. A page exists from its first read or write.
2. `filled` writes the values of a group into its place, and gives the pages back afterwards (madvise).
3. So a page that exists outside of `filled` shows that code has read zeros for values, or has written there.
   `fill_touched` asks the system (mincore), and a result that used such a tensor must be computed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from merge_gate.engine.tensors.watch import unwatched
from merge_gate.records.files import FileSpan

HUGE_BYTES = 1 << 21
"""A huge page. Each group begins at one if it is as large, so that no huge page has parts of two groups."""

MOST_HUGE_GROUPS = 1 << 13
"""Each range with huge pages counts as a mapping, and a process may have 65,530 of them."""

_NO_RESERVE = 0x4000  # MAP_NORESERVE: no memory is set aside for what may never be filled

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyGroup:
    """Tensors that get their values together.

    Attributes:
        outlines: the shape and the dtype of each tensor. None is empty: an empty tensor has no address.
        fill: writes all values of these tensors.
        spans: the parts of files that `fill` reads, in its order.
        read_rows: writes the values of some rows of its only tensor, from the given one on, into other memory; None if
            no rows can be read alone.
    """

    outlines: Mapping[str, tuple[Sequence[int], torch.dtype]]
    fill: Callable[[Tensors], None]
    spans: tuple[FileSpan, ...] = ()
    read_rows: Callable[[torch.Tensor, int], None] | None = None


@dataclass(slots=True, kw_only=True)
class _MappedGroup:
    """One group: its pages from `start` to `end`, and its tensors. `readers` keep it filled."""

    start: int
    end: int
    tensors: Tensors
    group: LazyGroup
    readers: int = 0
    kept: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class LazyTensors:
    """The tensors of groups, in the groups' order.

    Raises:
        OSError: the system has no such addresses.
    """

    def __init__(self, groups: Iterable[LazyGroup]) -> None:
        groups = tuple(groups)
        self.tensors: dict[str, torch.Tensor] = {}
        self._in_order: list[_MappedGroup] = []
        self._by_address: dict[int, _MappedGroup] = {}
        self._touched = False
        sizes = [sum(map(_pages, map(_size, group.outlines.values()))) for group in groups]
        whole = sum(size + (HUGE_BYTES if size >= HUGE_BYTES else 0) for size in sizes)
        self._memory = mmap.mmap(-1, max(whole, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        with contextlib.suppress(OSError):  # a kernel without huge pages; they would reach across groups
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
        start = 0
        for group, size in zip(groups, sizes, strict=True):
            if size >= HUGE_BYTES:
                start += -(address + start) % HUGE_BYTES
                self._use_huge_pages(start, size)
            end = start
            tensors: dict[str, torch.Tensor] = {}
            for name, (shape, dtype) in group.outlines.items():
                tensors[name] = self._tensor(end, shape, dtype)
                end += _pages(_size((shape, dtype)))
            mapped = _MappedGroup(start=start, end=end, tensors=tensors, group=group)
            start = end
            self._in_order.append(mapped)
            self._by_address |= dict.fromkeys((tensor.data_ptr() for tensor in tensors.values()), mapped)
            self.tensors |= tensors

    def _use_huge_pages(self, start: int, size: int) -> None:
        """Fill a large group by huge pages, as far as they lie in it: that takes a third of the kernel's time."""
        if len(self._in_order) < MOST_HUGE_GROUPS:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE, start, size - size % HUGE_BYTES)

    def _tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        flat = torch.frombuffer(self._memory, dtype=dtype, count=torch.Size(shape).numel(), offset=start)
        return flat.view(tuple(shape))

    @contextlib.contextmanager
    def filled(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Inside of the `with` block, the lazy ones of these tensors have their values."""
        places = (self._by_address.get(tensor.data_ptr()) for tensor in tensors)
        with contextlib.ExitStack() as stack:
            for mapped in {id(mapped): mapped for mapped in places if mapped is not None}.values():
                self._fill(mapped)
                stack.callback(self._leave, mapped)
            yield

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of the lazy tensors."""
        return tensor.data_ptr() in self._by_address

    def groups(self, names: Iterable[str]) -> list[LazyGroup]:
        """The groups that have one of these tensors, in order."""
        wanted = set(names)
        return [mapped.group for mapped in self._in_order if not wanted.isdisjoint(mapped.tensors)]

    def kept_bytes(self) -> int:
        """The memory of the tensors that have their values for good."""
        return sum(mapped.end - mapped.start for mapped in self._in_order if mapped.kept)

    def is_filled(self, group: LazyGroup) -> bool:
        """Whether its tensors have their values for good."""
        return all(map(self.is_kept, (self.tensors[name] for name in group.outlines)))

    def is_kept(self, tensor: torch.Tensor) -> bool:
        """Whether it has its values for good. True for a tensor that is not lazy."""
        mapped = self._by_address.get(tensor.data_ptr())
        return mapped is None or mapped.kept

    def rows_of(self, tensor: torch.Tensor) -> Callable[[torch.Tensor, int], None] | None:
        """What reads rows of a tensor without filling it. None if it has its values for good, or only has all rows."""
        mapped = self._by_address.get(tensor.data_ptr())
        return None if mapped is None or mapped.kept else mapped.group.read_rows

    def fill_touched(self) -> bool:
        """Fill, for good, each group that was read or written while it had no values. True if there was one."""
        for mapped in self._in_order:
            if not mapped.kept and self._exists(mapped):
                self._keep(mapped)
        touched, self._touched = self._touched, False
        return touched

    def forget_touched(self) -> bool:
        """Empty each group that was read or written while it had no values. True if there was one."""
        touched = [
            mapped for mapped in self._in_order if not mapped.kept and not mapped.readers and self._exists(mapped)
        ]
        for mapped in touched:
            self._empty(mapped)
        return bool(touched)

    def refill(self) -> None:
        """Write the values of all tensors that are filled for good once more."""
        for mapped in self._in_order:
            if mapped.kept:
                _fill(mapped)

    def _keep(self, mapped: _MappedGroup) -> None:
        _fill(mapped)
        mapped.kept = self._touched = True

    def _fill(self, mapped: _MappedGroup) -> None:
        with mapped.lock:
            if not mapped.readers and not mapped.kept:
                if self._exists(mapped):  # after the values are written, nothing would show it
                    self._keep(mapped)
                else:
                    self._write(mapped)
            mapped.readers += 1

    def _write(self, mapped: _MappedGroup) -> None:
        try:
            _fill(mapped)
        except BaseException:
            self._empty(mapped)  # a part of the values must not look like a read
            raise

    def _leave(self, mapped: _MappedGroup) -> None:
        with mapped.lock:
            mapped.readers -= 1
            if not mapped.readers and not mapped.kept:
                self._empty(mapped)

    def _empty(self, mapped: _MappedGroup) -> None:
        self._memory.madvise(mmap.MADV_DONTNEED, mapped.start, mapped.end - mapped.start)

    def _exists(self, mapped: _MappedGroup) -> bool:
        """Whether any page of it exists."""
        size = mapped.end - mapped.start
        pages = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        address = ctypes.c_void_p(next(iter(mapped.tensors.values())).data_ptr())
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), pages):
            return True  # if the system does not answer, the place counts as touched
        return any(pages.raw)


def _fill(mapped: _MappedGroup) -> None:
    with torch.device("cpu"), unwatched():  # PEFT makes layers without values under `torch.device("meta")`
        mapped.group.fill(mapped.tensors)


def _size(outline: tuple[Sequence[int], torch.dtype]) -> int:
    shape, dtype = outline
    return torch.Size(shape).numel() * dtype.itemsize


def _pages(size_bytes: int) -> int:
    """The size in whole pages, at least one."""
    return max(1, -(-size_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE
