"""Loads a base into memory from a `Feed`, tensor by tensor: one that transformers quantizes while it loads it.

In: the inputs of a skeleton. Out: a `Base` like that of `load_base`, or `NoSkeletonError` with the reason. No file is
mapped, and none is needed on the disk. Knows no PEFT.

1. The tensor map of the headers shows what is loaded, and how much memory that takes.
2. transformers gets each stored tensor as an object that reads its values when they are taken, like the slices of
   safetensors. If it quantizes, it keeps only the packed values.
3. It takes one at a time, in the order of the files if none are converted together; else the feed is read with jumps.
4. The load must lack the same tensors as the headers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import core_model_loading

from merge_gate.engine.base.foreign_weights import refuse_foreign_weights
from merge_gate.engine.base.loaded_base import (
    Base,
    Loading,
    ModelClass,
    Source,
    caught,
    load_with_info,
    loads_as_usual,
    measure_base,
    refuse_mismatches,
)
from merge_gate.engine.base.skeleton import NoSkeletonError, mapped_headers
from merge_gate.engine.base.stored_formats import refuse_other_packing
from merge_gate.engine.base.stored_spans import StoredBytes, stored_bytes
from merge_gate.engine.base.tensor_map import RENAMED, TensorGroup, TensorMap
from merge_gate.engine.tensors.quantized import quantizing
from merge_gate.errors import EngineError
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import Undecidable
from merge_gate.records.terms import Quantization
from merge_gate.sources.feed import Feed

ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' own switch. Otherwise four threads read ahead, out of order and into memory."""

PACKED_BYTES = {Quantization.BNB_4BIT: 0.5 + 4 / 64, Quantization.BNB_8BIT: 1.0}
"""Memory of one packed value with its part of the scale. The scales of rows do not count."""


def load_from_feed(
    source: Source, model_class: ModelClass, stored: Sequence[StoredTensor], feed: Feed, *, free_bytes: int | None
) -> Base:
    """Load a base from a feed.

    Args:
        source: the base. Of its directory, the headers of the weight files and the other files are read.
        model_class: the class and head to load it as.
        stored: the tensors in the headers of the files that transformers loads, in its order.
        feed: the bytes of these files.
        free_bytes: the free memory, if it is known.

    Raises:
        NoSkeletonError: this class has a loader of its own, or transformers' loader has changed.
        Undecidable: the base cannot be loaded as this class.
        EngineError: the memory does not suffice. Nothing was read.
        SourceError: bytes could not be had.
    """
    transformers_class = getattr(transformers, model_class.class_name)
    if not loads_as_usual(transformers_class):
        raise NoSkeletonError(f"{model_class.class_name} has a from_pretrained of its own")
    # 1.
    found = mapped_headers(transformers_class, source, model_class, stored)
    expected = Loading(missing=found.missing, unexpected=found.unexpected, mismatched=found.mismatched)
    refuse_mismatches(expected, source.label, model_class)
    _refuse_too_large(found.model, source, model_class, free_bytes)
    spans = stored_bytes(source.directory, {name: found.stored[name] for one in found.groups for name in one.sources})
    # 2. and 3.
    in_order, key = _order(found, spans)
    reads = _Reads(feed)
    given = {
        name: _Unread(spans[name], reads) if name in spans else _on_meta(one) for name, one in found.stored.items()
    }
    config = found.model.config
    options = {name: source.options[name] for name in ("quantization_config", "device_map") if name in source.options}
    feed.expect([spans[name].span for name in in_order], whole=True)
    try:
        with quantizing(source.quantization), _taken_in(key):
            model, loading = load_with_info(
                transformers_class, None, config=config, dtype=config.dtype, state_dict=given, **options
            )
    except Exception as error:
        reads.raise_failure()
        raise Undecidable(
            "base_raised", base=source.label, error=caught(error), class_name=model_class.class_name
        ) from error
    reads.raise_failure()
    # 4.
    if loading.newly_initialized != expected.newly_initialized:
        names = sorted(loading.newly_initialized ^ expected.newly_initialized)
        raise NoSkeletonError(f"{names[0]} has a source in one load and not in another")
    refuse_foreign_weights(model, loading.newly_initialized, source.label)
    refuse_other_packing(model, source)
    return measure_base(model, source, loading, known={})


def _refuse_too_large(outline: Any, source: Source, model_class: ModelClass, free_bytes: int | None) -> None:
    head = outline.get_output_embeddings()
    packed = {
        id(module.weight)
        for module in outline.modules()
        if isinstance(module, nn.Linear) and module is not head and source.quantization in PACKED_BYTES
    }
    of_packed = PACKED_BYTES.get(source.quantization, 0.0)
    needed = sum(one.numel() * of_packed if id(one) in packed else one.nbytes for one in outline.parameters())
    if free_bytes is not None and needed > free_bytes:
        quantized = f" ({source.quantization})" if packed else ""
        raise EngineError(
            f"base {source.label}{quantized} takes {needed / 2**30:.1f} GiB of memory as {model_class.class_name}, and "
            f"only {free_bytes / 2**30:.1f} GiB are free: nothing of it was read",
            hint="use a machine with more memory"
            + (
                "; with quantization: none, the base is read in pieces and needs no memory of its size"
                if packed
                else ""
            ),
        )


# --- 2. and 3. -----------------------------------------------------------------------------------------------------


class _Reads:
    """The reads of one load. transformers collects exceptions and goes on; after the first, none reads any more."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._failure: BaseException | None = None

    def read(self, place: StoredBytes) -> torch.Tensor:
        if self._failure is not None:
            raise self._failure
        try:
            with torch.device("cpu"):
                return place.read(self._feed)
        except BaseException as error:
            self._failure = error
            raise

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class _Unread:
    """A stored tensor that is read when transformers takes its values. It behaves like a slice."""

    def __init__(self, place: StoredBytes, reads: _Reads) -> None:
        self._place, self._reads = place, reads

    def get_shape(self) -> list[int]:
        return list(self._place.shape)

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self._reads.read(self._place)[index]


def _on_meta(one: StoredTensor) -> torch.Tensor:
    """A stored tensor that is not loaded."""
    return torch.empty(one.shape, device="meta")


def _order(found: TensorMap, spans: Mapping[str, StoredBytes]) -> tuple[list[str], Any]:
    """The stored tensors in the order in which they are taken, and the key by which transformers is to sort them."""
    if any(one.conversion != RENAMED or len(one.sources) != 1 for one in found.groups):
        return [name for one in found.groups for name in _taken(one)], None
    last = (len(spans), 0)
    places = {name: place.order for name, place in spans.items()}
    return sorted(spans, key=places.__getitem__), lambda name: places.get(name, last)


def _taken(group: TensorGroup) -> list[str]:
    """The stored tensors of one conversion, which takes all that match one pattern before the next."""
    if group.recipe is None:
        return list(group.sources)
    by_pattern: dict[str, list[str]] = {}
    for _, source, pattern, _ in group.recipe.steps:
        by_pattern.setdefault(pattern, []).append(source)
    return [source for sources in by_pattern.values() for source in sources]


@contextlib.contextmanager
def _taken_in(key: Any) -> Iterator[None]:
    """Inside of the `with` block, transformers takes one stored tensor at a time, sorted by `key` if it is set."""
    own = core_model_loading.dot_natural_key
    before = os.environ.get(ONE_AT_A_TIME)
    os.environ[ONE_AT_A_TIME] = "1"
    core_model_loading.dot_natural_key = key or own
    try:
        yield
    finally:
        core_model_loading.dot_natural_key = own
        if before is None:
            del os.environ[ONE_AT_A_TIME]
        else:
            os.environ[ONE_AT_A_TIME] = before
