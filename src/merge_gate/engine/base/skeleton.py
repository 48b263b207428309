"""Loads a base from its headers and a `Feed` of its bytes, as a skeleton that takes no memory.

In: a base's directory and `ModelClass`, the headers of its weight files, and a feed of their bytes. Out: a `Base`, or
`NoSkeletonError` with the reason. Knows no PEFT.

The tensors of a skeleton are mapped from the files, or filled from the feed while they are used. Only headers are read
to make it:

1. transformers' loader runs on the headers, and the tensor map records which stored tensors make which tensor of the
   model, in the wanted dtype, and by which conversion.
2. A stored tensor that keeps its bytes is mapped, if the files may be mapped. Any other conversion becomes a group
   (lazy_tensors.py): its tensors, and how they are filled from the feed. Conversions whose stored tensors are mixed in
   the files (fused experts) share a group, so that the files are read in order.
3. transformers loads the class again, from these tensors.
4. The proof that this is what `from_pretrained` gives: the same tensors have no source, all names, shapes, and dtypes
   are those of the outline on the meta device, and each tensor without values is still in its place.
5. A tensor that the load itself read or wrote (a padding row that transformers sets to zero) gets its values for good,
   and the load is repeated. The last load must not touch a tensor without values (mincore).
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate.engine.base.loaded_base import (
    Base,
    Loading,
    ModelClass,
    Place,
    Source,
    head_options,
    load_with_info,
    loads_as_usual,
    measure_base,
    named_tensors,
    place_of,
    refuse_misfits,
)
from merge_gate.engine.base.stored_spans import MappedFiles, SharedReads, StoredBytes, bytes_of, stored_bytes
from merge_gate.engine.base.tensor_map import RENAMED, NoMapError, TensorGroup, TensorMap, tensor_map
from merge_gate.engine.tensors.lazy_tensors import LazyGroup, LazyTensors, Tensors
from merge_gate.engine.tensors.measure import dtype_name
from merge_gate.files.feed import Feed
from merge_gate.records.files import CONFIG_NAME, FileSpan, StoredTensor
from merge_gate.records.measured import TensorStats
from merge_gate.records.refusals import CannotJudge
from merge_gate.records.terms import Quantization

MOST_BYTES_TOGETHER = 1 << 29
"""Conversions share a group up to this size. Beyond, they are filled one by one, and the files are read with jumps."""

CAST_ELEMENTS = 1 << 20
"""A tensor of another dtype is read and cast in blocks of so many elements."""

MOST_LOADS = 3
"""Which tensors a load reads depends on the class, so two loads read the same tensors."""

KEPT_SHARE = 4
LEAST_KEPT_BYTES = 3 << 28
"""At most a quarter of a base may be filled permanently, or 768 MiB (an embedding and a head) if that is more."""


class NoSkeletonError(Exception):
    """This base, or its class, needs `from_pretrained`. The text says why."""


FiguresBySpan = Mapping[tuple[tuple[FileSpan, ...], tuple[int, ...], str], TensorStats]
"""The figures of tensors by what each is read from, its shape, and its dtype."""


def skeleton_of(
    source: Source,
    model_class: ModelClass,
    stored: Sequence[StoredTensor],
    feed: Feed,
    *,
    is_mapped: bool = False,
    known: FiguresBySpan = MappingProxyType({}),
) -> Base:
    """Make the skeleton of a base.

    Args:
        source: the base. Of its directory, the headers of the weight files and the other files are read.
        model_class: the class and head to load it as.
        stored: the tensors in the headers of the files that transformers loads, in its order.
        feed: the bytes of these files. Skeletons with the same `SharedReads` are filled in one pass.
        is_mapped: tensors that keep their bytes are mapped from the files, and measured now.
        known: figures of other skeletons of the same files, so that only tensors with merges are read again.

    Raises:
        NoSkeletonError: it could differ from what `from_pretrained` gives.
        CannotJudge: the base cannot be loaded as this class.
        SourceError: bytes could not be had.
    """
    if source.quantization is not Quantization.NONE:
        raise NoSkeletonError(f"it is quantized while it is loaded ({source.quantization})")
    shared = feed if isinstance(feed, SharedReads) else SharedReads(feed)
    try:
        return _made(source, model_class, stored, shared, is_mapped=is_mapped, known=known)
    except (NoSkeletonError, CannotJudge, SourceError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries have their own exceptions
        raise NoSkeletonError(f"{type(error).__name__}: {error}"[:400]) from error


def _made(
    source: Source,
    model_class: ModelClass,
    stored: Sequence[StoredTensor],
    feed: SharedReads,
    *,
    is_mapped: bool,
    known: FiguresBySpan,
) -> Base:
    # 1.
    transformers_class, mapping, loading = mapped_headers(source, model_class, stored)
    outline = {name: tensor for name, _, tensor in named_tensors(mapping.model)}
    # 2.
    groups = _groups(mapping, outline, loading.newly_initialized)
    spans = stored_bytes(
        source.directory, {name: mapping.stored[name] for targets in groups for name in targets.group.sources}
    )
    in_files = {name: place for targets in groups if is_mapped for name, place in _unchanged(targets, spans).items()}
    others = [targets for targets in groups if in_files.keys().isdisjoint(targets.tensors)]
    lazy = LazyTensors(_lazy_groups(others, spans, feed))
    # 3. to 5.
    most_bytes = max(LEAST_KEPT_BYTES, sum(part.span.end - part.span.start for part in spans.values()) // KEPT_SHARE)
    map_files = functools.partial(MappedFiles, source.directory, in_files)
    model, mapped = _loaded(transformers_class, mapping, lazy, map_files, loading, most_bytes=most_bytes)
    alone = {place_of(tensor): (in_files[name].span,) for name, tensor in mapped.unwritten().items()}
    for lazy_group in lazy.groups(lazy.tensors):
        if len(lazy_group.outlines) == len(lazy_group.spans) == 1 and not lazy.is_filled(lazy_group):
            alone |= {place_of(lazy.tensors[name]): lazy_group.spans for name in lazy_group.outlines}
    keys = {place: _figures_key(place, of_place) for place, of_place in alone.items()}
    figures = {place: known[key] for place, key in keys.items() if key in known}
    held = lazy if lazy.tensors else None
    base = measure_base(model, source, loading, known=figures, lazy=held, feed=feed if held else None)
    base.alone = {name: alone[place] for name, tensor in base.tensors.items() if (place := place_of(tensor)) in alone}
    return base


def _figures_key(place: Place, spans: tuple[FileSpan, ...]) -> tuple[tuple[FileSpan, ...], tuple[int, ...], str]:
    _, shape, _, dtype = place
    return spans, shape, dtype_name(dtype)


def figures_by_span(base: Base) -> FiguresBySpan:
    """The figures that this run measured of a skeleton's tensors, for `skeleton_of`."""
    measured = base.alone.keys() & base.stats.keys()
    return {_figures_key(place_of(base.tensors[name]), base.alone[name]): base.stats[name] for name in measured}


# --- 1. ------------------------------------------------------------------------------------------------------------


def mapped_headers(
    source: Source, model_class: ModelClass, stored: Sequence[StoredTensor]
) -> tuple[Any, TensorMap, Loading]:
    """The class of transformers, the tensor map of a base in the wanted dtype, and the names that do not fit.

    Raises:
        NoSkeletonError: the class has a loader of its own, or the base is stored quantized, has an adapter in its
            directory, or its headers give no map.
        CannotJudge: the base cannot be loaded as this class.
    """
    transformers_class = getattr(transformers, model_class.class_name)
    if not loads_as_usual(transformers_class):
        raise NoSkeletonError(f"{model_class.class_name} has a from_pretrained of its own")
    if Path(source.directory, CONFIG_NAME).exists():
        raise NoSkeletonError("an adapter is in its directory, which transformers loads too")
    config = transformers_class.config_class.from_pretrained(source.directory, local_files_only=True)
    text = config.get_text_config(decoder=True)
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        raise NoSkeletonError("it is stored quantized")
    dtype = source.options["dtype"]
    if dtype == "auto" and config.dtype is None:
        dtype = _only_dtype(source.directory, stored)
    try:
        mapping = tensor_map(transformers_class, source.directory, stored, dtype=dtype, **head_options(model_class))
    except NoMapError as error:
        raise NoSkeletonError(f"its headers give no tensor map: {error}") from error
    loading = Loading(missing=mapping.missing, unexpected=mapping.unexpected, mismatched=mapping.mismatched)
    refuse_misfits(mapping.model, loading, source.label, model_class)
    return transformers_class, mapping, loading


def _only_dtype(directory: str, stored: Sequence[StoredTensor]) -> torch.dtype:
    """The dtype that `dtype="auto"` selects if the config has none and transformers looks at the files."""
    in_files = {tensor.dtype for tensor in stored if tensor.dtype.startswith(("F", "BF"))}
    index = Path(directory, SAFE_WEIGHTS_INDEX_NAME)
    if index.exists() and "dtype" in json.loads(index.read_bytes()).get("metadata", {}):
        raise NoSkeletonError(f"its config has no dtype, and {SAFE_WEIGHTS_INDEX_NAME} has one")
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    if len(in_files) != 1 or not in_files <= dtypes.keys():
        raise NoSkeletonError(f"its config has no dtype, and its files have {', '.join(sorted(in_files)) or 'none'}")
    return dtypes[in_files.pop()]


# --- 2. ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Targets:
    """A conversion, and its targets that are tensors of the model: the first name of each, and the target's name."""

    group: TensorGroup
    tensors: Mapping[str, str]
    outlines: Mapping[str, tuple[torch.Size, torch.dtype]]


def _groups(mapping: TensorMap, outline: Tensors, newly_initialized: frozenset[str]) -> list[_Targets]:
    """The conversions that make a tensor of the model."""
    first_names = {id(tensor): name for name, tensor in outline.items()}
    named = (
        *mapping.model.named_parameters(remove_duplicate=False),
        *mapping.model.named_buffers(remove_duplicate=False),
    )
    first = {name: first_names[id(tensor)] for name, tensor in named if id(tensor) in first_names}
    groups = []
    for group in mapping.groups:
        tensors = {
            first[target]: target for target in group.targets if target in first and target not in newly_initialized
        }
        tensors = {name: target for name, target in tensors.items() if outline[name].numel()}
        if tensors and group.recipe is None:
            raise NoSkeletonError(f"{group.targets[0]} needs values to be converted ({group.conversion})")
        outlines = {name: (outline[name].shape, outline[name].dtype) for name in tensors}
        if tensors:
            groups.append(_Targets(group=group, tensors=tensors, outlines=outlines))
    twice = [
        name for name, count in Counter(name for targets in groups for name in targets.tensors).items() if count > 1
    ]
    if twice:
        raise NoSkeletonError(f"{twice[0]} is stored under several names")
    return groups


def _unchanged(targets: _Targets, spans: Mapping[str, StoredBytes]) -> dict[str, StoredBytes]:
    """The tensor of a conversion that keeps the bytes of its stored tensor; empty if it does not."""
    if not _keeps_values(targets):
        return {}
    place = spans[targets.group.sources[0]]
    return {name: place for name, (_, dtype) in targets.outlines.items() if dtype == place.dtype}


def _lazy_groups(groups: Sequence[_Targets], spans: Mapping[str, StoredBytes], feed: Feed) -> Iterator[LazyGroup]:
    """Lazy groups, in the order of the files."""

    def places(targets: _Targets) -> list[tuple[int, int]]:
        return sorted(spans[name].order for name in targets.group.sources)

    def size(targets: _Targets) -> int:
        return sum(spans[name].span.end - spans[name].span.start for name in targets.group.sources)

    together: list[_Targets] = []
    last, held = (-1, -1), 0
    for targets in sorted(groups, key=places):
        if together and (places(targets)[0] > last or held + size(targets) > MOST_BYTES_TOGETHER):
            yield _lazy_group(together, spans, feed)
            together, last, held = [], (-1, -1), 0
        together.append(targets)
        last, held = max(last, places(targets)[-1]), held + size(targets)
    if together:
        yield _lazy_group(together, spans, feed)


def _lazy_group(groups: Sequence[_Targets], spans: Mapping[str, StoredBytes], feed: Feed) -> LazyGroup:
    reads = sorted(
        ((spans[name], targets) for targets in groups for name in targets.group.sources), key=lambda read: read[0].order
    )

    def fill(tensors: Tensors) -> None:
        values: dict[str, torch.Tensor] = {}
        for stored, targets in reads:
            if _keeps_values(targets):
                (name,) = targets.tensors
                _read_into(tensors[name], stored, feed)
                continue
            values[stored.name] = stored.read(feed)
            if all(source in values for source in targets.group.sources):
                _convert(targets, {source: values.pop(source) for source in targets.group.sources}, tensors)

    def read_rows(rows: torch.Tensor, first: int) -> None:
        _read_into(rows, reads[0][0], feed, first)

    return LazyGroup(
        outlines={name: outline for targets in groups for name, outline in targets.outlines.items()},
        fill=fill,
        spans=tuple(stored.span for stored, _ in reads),
        read_rows=read_rows if len(reads) == 1 and reads[0][0].shape and _keeps_values(groups[0]) else None,
    )


def _keeps_values(targets: _Targets) -> bool:
    """Whether the tensor of a conversion has the values of its stored tensor, except for a cast."""
    return targets.group.conversion == RENAMED and len(targets.group.sources) == 1


def _read_into(tensor: torch.Tensor, stored: StoredBytes, feed: Feed, first_row: int = 0) -> None:
    """Read a stored tensor that keeps its values, except for a cast; or its rows from `first_row` on."""
    place = stored.span.start + first_row * math.prod(stored.shape[1:]) * stored.dtype.itemsize
    if stored.dtype == tensor.dtype:
        feed.read(stored.span.file, place, bytes_of(tensor))
        return
    flat, buffer = tensor.view(-1), torch.empty(min(tensor.numel(), CAST_ELEMENTS), dtype=stored.dtype)
    for start in range(0, tensor.numel(), CAST_ELEMENTS):
        block = buffer[: tensor.numel() - start]
        feed.read(stored.span.file, place + start * stored.dtype.itemsize, bytes_of(block))
        values = block.float() if block.itemsize == 2 else block  # noqa: PLR2004 - halves by float32: half of the time
        flat[start : start + len(block)].copy_(values)


def _convert(targets: _Targets, stored: Tensors, tensors: Tensors) -> None:
    assert targets.group.recipe is not None  # noqa: S101 - `_groups` refuses a conversion without one
    made = targets.group.recipe(stored)
    for name, target in targets.tensors.items():
        if made[target].shape != tensors[name].shape or made[target].dtype != tensors[name].dtype:
            raise EngineError(
                f"{target}: {targets.group.conversion} made {tuple(made[target].shape)} of {made[target].dtype}, "
                f"expected {tuple(tensors[name].shape)} of {tensors[name].dtype}"
            )
        tensors[name].copy_(made[target])


# --- 3. to 5. ------------------------------------------------------------------------------------------------------


def _loaded(
    transformers_class: Any,
    headers: TensorMap,
    lazy: LazyTensors,
    map_files: Callable[[], MappedFiles],
    expected: Loading,
    *,
    most_bytes: int,
) -> tuple[Any, MappedFiles]:
    config, outline = headers.model.config, {name: tensor for name, _, tensor in named_tensors(headers.model)}
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in outline.items()
        if not tensor.numel() and name not in expected.newly_initialized
    }
    for number in range(MOST_LOADS):
        if number > 1:
            lazy.refill()  # what the last load wrote there, this one writes again
        mapped = map_files()  # for the same reason
        given = {**lazy.tensors, **empty, **mapped.tensors}
        model, loading = load_with_info(transformers_class, None, config=config, dtype=config.dtype, state_dict=given)
        if not lazy.fill_touched():
            without_values = {name: tensor for name, tensor in lazy.tensors.items() if not lazy.is_kept(tensor)}
            _refuse_another_model(model, loading, expected, outline, given=given, without_values=without_values)
            return model, mapped
        if lazy.kept_bytes() > most_bytes:
            break
    raise NoSkeletonError("transformers reads or changes too many of its tensors while it loads them")


def _refuse_another_model(
    model: Any, loading: Loading, expected: Loading, outline: Tensors, *, given: Tensors, without_values: Tensors
) -> None:
    """Step 4. A tensor that has its values may be tied to another one, or be replaced, as in any load."""
    tensors = {name: tensor for name, _, tensor in named_tensors(model)}
    refuse_other_sources(loading, expected)
    tied = given.keys() - without_values.keys() - tensors.keys()
    expected_outlines = {name: (tensor.shape, tensor.dtype) for name, tensor in outline.items() if name not in tied}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != expected_outlines:
        raise NoSkeletonError("its tensors have other names, shapes, or dtypes than its headers say")
    for name, tensor in without_values.items():
        if place_of(tensors[name]) != place_of(tensor):
            raise NoSkeletonError(f"transformers replaces {name} after it was loaded")


def refuse_other_sources(loading: Loading, expected: Loading) -> None:
    if loading.newly_initialized != expected.newly_initialized:
        names = sorted(loading.newly_initialized ^ expected.newly_initialized)
        raise NoSkeletonError(f"{names[0]} has a source in one load and not in another")
