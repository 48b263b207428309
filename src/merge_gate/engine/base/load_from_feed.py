"""Loads a base into memory from a `Feed` of its bytes: one that transformers quantizes, or that is in no file here.

In: a base's directory and `ModelClass`, the headers of its weight files, and a feed of their bytes. Out: a `Base`. No
file is mapped, and tensors are read one by one.

1. The tensor map (skeleton.py) shows what is loaded, and how much memory that takes.
2. transformers gets each stored tensor as an object that reads its values when they are taken, like the slices of
   safetensors. It keeps only the packed values.
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
from torch import nn
from transformers import core_model_loading

from merge_gate._internal.errors import EngineError
from merge_gate._internal.text import gibibytes
from merge_gate.engine.base.loaded_base import (
    Base,
    ModelClass,
    Source,
    caught,
    load_with_info,
    loaded_quantization,
    measure_base,
)
from merge_gate.engine.base.skeleton import NoSkeletonError, mapped_headers, refuse_other_sources
from merge_gate.engine.base.stored_spans import StoredBytes, stored_bytes
from merge_gate.engine.base.tensor_map import RENAMED, TensorMap
from merge_gate.engine.tensors.quantized import loading_options, quantizing
from merge_gate.files.feed import Feed
from merge_gate.records.files import BaseFiles, StoredTensor
from merge_gate.records.refusals import CannotJudge
from merge_gate.records.terms import Quantization

ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' own switch. Otherwise four threads read ahead, out of order and into memory."""

PACKED_BYTES = {Quantization.BNB_4BIT: 0.5 + 4 / 64, Quantization.BNB_8BIT: 1.0}
"""Memory of one packed value with its part of the scale. The scales of rows do not count."""


def load_from_feed(
    source: Source, model_class: ModelClass, files: BaseFiles, feed: Feed, *, free_bytes: int | None
) -> Base:
    """Load a base into memory.

    Args:
        source: the base. The headers of its weight files and its other files are read from its directory.
        model_class: the class and head to load it as.
        files: the base's files, with the tensors in their headers.
        feed: the bytes of these files.
        free_bytes: the free memory, if it is known.

    Raises:
        NoSkeletonError: the headers say less than the load, or transformers' loader has changed.
        CannotJudge: the base cannot be loaded as this class.
        EngineError: the memory does not suffice, and nothing was read. Or transformers itself has to load the base from
            its files, and they are not here: stubs have headers and no values.
        SourceError: bytes could not be had.
    """
    try:
        return _loaded(source, model_class, files.tensors, feed, free_bytes)
    except NoSkeletonError as error:
        if not files.is_streamed:
            raise
        stored, free = gibibytes(files.weight_bytes), gibibytes(free_bytes or 0)
        raise EngineError(
            f"base {source.label} cannot be streamed: {model_class.class_name} has to be loaded by transformers "
            f"itself ({error}), from {stored} of files, and {free} of memory are free",
            hint=f"set access: download for this base, on a runner whose disk has room for {stored}",
        ) from error


def _loaded(
    source: Source, model_class: ModelClass, stored: Sequence[StoredTensor], feed: Feed, free_bytes: int | None
) -> Base:
    # 1.
    transformers_class, mapping, expected = mapped_headers(source, model_class, stored)
    _refuse_too_large(mapping.model, source, model_class, free_bytes)
    spans = stored_bytes(
        source.directory, {name: mapping.stored[name] for group in mapping.groups for name in group.sources}
    )
    # 2. and 3.
    in_order, key = _order(mapping, spans)
    reads = _Reads(feed)
    given = {
        name: _Unread(spans[name], reads) if name in spans else _on_meta(tensor)
        for name, tensor in mapping.stored.items()
    }
    config = mapping.model.config
    options = loading_options(source.quantization, source.dtype, source.device)
    feed.expect([spans[name].span for name in in_order], whole=True)
    try:
        with quantizing(source.quantization), _taken_in(key):
            model, loading = load_with_info(
                transformers_class, None, config=config, dtype=config.dtype, state_dict=given, **options
            )
    except Exception as error:
        reads.raise_failure()
        raise CannotJudge(
            "base_raised", base=source.label, error=caught(error), class_name=model_class.class_name
        ) from error
    reads.raise_failure()
    # 4.
    refuse_other_sources(loading, expected)
    return measure_base(model, source, loading, quantization=loaded_quantization(model, None))


def _refuse_too_large(outline: Any, source: Source, model_class: ModelClass, free_bytes: int | None) -> None:
    head = outline.get_output_embeddings()
    packed = {
        id(module.weight)
        for module in outline.modules()
        if isinstance(module, nn.Linear) and module is not head and source.quantization in PACKED_BYTES
    }
    of_packed = PACKED_BYTES.get(source.quantization, 0.0)
    needed = sum(
        weight.numel() * of_packed if id(weight) in packed else weight.nbytes for weight in outline.parameters()
    )
    if free_bytes is not None and needed > free_bytes:
        quantized = f" ({source.quantization})" if packed else ""
        raise EngineError(
            f"base {source.label}{quantized} takes {gibibytes(needed)} of memory as {model_class.class_name}, and "
            f"only {gibibytes(free_bytes)} are free: nothing of it was read",
            hint="use a machine with more memory"
            + (
                "; with quantization: none, the base is read in pieces and needs no memory of its size"
                if packed
                else ""
            ),
        )


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


def _on_meta(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor that is not loaded."""
    return torch.empty(stored.shape, device="meta")


def _order(mapping: TensorMap, spans: Mapping[str, StoredBytes]) -> tuple[list[str], Any]:
    """The stored tensors in the order in which they are taken, and the key by which transformers is to sort them."""
    if any(group.conversion != RENAMED or len(group.sources) != 1 for group in mapping.groups):
        return [name for group in mapping.groups for name in group.sources], None
    last = (len(spans), 0)
    places = {name: place.order for name, place in spans.items()}
    return sorted(spans, key=places.__getitem__), lambda name: places.get(name, last)


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
