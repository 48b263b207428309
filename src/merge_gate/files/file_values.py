"""Looks for NaN and Inf in the tensors of a safetensors file, by their bits.

In: an open file and the places of its tensors. Out: `TensorStats` of tensors that are not finite. Reads blocks, and
uses the standard library alone: `merge-gate check` starts without numpy.
"""

# 1. A byte of each value tells whether its exponent may be the largest one. Searching for these bytes is fast, and
#    most blocks have none.
# 2. Otherwise each condition on a byte gives a byte of 0 or 1 for each value, and integers combine these.

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import TensorStats

if TYPE_CHECKING:
    from io import BufferedReader

BLOCK_BYTES = 1 << 20

_Test = tuple[int, frozenset[int]]
"""A byte of a value, and what it has to be."""


def _byte(place: int, *values: int) -> _Test:
    return place, frozenset(values)


def _ieee(size: int, exponents: tuple[int, int], second: int | None) -> tuple[tuple[_Test, ...], ...]:
    """The tests for values that are not finite, +Inf, and -Inf: `exponents` are the last bytes of both infinities.

    `second` is the least byte before it, if the exponent needs that; then the last byte alone is one of the two.
    """
    last = size - 1
    zeros = tuple(_byte(place, 0) for place in range(last - (second is not None)))
    if second is None:
        exponent: tuple[_Test, ...] = (_byte(last, *(first + low for first in exponents for low in range(4))),)
        infinite = zeros
    else:
        exponent = (_byte(last, *exponents), _byte(last - 1, *range(second, 256)))
        infinite = (*zeros, _byte(last - 1, second))
    return exponent, *((_byte(last, first), *infinite) for first in exponents)


_RULES: dict[str, tuple[tuple[_Test, ...], ...]] = {
    "F64": _ieee(8, (0x7F, 0xFF), 0xF0),
    "F32": _ieee(4, (0x7F, 0xFF), 0x80),
    "C64": _ieee(4, (0x7F, 0xFF), 0x80),
    "BF16": _ieee(2, (0x7F, 0xFF), 0x80),
    "F16": _ieee(2, (0x7C, 0xFC), None),
    "F8_E5M2": _ieee(1, (0x7C, 0xFC), None),
    "F8_E4M3": ((_byte(0, 0x7F, 0xFF),),),
    "F8_E8M0": ((_byte(0, 0xFF),),),
}
_ALWAYS_FINITE = {"F4", "F6_E2M3", "F6_E3M2", "BOOL"}


def has_rule(dtype: str) -> bool:
    """Whether it is known which values of a dtype are not finite. Integers all are."""
    return dtype in _RULES or dtype in _ALWAYS_FINITE or dtype[0] in "UI"


def nonfinite(file: BufferedReader, places: Iterable[tuple[StoredTensor, int, int]]) -> Iterator[TensorStats]:
    """The tensors with NaN or Inf, with their counts. A complex number counts as two values.

    Raises:
        OSError: the file cannot be read.
    """
    for tensor, begin, end in places:
        if tensor.dtype in _RULES:
            found = _read(file, _RULES[tensor.dtype], begin, end)
            if found.nonfinite:
                yield _stats(tensor, found)


@dataclass(slots=True)
class _Found:
    """How many values are not finite, +Inf, and -Inf, and the first that is not finite."""

    nonfinite: int = 0
    posinf: int = 0
    neginf: int = 0
    first: int | None = None


def _read(file: BufferedReader, rule: tuple[tuple[_Test, ...], ...], begin: int, end: int) -> _Found:
    found, size = _Found(), 1 + max(place for tests in rule for place, _ in tests)
    file.seek(begin)
    for start in range(0, end - begin, BLOCK_BYTES):
        wanted_bytes = min(BLOCK_BYTES, end - begin - start)
        block = file.read(wanted_bytes)
        if len(block) < wanted_bytes:
            raise OSError(errno.EIO, "it became shorter while it was read")
        place, values = rule[0][0]
        bytes_there = block[place::size]
        if not any(byte in bytes_there for byte in values):  # 1.
            continue
        counts = [_marked(block, size, tests) for tests in rule]  # 2.
        if found.first is None and (first := counts[0].find(1)) >= 0:
            found.first = start // size + first
        found.nonfinite += counts[0].count(1)
        found.posinf += counts[1].count(1) if len(counts) > 1 else 0
        found.neginf += counts[2].count(1) if len(counts) > 1 else 0
    return found


def _marked(block: bytes, size: int, tests: Iterable[_Test]) -> bytes:
    """A byte for each value: 1 if it meets all tests."""
    marked, length = -1, len(block) // size
    for place, values in tests:
        table = bytes(byte in values for byte in range(256))
        marked &= int.from_bytes(block[place::size].translate(table), "little")
    return marked.to_bytes(length, "little")


def _stats(tensor: StoredTensor, found: _Found) -> TensorStats:
    parts = 2 if tensor.dtype == "C64" else 1
    numel = math.prod(tensor.shape) * parts
    index, left = [], (found.first or 0) // parts
    for length in reversed(tensor.shape):
        left, position = divmod(left, length)
        index.append(position)
    stats = TensorStats(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, numel=numel)
    return replace(
        stats,
        nan=found.nonfinite - found.posinf - found.neginf,
        posinf=found.posinf,
        neginf=found.neginf,
        first_index=tuple(reversed(index)),
    )
