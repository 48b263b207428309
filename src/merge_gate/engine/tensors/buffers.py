"""Memory for blocks of rows, used again from block to block and from weight to weight.

In: shapes and dtypes. Out: uninitialized tensors, and slices of rows that stay in cache. Imports torch only.
"""

from __future__ import annotations

import math

import torch

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block: 512 KiB of float32 product and 256 KiB each of delta and merged weight, in a core's own L2."""

BLOCK_ROWS = 64
"""Rows of a block come in multiples of this, so that every block of a factor starts on a cache line."""


class Buffers:
    """Memory that lives from block to block and from weight to weight. Each thread needs its own.

    It grows to the largest block it met, about 2.5 MiB for a weight in bfloat16.
    """

    def __init__(self, *, block_elements: int = BLOCK_ELEMENTS) -> None:
        self.block_elements = block_elements
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._last: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor of `like`'s shape and device, valid until the next call with this name."""
        return self.of_shape(name, like.shape, dtype, like.device)

    def of_shape(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key, last = (name, dtype, device), self._last.get((name, dtype, device))
        if last is not None and last.shape == shape:
            return last
        buffer, numel = self._buffers.get(key), math.prod(shape)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        self._last[key] = buffer[:numel].view(shape)
        return self._last[key]

    def blocks(self, rows: int, columns: int, device: torch.device) -> tuple[slice, ...]:
        """Slices of about `block_elements`; the last one takes what would be a short block. One slice off the CPU."""
        step = max(self.block_elements // columns // BLOCK_ROWS, 1) * BLOCK_ROWS
        count = max(rows // step, 1) if device.type == "cpu" else 1
        return tuple(slice(i * step, rows if i == count - 1 else (i + 1) * step) for i in range(count))
