"""Reads the header of a GGUF file, which is hostile: every length is checked before anything is read or kept.

In: an open file. Out: `GgufHeader`. Follows ggml's docs/gguf.md, versions 2 and 3. The `gguf` package trusts the file,
so it gets single tensors only, whose bytes are known to be there.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any

from merge_gate._internal.errors import EngineError
from merge_gate._internal.text import quoted

MOST_HEADER_BYTES = 1 << 27
MOST_TENSORS, MOST_KEYS, MOST_DIMENSIONS = 100_000, 10_000, 4
MOST_NAME_BYTES, MOST_KEPT_BYTES = 1_000, 200
"""Names may be so long. Of longer strings, only the length is read."""

MOST_ALIGNMENT = 1 << 16
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers of types, and those of `struct`."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in the file: its shape as torch has it, ggml's number of its type, and its place in bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size_bytes: int


@dataclass(slots=True)
class GgufHeader:
    """Keys with a single value (strings up to 200 bytes), and the tensors by name."""

    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


class _Header:
    """The first bytes of a file, read in order."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.limit = min(self.size, MOST_HEADER_BYTES)

    def bytes_of(self, count: int, what: str) -> bytes:
        self._refuse_beyond(count, what)
        return self._file.read(count)

    def skip(self, count: int, what: str) -> None:
        self._refuse_beyond(count, what)
        self._file.seek(count, os.SEEK_CUR)

    def _refuse_beyond(self, count: int, what: str) -> None:
        here = self._file.tell()
        if count > self.limit - here:
            raise broken(f"{what} at byte {here:,} needs {count:,} bytes, and {max(0, self.limit - here):,} are left")

    def number(self, format_: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{format_}", self.bytes_of(struct.calcsize(f"<{format_}"), what))
        return value

    def count(self, most: int, what: str) -> int:
        value: int = self.number("Q", what)
        if value > most:
            raise broken(f"{what} is {value:,}, expected at most {most:,}")
        return value

    def name(self, what: str) -> str:
        try:
            return self.bytes_of(self.count(MOST_NAME_BYTES, f"the length of {what}"), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise broken(f"{what} is not UTF-8 text") from error

    def value(self, key: str) -> Any:
        """A single value; None for arrays, and for strings that are long or no text."""
        kind = self.number("I", f"the type of {key}")
        if kind == _ARRAY:
            self._skip_array(key)
            return None
        if kind == _STRING:
            length = self.count(self.limit, f"the length of {key}")
            if length > MOST_KEPT_BYTES:
                return self.skip(length, key)
            return self.bytes_of(length, key).decode("utf-8", "replace")
        return self.number(_scalar(kind, key), key)

    def _skip_array(self, key: str) -> None:
        kind = self.number("I", f"the type of the items of {key}")
        length = self.count(self.limit, f"the length of {key}")
        if kind != _STRING:
            self.skip(length * struct.calcsize(f"<{_scalar(kind, key)}"), key)
            return
        for _ in range(length):
            self.skip(self.count(self.limit, f"the length of an item of {key}"), f"an item of {key}")

    def data_start(self, alignment: int) -> int:
        return -(-self._file.tell() // alignment) * alignment


def broken(what: str) -> EngineError:
    """The error of a file that contradicts the format."""
    return EngineError(f"the GGUF file is broken: {what}", hint="write or download it again, and compare its size")


def _scalar(kind: int, key: str) -> str:
    if kind not in _SCALARS:
        raise broken(f"{quoted(key, 120)} has the type {kind}, expected one of GGUF's types of single values")
    return _SCALARS[kind]


def read_header(file: BufferedReader, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Read the header. `sizes` has the values and the bytes of a block of each of ggml's types.

    Raises:
        EngineError: the file is broken, or has what cannot be read. No value of a tensor was read.
    """
    header, result = _Header(file), GgufHeader()
    if (magic := header.bytes_of(4, "the magic number")) != b"GGUF":
        raise broken(f"it begins with {quoted(magic.hex(), 20)}, expected the letters GGUF")
    if (version := header.number("I", "the version")) not in {2, 3}:
        raise broken(f"its version is {version:,}, expected 2 or 3, in little-endian order")
    tensor_count = header.count(MOST_TENSORS, "the number of tensors")
    for _ in range(header.count(MOST_KEYS, "the number of keys")):
        key = header.name("a key")
        if key in result.keys:
            raise broken(f"the key {quoted(key, 120)} is there twice")
        result.keys[key] = header.value(quoted(key, 120))
    tensors = [_tensor(header, sizes) for _ in range(tensor_count)]
    alignment = result.keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment % 8:
        raise broken(f"general.alignment is {quoted(str(alignment), 40)}, expected a multiple of 8")
    start = end = header.data_start(alignment)
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        name, place = quoted(tensor.name, 120), start + tensor.start
        if tensor.name in result.tensors:
            raise broken(f"the tensor {name} is there twice")
        if place % alignment or place < end or place + tensor.size_bytes > header.size:
            raise broken(
                f"the tensor {name} has {tensor.size_bytes:,} bytes from {place:,} on, expected a multiple of "
                f"{alignment:,} from {end:,} on, and an end within the {header.size:,} bytes of the file"
            )
        end = place + tensor.size_bytes
        result.tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.type, place, tensor.size_bytes)
    return result


def _tensor(header: _Header, sizes: Mapping[int, tuple[int, int]]) -> GgufTensor:
    name = header.name("the name of a tensor")
    shown = quoted(name, 120)
    if not 0 < (count := header.number("I", f"the number of dimensions of {shown}")) <= MOST_DIMENSIONS:
        raise broken(f"the tensor {shown} has {count:,} dimensions, expected 1 to {MOST_DIMENSIONS}")
    shape = tuple(header.number("Q", f"the shape of {shown}") for _ in range(count))[::-1]
    kind = header.number("I", f"the type of {shown}")
    if kind not in sizes:
        raise EngineError(
            f"the tensor {shown} has ggml's type {kind}, which the installed package gguf does not know",
            hint="upgrade gguf, or convert the release to another type",
        )
    values, size_bytes = sizes[kind]
    numel = math.prod(shape)
    if not 0 < numel <= header.size * values or shape[-1] % values:
        raise broken(f"the tensor {shown} has the shape {list(shape)}, which its file or its type cannot have")
    return GgufTensor(name, shape, kind, header.number("Q", f"the place of {shown}"), numel // values * size_bytes)
