"""The worker's heap: memory that a tensor has left is there for the next one, and given back where much of it is free.

In: nothing. Out: settings of glibc's allocator, and a call. Knows nothing of tensors.

By itself glibc asks the kernel for each large piece, and hands it back when it is freed. PEFT merges with whole
tensors, six or seven after another, and the kernel clears every page of each of them anew: half of what a witness cost.
"""

from __future__ import annotations

import ctypes

REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(5 << 26)}
"""Environment: pieces of every size come from one heap, and no more than so many bytes stay free at its end. A libc
other than glibc does not look."""


def give_back() -> None:
    """Give pages that nobody uses back to the kernel: after something large has been let go of."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
