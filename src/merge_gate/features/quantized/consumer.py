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
from collections import Counter
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
from merge_gate.features.quantized.folds import norms_of_one_plus
from merge_gate.features.quantized.measurement import Measurement, TensorStrength
from merge_gate.features.quantized.release import Release, is_near
from merge_gate.features.quantized.release_flow import GGUF
from merge_gate.features.quantized.tensor_fit import fitted
from merge_gate.features.verify.finished_model import Files
from merge_gate.files.feed import LocalFeed
from merge_gate.records.files import Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.worker.pinned import pinned_directory
from merge_gate.worker.protocol import Task

if TYPE_CHECKING:
    from merge_gate.worker.group_bases import GroupBase, GroupBases


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
        raise EngineError(
            f"{quoted(finished.name, 200)} cannot be read: {error.strerror or error}",
            hint="check that the user who runs merge-gate may read it",
        ) from error
    return GgufRelease(file, loaded.base.model)


def _opened_directory(
    finished: Snapshot, loaded: GroupBase, bases: GroupBases, pinned: contextlib.ExitStack
) -> Release:
    group, mapping = loaded.group, bases.account(loaded).map
    if mapping is None or finished.base_files is None:
        raise EngineError(
            f"the tensors of base {group.base.name} have no known names, so no release is compared",
            hint="save the base in safetensors, or verify the merged model before it is quantized",
        )
    directory = pinned.enter_context(pinned_directory(finished.directory))
    feed = pinned.enter_context(LocalFeed(directory, keep=False))
    files = Files(directory=directory, stored=finished.base_files.tensors, feed=feed)
    base_files = Files(directory=group.directory, stored=group.files.tensors, feed=bases.feed)
    sources = {alias: mapping.sources.get(first) for alias, first in loaded.base.aliases.items()}
    aliases = {alias: own[0] for alias, own in sources.items() if own and alias not in mapping.sources}
    release = open_checkpoint(files, base_files, finished.name, aliases)
    one_plus = norms_of_one_plus(mapping.model)
    release.folds.of_one_plus = {source for name in one_plus for source in mapping.sources.get(name, ())}
    return ByModelNames(release, mapping, aliases)


class ByModelNames:
    """A directory by the names of the model's tensors, which transformers makes of stored ones: a `Release`.

    If several stored tensors make a tensor, transformers' own conversion makes it. `aliases` are further names of tied
    tensors, which a release may store too.
    """

    def __init__(self, release: Checkpoint, mapping: TensorMap, aliases: Collection[str] = ()) -> None:
        self._release, self.format = release, release.format
        self.added, self.settings = release.added, release.settings
        for source in (source for group in mapping.groups if group.conversion != RENAMED for source in group.sources):
            shape, expected = release.shape(source) if source in release else None, mapping.stored[source].shape
            if shape not in {None, tuple(expected)}:
                raise EngineError(
                    f"the release stores {quoted(source, 120)} in the shape {list(shape)}, expected {list(expected)}",
                    hint="verify the merged model before it is quantized",
                )
        self._expected = {target for group in mapping.groups for target in group.targets}
        self._groups: dict[str, TensorGroup] = {
            target: group
            for group in mapping.groups
            for target in group.targets
            if all(source in release for source in group.sources)
            and (group.conversion == RENAMED or group.recipe is not None)
        }
        self._groups |= {name: TensorGroup(sources=(name,), targets=(name,)) for name in aliases if name in release}

    def expect(self, names: Collection[str]) -> None:
        """The merge can change these tensors."""
        groups = [self._groups[name] for name in names if name in self._groups]
        self._release.folds.touched = {source for group in groups for source in group.sources}

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def expects(self, name: str) -> bool:
        return name in self._expected

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
        self._compared, self._untied = set[str](), set[str]()
        self._lock = threading.Lock()

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        if isinstance(self._release, ByModelNames):
            self._release.expect(outlines)

    def _touched(self, name: str, merged: torch.Tensor) -> None:
        with self._lock:
            self._compare(name, merged)

    def _compare(self, name: str, merged: torch.Tensor | None) -> None:
        """Compare a tensor with the release's, by each of its names that it has: a tied tensor has several.

        Without `merged`, it has the base's values. The merge may untie a name, which then has values of its own.
        """
        first = self._base.first_name(name)
        shared = [alias for alias, of in self._base.aliases.items() if of == name and alias not in self._untied]
        if name != first:
            self._untied.add(name)
        self._compared.add(name)
        with torch.no_grad(), self._base.filled([first]):
            base = self._base.tensors[first].detach().float()
            merged = base if merged is None else merged.float()
            stored = [own for own in (name, *shared) if own in self._release]
            self._facts |= {own: self._measured(own, base, merged) for own in stored}
            if not stored and self._release.expects(name):
                self._absent[name] = None

    def _measured(self, name: str, base: torch.Tensor, merged: torch.Tensor) -> TensorStrength:
        outline = TensorStrength(
            name=name,
            kind=self._release.kind(name),
            touched=merged is not base,
            shape=tuple(self._release.shape(name)),
            expected_shape=tuple(merged.shape),
        )
        if not is_near(outline.shape, outline.expected_shape):
            return outline  # the values are not read
        actual = self._release.read(name)
        outline = replace(outline, shape=tuple(actual.shape))
        if base.shape == merged.shape == actual.shape:
            quantize = partial(self._release.requantized, name) if outline.kind else _in_16_bits
            return fitted(outline, base, merged, actual, self._dtype, quantize)
        if not base.dim() == merged.dim() == actual.dim():
            return outline
        part = tuple(slice(min(sizes)) for sizes in zip(base.shape, merged.shape, actual.shape, strict=True))
        return fitted(outline, base[part], merged[part], actual[part], self._dtype)

    def end(self, attempt: MergeAttempt) -> Evidence:
        attempt.merge = None  # its memory is of no use to what follows
        release = self._release
        measurement = Measurement(format=release.format, added=release.added, settings=release.settings)
        if attempt.evidence.refusal is None:
            self._compare_others()
            measurement = replace(measurement, tensors=tuple(self._facts.values()), absent=tuple(self._absent))
        return replace(attempt.evidence, facts=(*attempt.evidence.facts, ("quantized", measurement)))

    def _compare_others(self) -> None:
        left = self._compared | self._base.newly_initialized
        for name in (*(alias for alias, _ in self.untied), *self._base.tensors):
            if name not in left and self._base.tensors[self._base.first_name(name)].numel():
                self._compare(name, None)


def _in_16_bits(values: torch.Tensor) -> torch.Tensor:
    """What plain floats may lose. Float16 loses less, except of tiny values."""
    return values.bfloat16().float()
