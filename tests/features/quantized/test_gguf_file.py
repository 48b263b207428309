"""The header of a GGUF file is hostile: it is refused with a clear error, and nothing is allocated for it."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest

from merge_gate._internal.errors import EngineError
from merge_gate.features.quantized.gguf_file import GgufHeader, read_header

SIZES = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
HUGE = 1 << 62


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: bytes = b"a", shape: tuple[int, ...] = (32,), kind: int = 0, place: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, place)


def file_of(*tensors: bytes, keys: tuple[bytes, ...] = (), data: int = 128, tensor_count: int | None = None) -> bytes:
    counts = struct.pack("<IQQ", 3, len(tensors) if tensor_count is None else tensor_count, len(keys))
    header = b"GGUF" + counts + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % 32) + bytes(data)


def read(content: bytes, tmp_path: Path) -> GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with path.open("rb") as file:
        return read_header(file, SIZES)


def test_a_header_is_read(tmp_path: Path) -> None:
    keys = (
        key(b"general.architecture", 8, text(b"llama")),
        key(b"general.alignment", 4, struct.pack("<I", 32)),
        key(b"tokens", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"\xff")),
        key(b"scores", 9, struct.pack("<IQ", 6, 2) + bytes(8)),
        key(b"template", 8, text(b"x" * 1000)),
    )
    header = read(file_of(info(b"b", (32, 2), 8, 128), info(b"a"), keys=keys, data=196), tmp_path)
    assert header.keys == {
        "general.architecture": "llama",
        "general.alignment": 32,
        "tokens": None,
        "scores": None,
        "template": None,
    }
    assert {name: (one.shape, one.size_bytes) for name, one in header.tensors.items()} == {
        "a": ((32,), 128),
        "b": ((2, 32), 68),
    }


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "no magic": b"GGML" + bytes(64),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "cut": file_of(info())[:40],
    "many tensors": file_of(tensor_count=HUGE),
    "more tensors than there are": file_of(info(), tensor_count=9),
    "many keys": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "long name": file_of(struct.pack("<Q", HUGE)),
    "long key": file_of(keys=(struct.pack("<Q", HUGE),)),
    "no text": file_of(info(b"\xff\xfe")),
    "long string": file_of(keys=(key(b"k", 8, struct.pack("<Q", HUGE)),)),
    "long array": file_of(keys=(key(b"k", 9, struct.pack("<IQ", 6, HUGE)),)),
    "array of long strings": file_of(keys=(key(b"k", 9, struct.pack("<IQQ", 8, 1, HUGE)),)),
    "many strings": file_of(keys=(key(b"k", 9, struct.pack("<IQ", 8, 1 << 20)),)),
    "array in array": file_of(keys=(key(b"k", 9, struct.pack("<IQ", 9, 1) * 50),)),
    "unknown type of a key": file_of(keys=(key(b"k", 99, b""),)),
    "key twice": file_of(keys=(key(b"k", 0, b"a"), key(b"k", 0, b"b"))),
    "no alignment": file_of(info(), keys=(key(b"general.alignment", 4, struct.pack("<I", 0)),)),
    "odd alignment": file_of(info(), keys=(key(b"general.alignment", 4, struct.pack("<I", 12)),)),
    "huge alignment": file_of(info(), keys=(key(b"general.alignment", 4, struct.pack("<I", 1 << 31)),)),
    "alignment as text": file_of(info(), keys=(key(b"general.alignment", 8, text(b"32")),)),
    "no dimensions": file_of(info(shape=())),
    "many dimensions": file_of(info(shape=(1,) * 9)),
    "dimension of zero": file_of(info(shape=(0, 32))),
    "huge dimensions": file_of(info(shape=(HUGE, HUGE))),
    "more than the file": file_of(info(shape=(64,))),
    "unknown type": file_of(info(kind=12345)),
    "half a block": file_of(info(shape=(33,), kind=2)),
    "place beyond": file_of(info(place=HUGE)),
    "place between": file_of(info(shape=(1,), place=8)),
    "overlap": file_of(info(b"a"), info(b"b", place=96), data=256),
    "same place": file_of(info(b"a"), info(b"b")),
    "same name": file_of(info(b"a"), info(b"a", place=128), data=256),
}


def test_a_header_of_empty_strings_is_refused_before_they_are_read(tmp_path: Path) -> None:
    strings = key(b"k", 9, struct.pack("<IQ", 8, 1_500_000) + bytes(8 * 1_500_000))
    read(file_of(info(), keys=(strings,)), tmp_path)
    with pytest.raises(EngineError, match=r"has 1,500,000 strings, expected at most 500,000"):
        read(file_of(info(), keys=(strings, strings.replace(b"k", b"l", 1))), tmp_path)
    endless = key(b"k", 9, struct.pack("<IQ", 8, 1 << 40))
    with pytest.raises(EngineError, match=r"has 1,099,511,627,776 strings, expected at most 2,000,000"):
        read(file_of(keys=(endless,)) + bytes(1 << 20), tmp_path)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused(content: bytes, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(EngineError) as refused:
            read(content, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert refused.value.hint
    assert len(refused.value.message) < 400


def test_any_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    content = file_of(info(b"b", (32, 2), 8, 128), info(), keys=(key(b"k", 8, text(b"v")),), data=196)
    for place in range(len(content) - 196):
        for byte in (0x00, 0x01, 0x7F, 0xFF):
            with contextlib.suppress(EngineError):
                read(content[:place] + bytes([byte]) + content[place + 1 :], tmp_path)
