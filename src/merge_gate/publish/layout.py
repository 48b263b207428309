"""Where each tensor of a published model is stored: the base's own files, with other tensors in their places.

In: the headers of a base, and the dtypes and shapes that the merge changes. Out: a `ModelLayout`: file names, header
bytes, places of tensors, and the index. Reads headers and the index, no values.

1. A file keeps its name, its order, and its header bytes if all its tensors keep their dtypes and shapes.
2. If one changes, the file has a new header, and the same order of tensors.
3. With a limit on the size of a shard, the tensors go into new files, in the order of the base.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate.errors import GateError, NotPublishedError
from merge_gate.files import json_object
from merge_gate.files.base_files import INDEX_ENDING, MODEL, MODEL_INDEX, SAFETENSORS_ENDING, loaded_files
from merge_gate.files.headers import DTYPE_BITS, CorruptFileError, open_regular, parse_places, shown
from merge_gate.records.files import StoredTensor
from merge_gate.records.packed_weights import packed_weights
from merge_gate.records.terms import record
from merge_gate.strict_json import InvalidJsonError, parse_strictly

FLOATING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes that a model can be cast to, and their names in a header."""

FLOATING_STORED = frozenset({*FLOATING.values(), "F64"})
"""The floating dtypes that a cast changes."""

_PREFIX_BYTES = 8
_ALIGNMENT = 8


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
    """One weights file: its header with the length before it, and the places of its tensors."""

    name: str
    head: bytes
    places: tuple[Place, ...]

    @property
    def size_bytes(self) -> int:
        return max((place.end for place in self.places), default=len(self.head))


@record
class IndexFile:
    """An index and its bytes."""

    name: str
    content: bytes


@record
class ModelLayout:
    """The weight files of a model, and their index if there is one."""

    files: tuple[FileLayout, ...]
    index: IndexFile | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files) + (len(self.index.content) if self.index else 0)

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
        files = () if pickled else tuple(_read(directory, name) for name in chosen.files)
        index = chosen.index and IndexFile(name=chosen.index, content=Path(directory, chosen.index).read_bytes())
    except (CorruptFileError, OSError, GateError) as error:
        raise NotPublishedError(f"the base's files cannot be read: {error}", hint="fetch the base again") from error
    if pickled:
        raise NotPublishedError(
            f"the base stores its weights in {shown(pickled[0])}, expected safetensors files",
            hint="convert the base to safetensors, and publish from that copy",
        )
    return ModelLayout(files=files, index=index or None)


def _read(directory: str, name: str) -> FileLayout:
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
        yield file if is_same else _new_file(file.name, tensors, _metadata(file))


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
        yield _new_file(name, [replace(tensor, file=name) for tensor in shard], metadata)


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


def _new_file(name: str, tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None) -> FileLayout:
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


def _index(base: ModelLayout, files: Sequence[FileLayout]) -> IndexFile | None:
    """The index of these files. The base's own bytes stay if they say the same."""
    is_needed = len(files) > 1 or (base.index is not None and files[0].name != MODEL)
    if not is_needed:
        return None
    listed = {place.tensor.name: file.name for file in files for place in file.places}
    size_bytes = sum(place.size_bytes for file in files for place in file.places)
    own = _parsed(base.index.content) if base.index is not None else {}
    metadata = own["metadata"] if isinstance(own.get("metadata"), dict) else {}
    name = base.index.name if base.index is not None else MODEL_INDEX
    if base.index is not None and _is_true(own, files) and metadata.get("total_size") == size_bytes:
        return base.index
    content = {"metadata": metadata | {"total_size": size_bytes}, "weight_map": dict(sorted(listed.items()))}
    return IndexFile(name=name, content=(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


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
    if written.index is not None and not _is_true(_parsed(written.index.content), written.files):
        raise NotPublishedError("the written index differs from the headers", hint="please report this")
