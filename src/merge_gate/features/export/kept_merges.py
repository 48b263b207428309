"""Keeps the merges of an adapter on disk, and compares the merges of its export with them.

In: what the worker writes of merged models, which is not trusted. Out: a `MergeComparison` for each dtype. Stored
tensors are compared by name, so it does not matter which class the base was loaded as.

Two merges are the same if each value differs by at most a unit in the last place, and by what rounding its delta gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merge_gate._internal.errors import GateError
from merge_gate._internal.text import counted
from merge_gate.features.export.export_record import MergeComparison
from merge_gate.features.export.plain_lora import PlainLora, array_of
from merge_gate.features.publish.calls import PublicationService, PublicationWritten
from merge_gate.features.publish.one_publication import publishing
from merge_gate.features.publish.publish_directory import refuse_small_disk
from merge_gate.features.publish.weight_files import CHUNK_BYTES, ModelLayout, ModelWriter, Place, new_file
from merge_gate.files.headers import shown
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import Evidence, ServedClass
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import AS_MERGED, Verdict
from merge_gate.report.stored.output_directory import explained
from merge_gate.run.feature import Feature
from merge_gate.worker.protocol import Group, Job

_PRECISIONS = {"F64": (52, -1074), "F32": (23, -149), "F16": (10, -24), "BF16": (7, -133)}
"""The bits of a dtype's mantissa, and the exponent of its smallest number."""

_MORE_BYTES, _MOST_ITEM_BYTES = 1 << 30, 8
_NOT_WRITTEN = NotJudged(message="it was not written")
_MAKE_ROOM = "free some space, or choose another disk with --output"
_OFFER = "publish it: merge-gate run --publish DIR"
_BUG = "this is a bug of merge-gate: please report it; until then, publish the merge: merge-gate run --publish DIR"


class KeptMerges(Feature):
    """The merges of a run, each in a file. `served` is what the worker knows of the class that servers load."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.served: ServedClass | None = None
        self._writers: dict[int, ModelWriter] = {}
        self._problems: dict[int, NotJudged | None] = {}

    def service(self, job: Job) -> PublicationService:
        return PublicationService(self, [task.index for group in job.groups for task in group.tasks])

    def needs_merge(self, index: int) -> bool:  # noqa: ARG002
        return True

    def schedule(self, groups: Sequence[Group]) -> Iterator[Group]:
        """All merges are written."""
        sizes = (math.prod(tensor.shape) for group in groups for _ in group.tasks for tensor in group.files.tensors)
        consumer = publishing(AS_MERGED, most_bytes=_MORE_BYTES + _MOST_ITEM_BYTES * sum(sizes))
        return (replace(group, tasks=tuple(task.with_consumer(consumer) for task in group.tasks)) for group in groups)

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> tuple[int, ...]:
        name = f"{task}.safetensors"
        (self.folder / name).unlink(missing_ok=True)
        layout = ModelLayout(files=(new_file(name, [replace(tensor, file=name) for tensor in tensors], None),))
        self._writers[task] = ModelWriter(self.folder, layout)
        self._problems.pop(task, None)
        unwritten = (
            writer.layout.size_bytes for number, writer in self._writers.items() if number not in self._problems
        )
        refuse_small_disk(self.folder, sum(unwritten), "the merges to compare", _MAKE_ROOM)
        with explained("cannot keep the merge"):
            return self._writers[task].make_files()

    def written(self, message: PublicationWritten) -> None:
        if (writer := self._writers.get(message.task)) is not None:
            writer.checksums = dict(message.checksums)
            self._problems[message.task] = message.refusal

    def ended(self) -> None:
        """Nothing is published."""

    def judged(self, index: int, report: AdapterReport, evidence: Evidence | None) -> None:  # noqa: ARG002
        if report.verdict is Verdict.PASSED and evidence is not None:
            self.served = evidence.served

    def places(self, task: int) -> dict[str, Place]:
        """The tensors of a merge, and their places in its file.

        Raises:
            GateError: they were not all written.
        """
        problem = self._problems.get(task, _NOT_WRITTEN)
        if problem is None and (lost := next(self._writers[task].missing(), None)) is not None:
            problem = NotJudged(message=f"{shown(lost.tensor.name)} was not written")
        if problem is not None:
            raise GateError(f"the merge cannot be compared: {problem.message}", hint=problem.hint or _OFFER)
        return {place.tensor.name: place for file in self._writers[task].layout.files for place in file.places}


def compared(task: int, dtype: str, earlier: KeptMerges, later: KeptMerges, made: PlainLora) -> MergeComparison:
    """The merge of an export, compared with the `earlier` one of its adapter.

    Raises:
        GateError: they differ by more than rounding, or cannot be compared.
    """
    before, after = earlier.places(task), later.places(task)
    sources = earlier.served.sources if earlier.served is not None else {}
    padding = {source for module in made.padding for source in sources.get(module, ())}
    bounds: dict[str, float] = {}
    """No value of the delta of a stored tensor exceeds this number."""
    for module, bound in made.bounds.items():
        for source in sources.get(module, ()):
            bounds[source] = max(bound, bounds.get(source, 0.0))
    outlines = [
        {(place.tensor.name, place.tensor.dtype, place.tensor.shape) for place in of.values()} for of in (before, after)
    ]
    strange = {name for name, *_ in outlines[0] ^ outlines[1]} - (padding - before.keys())
    count, largest = 0, 0.0
    for name in before.keys() & after.keys() - strange:
        ours, theirs = (
            _pieces(merges.folder / place.tensor.file, place)
            for merges, place in ((earlier, before[name]), (later, after[name]))
        )
        for kept, data in zip(ours, theirs, strict=True):
            differing, difference = _difference(before[name].tensor.dtype, kept, data, bounds.get(name, 0.0), made)
            count, largest = count + differing, max(largest, difference)
            if difference == math.inf:
                strange.add(name)
    if strange:
        raise GateError(
            f"in {dtype}, the export changes {counted(len(strange), 'tensor')} in another way than the adapter: "
            f"{shown(min(strange))}",
            hint=_BUG,
        )
    values = sum(math.prod(place.tensor.shape) for place in before.values())
    return MergeComparison(dtype=dtype, tensors=len(before), values=values, differing=count, largest=largest)


def _pieces(path: Path, place: Place) -> Iterator[bytes]:
    with explained("cannot read a merge"), path.open("rb") as file:
        file.seek(place.start)
        for start in range(place.start, place.end, CHUNK_BYTES):
            yield file.read(min(CHUNK_BYTES, place.end - start))


def _difference(dtype: str, kept: bytes, data: bytes, bound: float, made: PlainLora) -> tuple[int, float]:
    """How many values differ, and by how much. What rounding does not explain is infinite."""
    if kept == data:
        return 0, 0.0
    if dtype not in _PRECISIONS:
        return len(data), math.inf
    before, after = (array_of(dtype, (-1,), part).as_float64() for part in (kept, data))
    of_delta = max(float(_unit(dtype, np.array([bound]))[0]), (made.config["r"] + 4) * 2.0**-24 * bound)
    difference = np.abs(before - after)
    is_rounding = difference <= _unit(dtype, np.maximum(np.abs(before), np.abs(after))) + of_delta
    return int(np.count_nonzero(difference)), float(difference.max()) if is_rounding.all() else math.inf


def _unit(dtype: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unit in the last place of each value."""
    bits, least = _PRECISIONS[dtype]
    unit: NDArray[np.float64] = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1 - bits, least))
    return unit
