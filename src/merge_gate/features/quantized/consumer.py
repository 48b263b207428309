"""Measures a quantized release in the worker, while the merge of a task passes.

In: merged tensors in float32, and the release's files. Out: a `Measurement` in the evidence of the merge. Judges
nothing.

1. The release is opened, and refused by its headers.
2. Each merged tensor is compared with the release's as it passes: one at a time, which bounds the memory.
3. The other tensors are compared with the base's.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merge_gate._internal.errors import EngineError
from merge_gate._internal.regular_file import open_regular_file
from merge_gate._internal.text import quoted
from merge_gate.engine.adapter_evidence import MergeAttempt
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.tensor_map import DTYPES, RENAMED, TensorGroup, TensorMap
from merge_gate.engine.consumer import Consumer, Outline, WholeTensors
from merge_gate.features.quantized.checkpoint import Checkpoint, open_checkpoint
from merge_gate.features.quantized.measurement import TOLERANCE, Measurement, Setting, TensorStrength
from merge_gate.features.quantized.release import Release, is_near
from merge_gate.features.quantized.release_flow import GGUF
from merge_gate.features.quantized.tensor_fit import Requantize, fitted, repeated, untouched
from merge_gate.features.verify.finished_model import Files
from merge_gate.files.feed import LocalFeed
from merge_gate.records.files import Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.worker.pinned import pinned_directory
from merge_gate.worker.protocol import Task

if TYPE_CHECKING:
    from merge_gate.worker.group_bases import GroupBase, GroupBases

MOST_REPEATED, MOST_ODD = 8, 64
"""So many tensors are quantized again, and so many whose strength is not 1. As many others as the first number."""

FAR = 1.5
"""Other tensors are quantized again beyond so many times the usual distance."""


def consumer(
    finished: Snapshot, _task: Task, loaded: GroupBase, bases: GroupBases, pinned: contextlib.ExitStack
) -> Consumer:
    """Step 1.

    Raises:
        EngineError: the release cannot be read.
    """
    assert finished.base_files is not None  # noqa: S101 - it was recognized by them
    is_file = finished.base_files.quantization == GGUF
    release = _opened_file(finished, loaded, pinned) if is_file else _opened_directory(finished, loaded, bases, pinned)
    stored = Counter(tensor.dtype for tensor in loaded.group.files.tensors if len(tensor.shape) > 1)
    dtype = getattr(torch, DTYPES[stored.most_common(1)[0][0]]) if stored else torch.float32
    return StrengthConsumer(loaded.base, release, dtype)


def _opened_file(finished: Snapshot, loaded: GroupBase, pinned: contextlib.ExitStack) -> Release:
    from merge_gate.features.quantized.gguf_release import GgufRelease  # noqa: PLC0415 - slow to import

    try:
        file = pinned.enter_context(open_regular_file(Path(finished.directory), follow=True))
    except OSError as error:
        raise EngineError(f"{quoted(finished.name, 200)} cannot be read: {error.strerror or error}") from error
    return GgufRelease(file, loaded.base.model)


def _opened_directory(
    finished: Snapshot, loaded: GroupBase, bases: GroupBases, pinned: contextlib.ExitStack
) -> Release:
    group, mapping = loaded.group, bases.account(loaded).map
    if mapping is None or finished.base_files is None:
        raise EngineError(f"the tensors of base {group.base.name} have no known names, so no release is compared")
    directory = pinned.enter_context(pinned_directory(finished.directory))
    feed = pinned.enter_context(LocalFeed(directory, keep=False))
    files = Files(directory=directory, stored=finished.base_files.tensors, feed=feed)
    base_files = Files(directory=group.directory, stored=group.files.tensors, feed=bases.feed)
    return ByModelNames(open_checkpoint(files, base_files, finished.name), mapping)


class ByModelNames:
    """A directory by the names of the model's tensors, which transformers makes of stored ones: a `Release`.

    If several stored tensors make a tensor, transformers' own conversion makes it.
    """

    def __init__(self, release: Checkpoint, mapping: TensorMap) -> None:
        self._release, self.format = release, release.format
        self.added, self.settings = release.added, tuple[Setting, ...]()
        for source in (source for group in mapping.groups if group.conversion != RENAMED for source in group.sources):
            shape, expected = release.shape(source) if source in release else None, mapping.stored[source].shape
            if shape not in {None, tuple(expected)}:
                raise EngineError(
                    f"the release stores {quoted(source, 120)} in the shape {list(shape)}, expected {list(expected)}",
                    hint="verify the merged model before it is quantized",
                )
        self._groups: Mapping[str, TensorGroup] = {
            target: group
            for group in mapping.groups
            for target in group.targets
            if all(source in release for source in group.sources)
            and (group.conversion == RENAMED or group.recipe is not None)
        }

    def expect(self, names: Collection[str]) -> None:
        """The merge can change these tensors."""
        groups = [self._groups[name] for name in names if name in self._groups]
        self._release.folds.touched = {source for group in groups for source in group.sources}

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def kind(self, name: str) -> str:
        return next(filter(None, map(self._release.kind, self._groups[name].sources)), "")

    def shape(self, name: str) -> tuple[int, ...]:
        group = self._groups[name]
        shapes = {source: self._release.shape(source) for source in group.sources}
        if group.conversion == RENAMED or group.recipe is None:
            return shapes[group.sources[0]]
        made = group.recipe({source: torch.empty(shape, device="meta") for source, shape in shapes.items()})
        return tuple(made[name].shape)

    def read(self, name: str) -> torch.Tensor:
        group = self._groups[name]
        if group.conversion == RENAMED or group.recipe is None:
            return self._release.read(group.sources[0])
        return group.recipe({source: self._release.read(source) for source in group.sources})[name].float()

    def requantized(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        group = self._groups[name]
        return self._release.requantized(group.sources[0], values) if group.conversion == RENAMED else None


class StrengthConsumer(WholeTensors):
    """Steps 2 and 3. `dtype` is that of the base's files. If the adapter was not merged, nothing is measured."""

    def __init__(self, base: Base, release: Release, dtype: torch.dtype) -> None:
        super().__init__(self._touched)
        self._base, self._release, self._dtype = base, release, dtype
        self._facts: dict[str, TensorStrength] = {}
        self._absent: dict[str, None] = {}
        self._repeated = 0
        self._lock = threading.Lock()

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        if isinstance(self._release, ByModelNames):
            self._release.expect(outlines)

    def _read(self, name: str, expected: torch.Tensor) -> tuple[TensorStrength, torch.Tensor, Requantize] | None:
        """The outline of a tensor, its values in the release, and its quantizer. A tied tensor has several names."""
        names = (name, *(alias for alias, first in self._base.aliases.items() if first == name))
        if (own := next((name for name in names if name in self._release), None)) is None:
            return None
        kind, stored, shape = self._release.kind(own), self._release.shape(own), tuple(expected.shape)
        facts = TensorStrength(name=name, kind=kind, touched=False, shape=tuple(stored), expected_shape=shape)
        if not is_near(stored, shape):  # its values are not read
            self._facts[name] = facts
            return None
        actual = self._release.read(own)
        return replace(facts, shape=tuple(actual.shape)), actual, partial(self._release.requantized, own)

    def _touched(self, name: str, merged: torch.Tensor) -> None:
        first = self._base.first_name(name)
        with self._lock, torch.no_grad(), self._base.filled([first]):
            if (read := self._read(name, merged)) is None:
                if name not in self._facts:
                    self._absent[name] = None
                return
            facts, actual, requantize = read
            base, merged = self._base.tensors[first].detach().float(), merged.float()
            is_whole = base.shape == merged.shape == actual.shape
            if base.dim() == merged.dim() == actual.dim():
                part = tuple(slice(min(sizes)) for sizes in zip(base.shape, merged.shape, actual.shape, strict=True))
                base, merged, actual = base[part], merged[part], actual[part]
                facts = fitted(replace(facts, touched=True), base, merged, actual, self._dtype)
            is_odd = abs(facts.strength - 1) > TOLERANCE + 2 * facts.error
            if is_whole and facts.kind and self._repeated < (MOST_ODD if is_odd else MOST_REPEATED):
                self._repeated += 1
                facts = repeated(facts, base, merged, actual, requantize, self._dtype)
            self._facts[name] = facts

    def end(self, attempt: MergeAttempt) -> Evidence:
        attempt.merge = None  # its memory is of no use to what follows
        release = self._release
        measurement = Measurement(format=release.format, added=release.added, settings=release.settings)
        if attempt.evidence.refusal is None:
            self._compare_others()
            measurement = replace(measurement, tensors=tuple(self._facts.values()), absent=tuple(self._absent))
        return replace(attempt.evidence, facts=(*attempt.evidence.facts, ("quantized", measurement)))

    def _compare_others(self) -> None:
        shares: dict[str, list[float]] = defaultdict(lambda: [0.0])
        for facts in self._facts.values():
            shares[facts.kind].append(facts.noise / (facts.weight or 1.0))
        left = MOST_REPEATED
        for name in self._base.tensors.keys() - self._facts.keys() - self._base.newly_initialized:
            with torch.no_grad(), self._base.filled([name]):
                base = self._base.tensors[name].detach().float()
                if not base.numel() or not base.dim() or (read := self._read(name, base)) is None:
                    continue
                facts, actual, requantize = read
                if actual.shape == base.shape:
                    facts = untouched(facts, base, actual)
                    if left and facts.kind and facts.distance > FAR * max(shares[facts.kind]) * facts.weight:
                        left -= 1
                        facts = repeated(facts, base, base, actual, requantize, self._dtype)
                self._facts[name] = facts
