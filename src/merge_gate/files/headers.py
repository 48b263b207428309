"""Reads weight files without loading them: safetensors headers, Git LFS pointers, other formats by their first bytes.

A hostile file goes in; `StoredTensor`s or a `CorruptFileError` come out. No tensor data is read.

The reader refuses everything that the safetensors library refuses, and also repeated names and unknown fields. It
accepts everything that the library writes.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from merge_gate._internal.regular_file import NotRegularFileError, open_regular_file
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import counted, quoted
from merge_gate.judging.foreign_formats import by_files
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import Refusal

if TYPE_CHECKING:
    from io import BufferedReader

PickleReader = Callable[[str], tuple[StoredTensor, ...] | Refusal]
"""Lists the tensors of a pickled file, by its path, or says why torch's restricted unpickler refuses it."""

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

_PREFIX_BYTES = 8
_MAX_U64 = 2**64 - 1
_MAX_U64_DIGITS = 20
_MAX_POINTER_BYTES = 1024
_TENSOR_FIELDS = {"dtype", "shape", "data_offsets"}
_SHOWN_CHARACTERS = 120
_LINE_ENDS_SAMPLE_BYTES, _MIN_LINE_ENDS = 1_000_000, 4

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype that safetensors knows."""

_ZIP, _PICKLE, _GGUF = (
    "a zip archive (torch's pickle format, or an archive of the adapter)",
    "a Python pickle",
    "a GGUF model",
)
ZEROS = "zeros, probably of an interrupted download"
_PAGE = "an HTML or XML page, probably of a failed download"
_FORMATS = (
    (re.compile(rb"PK\x03\x04"), _ZIP),
    (re.compile(rb"\x80[\x02-\x05]"), _PICKLE),
    (re.compile(rb"GGUF"), _GGUF),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
    (re.compile(rb"\x89HDF\r\n"), "an HDF5 file"),
    (re.compile(rb"\x93NUMPY"), "a NumPy array"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), _PAGE),
    (re.compile(rb"\s*[{\[]"), "a JSON text"),
    (re.compile(rb"\x00{16}"), ZEROS),
)

_SAVED_AS_PICKLE = (
    "if torch.save wrote the file, save the adapter again with save_pretrained, or rename the file to "
    "adapter_model.bin and set allow-pickle: true; if it is an archive of the adapter, unpack it"
)
_HINTS = {
    _ZIP: _SAVED_AS_PICKLE,
    _PICKLE: _SAVED_AS_PICKLE,
    _GGUF: by_files(("adapter.gguf",)) or "",
    _PAGE: "download the file again, with a token: the server sent a page, usually a sign-in page",
}
"""Hints for some formats. For the others, the hint is to download the file again."""


class CorruptFileError(Exception):
    """The file is not in the format that its name claims. The text continues a sentence that starts with its name.

    `hint` says what to do. If it is empty, the remedy is to download the file again.
    """

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class TruncatedFileError(CorruptFileError):
    """The end of the file is missing, as after an interrupted download."""


def shown(text: str) -> str:
    """Quote hostile text for a message: control characters are escaped, and the text is cut to a readable length."""
    return quoted(text, _SHOWN_CHARACTERS, "'")


def open_regular(path: str) -> BufferedReader:
    """Open a regular file, also through a link. A named pipe or a device raises `CorruptFileError`."""
    try:
        return open_regular_file(path, follow=True)
    except NotRegularFileError as error:
        raise CorruptFileError(f"is {error.kind}, expected a regular file") from None


def lfs_pointer(file: BufferedReader) -> str | None:
    """The size of the file that a Git LFS pointer leads to, in words, or "" if it gives none; None for another file.

    Format: https://github.com/git-lfs/git-lfs, docs/spec.md.
    """
    file.seek(0)
    text = file.read(_MAX_POINTER_BYTES)
    if not text.startswith(b"version https://git-lfs"):
        return None
    size = re.search(rb"^size (\d{1,20})\r?$", text, re.MULTILINE)
    return counted(int(size[1]), "byte") if size else ""


def parse_file(file: BufferedReader) -> tuple[StoredTensor, ...]:
    """Return the tensors of a safetensors file, in the order of its header.

    Raises:
        CorruptFileError: the file is damaged or has another format.
        OSError: the file cannot be read.
    """
    return tuple(tensor for tensor, _, _ in parse_places(file))


def parse_places(file: BufferedReader) -> tuple[tuple[StoredTensor, int, int], ...]:
    """Like `parse_file`, with the offsets in the file of each tensor's first byte and of the byte after its last."""
    # 1. The first eight bytes are the header's length, little-endian.
    size_bytes = os.fstat(file.fileno()).st_size
    if not size_bytes:
        raise TruncatedFileError("is empty (0 bytes)")
    file.seek(0)
    prefix = file.read(_PREFIX_BYTES)
    header_bytes = int.from_bytes(prefix, "little")
    data_start = _PREFIX_BYTES + header_bytes
    if len(prefix) < _PREFIX_BYTES or header_bytes > MAX_HEADER_BYTES or data_start > size_bytes:
        _refuse_start(file, header_bytes, size_bytes)
    # 2. The header is a JSON object with an entry for each tensor.
    raw = file.read(header_bytes)
    if len(raw) < header_bytes:
        read = f"{len(raw):,} of {counted(header_bytes, 'header byte')}"
        raise TruncatedFileError(f"was cut off while it was read: {read}")
    entries = _parse_json(raw)
    _check_metadata(entries.pop("__metadata__", None))
    tensors = {name: _parse_tensor(name, entry) for name, entry in entries.items()}
    # 3. Every byte of the data belongs to exactly one tensor.
    try:
        _check_offsets(tensors, data_bytes=size_bytes - data_start)
    except CorruptFileError as error:
        if _has_windows_line_ends(file, data_start):
            raise CorruptFileError(
                "is damaged by a conversion of line ends: every LF byte has become CR LF",
                "git or an FTP client treated the file as text: add `*.safetensors -text` to .gitattributes of its "
                "repository, and commit the undamaged file again",
            ) from error
        raise
    return tuple((tensor, data_start + begin, data_start + end) for tensor, begin, end in tensors.values())


def _has_windows_line_ends(file: BufferedReader, start: int) -> bool:
    """Whether every LF follows a CR. In undamaged tensor data, one byte in 256 is an LF by chance."""
    file.seek(start)
    data = file.read(_LINE_ENDS_SAMPLE_BYTES)
    ends = data.count(b"\n")
    return ends >= _MIN_LINE_ENDS and ends == data.count(b"\r\n")


def _refuse_start(file: BufferedReader, header_bytes: int, size_bytes: int) -> NoReturn:
    file.seek(0)
    head = file.read(64)
    if name := next((name for pattern, name in _FORMATS if pattern.match(head)), None):
        raise CorruptFileError(f"is not a safetensors file but {name}", _HINTS.get(name, ""))
    if size_bytes < _PREFIX_BYTES:
        raise TruncatedFileError(f"has {counted(size_bytes, 'byte')}, too few for a safetensors file")
    if header_bytes > MAX_HEADER_BYTES:
        raise CorruptFileError(
            f"is not a safetensors file: its first 8 bytes claim a header of {header_bytes:,} bytes, "
            f"the format allows {MAX_HEADER_BYTES:,}"
        )
    raise TruncatedFileError(
        f"is truncated, or not a safetensors file: the header alone should have {counted(header_bytes, 'byte')}, "
        f"the whole file has {size_bytes:,}"
    )


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        entries = parse_strictly(raw, integer=_parse_unsigned, other_number=_refuse_number)
    except InvalidJsonError as error:
        raise CorruptFileError(f"has a header that {error}") from None
    if not isinstance(entries, dict):
        raise CorruptFileError("has a header that is not a JSON object of tensors")
    return entries


def _parse_unsigned(digits: str) -> int:
    if digits.startswith("-") or len(digits) > _MAX_U64_DIGITS or int(digits) > _MAX_U64:
        _refuse_number(digits)
    return int(digits)


def _refuse_number(text: str) -> NoReturn:
    raise CorruptFileError(f"has a header with the number {text[:40]}, expected unsigned 64-bit integers only")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError("has a header whose __metadata__ is not a mapping of strings to strings")
    for text in (*metadata, *metadata.values()):
        _check_unicode(text)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorruptFileError(f"has a header with a lone surrogate in {shown(text)}") from None


def _parse_tensor(name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    _check_unicode(name)
    if not isinstance(entry, dict) or set(entry) != _TENSOR_FIELDS:
        raise CorruptFileError(f"has a header whose entry {shown(name)} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptFileError(f"has a tensor {shown(name)} of unknown dtype {shown(str(dtype))}")
    if not _is_integers(shape) or not _is_integers(offsets) or len(offsets) != 2:  # noqa: PLR2004
        raise CorruptFileError(f"has a tensor {shown(name)} whose shape or data_offsets are not lists of integers")
    begin, end = offsets
    bits = _count_bits(shape, DTYPE_BITS[dtype])
    if (end - begin) * 8 != bits:  # `bits` is never negative, and None is no size
        raise CorruptFileError(
            f"has a tensor {shown(name)} of dtype {dtype} and shape {shown(str(shape))} "
            f"whose data_offsets [{begin}, {end}] do not fit that size"
        )
    return StoredTensor(name=name, dtype=dtype, shape=tuple(shape)), begin, end


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _count_bits(shape: list[int], bits: int) -> int | None:
    """Bits of a tensor, None on 64-bit overflow at any step (the library multiplies in the same order)."""
    count = 1
    for factor in (*shape, bits):
        count *= factor
        if count > _MAX_U64:
            return None
    return count


def _check_offsets(tensors: dict[str, tuple[StoredTensor, int, int]], *, data_bytes: int) -> None:
    expected = 0
    for tensor, begin, end in sorted(tensors.values(), key=lambda item: item[1:]):
        if begin != expected:
            fault = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise CorruptFileError(
                f"has a tensor {shown(tensor.name)} that {fault} (byte {begin}, expected {expected})"
            )
        expected = end
    sizes = f"its header describes {counted(expected, 'byte')} of tensor data, the file holds {data_bytes:,}"
    if expected > data_bytes:
        raise TruncatedFileError(f"is truncated: {sizes}")
    if excess := data_bytes - expected:
        belong = "belongs" if excess == 1 else "belong"
        raise CorruptFileError(f"has {counted(excess, 'byte')} that {belong} to no tensor: {sizes}")
