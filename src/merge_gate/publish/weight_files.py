"""The weight files of a published model: where each tensor is stored, and proof that the disk has what was written.

In: the headers of a base, the dtypes and shapes that the merge changes, and the bytes of tensors in parts. Out: a
`ModelLayout` (file names, header bytes, places of tensors, the index), and the files with their SHA-256. The meaning of
values does not matter here.

1. A file keeps its name, its order, and its header bytes if all its tensors keep their dtypes and shapes.
2. If one changes, the file has a new header, and the same order of tensors.
3. With a limit on the size of a shard, the tensors go into new files, in the order of the base.
4. Each file is created with its final size and its header.                                              `ModelWriter`
5. Each part gets a checksum and is written at its place. A later part replaces an earlier one there.    `write`
6. Every byte of every tensor must have been written.                                                    `missing`
7. The files go to disk and are read back: each part must have its checksum.                             `read_back`
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate.files import json_object
from merge_gate.files.base_files import INDEX_ENDING, MODEL, MODEL_INDEX, SAFETENSORS_ENDING, loaded_files
from merge_gate.files.headers import DTYPE_BITS, CorruptFileError, open_regular, parse_places, shown
from merge_gate.records.files import FileRecord, StoredTensor
from merge_gate.records.packed_weights import packed_weights
from merge_gate.records.terms import record

FLOATING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes that a model can be cast to, and their names in a header."""

FLOATING_STORED = frozenset({*FLOATING.values(), "F64"})
"""The floating dtypes that a cast changes."""

_PREFIX_BYTES = 8
_ALIGNMENT = 8

CHUNK_BYTES = 16 << 20
MOST_PARTS = 1 << 16
"""Enough for a merged tensor of 256 GiB, which arrives in parts of 4 MiB."""

_EXISTING = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = _EXISTING | os.O_CREAT | os.O_EXCL
_LIBC, _SYNC_FILE_RANGE_WRITE = ctypes.CDLL(None), 2
_REREAD = "the disk or its driver loses data: publish to another disk"


@record
class Place:
    """A stored tensor, and where its bytes are in its file: from `start` up to `end`."""

    tensor: StoredTensor
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@record
class FileLayout:
    """One weights file: its header with the length before it, and the places of its tensors. An index is all header."""

    name: str
    head: bytes
    places: tuple[Place, ...] = ()

    @property
    def size_bytes(self) -> int:
        return max((place.end for place in self.places), default=len(self.head))


@record
class ModelLayout:
    """The weight files of a model, and their index if there is one."""

    files: tuple[FileLayout, ...]
    index: FileLayout | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files) + (self.index.size_bytes if self.index else 0)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(place.tensor for file in self.files for place in file.places)

    def places(self) -> dict[str, tuple[Place, ...]]:
        """The places of each tensor. A name that two files hold has two."""
        places: dict[str, tuple[Place, ...]] = {}
        for file in self.files:
            for place in file.places:
                places[place.tensor.name] = (*places.get(place.tensor.name, ()), place)
        return places


def base_layout(directory: str) -> ModelLayout:
    """The layout of a base in a directory.

    Raises:
        NotPublishedError: its weights are pickles, or cannot be read.
    """
    try:
        chosen = loaded_files(directory)
        pickled = [name for name in chosen.files if not name.endswith(SAFETENSORS_ENDING)]
        files = () if pickled else tuple(_stored(directory, name) for name in chosen.files)
        index = chosen.index and FileLayout(name=chosen.index, head=Path(directory, chosen.index).read_bytes())
    except (CorruptFileError, OSError, GateError) as error:
        raise NotPublishedError(f"the base's files cannot be read: {error}", hint="fetch the base again") from error
    if pickled:
        raise NotPublishedError(
            f"the base stores its weights in {shown(pickled[0])}, expected safetensors files",
            hint="convert the base to safetensors, and publish from that copy",
        )
    return ModelLayout(files=files, index=index or None)


def _stored(directory: str, name: str) -> FileLayout:
    with open_regular(str(Path(directory, name))) as file:
        places = parse_places(file)
        file.seek(0)
        length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
        file.seek(0)
        head = file.read(_PREFIX_BYTES + length)
    ordered = sorted(places, key=lambda place: place[1:])
    return FileLayout(
        name=name,
        head=head,
        places=tuple(Place(tensor=replace(tensor, file=name), start=start, end=end) for tensor, start, end in ordered),
    )


def cast(base: ModelLayout, dtype: str) -> dict[str, StoredTensor]:
    """The tensors of a base that another dtype changes, as they are after the cast.

    A weight that bitsandbytes has packed becomes plain. Its shape is not known from the headers: it comes as one row.
    """
    packed = packed_weights(base.tensors)
    changed = {
        tensor.name: replace(tensor, dtype=FLOATING[dtype])
        for tensor in base.tensors
        if tensor.dtype in FLOATING_STORED and tensor.dtype != FLOATING[dtype] and tensor.name not in packed.others
    }
    plain = {
        tensor.name: replace(tensor, dtype=FLOATING[dtype], shape=(packed.counts[tensor.name],))
        for tensor in base.tensors
        if tensor.name in packed
    }
    return changed | plain


def merged_layout(
    base: ModelLayout,
    changes: Mapping[str, StoredTensor],
    shard_limit_bytes: int | None = None,
    dropped: Collection[str] = (),
) -> ModelLayout:
    """The layout of a published model.

    Args:
        base: the base's own layout.
        changes: tensors with another dtype or shape than the base's, and tensors that the base does not store.
        shard_limit_bytes: the most bytes that the tensors of a file may have. None keeps the base's files.
        dropped: names of tensors that the model does not have.

    Raises:
        NotPublishedError: the base's config.json names a single weights file, and there would be several.
    """
    if shard_limit_bytes is None:
        files = tuple(_changed_files(base, changes, dropped))
    else:
        files = tuple(_resharded(base, changes, shard_limit_bytes, dropped))
    return ModelLayout(files=files, index=_index(base, files))


def _changed_files(
    base: ModelLayout, changes: Mapping[str, StoredTensor], dropped: Collection[str]
) -> Iterator[FileLayout]:
    known = {tensor.name for tensor in base.tensors}
    added = [tensor for name, tensor in changes.items() if name not in known]
    for number, file in enumerate(base.files):
        kept = [one.tensor for one in file.places if one.tensor.name not in dropped]
        tensors = [replace(changes.get(tensor.name, tensor), file=file.name) for tensor in kept]
        if number == len(base.files) - 1:
            tensors += [replace(tensor, file=file.name) for tensor in added]
        is_same = tensors == [one.tensor for one in file.places]
        yield file if is_same else new_file(file.name, tensors, _metadata(file))


def _resharded(
    base: ModelLayout, changes: Mapping[str, StoredTensor], limit_bytes: int, dropped: Collection[str]
) -> Iterator[FileLayout]:
    kept = [tensor for tensor in base.tensors if tensor.name not in dropped]
    tensors = {tensor.name: changes.get(tensor.name, tensor) for tensor in kept} | dict(changes)
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors.values():
        size_bytes = tensor_bytes(tensor)
        if shards[-1] and filled + size_bytes > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size_bytes
    metadata = _metadata(base.files[0])
    for number, shard in enumerate(shards, 1):
        name = _shard_name(base, number, len(shards))
        yield new_file(name, [replace(tensor, file=name) for tensor in shard], metadata)


def _shard_name(base: ModelLayout, number: int, count: int) -> str:
    """Shards are named as transformers names them, after the file or the index that it loads."""
    first = base.index.name.removesuffix(INDEX_ENDING) if base.index else base.files[0].name
    if count == 1 and (base.index is None or base.index.name == MODEL_INDEX):
        return first
    if base.index is None and first != MODEL:
        raise NotPublishedError(
            f"config.json of the base names one weights file, {shown(first)}, and the limit on a shard's size asks for "
            f"{count:,} files",
            hint="raise --max-shard-size, or omit it",
        )
    return f"{first.removesuffix(SAFETENSORS_ENDING)}-{number:05}-of-{count:05}{SAFETENSORS_ENDING}"


def new_file(name: str, tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None) -> FileLayout:
    """A file of these tensors. Wider dtypes come first: each tensor then begins at a multiple of its element size."""
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    offsets = [*itertools.pairwise(itertools.accumulate(map(tensor_bytes, ordered), initial=0))]
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for tensor, span in zip(ordered, offsets, strict=True):
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(span)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(_PREFIX_BYTES, "little") + text
    places = (
        Place(tensor=tensor, start=len(head) + start, end=len(head) + end)
        for tensor, (start, end) in zip(ordered, offsets, strict=True)
    )
    return FileLayout(name=name, head=head, places=tuple(places))


def _metadata(file: FileLayout) -> dict[str, str] | None:
    try:
        metadata: dict[str, str] | None = parse_strictly(file.head[_PREFIX_BYTES:]).get("__metadata__")
    except (InvalidJsonError, AttributeError):  # the header was parsed before
        return None
    return metadata


def tensor_bytes(tensor: StoredTensor) -> int:
    """The size of a tensor's values."""
    bits = DTYPE_BITS[tensor.dtype] * math.prod(tensor.shape)
    if bits % 8:
        raise NotPublishedError(f"the tensor {shown(tensor.name)} does not fill whole bytes")
    return bits // 8


# --- the index -------------------------------------------------------------------------------------------------------


def _index(base: ModelLayout, files: Sequence[FileLayout]) -> FileLayout | None:
    """The index of these files. The base's own bytes stay if they say the same."""
    is_needed = len(files) > 1 or (base.index is not None and files[0].name != MODEL)
    if not is_needed:
        return None
    listed = {place.tensor.name: file.name for file in files for place in file.places}
    size_bytes = sum(place.size_bytes for file in files for place in file.places)
    own = _parsed(base.index.head) if base.index is not None else {}
    metadata = own["metadata"] if isinstance(own.get("metadata"), dict) else {}
    name = base.index.name if base.index is not None else MODEL_INDEX
    if base.index is not None and _is_true(own, files) and metadata.get("total_size") == size_bytes:
        return base.index
    content = {"metadata": metadata | {"total_size": size_bytes}, "weight_map": dict(sorted(listed.items()))}
    return FileLayout(name=name, head=(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        return json_object.parse(content)
    except json_object.InvalidObjectError:  # `loaded_files` read it before
        return {}


def _is_true(index: Mapping[str, Any], files: Iterable[FileLayout]) -> bool:
    """Whether an index names every tensor of these files, and nothing else. Of a name in two files, either counts."""
    holders: dict[str, set[str]] = {}
    for file in files:
        for place in file.places:
            holders.setdefault(place.tensor.name, set()).add(file.name)
    listed = index.get("weight_map")
    return (
        isinstance(listed, dict)
        and listed.keys() == holders.keys()
        and all(listed[name] in holders[name] for name in listed)
    )


def compare_written(directory: Path, layout: ModelLayout) -> None:
    """Compare the headers and the index on disk with the layout, both ways.

    Raises:
        NotPublishedError: they differ, or transformers would load other files.
    """
    written = base_layout(str(directory))
    if written.files != layout.files:
        raise NotPublishedError("the written headers differ from the planned ones", hint="please report this")
    if written.index is not None and not _is_true(_parsed(written.index.head), written.files):
        raise NotPublishedError("the written index differs from the headers", hint="please report this")


# --- written, and read back ------------------------------------------------------------------------------------------


class ModelWriter:
    """The weight files of one model. One thread at a time may use it. No file stays open between two calls."""

    def __init__(self, directory: Path, layout: ModelLayout) -> None:
        self.layout = layout
        self._directory = directory
        self._places = layout.places()
        self._parts: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
        """Of each place, the parts by their start: size and checksum."""
        for file in layout.files:
            path = directory / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with _opened(path, _NEW) as descriptor:
                os.ftruncate(descriptor, file.size_bytes)
                _write_all(descriptor, 0, memoryview(file.head))

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a tensor is stored; empty if it is not."""
        return self._places.get(name, ())

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Write bytes of a tensor, from `offset` of the tensor on, to each of its places.

        Raises:
            ValueError: the tensor has no such bytes.
            OSError: the disk is full, or fails.
        """
        places = self.places(name)
        if not places or not 0 <= offset < offset + len(content) <= places[0].size_bytes:
            raise ValueError(f"{name}: {len(content)} bytes at {offset}")
        checksum = zlib.crc32(content)
        for place in places:
            with _opened(self._directory / place.tensor.file) as descriptor:
                _write_all(descriptor, place.start + offset, content)
                _begin_to_store(descriptor, place.start + offset, len(content))
            parts = self._parts.setdefault((place.tensor.file, place.start), {})
            end = offset + len(content)
            if offset not in parts or parts[offset][0] != len(content):
                for start in [one for one, (size_bytes, _) in parts.items() if one < end and offset < one + size_bytes]:
                    del parts[start]
            if len(parts) >= MOST_PARTS:
                raise ValueError(f"{name}: more than {MOST_PARTS} parts")
            parts[offset] = (len(content), checksum)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with bytes of a tensor from `offset` on, as they are in the first file that has it.

        Raises:
            NotPublishedError: the file ends before.
            OSError: the disk fails.
        """
        place = self.places(name)[0]
        with _opened(self._directory / place.tensor.file) as descriptor:
            _read_all(descriptor, place.start + offset, into, place.tensor.file)

    def forget(self, place: Place) -> None:
        """Parts of this tensor that were written do not count."""
        self._parts.pop((place.tensor.file, place.start), None)

    def is_written(self, place: Place) -> bool:
        """Whether every byte of a tensor was written."""
        parts = self._parts.get((place.tensor.file, place.start), {})
        return sum(size_bytes for size_bytes, _ in parts.values()) == place.size_bytes  # they do not overlap

    def missing(self) -> Iterator[Place]:
        """The places of tensors that were not written whole."""
        for file in self.layout.files:
            yield from (place for place in file.places if not self.is_written(place))

    def add_file(self, name: str, content: bytes) -> FileRecord:
        """Write another file of the model, whole.

        Raises:
            FileExistsError: there is one of that name.
            OSError: the disk is full, or fails.
        """
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, _NEW) as descriptor:
            _write_all(descriptor, 0, memoryview(content))
            os.fsync(descriptor)
            read = _read_whole(descriptor, len(content) + 1)
        if read != content:
            raise _other_bytes(name)
        return FileRecord(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read_back(self, go_on: Callable[[], None] = lambda: None) -> tuple[FileRecord, ...]:
        """Send the files to disk, read them again, and compare every part. Returns their digests.

        `go_on` is called for each piece, and may raise to end the reading.

        Raises:
            NotPublishedError: the disk has other bytes than were written.
            OSError: the disk fails.
        """
        for file in self.layout.files:
            go_on()
            with _opened(self._directory / file.name) as descriptor:
                os.fsync(descriptor)
        with ThreadPoolExecutor(1) as pool:
            return tuple(self._read_file(file, pool, go_on) for file in self.layout.files)

    def _read_file(self, file: FileLayout, pool: ThreadPoolExecutor, go_on: Callable[[], None]) -> FileRecord:
        with _opened(self._directory / file.name) as descriptor:
            return self._read_opened(descriptor, file, pool, go_on)

    def _read_opened(
        self, descriptor: int, file: FileLayout, pool: ThreadPoolExecutor, go_on: Callable[[], None]
    ) -> FileRecord:
        """Another thread hashes the file, while this one compares checksums."""
        if os.fstat(descriptor).st_size != file.size_bytes or _read_whole(descriptor, len(file.head)) != file.head:
            raise _other_bytes(file.name)
        whole = hashlib.sha256(file.head)
        buffers = [memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))]
        hashing = None
        for place in file.places:
            parts = self._parts.get((file.name, place.start), {})
            for offset, (size_bytes, expected) in sorted(parts.items()):
                checksum = 0
                for start in range(offset, offset + size_bytes, CHUNK_BYTES):
                    go_on()
                    buffers.reverse()
                    piece = buffers[0][: min(CHUNK_BYTES, offset + size_bytes - start)]
                    _read_all(descriptor, place.start + start, piece, file.name)
                    if hashing is not None:
                        hashing.result()
                    hashing = pool.submit(whole.update, piece)
                    checksum = zlib.crc32(piece, checksum)
                if checksum != expected:
                    raise _other_bytes(file.name, place.tensor.name)
        if hashing is not None:
            hashing.result()
        return FileRecord(path=file.name, size_bytes=file.size_bytes, sha256=whole.hexdigest())


@contextlib.contextmanager
def _opened(path: Path, flags: int = _EXISTING) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, start: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)


def _read_all(descriptor: int, start: int, into: memoryview, file: str) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], start + done)
        if not count:
            raise _other_bytes(file)
        done += count


def _read_whole(descriptor: int, size_bytes: int) -> bytes:
    content = bytearray()
    while len(content) < size_bytes and (piece := os.pread(descriptor, size_bytes - len(content), len(content))):
        content += piece
    return bytes(content)


def _begin_to_store(descriptor: int, start: int, size_bytes: int) -> None:
    """Let the disk begin to write these bytes, so that fsync waits for few. The call returns at once."""
    with contextlib.suppress(AttributeError):  # not Linux with glibc or musl
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)


def _other_bytes(file: str, tensor: str | None = None) -> NotPublishedError:
    of_tensor = f" of {shown(tensor)}" if tensor is not None else ""
    return NotPublishedError(f"{shown(file)} was read back with other bytes{of_tensor} than were written", hint=_REREAD)
