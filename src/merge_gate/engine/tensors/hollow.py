"""Tensors with addresses and no memory: each gets its values when it is used, and is emptied again.

In: `Cell`s, which are tensors that get their values together. Out: `Hollow`, whose tensors behave like any other, but
cost no memory until they are `filled`. Knows nothing of models.

1. The system gives addresses, not memory. A page exists from its first read or write.
2. `filled` writes the values of a cell into its place, and gives the pages back afterwards (madvise).
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

from merge_gate.records.files import FileSpan

HUGE_BYTES = 1 << 21
"""A huge page. Each cell begins at one if it is as large, so that no huge page has parts of two cells."""

MOST_HUGE_CELLS = 1 << 13
"""Each range with huge pages counts as a mapping, and a process may have 65,530 of them."""

_NO_RESERVE = 0x4000  # MAP_NORESERVE: no memory is set aside for what may never be filled

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Tensors that get their values together.

    Attributes:
        outlines: the shape and the dtype of each tensor. None is empty: an empty tensor has no address.
        fill: writes all values of these tensors.
        spans: the parts of files that `fill` reads, in its order.
    """

    outlines: Mapping[str, tuple[Sequence[int], torch.dtype]]
    fill: Callable[[Tensors], None]
    spans: tuple[FileSpan, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Place:
    """One cell: its pages from `start` to `end`, and its tensors. `readers` keep it filled."""

    start: int
    end: int
    tensors: Tensors
    cell: Cell
    readers: int = 0
    kept: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Hollow:
    """The tensors of cells, in the cells' order.

    Raises:
        OSError: the system has no such addresses.
    """

    def __init__(self, cells: Iterable[Cell]) -> None:
        cells = tuple(cells)
        self.tensors: dict[str, torch.Tensor] = {}
        self._in_order: list[_Place] = []
        self._places: dict[int, _Place] = {}
        self._touched = False
        sizes = [sum(map(_pages, map(_size, cell.outlines.values()))) for cell in cells]
        whole = sum(size + (HUGE_BYTES if size >= HUGE_BYTES else 0) for size in sizes)
        self._memory = mmap.mmap(-1, max(whole, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        with contextlib.suppress(OSError):  # a kernel without huge pages; they would reach across cells
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
        start = 0
        for cell, size in zip(cells, sizes, strict=True):
            if size >= HUGE_BYTES:
                start += -(address + start) % HUGE_BYTES
                self._use_huge_pages(start, size)
            end = start
            tensors: dict[str, torch.Tensor] = {}
            for name, (shape, dtype) in cell.outlines.items():
                tensors[name] = self._tensor(end, shape, dtype)
                end += _pages(_size((shape, dtype)))
            place = _Place(start=start, end=end, tensors=tensors, cell=cell)
            start = end
            self._in_order.append(place)
            self._places |= dict.fromkeys((tensor.data_ptr() for tensor in tensors.values()), place)
            self.tensors |= tensors

    def _use_huge_pages(self, start: int, size: int) -> None:
        """Fill a large cell by huge pages, as far as they lie in the cell: that takes a third of the kernel's time."""
        if len(self._in_order) < MOST_HUGE_CELLS:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE, start, size - size % HUGE_BYTES)

    def _tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        flat = torch.frombuffer(self._memory, dtype=dtype, count=torch.Size(shape).numel(), offset=start)
        return flat.view(tuple(shape))

    @contextlib.contextmanager
    def filled(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Inside of the `with` block, the hollow ones of these tensors have their values."""
        places = (self._places.get(tensor.data_ptr()) for tensor in tensors)
        with contextlib.ExitStack() as stack:
            for place in {id(place): place for place in places if place is not None}.values():
                self._fill(place)
                stack.callback(self._leave, place)
            yield

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of the hollow tensors."""
        return tensor.data_ptr() in self._places

    def cells(self, names: Iterable[str]) -> list[Cell]:
        """The cells that have one of these tensors, in order."""
        wanted = set(names)
        return [place.cell for place in self._in_order if not wanted.isdisjoint(place.tensors)]

    def kept_bytes(self) -> int:
        """The memory of the tensors that have their values for good."""
        return sum(place.end - place.start for place in self._in_order if place.kept)

    def is_filled(self, cell: Cell) -> bool:
        """Whether its tensors have their values for good."""
        return all(map(self.is_kept, (self.tensors[name] for name in cell.outlines)))

    def is_kept(self, tensor: torch.Tensor) -> bool:
        """Whether it has its values for good. True for a tensor that is not hollow."""
        place = self._places.get(tensor.data_ptr())
        return place is None or place.kept

    def fill_touched(self) -> bool:
        """Fill, for good, each cell that was read or written while it had no values. True if there was one."""
        for place in self._in_order:
            if not place.kept and self._exists(place):
                self._keep(place)
        touched, self._touched = self._touched, False
        return touched

    def forget_touched(self) -> bool:
        """Empty each cell that was read or written while it had no values. True if there was one."""
        touched = [place for place in self._in_order if not place.kept and not place.readers and self._exists(place)]
        for place in touched:
            self._empty(place)
        return bool(touched)

    def refill(self) -> None:
        """Write the values of all tensors that are filled for good once more."""
        for place in self._in_order:
            if place.kept:
                _fill(place)

    def _keep(self, place: _Place) -> None:
        _fill(place)
        place.kept = self._touched = True

    def _fill(self, place: _Place) -> None:
        with place.lock:
            if not place.readers and not place.kept:
                if self._exists(place):  # after the values are written, nothing would show it
                    self._keep(place)
                else:
                    self._write(place)
            place.readers += 1

    def _write(self, place: _Place) -> None:
        try:
            _fill(place)
        except BaseException:
            self._empty(place)  # a part of the values must not look like a read
            raise

    def _leave(self, place: _Place) -> None:
        with place.lock:
            place.readers -= 1
            if not place.readers and not place.kept:
                self._empty(place)

    def _empty(self, place: _Place) -> None:
        self._memory.madvise(mmap.MADV_DONTNEED, place.start, place.end - place.start)

    def _exists(self, place: _Place) -> bool:
        """Whether any page of it exists."""
        size = place.end - place.start
        pages = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        address = ctypes.c_void_p(next(iter(place.tensors.values())).data_ptr())
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), pages):
            return True  # if the system does not answer, the place counts as touched
        return any(pages.raw)


def _fill(place: _Place) -> None:
    with torch.device("cpu"):  # PEFT makes layers without values under `torch.device("meta")`
        place.cell.fill(place.tensors)


def _size(outline: tuple[Sequence[int], torch.dtype]) -> int:
    shape, dtype = outline
    return torch.Size(shape).numel() * dtype.itemsize


def _pages(size_bytes: int) -> int:
    """The size in whole pages, at least one."""
    return max(1, -(-size_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE
