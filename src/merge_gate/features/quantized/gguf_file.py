"""Reads the header of a GGUF file, which is hostile: every length is checked before anything is read or kept.

In: an open file. Out: `GgufHeader`. Follows ggml's docs/gguf.md, versions 2 and 3. The `gguf` package trusts the file,
so it gets single tensors only, whose bytes are known to be there.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from io import BufferedReader
from typing import Any, NamedTuple

from merge_gate._internal.errors import EngineError
from merge_gate._internal.text import quoted
from merge_gate.features.quantized.measurement import TEMPLATE

MOST_HEADER_BYTES = 1 << 27
MOST_TENSORS, MOST_KEYS, MOST_DIMENSIONS, MOST_NAME_BYTES, MOST_ALIGNMENT = 100_000, 10_000, 4, 1_000, 1 << 16
MOST_STRINGS = 2_000_000
"""The most strings in all arrays together. Gemma has most: 0.3 million tokens, and 0.5 million merges."""

MOST_KEPT_BYTES, MOST_TEMPLATE_BYTES = 200, 1 << 20
"""Longer strings are not kept, and longer chat templates."""

TOKENS = "tokenizer.ggml.tokens"

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers of types, and those of `struct`."""


class GgufTensor(NamedTuple):
    """A tensor in the file: its shape as torch has it, ggml's number of its type, and its place in bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size_bytes: int


class GgufHeader(NamedTuple):
    """Keys with a single value (other values are None), the tensors by name, and the texts of the vocabulary."""

    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    tokens: tuple[str, ...] = ()


def _broken(what: str) -> EngineError:
    return EngineError(f"the GGUF file is broken: {what}", hint="write or download it again, and compare its size")


class _Header:
    """The first bytes of a file, read in order."""

    def __init__(self, file: BufferedReader) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.limit, self.strings_left = min(self.size, MOST_HEADER_BYTES), MOST_STRINGS

    def take(self, count: int, what: str, *, keep: bool = True) -> bytes:
        here = self.file.tell()
        if count > self.limit - here:
            raise _broken(f"{what} at byte {here:,} needs {count:,} bytes, and {max(0, self.limit - here):,} are left")
        if keep:
            return self.file.read(count)
        self.file.seek(count, os.SEEK_CUR)
        return b""

    def number(self, type_: str, what: str, most: int | None = None) -> Any:
        (value,) = struct.unpack(f"<{type_}", self.take(struct.calcsize(f"<{type_}"), what))
        if most is not None and value > most:
            raise _broken(f"{what} is {value:,}, expected at most {most:,}")
        return value

    def name(self, what: str) -> str:
        try:
            return self.take(self.number("Q", f"the length of {what}", MOST_NAME_BYTES), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(f"{what} is not UTF-8 text") from error

    def value(self, key: str, most_bytes: int = MOST_KEPT_BYTES, kept: list[bytes] | None = None) -> Any:
        """A value. The strings of an array are added to `kept`."""
        kind, count = self.number("I", f"the type of {key}"), 0
        is_array = kind == _ARRAY
        if is_array:
            kind, count = self.number("I", f"the type of the items of {key}"), self.number("Q", f"the length of {key}")
        if kind == _STRING:
            if is_array:
                self.strings(key, count, kept)
                return None
            size = self.number("Q", f"the length of {key}", self.limit)
            text = self.take(size, key, keep=size <= most_bytes)
            return None if size > most_bytes else text.decode("utf-8", "replace")
        if kind not in _SCALARS:
            raise _broken(f"{key} has the type {kind}, expected one of GGUF's types of single values")
        if not is_array:
            return self.number(_SCALARS[kind], key)
        self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"), key, keep=False)
        return None

    def strings(self, key: str, count: int, kept: list[bytes] | None) -> None:
        """Pass over so many strings, in less than a microsecond each, and keep them."""
        if count > self.strings_left:
            raise _broken(f"{key} has {count:,} strings, expected at most {self.strings_left:,}")
        self.strings_left -= count
        here, unpack = self.file.tell(), struct.Struct("<Q").unpack
        for _ in range(count):
            size = unpack(self.file.read(8))[0] if here + 8 <= self.limit else self.limit
            here += 8 + size
            if here > self.limit:
                raise _broken(f"{key} ends at byte {here:,}, and the header at byte {self.limit:,} at the latest")
            if kept is None:
                self.file.seek(size, os.SEEK_CUR)
            else:
                kept.append(self.file.read(size))

    def tensor(self, sizes: Mapping[int, tuple[int, int]]) -> GgufTensor:
        name = self.name("the name of a tensor")
        shown = quoted(name, 120)
        count = self.number("I", f"the number of dimensions of {shown}", MOST_DIMENSIONS)
        shape = tuple(self.number("Q", f"the shape of {shown}") for _ in range(count))[::-1]
        kind = self.number("I", f"the type of {shown}")
        if kind not in sizes:
            raise EngineError(
                f"the tensor {shown} has ggml's type {kind}, which the installed package gguf does not know",
                hint="upgrade gguf, or convert the release to another type",
            )
        values, size_bytes = sizes[kind]
        numel = math.prod(shape)
        if not shape or not 0 < numel <= self.size * values or shape[-1] % values:
            raise _broken(f"the tensor {shown} has the shape {list(shape)}, which its file or its type cannot have")
        return GgufTensor(name, shape, kind, self.number("Q", f"the place of {shown}"), numel // values * size_bytes)


def read_header(file: BufferedReader, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Read the header. `sizes` has the values and the bytes of a block of each of ggml's types.

    Raises:
        EngineError: the file is broken, or has what cannot be read. No value of a tensor was read.
    """
    header, keys, by_name, tokens = _Header(file), dict[str, Any](), dict[str, GgufTensor](), list[bytes]()
    if (magic := header.take(4, "the magic number")) != b"GGUF":
        raise _broken(f"it begins with {magic.hex()}, expected the letters GGUF")
    if (version := header.number("I", "the version")) not in {2, 3}:
        raise _broken(f"its version is {version:,}, expected 2 or 3, in little-endian order")
    tensor_count = header.number("Q", "the number of tensors", MOST_TENSORS)
    for _ in range(header.number("Q", "the number of keys", MOST_KEYS)):
        if (key := header.name("a key")) in keys:
            raise _broken(f"the key {quoted(key, 120)} is there twice")
        most, kept = MOST_TEMPLATE_BYTES if key == TEMPLATE else MOST_KEPT_BYTES, tokens if key == TOKENS else None
        keys[key] = header.value(quoted(key, 120), most, kept)
    tensors = [header.tensor(sizes) for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment % 8:
        raise _broken(f"general.alignment is {quoted(str(alignment), 40)}, expected a multiple of 8")
    start = end = -(-file.tell() // alignment) * alignment
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        place = start + tensor.start
        if tensor.name in by_name:
            raise _broken(f"the tensor {quoted(tensor.name, 120)} is there twice")
        if place % alignment or place < end or place + tensor.size_bytes > header.size:
            raise _broken(
                f"the tensor {quoted(tensor.name, 120)} has {tensor.size_bytes:,} bytes from {place:,} on, expected a "
                f"multiple of {alignment:,} from {end:,} on, and an end within the {header.size:,} bytes of the file"
            )
        end = place + tensor.size_bytes
        by_name[tensor.name] = tensor._replace(start=place)
    return GgufHeader(keys, by_name, tuple(token.decode("utf-8", "replace") for token in tokens))
