"""Tensors with addresses and no values: each is cast from another tensor while it is read, and then emptied again.

In: tensors, and the dtypes that they are wanted in. Out: `Hollow`, whose tensors behave like any other, but cost no
memory until they are `filled`. Knows nothing of models.

1. The system gives addresses, not memory. A page exists from its first read or write.
2. `filled` casts a tensor into its place, and gives the pages back afterwards (madvise).
3. So a page that exists outside of `filled` shows that code has read zeros for values, or has written there.
   `fill_touched` asks the system (mincore), and a result that used such a tensor must be computed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose casts are element by element and monotone: x ≤ y stays so, and the extremes of a tensor its extremes."""

LEAST_ELEMENTS = 512
"""A smaller tensor is not worth a page."""

_NO_RESERVE = 0x4000  # MAP_NORESERVE: no memory is set aside for what may never be filled


@dataclass(slots=True, kw_only=True)
class _Place:
    """One tensor: its pages from `start` to `end`, and the `source` of its values. `readers` keep it filled."""

    start: int
    end: int
    tensor: torch.Tensor
    source: torch.Tensor
    readers: int = 0
    kept: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Hollow:
    """Tensors of the shapes of others, in dtypes of their own.

    Args:
        sources: tensors of `CASTABLE` dtypes, which no code writes to.
        dtypes: the dtype of the new tensor for each source.

    Raises:
        OSError: the system has no such memory.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[int, _Place] = {}
        self._touched = False
        spans = {name: source.numel() * dtypes[name].itemsize for name, source in sources.items()}
        size = sum(_pages(span) for span in spans.values())
        self._memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        with contextlib.suppress(OSError):  # a kernel without huge pages; they would reach across tensors
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = 0
        for name, source in sources.items():
            flat = torch.frombuffer(self._memory, dtype=dtypes[name], count=source.numel(), offset=start)
            tensor = self.tensors[name] = flat.view(source.shape)
            end = start + _pages(spans[name])
            self._places[tensor.data_ptr()] = _Place(start=start, end=end, tensor=tensor, source=source)
            start = end

    @contextlib.contextmanager
    def filled(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Inside of the `with` block, the hollow ones of these tensors have their values."""
        found = {tensor.data_ptr(): tensor for tensor in tensors}
        places = [self._places[address] for address in found if address in self._places]
        for place in places:
            self._fill(place)
        try:
            yield
        finally:
            for place in places:
                self._leave(place)

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a hollow tensor is cast from, in its own dtype. Any other tensor is returned as it is."""
        place = self._places.get(tensor.data_ptr())
        return tensor if place is None else place.source

    def fill_touched(self) -> bool:
        """Fill, for good, each tensor that was read or written while it had no values. True if there was one."""
        for place in self._places.values():
            if not place.kept and self._exists(place):
                self._keep(place)
        touched, self._touched = self._touched, False
        return touched

    def _keep(self, place: _Place) -> None:
        place.kept = self._touched = True
        place.tensor.copy_(place.source)

    def _fill(self, place: _Place) -> None:
        with place.lock:
            if not place.readers and not place.kept:
                if self._exists(place):  # after the copy nothing would show it
                    self._keep(place)
                place.tensor.copy_(place.source)
            place.readers += 1

    def _leave(self, place: _Place) -> None:
        with place.lock:
            place.readers -= 1
            if not place.readers and not place.kept:
                self._memory.madvise(mmap.MADV_DONTNEED, place.start, place.end - place.start)

    def _exists(self, place: _Place) -> bool:
        """Whether any page of it exists."""
        size = place.end - place.start
        pages = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        address = ctypes.c_void_p(place.tensor.data_ptr())
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), pages):
            return True  # if the system does not answer, the place counts as touched
        return any(pages.raw)


def _pages(size_bytes: int) -> int:
    """The size in whole pages, at least one."""
    return max(1, -(-size_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE
