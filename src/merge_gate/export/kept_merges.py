"""Keeps the merges of an adapter on disk, and compares the merges of its export with them.

In: what the worker sends of merged models (worker/call_service.py), which is not trusted. Out: a `MergeComparison` for
each dtype. Stored tensors are compared by name, so it does not matter which class the base was loaded as.

Two merges are the same if they differ by one rounding at most: by a unit in the last place of the merged value, and by
one of its delta. Nothing else explains a difference.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate._internal.text import counted, quoted
from merge_gate.export.plain_lora import Array
from merge_gate.files.headers import DTYPE_BITS
from merge_gate.publish.publications import Publications
from merge_gate.records.files import Entry, StoredTensor
from merge_gate.records.publication import MergeComparison
from merge_gate.records.terms import AS_MERGED
from merge_gate.worker.protocol import PublicationSent

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
_LEAST = {"F64": -1074, "F32": -149, "F16": -24, "BF16": -133}
"""The bits of a dtype's mantissa, and the exponent of its smallest number."""


@dataclass(slots=True)
class _Merge:
    """What was sent of one merge. `parts` are the sizes by tensor and offset, with how the values there differ."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    parts: dict[str, dict[int, tuple[int, int, float, bool]]] = field(default_factory=dict)
    sent: PublicationSent | None = None


class KeptMerges(Publications):
    """The merges of a run. Without `earlier`, they are kept in files of `folder`; with it, compared with those.

    `bounds` has a number for each stored tensor that no value of its delta exceeds, and `rank` is that of the export.
    """

    def __init__(
        self,
        folder: Path,
        *,
        earlier: KeptMerges | None = None,
        bounds: Mapping[str, float] | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__(None, ())
        self._folder, self._earlier, self._bounds, self._rank = folder, earlier, bounds or {}, rank
        self._merges: dict[int, _Merge] = {}
        self.numbers: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def choose(self, entries: Mapping[int, Entry]) -> dict[int, str]:
        """All merges are sent."""
        return dict.fromkeys(entries, AS_MERGED)

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> None:
        self._merges[task] = _Merge({one.name: one for one in tensors})

    def part(self, task: int, name: str, offset: int, content: memoryview) -> None:
        data, merge = bytes(content), self._merges.setdefault(task, _Merge())
        differing: tuple[int, float, bool] = (0, 0.0, True)
        with self._lock:
            numbers = (self._earlier or self).numbers
            number = numbers.setdefault((task, name), len(numbers))
        path = self._folder / str(number)
        if self._earlier is None:
            path.touch()
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(data)
        elif path.is_file():
            with path.open("rb") as file:
                file.seek(offset)
                kept = file.read(len(data))
            if kept != data:
                differing = self._difference(self._earlier.whole(task).tensors.get(name), kept, data)
        with self._lock:
            merge.parts.setdefault(name, {})[offset] = (len(data), *differing)

    def passing(self, directory: str, file: str, start: int, content: memoryview) -> None:
        """Bytes of the base, which no merge changes."""

    def sent(self, message: PublicationSent) -> None:
        merge = self._merges.setdefault(message.task, _Merge())
        merge.sent = message
        merge.tensors = {one.name: one for one in message.tensors}

    def _difference(self, one: StoredTensor | None, kept: bytes, data: bytes) -> tuple[int, float, bool]:
        """How many values differ, by how much at most, and whether one rounding explains it."""
        if one is None or one.dtype not in _FLOATS or len(kept) != len(data):
            return len(data), math.inf, False
        before, after = (_as_float64(one.dtype, part) for part in (kept, data))
        bound = self._bounds.get(one.name, 0.0)
        with np.errstate(invalid="ignore"):
            difference = np.abs(before - after)
            allowed = _unit(one.dtype, np.maximum(np.abs(before), np.abs(after)))
            allowed += max(float(_unit(one.dtype, np.array([bound]))[0]), (self._rank + 4) * 2.0**-24 * bound)
        count = int(np.count_nonzero(difference))
        return count, float(difference.max(initial=0.0)), bool((difference <= allowed).all())

    def comparison(self, task: int, dtype: str, padding: Collection[str]) -> MergeComparison:
        """The merge of a task, compared with the earlier one.

        `padding` are stored tensors that the export merges with zeros.

        Raises:
            NotPublishedError: a merge was not sent as a whole.
            GateError: they differ by more than one rounding.
        """
        assert self._earlier is not None  # noqa: S101 - the earlier run compares nothing
        before, after = self._earlier.whole(task), self.whole(task)
        outlines = [{(one.name, one.dtype, one.shape) for one in merge.tensors.values()} for merge in (before, after)]
        unlike = (name for name, *_ in outlines[0] ^ outlines[1])
        strange = sorted(name for name in unlike if name not in padding or name in before.tensors)
        parts = [(name, part) for name in before.tensors for part in after.parts.get(name, {}).values()]
        strange += sorted({name for name, (_, _, _, is_rounding) in parts if not is_rounding})
        if strange:
            raise GateError(
                f"the export merges into {quoted(strange[0], 200)} as the adapter does not ({dtype}), and so into "
                f"{counted(len(set(strange)), 'tensor')} in all; nothing was written",
                hint="this is a bug of merge-gate: please report it. Until then: merge-gate run --publish",
            )
        return MergeComparison(
            dtype=dtype,
            tensors=len(before.tensors),
            values=sum(math.prod(one.shape) for one in before.tensors.values()),
            differing=sum(count for _, (_, count, _, _) in parts),
            largest=max((largest for _, (_, _, largest, _) in parts), default=0.0),
        )

    def whole(self, task: int) -> _Merge:
        """A merge whose tensors were all sent."""
        merge = self._merges.get(task, _Merge())
        if merge.sent is None or merge.sent.refusal is not None:
            refusal = merge.sent.refusal if merge.sent is not None else None
            raise NotPublishedError(
                f"the merge cannot be compared: {refusal.message if refusal else 'it was not sent'}",
                hint=refusal.hint if refusal else "run the command again",
            )
        for one in merge.tensors.values():
            size_bytes = math.prod(one.shape) * DTYPE_BITS[one.dtype] // 8
            if sum(size for size, *_ in merge.parts.get(one.name, {}).values()) != size_bytes:
                raise NotPublishedError(f"not all of {quoted(one.name, 200)} was sent", hint="run the command again")
        return merge


def _as_float64(dtype: str, data: bytes) -> NDArray[np.float64]:
    values: NDArray[Any] = np.frombuffer(data, _FLOATS[dtype])
    return (Array(dtype=dtype, values=values).as_float32() if dtype == "BF16" else values).astype("<f8")


def _unit(dtype: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unit in the last place of each value."""
    exponents = np.frexp(values)[1] - 1 - _BITS[dtype]
    return np.ldexp(np.ones_like(values), np.maximum(exponents, _LEAST[dtype]))
