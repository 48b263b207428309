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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merge_gate._internal.errors import GateError
from merge_gate._internal.text import counted
from merge_gate.exporting.plain_lora import PlainLora, array_of
from merge_gate.files.headers import shown
from merge_gate.publish.one_publication import BaseReader
from merge_gate.publish.publications import Publications, refuse_small_disk
from merge_gate.publish.weight_files import tensor_bytes
from merge_gate.records.files import Entry, StoredTensor
from merge_gate.records.measured import Evidence, ServedClass
from merge_gate.records.publication import MergeComparison
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import AS_MERGED
from merge_gate.report.stored.output_directory import explained
from merge_gate.worker.protocol import PublicationSent

_PRECISIONS = {"F64": (52, -1074), "F32": (23, -149), "F16": (10, -24), "BF16": (7, -133)}
"""The bits of a dtype's mantissa, and the exponent of its smallest number."""

_NOT_SENT = NotJudged(message="it was not sent")
_MAKE_ROOM = "free some space, or choose another disk with --output"
_OFFER = "publish it: merge-gate run --publish DIR"
_BUG = "this is a bug of merge-gate: please report it; until then, publish the merge: merge-gate run --publish DIR"


@dataclass(slots=True)
class _Merge:
    """What was sent of a merge. `parts` are by tensor and offset: size, differing values, and the largest difference.

    A difference that rounding does not explain is infinite.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    parts: dict[tuple[str, int], tuple[int, int, float]] = field(default_factory=dict)
    problem: NotJudged | None = _NOT_SENT


class KeptMerges(Publications):
    """The merges of a run, in files of `folder`. `served` is what the worker knows of the class that servers load."""

    served: ServedClass | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(None, ())
        self._folder = folder
        self._base: dict[str, int] = {}
        self.merges: dict[int, _Merge] = {}

    def choose(self, entries: Mapping[int, Entry]) -> dict[int, str]:
        """All merges are sent."""
        self.merges = {index: _Merge() for index in entries}
        stored = (one for entry in entries.values() if entry.base_files is not None for one in entry.base_files.tensors)
        self._base = {one.name: math.prod(one.shape) for one in stored}
        return dict.fromkeys(entries, AS_MERGED)

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> None:
        for one in tensors:
            if self._base.get(one.name) != math.prod(one.shape):
                raise GateError(f"{shown(one.name)} is not a tensor of the base")
        self.merges[task] = _Merge({one.name: one for one in tensors})
        self._refuse_small_disk()

    def _refuse_small_disk(self) -> None:
        planned = sum(tensor_bytes(one) for merge in self.merges.values() for one in merge.tensors.values())
        kept = sum(size for merge in self.merges.values() for size, *_ in merge.parts.values())
        refuse_small_disk(self._folder, planned - kept, "the merges to compare", _MAKE_ROOM)

    def part(self, task: int, name: str, offset: int, content: memoryview) -> None:
        one = self.merges[task].tensors.get(name)
        if one is None or not 0 <= offset <= tensor_bytes(one) - len(content):  # the worker is not trusted
            raise GateError(f"the worker sent bytes of {shown(name)} that it did not plan")
        self.merges[task].parts[name, offset] = len(content), *self._take(task, name, offset, bytes(content))

    def _take(self, task: int, name: str, offset: int, data: bytes) -> tuple[int, float]:
        descriptor = os.open(self.path(task, name), os.O_WRONLY | os.O_CREAT)
        with explained("cannot keep the merge"), os.fdopen(descriptor, "wb") as file:
            file.seek(offset)
            file.write(data)
        return 0, 0.0

    def path(self, task: int, name: str) -> Path:
        """The file of a tensor."""
        return self._folder / hashlib.sha256(f"{task} {name}".encode(errors="backslashreplace")).hexdigest()

    def sent(self, message: PublicationSent) -> None:
        merge = self.merges[message.task]
        merge.tensors = {one.name: one for one in message.tensors}
        merge.problem = message.refusal

    def passed(self, index: int, base: Callable[[], BaseReader], evidence: Evidence) -> None:  # noqa: ARG002 - of models
        self.served = evidence.served

    def passing(self, directory: str, file: str, start: int, content: memoryview) -> None:
        """Bytes of the base, which no merge changes."""

    def whole(self, task: int) -> _Merge:
        """A merge whose tensors were all sent.

        Raises:
            GateError: they were not.
        """
        merge, sizes = self.merges[task], Counter[str]()
        for (name, _), (size, *_) in merge.parts.items():
            sizes[name] += size
        lost = [name for name, one in merge.tensors.items() if sizes[name] != tensor_bytes(one)]
        problem = merge.problem or (NotJudged(message=f"not all of {shown(lost[0])} was sent") if lost else None)
        if problem is not None:
            raise GateError(f"the merge cannot be compared: {problem.message}", hint=problem.hint or _OFFER)
        return merge


class ComparedMerges(KeptMerges):
    """The merges of an export, which are compared with the `earlier` ones of its adapter, and not kept."""

    def __init__(self, earlier: KeptMerges, made: PlainLora) -> None:
        super().__init__(Path())
        self._earlier, self._rank = earlier, made.config["r"]
        sources = earlier.served.sources if earlier.served is not None else {}
        self._padding = {source for module in made.padding for source in sources.get(module, ())}
        self._bounds: dict[str, float] = {}
        """No value of the delta of a stored tensor exceeds this number."""
        for module, bound in made.bounds.items():
            for source in sources.get(module, ()):
                self._bounds[source] = max(bound, self._bounds.get(source, 0.0))

    def _refuse_small_disk(self) -> None:
        """Nothing is kept."""

    def _take(self, task: int, name: str, offset: int, data: bytes) -> tuple[int, float]:
        path = self._earlier.path(task, name)
        if not path.exists():  # a tensor that the adapter leaves alone
            return 0, 0.0
        with path.open("rb") as file:
            file.seek(offset)
            kept = file.read(len(data))
        dtype = self._earlier.merges[task].tensors[name].dtype
        if kept == data:
            return 0, 0.0
        if dtype not in _PRECISIONS or len(kept) != len(data):
            return len(data), math.inf
        before, after = (array_of(dtype, (-1,), part).as_float64() for part in (kept, data))
        bound = self._bounds.get(name, 0.0)
        of_delta = max(float(_unit(dtype, np.array([bound]))[0]), (self._rank + 4) * 2.0**-24 * bound)
        difference = np.abs(before - after)
        is_rounding = difference <= _unit(dtype, np.maximum(np.abs(before), np.abs(after))) + of_delta
        return int(np.count_nonzero(difference)), float(difference.max()) if is_rounding.all() else math.inf

    def comparison(self, task: int, dtype: str) -> MergeComparison:
        """The merge of a task, compared with the earlier one.

        Raises:
            GateError: they differ by more than rounding, or cannot be compared.
        """
        before, after = self._earlier.whole(task), self.whole(task)
        outlines = [{(one.name, one.dtype, one.shape) for one in merge.tensors.values()} for merge in (before, after)]
        strange = {name for name, *_ in outlines[0] ^ outlines[1]} - (self._padding - before.tensors.keys())
        strange |= {name for (name, _), (_, _, largest) in after.parts.items() if largest == math.inf}
        if strange:
            raise GateError(
                f"in {dtype}, the export changes {counted(len(strange), 'tensor')} in another way than the adapter: "
                f"{shown(min(strange))}",
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
