"""The weight files of a published model: where each tensor is stored, and proof that the disk has what was written.

In: the headers of a base, the dtypes and shapes that the merge changes, and checksums of tensors. Out: a `ModelLayout`
(file names, header bytes, places of tensors, the index), and the files with their SHA-256. The meaning of values does
not matter here.

1. A file keeps its name, its order, and its header bytes if all its tensors keep their dtypes and shapes.
2. If one changes, the file has a new header, and the same order of tensors.
3. With a limit on the size of a shard, the tensors go into new files, in the order of the base.
4. Each file is created with its final size and its header.                       `ModelWriter.make_files`
5. The worker writes tensors at their places, and reports their checksums.        planned_files.py
6. All other tensors are copied from the base.                                    `copy`
7. The files go to disk and are read back: each tensor must have its checksum.    `read_back`
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate.features.publish.packed_weights import packed_weights
from merge_gate.features.publish.planned_files import write_all
from merge_gate.files import json_object
from merge_gate.files.base_files import INDEX_ENDING, MODEL, MODEL_INDEX, SAFETENSORS_ENDING, loaded_files
from merge_gate.files.feed import LocalFeed
from merge_gate.files.headers import DTYPE_BITS, CorruptFileError, open_regular, parse_places, shown
from merge_gate.records.files import HashedFile, StoredTensor
from merge_gate.records.terms import record

FLOATING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes that a model can be cast to, and their names in a header."""

FLOATING_STORED = frozenset({*FLOATING.values(), "F64"})
"""The floating dtypes that a cast changes."""

_PREFIX_BYTES = 8
_ALIGNMENT = 8

CHUNK_BYTES = 16 << 20

_EXISTING = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = _EXISTING | os.O_CREAT | os.O_EXCL
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
    def largest_bytes(self) -> int:
        return max((file.size_bytes for file in self.files), default=0)

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
    max_shard_bytes: int | None = None,
    dropped: Collection[str] = (),
) -> ModelLayout:
    """The layout of a published model.

    Args:
        base: the base's own layout.
        changes: tensors with another dtype or shape than the base's, and tensors that the base does not store.
        max_shard_bytes: the most bytes that the tensors of a file may have. None keeps the base's files.
        dropped: names of tensors that the model does not have.

    Raises:
        NotPublishedError: the base's config.json names a single weights file, and there would be several.
    """
    if max_shard_bytes is None:
        files = tuple(_changed_files(base, changes, dropped))
    else:
        files = tuple(_resharded(base, changes, max_shard_bytes, dropped))
    return ModelLayout(files=files, index=_index(base, files))


def _changed_files(
    base: ModelLayout, changes: Mapping[str, StoredTensor], dropped: Collection[str]
) -> Iterator[FileLayout]:
    known = {tensor.name for tensor in base.tensors}
    added = [tensor for name, tensor in changes.items() if name not in known]
    for number, file in enumerate(base.files):
        kept = [place.tensor for place in file.places if place.tensor.name not in dropped]
        tensors = [replace(changes.get(tensor.name, tensor), file=file.name) for tensor in kept]
        if number == len(base.files) - 1:
            tensors += [replace(tensor, file=file.name) for tensor in added]
        is_same = tensors == [place.tensor for place in file.places]
        yield file if is_same else new_file(file.name, tensors, _metadata(file))


def _resharded(
    base: ModelLayout, changes: Mapping[str, StoredTensor], max_bytes: int, dropped: Collection[str]
) -> Iterator[FileLayout]:
    kept = [tensor for tensor in base.tensors if tensor.name not in dropped]
    tensors = {tensor.name: changes.get(tensor.name, tensor) for tensor in kept} | dict(changes)
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors.values():
        size_bytes = tensor_bytes(tensor)
        if shards[-1] and filled + size_bytes > max_bytes:
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
    """Whether an index names every tensor of these files, and nothing else. A tensor may be in two files."""
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


def refuse_other_files(directory: Path, layout: ModelLayout) -> None:
    """Refuse a model if transformers would load other files of it than the layout has, which were read back."""
    chosen = loaded_files(str(directory))
    index = layout.index.name if layout.index is not None else None
    if (sorted(chosen.files), chosen.index) != (sorted(file.name for file in layout.files), index):
        raise NotPublishedError("transformers would not load the written files", hint="please report this")


# --- written, and read back ------------------------------------------------------------------------------------------


class ModelWriter:
    """The weight files of one model. `checksums` has the CRC-32 of each tensor that was written."""

    def __init__(self, directory: Path, layout: ModelLayout) -> None:
        self.layout = layout
        self._directory = directory
        self.checksums: dict[str, int] = {}
        self.is_stopped = False

    def make_files(self) -> tuple[int, ...]:
        """Create each file with its header and its size. Returns the files, open; the caller closes them.

        Raises:
            OSError: the disk is full, or fails.
        """
        with contextlib.ExitStack() as stack:
            made = []
            for file in self.layout.files:
                made.append(_open(self._directory / file.name, _NEW))
                stack.callback(os.close, made[-1])
                os.ftruncate(made[-1], file.size_bytes)
                write_all(made[-1], 0, memoryview(file.head))
            stack.pop_all()
        return tuple(made)

    def missing(self) -> Iterator[Place]:
        """The places of tensors that were not written."""
        return (place for file in self.layout.files for place in file.places if place.tensor.name not in self.checksums)

    def copy(self, base: ModelLayout, directory: str) -> None:
        """Write the tensors that were not written as the base in this directory has them.

        Raises:
            SourceError: the base cannot be read.
            OSError: the disk is full, or fails.
        """
        sources, buffer = base.places(), memoryview(bytearray(CHUNK_BYTES))
        with LocalFeed(directory) as feed:
            for place in tuple(self.missing()):
                source, checksum = sources[place.tensor.name][-1], 0
                with _opened(self._directory / place.tensor.file) as descriptor:
                    for offset, size_bytes in self._pieces(place):
                        piece = buffer[:size_bytes]
                        feed.read(source.tensor.file, source.start + offset, piece)
                        checksum = zlib.crc32(piece, checksum)
                        write_all(descriptor, place.start + offset, piece)
                self.checksums[place.tensor.name] = checksum

    def _pieces(self, place: Place) -> Iterator[tuple[int, int]]:
        """The parts of a tensor that are read at a time: the offset and the size of each."""
        for offset in range(0, place.size_bytes, CHUNK_BYTES):
            if self.is_stopped:
                raise NotPublishedError("the run was ended")
            yield offset, min(CHUNK_BYTES, place.size_bytes - offset)

    def add_file(self, name: str, content: bytes) -> HashedFile:
        """Write another file of the model, whole.

        Raises:
            FileExistsError: there is one of that name.
            OSError: the disk is full, or fails.
        """
        with _opened(self._directory / name, _NEW) as descriptor, open(descriptor, "rb", closefd=False) as file:
            write_all(descriptor, 0, memoryview(content))
            os.fsync(descriptor)
            if file.read() != content:
                raise _other_bytes(name)
        return HashedFile(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read_back(self) -> tuple[HashedFile, ...]:
        """Send the files to disk, and read each once: for its digest, and to compare each tensor with its checksum.

        Raises:
            NotPublishedError: the disk has other bytes than were written.
            OSError: the disk fails.
        """
        return tuple(map(self._read_file, self.layout.files))

    def _read_file(self, file: FileLayout) -> HashedFile:
        whole, buffer = hashlib.sha256(file.head), memoryview(bytearray(CHUNK_BYTES))
        with _opened(self._directory / file.name) as descriptor, open(descriptor, "rb", closefd=False) as opened:
            os.fsync(descriptor)
            if os.fstat(descriptor).st_size != file.size_bytes or opened.read(len(file.head)) != file.head:
                raise _other_bytes(file.name)
            for place in file.places:  # in their order, without holes
                checksum = 0
                for _, size_bytes in self._pieces(place):
                    piece = buffer[: opened.readinto(buffer[:size_bytes])]
                    whole.update(piece)
                    checksum = zlib.crc32(piece, checksum)
                if checksum != self.checksums[place.tensor.name]:
                    raise _other_bytes(file.name, place.tensor.name)
        return HashedFile(path=file.name, size_bytes=file.size_bytes, sha256=whole.hexdigest())


def _open(path: Path, flags: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, flags, 0o666)


@contextlib.contextmanager
def _opened(path: Path, flags: int = _EXISTING) -> Iterator[int]:
    descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _other_bytes(file: str, tensor: str | None = None) -> NotPublishedError:
    of_tensor = f" of {shown(tensor)}" if tensor is not None else ""
    return NotPublishedError(f"{shown(file)} was read back with other bytes{of_tensor} than were written", hint=_REREAD)
