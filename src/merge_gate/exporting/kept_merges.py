"""Keeps the merges of an adapter on disk, and compares the merges of its export with them.

In: what the worker sends of merged models (worker/call_service.py), which is not trusted. Out: a `MergeComparison` for
each dtype. Stored tensors are compared by name, so it does not matter which class the base was loaded as.

Two merges are the same if each value differs by at most a unit in the last place, and by what rounding its delta gives.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merge_gate._internal.errors import GateError
from merge_gate._internal.text import counted, quoted
from merge_gate.exporting.plain_lora import array_of
from merge_gate.files.headers import DTYPE_BITS
from merge_gate.publish.publications import Publications
from merge_gate.records.files import Entry, StoredTensor
from merge_gate.records.publication import MergeComparison
from merge_gate.records.terms import AS_MERGED
from merge_gate.report.stored.output_directory import explained
from merge_gate.worker.protocol import PublicationSent

_PRECISIONS = {"F32": (23, -149), "F16": (10, -24), "BF16": (7, -133)}
"""The bits of a dtype's mantissa, and the exponent of its smallest number."""

_MOST_ITEM_BYTES = 8
"""The bytes of the largest dtype's values."""

_BUG = "this is a bug of merge-gate: please report it; until then, publish the merge: merge-gate run --publish DIR"


@dataclass(slots=True)
class _Merge:
    """What was sent of a merge. `parts` are by tensor and offset: size, differing values, and the largest difference.

    A difference that rounding does not explain is infinite.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    parts: dict[tuple[str, int], tuple[int, int, float]] = field(default_factory=dict)
    problem: str = "it was not sent"
    is_garbled: bool = False


class KeptMerges(Publications):
    """The merges of a run. Without `earlier`, they are kept in files of `folder`; with it, compared with those.

    `bounds` has a number for each stored tensor that no value of its delta exceeds, and `rank` is that of the export.
    """

    def __init__(
        self,
        folder: Path,
        earlier: KeptMerges | None = None,
        bounds: Mapping[str, float] | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__(None, ())
        self._folder, self._earlier, self._bounds, self._rank = folder, earlier, bounds or {}, rank
        self.merges: dict[int, _Merge] = {}
        self._most: dict[int, dict[str, int]] = {}

    def choose(self, entries: Mapping[int, Entry]) -> dict[int, str]:
        """All merges are sent."""
        self.merges = {index: _Merge() for index in entries}
        for index, entry in entries.items():
            stored = entry.base_files.tensors if entry.base_files is not None else ()
            self._most[index] = {one.name: math.prod(one.shape) * _MOST_ITEM_BYTES for one in stored}
        return dict.fromkeys(entries, AS_MERGED)

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> None:
        self.merges[task] = _Merge({one.name: one for one in tensors})

    def part(self, task: int, name: str, offset: int, content: memoryview) -> None:
        if not 0 <= offset <= self._most[task].get(name, 0) - len(content):  # the worker is not trusted
            self.merges[task].is_garbled = True
            return
        data, differing = bytes(content), (0, 0.0)
        path = self._folder / hashlib.sha256(f"{task} {name}".encode(errors="backslashreplace")).hexdigest()
        if self._earlier is None:
            with explained("cannot keep the merge"), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
                file.seek(offset)
                file.write(data)
        elif path.exists():  # else it is a tensor that the adapter leaves alone
            with path.open("rb") as file:
                file.seek(offset)
                differing = self._difference(self._earlier.merges[task].tensors[name], file.read(len(data)), data)
        self.merges[task].parts[name, offset] = (len(data), *differing)

    def sent(self, message: PublicationSent) -> None:
        merge = self.merges[message.task]
        merge.tensors = {one.name: one for one in message.tensors}
        merge.problem = message.refusal.message if message.refusal is not None else ""

    def passing(self, directory: str, file: str, start: int, content: memoryview) -> None:
        """Bytes of the base, which no merge changes."""

    def _difference(self, one: StoredTensor, kept: bytes, data: bytes) -> tuple[int, float]:
        if kept == data:
            return 0, 0.0
        if one.dtype not in _PRECISIONS or len(kept) != len(data):
            return len(data), math.inf
        before, after = (array_of(one.dtype, (-1,), part).as_float64() for part in (kept, data))
        bound = self._bounds.get(one.name, 0.0)
        of_delta = max(float(_unit(one.dtype, np.array([bound]))[0]), (self._rank + 4) * 2.0**-24 * bound)
        difference = np.abs(before - after)
        is_rounding = difference <= _unit(one.dtype, np.maximum(np.abs(before), np.abs(after))) + of_delta
        return int(np.count_nonzero(difference)), float(difference.max()) if is_rounding.all() else math.inf

    def whole(self, task: int) -> _Merge:
        """A merge whose tensors were all sent.

        Raises:
            GateError: they were not.
        """
        merge, sizes = self.merges[task], Counter[str]()
        for (name, _), (size, *_) in merge.parts.items():
            sizes[name] += size * 8
        lost = [
            one for one in merge.tensors.values() if sizes[one.name] != math.prod(one.shape) * DTYPE_BITS[one.dtype]
        ]
        if merge.is_garbled:
            raise GateError("the merge cannot be compared: a tensor of it is not one of the base", hint=_BUG)
        if problem := merge.problem or (f"not all of {quoted(lost[0].name, 200)} was sent" if lost else ""):
            raise GateError(f"the merge cannot be compared: {problem}", hint="publish it: merge-gate run --publish DIR")
        return merge

    def comparison(self, task: int, dtype: str, padding: Collection[str]) -> MergeComparison:
        """The merge of a task, compared with the earlier one. `padding` are tensors that only the export touches.

        Raises:
            GateError: they differ by more than rounding, or cannot be compared.
        """
        assert self._earlier is not None  # noqa: S101 - the earlier run compares nothing
        before, after = self._earlier.whole(task), self.whole(task)
        outlines = [{(one.name, one.dtype, one.shape) for one in merge.tensors.values()} for merge in (before, after)]
        strange = {name for name, *_ in outlines[0] ^ outlines[1]} - ({*padding} - before.tensors.keys())
        strange |= {name for (name, _), (_, _, largest) in after.parts.items() if largest == math.inf}
        if strange:
            raise GateError(
                f"in {dtype}, the export changes {counted(len(strange), 'tensor')} in another way than the adapter: "
                f"{quoted(min(strange), 200)}",
                hint=_BUG,
            )
        return MergeComparison(
            dtype=dtype,
            tensors=len(before.tensors),
            values=sum(math.prod(one.shape) for one in before.tensors.values()),
            differing=sum(count for _, count, _ in after.parts.values()),
            largest=max(largest for *_, largest in after.parts.values()),
        )


def _unit(dtype: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unit in the last place of each value."""
    bits, least = _PRECISIONS[dtype]
    unit: NDArray[np.float64] = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1 - bits, least))
    return unit
