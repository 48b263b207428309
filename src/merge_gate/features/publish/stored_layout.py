"""The tensor map, reversed: which stored tensors a tensor of the model is written to, and with which values.

In: a base's tensor map, its loaded tensors, and a feed of its files. Out: stored tensors by the base's own stored
names, or `NotPublishedError` with the reason. For a base that bitsandbytes has packed, the headers that it would have
as a plain one. Knows no PEFT, and writes no files.

1. A stored tensor that was renamed at most has the values of its tensor of the model.
2. Other conversions (fused experts, split projections) are reversed by transformers. The result counts if
   transformers' own conversion makes exactly the given tensors of it. For the first group of each kind, the base's
   own tensors also have to give the stored bytes again.
"""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from transformers import core_model_loading

from merge_gate._internal.errors import NotPublishedError
from merge_gate._internal.text import listing
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import current_names
from merge_gate.engine.base.stored_spans import StoredBytes, stored_bytes
from merge_gate.engine.base.tensor_map import DTYPES, RENAMED, TensorGroup, TensorMap
from merge_gate.engine.tensors.measure import dtype_name, same_bits
from merge_gate.features.publish.packed_weights import packed_weights
from merge_gate.files.feed import Feed
from merge_gate.records.files import StoredTensor

STORED_DTYPES = {torch_name: stored for stored, torch_name in DTYPES.items()}
"""torch's names of dtypes, and safetensors'."""

MOST_STATE_BYTES = 1 << 16
"""bitsandbytes writes a few hundred."""

_UNQUANTIZED = "publish the merge into the unquantized base"
_AT_RUN_TIME = "load the adapter on its base at run time, or save the merge with another tool"


@dataclass(slots=True, kw_only=True)
class StoredLayout:
    """How a base is stored. `places` has every stored tensor. One layout serves several threads.

    `packed` names weights that are packed in the files, and that the loaded base and the map have as plain ones. Their
    places have the dtype and the shape of the plain weights, and their bytes must not be read.
    """

    map: TensorMap
    base: Base
    feed: Feed
    places: Mapping[str, StoredBytes]
    packed: frozenset[str] = frozenset()
    _groups: dict[str, tuple[TensorGroup, ...]] = field(init=False)
    _proved: dict[tuple[object, ...], bool] = field(default_factory=dict)
    _one_conversion_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        groups: dict[str, list[TensorGroup]] = {}
        for group in self.map.groups:
            for name in dict.fromkeys(map(self.base.first_name, group.targets)):
                groups.setdefault(name, []).append(group)
        self._groups = {name: tuple(members) for name, members in groups.items()}

    def groups(self, name: str) -> tuple[TensorGroup, ...]:
        """The conversions that make the base's tensor of this name; several if it is stored under several names."""
        return self._groups.get(name, ())

    def checked_groups(self, name: str) -> tuple[TensorGroup, ...]:
        """The same.

        Raises:
            NotPublishedError: nothing is stored for this tensor, or its conversion is unknown.
        """
        groups = self.groups(name)
        if not groups or name in self.base.newly_initialized:
            raise NotPublishedError(
                f"the base stores no tensor for {name}, which the merge changes: {type(self.base.model).__name__} "
                "initializes it",
                hint=_AT_RUN_TIME,
            )
        for group in groups:
            if group.failed or (group.recipe is None and not is_renamed(group)):
                raise NotPublishedError(
                    f"{group.sources[0]} is converted to {name} in a way that the gate cannot repeat "
                    f"({group.conversion or 'unknown'})",
                    hint=_AT_RUN_TIME,
                )
            self._refuse_packed(group)
        return groups

    def _refuse_packed(self, group: TensorGroup) -> None:
        """The way back is proved on the stored values. Packed ones are no proof."""
        if not is_renamed(group) and (packed := self.packed.intersection(group.sources)):
            raise NotPublishedError(
                f"{min(packed)} is packed by bitsandbytes, and transformers converts it to {group.targets[0]} "
                f"({group.conversion}): the way back cannot be proved",
                hint=_UNQUANTIZED,
            )

    def outline(self, source: str) -> StoredTensor:
        """The header of a stored tensor."""
        return self.map.stored[source]

    def loaded_groups(self) -> Iterator[TensorGroup]:
        """The conversions whose tensors are all in the loaded base."""
        for group in self.map.groups:
            if not group.failed and all(self.base.first_name(target) in self.base.tensors for target in group.targets):
                yield group

    def unloaded(self) -> Iterator[StoredTensor]:
        """Floating and complex stored tensors that no loaded tensor has the values of, in the order of the files."""
        covered = {source for group in self.loaded_groups() for source in group.sources}
        for name in sorted(self.places.keys() - covered, key=lambda name: self.places[name].order):
            if name in self.packed:
                raise NotPublishedError(
                    f"{name} is packed by bitsandbytes, and transformers does not load it, so it has no plain values",
                    hint=_UNQUANTIZED,
                )
            if self.places[name].dtype.is_floating_point or self.places[name].dtype.is_complex:
                yield self.map.stored[name]

    def reversed(self, group: TensorGroup, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors of a group, from those of the model. `values` has all targets of the group.

        Raises:
            NotPublishedError: transformers' reverse conversion is not exact.
        """
        if is_renamed(group):
            return {group.sources[0]: values[group.targets[0]]}
        self._refuse_packed(group)
        with self._one_conversion_at_a_time:
            self._prove(group)
            made = self._reversed(group, values)
            self._refuse_inexact(group, self._forward(group, made), values)
        return made

    # --- 2. --------------------------------------------------------------------------------------------------------

    def _prove(self, group: TensorGroup) -> None:
        """Check that the base's own tensors give the stored bytes, once for each kind of conversion."""
        kind = (group.conversion, len(group.sources), len(group.targets))
        if self._proved.get(kind):
            return
        names = [self.base.first_name(target) for target in group.targets]
        with self.base.filled(names):
            own = {target: self.base.tensors[name].detach() for target, name in zip(group.targets, names, strict=True)}
            made = self._reversed(group, own)
            stored = {source: self.places[source].read(self.feed).to(made[source].dtype) for source in group.sources}
            self._refuse_inexact(group, made, stored)
        self._proved[kind] = True

    def _reversed(self, group: TensorGroup, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            made = core_model_loading.revert_weight_conversion(self.map.model, dict(values))
        except Exception as error:  # each operation has its own exceptions
            raise _inexact(group, f"transformers raises {type(error).__name__}: {str(error)[:200]}") from error
        named = _named_as_stored(made, group.sources)
        if named is None:
            raise _inexact(group, f"transformers names the result {', '.join(sorted(made)[:3])}")
        for source, tensor in named.items():
            if tuple(tensor.shape) != self.places[source].shape:
                raise _inexact(
                    group, f"{source} would have shape {tuple(tensor.shape)}, expected {self.places[source].shape}"
                )
        return named

    @staticmethod
    def _forward(group: TensorGroup, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert group.recipe is not None  # noqa: S101 - checked_groups refuses a conversion without one
        try:
            return group.recipe(stored)
        except Exception as error:  # as above
            raise _inexact(group, f"transformers raises {type(error).__name__}: {str(error)[:200]}") from error

    @staticmethod
    def _refuse_inexact(
        group: TensorGroup, made: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
    ) -> None:
        for name, tensor in expected.items():
            if name not in made or not same_bits(made[name], tensor):
                raise _inexact(group, f"{name} has other values after it was converted there and back")


def is_renamed(group: TensorGroup) -> bool:
    """Whether a stored tensor keeps its values when it is loaded."""
    return group.conversion == RENAMED and len(group.sources) == len(group.targets) == 1


def layout_of(
    base: Base, mapping: TensorMap, feed: Feed, packed: Mapping[str, StoredTensor] = MappingProxyType({})
) -> StoredLayout:
    """The layout of a base whose tensor map was made in the dtype that it was loaded in.

    `packed` are the headers of weights that the files have packed, and that the map has plain.

    Raises:
        ValueError, OSError: a header is not what it was.
    """
    places = stored_bytes(base.source.directory, {**mapping.stored, **packed})
    for name in packed:
        plain = mapping.stored[name]
        places[name] = replace(places[name], dtype=getattr(torch, DTYPES[plain.dtype]), shape=plain.shape)
    return StoredLayout(map=mapping, base=base, feed=feed, places=places, packed=frozenset(packed))


def extended(layout: StoredLayout, names: Iterable[str]) -> tuple[StoredLayout, dict[str, Any]]:
    """The layout with what a merge adds: tensors that it separates from their first ones, and heads without a file.

    They are stored under their own names. `names` are all tensors that the merge can change. Also returns the keys of
    config.json that this changes, as PEFT's merged model has them.

    Raises:
        NotPublishedError: transformers would tie, initialize, or rename a tensor of the published model.
    """
    base, mapping, names, settings = copy.copy(layout.base), layout.map, {*names}, dict[str, Any]()
    made = {target for group in mapping.groups for target in group.targets}
    untied = {name: first for name, first in base.aliases.items() if name in names}
    heads = (base.newly_initialized & names) - made
    added = sorted({*untied, *untied.values(), *heads} - made)
    left = {name for name, new in zip(added, current_names(mapping.model, added), strict=True) if name != new}
    left |= (base.aliases.keys() - untied if untied else set()) | (base.newly_initialized - heads if heads else set())
    if left:
        problem = (
            f"the merge adds {listing(added)}, and transformers would load other values for {listing(sorted(left))}"
        )
        raise NotPublishedError(problem, hint=_AT_RUN_TIME)
    if untied:
        base.aliases, settings = {}, {"tie_word_embeddings": False}
    if heads:
        settings |= {key: getattr(mapping.model.config, key) for key in ("model_type", "id2label", "label2id")}
        settings["architectures"] = [type(mapping.model).__name__]
    base.tensors = base.tensors | {name: base.tensors[first] for name, first in untied.items()}
    base.newly_initialized -= heads
    stored, places = dict(mapping.stored), dict(layout.places)
    for name in added:
        dtype, shape = base.tensors[name].dtype, tuple(base.tensors[name].shape)
        places[name] = replace(next(iter(layout.places.values())), name=name, dtype=dtype, shape=shape)
        stored[name] = StoredTensor(name=name, dtype=stored_dtype(dtype), shape=shape)
    groups = (*mapping.groups, *(TensorGroup(sources=(name,), targets=(name,)) for name in added))
    return replace(layout, map=replace(mapping, stored=stored, groups=groups), base=base, places=places), settings


def stored_dtype(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype."""
    return STORED_DTYPES[dtype_name(dtype)]


def _named_as_stored(made: Mapping[str, torch.Tensor], sources: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """The tensors by their stored names, which may have a prefix more or less; None if they do not fit."""
    named: dict[str, Any] = {}
    for name, tensor in made.items():
        fitting = [source for source in sources if source == name] or [
            source for source in sources if source.endswith(f".{name}") or name.endswith(f".{source}")
        ]
        if len(fitting) != 1 or fitting[0] in named:
            return None
        named[fitting[0]] = tensor
    return named if named.keys() == set(sources) else None


def _inexact(group: TensorGroup, reason: str) -> NotPublishedError:
    return NotPublishedError(
        f"{group.sources[0]} cannot be written in the base's own layout: transformers converts it to "
        f"{group.targets[0]} ({group.conversion}), and the way back is not exact: {reason}",
        hint=_AT_RUN_TIME,
    )


# --- a base that bitsandbytes has packed -----------------------------------------------------------------------------


def plain_headers(directory: str, stored: Iterable[StoredTensor], feed: Feed, dtype: str) -> tuple[StoredTensor, ...]:
    """The headers without packing. `dtype` is safetensors' name for the dtype of the plain weights.

    Raises:
        NotPublishedError: the state of a packed weight cannot be read.
        ValueError, OSError: a header is not what it was.
    """
    stored = tuple(stored)
    packed = packed_weights(stored)
    states = {tensor.name: tensor for tensor in stored if tensor.name in packed.states.values()}
    places = stored_bytes(directory, states)
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, state in packed.states.items():
        if places[state].span.end - places[state].span.start > MOST_STATE_BYTES:
            raise _unreadable(state)
        shapes[weight] = _shape(bytes(places[state].read(feed).flatten().tolist()), packed.counts[weight], state)
    return tuple(
        replace(tensor, dtype=dtype, shape=shapes.get(tensor.name, tensor.shape)) if tensor.name in packed else tensor
        for tensor in stored
        if tensor.name not in packed.others
    )


def _shape(state: bytes, count: int, name: str) -> tuple[int, ...]:
    try:
        shape: Any = json.loads(state)["shape"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(name) from error
    is_shape = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not is_shape or math.prod(shape) not in {count, count - 1}:
        raise _unreadable(name)
    return tuple(shape)


def _unreadable(name: str) -> NotPublishedError:
    return NotPublishedError(
        f"{name} does not have the shape of its packed weight", hint="fetch the base again, or contact its owner"
    )


def turned(headers: Iterable[StoredTensor], mapping: TensorMap, packed: Mapping[str, Any]) -> Iterator[StoredTensor]:
    """The headers with the other direction for weights of a Conv1D, which transformers transposes and then packs."""
    shapes: dict[str, Sequence[int]] = {
        source: needed
        for name, has, needed in mapping.mismatched
        if tuple(has) == tuple(reversed(tuple(needed)))
        for source in mapping.sources.get(name, (name,))
    }
    for header in headers:
        is_turned = header.name in shapes and header.name in packed
        yield replace(header, shape=tuple(shapes[header.name])) if is_turned else header
