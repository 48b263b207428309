"""The worker's heap: freed memory is reused for the next tensor, and returned to the kernel only in large amounts.

In: nothing. Out: settings of glibc's allocator, and a call that returns memory. Knows nothing of tensors.
"""

# By default glibc asks the kernel for each large piece of memory, and returns it when it is freed. PEFT merges with
# whole tensors, six or seven in a row, and the kernel clears every page of each: half the cost of a cross-check.

from __future__ import annotations

import ctypes

REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(5 << 26)}
"""Environment variables for glibc: pieces of every size come from one heap, which keeps at most 320 MiB of free memory
at its end. Another libc ignores them."""


def give_back() -> None:
    """Return unused pages to the kernel. To be called after something large was released."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
