"""The headers that a base would have if its weights were not packed by bitsandbytes.

In: the headers of a base's files, and a feed of them. Out: headers of a plain model with the same names. Reads the
shapes of weights of 4 bits, which are values of a small stored tensor, and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.base.tensor_map import TensorMap
from merge_gate.errors import NotPublishedError
from merge_gate.records.files import StoredTensor
from merge_gate.records.packed_weights import packed_weights
from merge_gate.sources.feed import Feed

MOST_STATE_BYTES = 1 << 16
"""bitsandbytes writes a few hundred."""


def plain_headers(directory: str, stored: Iterable[StoredTensor], feed: Feed, dtype: str) -> tuple[StoredTensor, ...]:
    """The headers without packing. `dtype` is safetensors' name for the dtype of the plain weights.

    Raises:
        NotPublishedError: the state of a packed weight cannot be read.
        ValueError, OSError: a header is not what it was.
    """
    stored = tuple(stored)
    packed = packed_weights(stored)
    states = {one.name: one for one in stored if one.name in packed.states.values()}
    places = stored_bytes(directory, states)
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, state in packed.states.items():
        if places[state].span.end - places[state].span.start > MOST_STATE_BYTES:
            raise _unreadable(state)
        shapes[weight] = _shape(bytes(places[state].read(feed).flatten().tolist()), packed.counts[weight], state)
    return tuple(
        replace(one, dtype=dtype, shape=shapes.get(one.name, one.shape)) if one.name in packed else one
        for one in stored
        if one.name not in packed.others
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


def turned(headers: Iterable[StoredTensor], found: TensorMap, packed: Mapping[str, Any]) -> Iterator[StoredTensor]:
    """The headers with the other direction for weights of a Conv1D, which transformers transposes and then packs."""
    shapes: dict[str, Sequence[int]] = {
        source: needed
        for name, has, needed in found.mismatched
        if tuple(has) == tuple(reversed(tuple(needed)))
        for source in found.sources.get(name, (name,))
    }
    for one in headers:
        is_turned = one.name in shapes and one.name in packed
        yield replace(one, shape=tuple(shapes[one.name])) if is_turned else one
