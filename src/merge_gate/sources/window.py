"""A bounded window of a base's bytes in shared memory: slots that are filled, used, and released in turn.

In: a size. Out: `WindowSlot`s over one memfd, which another process can read. A slot has one owner at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable

from merge_gate.records.terms import record

POISON = b"\xff"
"""Every floating dtype reads NaN from these bytes, and integers their lowest or highest value."""

_SEAL_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE of Linux 5.1: later mappings can only be read."""


@record
class WindowSlot:
    """A part of the window: `size_bytes` from `start` on."""

    start: int
    size_bytes: int


class Window:
    """Slots of a fixed size in one memfd.

    Args:
        slot_bytes: the size of each slot; a multiple of the page size.
        slots: how many there are.
        poison: overwrite each released slot, so that a reader who kept it computes NaN. For tests.

    Attributes:
        is_sealed: the other process cannot write to it. If not, bytes that it has seen prove nothing, and a published
            file must not be written from them.
    """

    def __init__(self, slot_bytes: int, slots: int, *, poison: bool = False) -> None:
        if slot_bytes <= 0 or slot_bytes % mmap.PAGESIZE:
            raise ValueError(f"slot_bytes is {slot_bytes}, expected a multiple of {mmap.PAGESIZE}")
        self.slot_bytes, self.slots = slot_bytes, slots
        self.descriptor = os.memfd_create("merge-gate-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, slot_bytes * slots)
        self._memory = mmap.mmap(self.descriptor, slot_bytes * slots)
        self.is_sealed = False
        with contextlib.suppress(OSError):  # an older kernel
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self.is_sealed = True
        self._view = memoryview(self._memory)
        self._free = deque(range(0, slot_bytes * slots, slot_bytes))
        self._owned: set[int] = set()
        self._changed = threading.Condition()
        self._poison = poison
        self._is_closed = False

    def acquire(self, size_bytes: int, *, is_over: Callable[[], bool] = lambda: False) -> WindowSlot | None:
        """A slot that no one else has; waits until one is free. None once the window is closed, or once `is_over`.

        Call `wake` when `is_over` becomes true.
        """
        if not 0 < size_bytes <= self.slot_bytes:
            raise ValueError(f"{size_bytes} bytes do not fit in a slot of {self.slot_bytes}")
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._is_closed or is_over())
            if self._is_closed or is_over():
                return None
            start = self._free.popleft()
            self._owned.add(start)
            return WindowSlot(start=start, size_bytes=size_bytes)

    def wake(self) -> None:
        """Let every thread that waits for a slot ask again whether its wait is over."""
        with self._changed:
            self._changed.notify_all()

    def view(self, slot: WindowSlot) -> memoryview:
        """The bytes of a slot, for its owner."""
        with self._changed:
            if slot.start not in self._owned:
                raise AssertionError(f"the slot at {slot.start} is not in use")
        return self._view[slot.start : slot.start + slot.size_bytes]

    def release(self, slot: WindowSlot) -> None:
        """Give a slot back. No one may read it any more."""
        with self._changed:
            if slot.start not in self._owned:
                raise AssertionError(f"the slot at {slot.start} was released twice")
            if self._poison:
                self._view[slot.start : slot.start + self.slot_bytes] = POISON * self.slot_bytes
            self._owned.remove(slot.start)
            self._free.append(slot.start)
            self._changed.notify_all()  # one alone could be a thread whose wait is over

    def close(self) -> None:
        """End all waits, and close the descriptor. Slots in use stay readable until the last view is gone."""
        with self._changed:
            if not self._is_closed:
                os.close(self.descriptor)
            self._is_closed = True
            self._changed.notify_all()
