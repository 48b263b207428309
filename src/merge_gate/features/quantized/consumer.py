"""Measures a quantized release in the worker, while the merge of a task passes.

In: merged tensors in float32, and the release's files. Out: a `Measurement` in the evidence of the merge. Judges
nothing.

1. The release is opened, and refused by its headers.
2. Each merged tensor is compared with the release's, row by row, as it passes. Several pass at a time.
3. The other tensors are compared with the base's: as they pass, or at the end.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merge_gate._internal.errors import EngineError
from merge_gate._internal.regular_file import open_regular_file
from merge_gate._internal.text import quoted
from merge_gate.engine.adapter_evidence import MergeAttempt
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.tensor_map import DTYPES, RENAMED, TensorGroup, TensorMap
from merge_gate.engine.consumer import Consumer, Outline
from merge_gate.engine.tensors.threads import spread
from merge_gate.features.quantized.checkpoint import Checkpoint, open_checkpoint
from merge_gate.features.quantized.folds import norms_of_one_plus
from merge_gate.features.quantized.gguf_tokenizer import differing_tokenizer
from merge_gate.features.quantized.measurement import Measurement, ReleaseFiles, TensorStrength
from merge_gate.features.quantized.release import OpenTensor, Release, is_near, whole
from merge_gate.features.quantized.release_flow import GGUF
from merge_gate.features.quantized.tensor_fit import BLOCK, TensorFit
from merge_gate.features.verify.expected_differences import Expectation
from merge_gate.features.verify.finished_model import Files
from merge_gate.features.verify.finished_settings import read_settings
from merge_gate.files.feed import LocalFeed
from merge_gate.records.files import AdapterFiles, Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.worker.pinned import pinned_directory
from merge_gate.worker.protocol import Task

if TYPE_CHECKING:
    from merge_gate.features.quantized.gguf_release import GgufRelease
    from merge_gate.worker.merging.group_bases import GroupBase, GroupBases

_NOTHING_MEASURED = Measurement()
_OF_COPIES = re.compile(r"((modules_to_save|original_module)\.)?(weight|bias)")
"""The tensors of a module that PEFT saves whole, by the ends of their names."""


def consumer(
    asked: ReleaseFiles,
    task: Task,
    loaded: GroupBase,
    bases: GroupBases,
    pinned: contextlib.ExitStack,
) -> Consumer:
    """Step 1. The tokenizer is compared with each of those that the release may have.

    Raises:
        EngineError: the release cannot be read.
    """
    finished, files = asked.release, asked.files
    assert finished.base_files is not None  # noqa: S101 - it was recognized by them
    measurement, config = Measurement(), loaded.base.model.config
    if finished.base_files.quantization == GGUF:
        release: Release = (of_file := _opened_file(finished, loaded, pinned))
        expected = (dict(own.expected) for own in files)
        tokenizers = tuple(tuple(differing_tokenizer(of_file.header, own)) for own in expected)
        measurement = replace(measurement, tokenizers=tokenizers)
    else:
        release = _opened_directory(finished, loaded, bases, pinned)
        read = (read_settings(own, finished.directory, config, deepcopy(config), Expectation()) for own in files)
        measurement = replace(measurement, files=tuple(read))
    stored = Counter(tensor.dtype for tensor in loaded.group.files.tensors if len(tensor.shape) > 1)
    dtype = getattr(torch, DTYPES[stored.most_common(1)[0][0]]) if stored else torch.float32
    return StrengthConsumer(loaded.base, release, dtype, measurement, task.files)


def _opened_file(finished: Snapshot, loaded: GroupBase, pinned: contextlib.ExitStack) -> GgufRelease:
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
    new = {name: tuple(loaded.base.tensors[name].shape) for name in loaded.base.newly_initialized}
    release = open_checkpoint(files, base_files, finished.name, aliases, new)
    one_plus = norms_of_one_plus(mapping.model)
    release.folds.of_one_plus = {source for name in one_plus for source in mapping.sources.get(name, ())}
    return ByModelNames(release, mapping, {*aliases, *new})


class ByModelNames:
    """A directory by the names of the model's tensors, which transformers makes of stored ones: a `Release`.

    If several stored tensors make a tensor, transformers' own conversion makes it. `others` are further names that a
    release may store: of tied tensors, and of tensors that the base does not store.
    """

    def __init__(self, release: Checkpoint, mapping: TensorMap, others: Collection[str] = ()) -> None:
        self._release, self.format = release, release.format
        self.added, self.settings = release.added, release.settings
        for source in (source for group in mapping.groups if group.conversion != RENAMED for source in group.sources):
            shape, expected = release.shape(source) if source in release else None, mapping.stored[source].shape
            if shape not in {None, tuple(expected)}:
                raise EngineError(
                    f"the release stores {quoted(source, 120)} in the shape {list(shape)}, expected {list(expected)}",
                    hint="verify the merged model before it is quantized",
                )
        self._expected = {target for group in mapping.groups for target in group.targets}.union(others)
        self._one_conversion_at_a_time = threading.Lock()
        self._groups: dict[str, TensorGroup] = {
            target: group
            for group in mapping.groups
            for target in group.targets
            if all(source in release for source in group.sources)
            and (group.conversion == RENAMED or group.recipe is not None)
        }
        self._groups |= {name: TensorGroup(sources=(name,), targets=(name,)) for name in others if name in release}

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

    def open(self, name: str) -> OpenTensor:
        group = self._groups[name]
        if group.conversion == RENAMED or group.recipe is None:
            return self._release.open(group.sources[0])
        parts = {source: self._release.open(source).read(slice(None)) for source in group.sources}
        with self._one_conversion_at_a_time:
            return whole(group.recipe(parts)[name].float(), lambda _values: None)


class StrengthConsumer(Consumer):
    """Steps 2 and 3. `dtype` is that of the base's files, and `measurement` has what was compared before.

    `members` are the files of the adapters: rows that the base does not have may be copied from one of them.
    If the adapter was not merged, nothing is measured.
    """

    takes_tensors = True

    def __init__(
        self,
        base: Base,
        release: Release,
        dtype: torch.dtype,
        measurement: Measurement = _NOTHING_MEASURED,
        members: Sequence[AdapterFiles] = (),
    ) -> None:
        self._members = members
        self._measurement = replace(measurement, format=release.format, added=release.added, settings=release.settings)
        self._base, self._release, self._dtype = base, release, dtype
        self._facts: dict[str, tuple[TensorStrength, ...]] = {}
        self._begun: dict[str, list[_Comparison]] = {}
        self._absent: dict[str, bool] = {}
        self._merged, self._expected = set[str](), frozenset[str]()
        self._untied: frozenset[tuple[str, str]] = frozenset()

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        self._expected = frozenset(outlines)
        if isinstance(self._release, ByModelNames):
            self._release.expect(outlines)

    def pass_by(self, name: str, rows: torch.Tensor, *, start: int) -> None:
        if name in self._expected or not rows.numel():
            return
        if start == 0 and name not in self._facts:
            self._begun[name] = self._begin(name, None)
        for comparison in self._begun.get(name, ()):
            comparison.take(None, rows, start)
        if _is_last(rows, start, self._base.tensors[name].shape):
            self._end(self._begun.pop(name, ()))

    def put(self, name: str, values: torch.Tensor) -> None:
        self.put_rows(name, values.detach(), start=0, shape=values.shape)

    def put_rows(self, name: str, rows: torch.Tensor, *, start: int, shape: Sequence[int]) -> None:
        if start == 0:
            self._merged.add(name)
            self._begun[name] = self._begin(name, tuple(shape))
        first = self._base.first_name(name)
        with torch.no_grad(), self._base.filled([first]):
            for comparison in self._begun[name]:
                comparison.take(self._base.tensors[first].detach(), rows, start)
        if _is_last(rows, start, shape):
            self._end(self._begun.pop(name))

    def complete(self, names: Collection[str], untied: Collection[tuple[str, str]]) -> None:  # noqa: ARG002
        self._untied = frozenset(untied)

    def _begin(self, name: str, shape: tuple[int, ...] | None) -> list[_Comparison]:
        """The comparisons of a tensor with the release's, by each of its names that it has: a tied one has several.

        Without `shape`, it has the base's values. The merge may untie a name, which then has values of its own.
        """
        first = self._base.first_name(name)
        untied = self._merged | {alias for alias, _ in self._untied}
        names = (name, *(alias for alias, of in self._base.aliases.items() if of == name and alias not in untied))
        stored = [own for own in names if own in self._release]
        if not stored:
            self._absent[name] = shape is not None or name in untied
        base = self._base.tensors[first]
        known = 0 if first in self._base.newly_initialized else len(base)
        is_copied = shape is not None and _is_copied(name, shape, self._members)
        return [_Comparison(self._release, own, base, known, shape, self._dtype, is_copied=is_copied) for own in stored]

    def _end(self, comparisons: Sequence[_Comparison]) -> None:
        self._facts |= {comparison.name: comparison.facts() for comparison in comparisons}

    def _compare_others(self, name: str) -> None:
        comparisons = self._begin(name, None)
        for start, rows in self._base.rows_of(self._base.first_name(name)):
            for comparison in comparisons:
                comparison.take(None, rows, start)
        self._end(comparisons)

    def end(self, attempt: MergeAttempt) -> Evidence:
        attempt.merge = None  # its memory is of no use to what follows
        release, measurement = self._release, self._measurement
        if attempt.evidence.refusal is None:
            for _ in spread(self._compare_others, self._left()):
                pass
            absent = {name: is_changed for name, is_changed in self._absent.items() if name not in self._facts}
            measurement = replace(
                measurement,
                tensors=tuple(facts for parts in self._facts.values() for facts in parts),
                absent=tuple(name for name in absent if release.expects(name)),
                lost=tuple(name for name, is_changed in absent.items() if is_changed and release.expects(name)),
                not_in_format=tuple(
                    name for name, is_changed in absent.items() if is_changed and not release.expects(name)
                ),
            )
        return replace(attempt.evidence, facts=(*attempt.evidence.facts, ("quantized", measurement)))

    def _left(self) -> list[str]:
        """The tensors that were not compared, the largest ones first. A name that the merge unties is one of them."""
        tensors, untied = self._base.tensors, [alias for alias, _ in self._untied if alias not in self._merged]
        done = self._merged | self._facts.keys() | self._base.newly_initialized
        left = [name for name in tensors if name not in done and tensors[name].numel()]
        return sorted((*untied, *left), key=lambda name: -tensors[self._base.first_name(name)].numel())


class _Comparison:
    """One tensor of the release, compared as the rows of the merge pass.

    `base` is the base's tensor. Its first `known` rows are compared with the merge's. The merge's further rows, and a
    tensor that the base does not store, are compared with zeros: their strength is 1, too. If they are copied from the
    adapter's file and stored as plain floats, they have the merge's bits. Without `shape`, the merge leaves the tensor
    alone.
    """

    def __init__(  # noqa: PLR0917
        self,
        release: Release,
        name: str,
        base: torch.Tensor,
        known: int,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype,
        *,
        is_copied: bool,
    ) -> None:
        self.name, self._known, self._is_changed = name, known, shape is not None
        expected = tuple(base.shape) if shape is None else shape
        self._outline = TensorStrength(
            name=name,
            kind=release.kind(name),
            touched=self._is_changed,
            shape=tuple(release.shape(name)),
            expected_shape=expected,
        )
        self._fits: list[tuple[int, int, TensorFit]] = []
        self._is_copied, self._differing = is_copied and not self._outline.kind, 0
        self._waiting: list[torch.Tensor] = []
        if not is_near(self._outline.shape, expected):
            return  # the values are not read
        self._tensor = release.open(name)
        self._outline = replace(self._outline, shape=self._tensor.shape)
        rows, *of_row = expected or (1,)
        if not list(self._tensor.shape[1:]) == list(base.shape[1:]) == of_row:
            return
        again = self._tensor.requantized if self._outline.kind else _in_16_bits
        last = min(rows, *self._tensor.shape[:1])
        for start, end in ((0, min(known, last)), (min(known, last), last)):
            if start < end:
                shape = (end - start, *of_row)
                part = replace(self._outline, shape=shape, expected_shape=shape) if self._fits else self._outline
                fit = TensorFit(replace(part, first_row=start), shape, dtype, again)
                self._fits.append((start, end, fit))

    def take(self, base: torch.Tensor | None, rows: torch.Tensor, start: int) -> None:
        """Take rows of the merge into this base, from `start` on; or of the base. They are valid during the call."""
        if not self._fits:
            return
        rows = rows.detach() if rows.dim() else rows.detach().view(1)
        base = base if base is None or base.dim() else base.view(1)
        end, step = start + len(rows), self._tensor.step
        count = max(1, BLOCK // max(1, math.prod(rows.shape[1:])) // step) * step
        ready = end if end >= self._fits[-1][1] else end - end % (count if base is None else step)
        if ready > start:
            if self._waiting:
                start, rows = start - sum(map(len, self._waiting)), torch.cat((*self._waiting, rows))
            self._compare(base, rows, start, ready, count)
            rows, self._waiting = rows[ready - start :], []
        if ready < end:
            self._waiting.append(rows.clone())

    def _compare(self, base: torch.Tensor | None, rows: torch.Tensor, start: int, end: int, count: int) -> None:
        for first, last, fit in self._fits:
            for begin in range(max(start, first), min(end, last), count):
                span = slice(begin, min(begin + count, end, last))
                merged = rows[begin - start : span.stop - start].cpu().float()
                if base is None:
                    of_base = merged
                elif first < self._known:
                    of_base = base[span].float()
                else:
                    of_base = torch.zeros_like(merged)
                actual = self._tensor.read(span)
                fit.add(of_base, merged, actual.view(of_base.shape), span)
                if self._is_copied and first >= self._known:
                    self._differing += _differing(merged, actual.view(merged.shape))

    def facts(self) -> tuple[TensorStrength, ...]:
        """The figures of the rows that the base has, and of the others."""
        facts = tuple(
            replace(fit.facts(), differing=self._differing if first >= self._known else 0)
            for first, _, fit in self._fits
        )
        return facts or (self._outline,)


def _is_last(rows: torch.Tensor, start: int, shape: Sequence[int]) -> bool:
    return not rows.dim() or start + len(rows) == shape[0]


def _is_copied(name: str, shape: Sequence[int], members: Sequence[AdapterFiles]) -> bool:
    """Whether the merge has the values of this tensor in the adapter's file, and no delta on it."""
    module, _, leaf = name.rpartition(".")
    own = {
        rest: tuple(tensor.shape)
        for files in members
        for tensor in files.tensors
        for _, found, rest in [f".{tensor.name}".partition(f".{module}.")]
        if found
    }
    is_whole = all(_OF_COPIES.fullmatch(rest) for rest in own)
    return len(members) == 1 and is_whole and tuple(shape) in (own.get(leaf), own.get(f"modules_to_save.{leaf}"))


def _differing(merged: torch.Tensor, actual: torch.Tensor) -> int:
    """How many values of plain floats are not those of the merge: in float32, or rounded to 16 bits in any order."""
    half, brain = merged.half().float(), merged.bfloat16().float()
    allowed = (merged, half, brain, half.bfloat16().float(), brain.half().float())
    return merged.numel() - int(torch.stack([actual == values for values in allowed]).any(0).count_nonzero())


def _in_16_bits(values: torch.Tensor, _rows: slice) -> torch.Tensor:
    """What plain floats may lose. Float16 loses less, except of tiny values."""
    return values.bfloat16().float()
