"""Writes the stored tensors of merged models while their adapters are merged and measured.

In: a loaded base, the feed of its files, and merged tensors. Out: tensors in the files that a `Connection` gets, and
at the end of each task their checksums, or the reason why the model must not be published. Judges nothing, and creates
no files.

1. `expect`: the merge begins. Each tensor that it can change has to have a stored one, in the dtype of the merge.
2. `put`, `put_rows`: the merged values are written, converted to the stored layout if necessary.
   `take`: if the parent feeds the base, so are its other stored tensors, while their bytes are here.
3. `finish`: what was expected and did not change is written as the base has it. For a cast, so is every other floating
   tensor that is stored in another dtype. Tensors that transformers does not load are measured here.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers

from merge_gate._internal.errors import GateError, NotPublishedError, SourceError
from merge_gate._internal.text import listing
from merge_gate.engine.base.loaded_base import Base, ModelClass, head_options
from merge_gate.engine.base.stored_spans import SharedReads, StoredBytes, bytes_of
from merge_gate.engine.base.tensor_map import NoMapError, TensorGroup, TensorMap, tensor_map
from merge_gate.engine.consumer import Consumer, Outline
from merge_gate.engine.tensors.measure import dtype_name, measure
from merge_gate.features.publish.calls import PublicationPlanned, PublicationWritten
from merge_gate.features.publish.packed_weights import packed_weights
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.stored_layout import (
    STORED_DTYPES,
    StoredLayout,
    extended,
    is_renamed,
    layout_of,
    plain_headers,
    stored_dtype,
    turned,
)
from merge_gate.records.config import A_FILE
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import AS_MERGED, PRESERVE, Quantization

if TYPE_CHECKING:
    from merge_gate.worker.call_client import CallClient
    from merge_gate.worker.merging.group_bases import GroupBase, GroupBases
    from merge_gate.worker.protocol import Task

_MORE_FILES = "raise the limit of open files (ulimit -n), or the size of the files with --max-shard-size"


def consumer(
    dtype: str, task: Task, loaded: GroupBase, bases: GroupBases, _pinned: contextlib.ExitStack
) -> Consumer | None:
    """What publishes a task's merge. None if no process makes its files."""
    if bases.client is None:
        return None
    base = loaded.kept[__name__] = loaded.kept.get(__name__) or PublicationBase(
        base=loaded.base,
        model_class=loaded.model_class,
        stored=loaded.group.files.tensors,
        feed=bases.feed,
        connection=Connection(bases.client),
        is_fed=loaded.group.fed,
    )
    return base.consumer(task.index, dtype)


class Connection:
    """Gets the files of models from the parent."""

    def __init__(self, client: CallClient) -> None:
        self._client = client

    def plan(self, task: int, tensors: Sequence[StoredTensor]) -> PlannedFiles:
        """Begin to write the tensors of a task, perhaps again. Returns the files of its model.

        Raises:
            SourceError: the parent is gone, as for `finish`, or the model cannot be published.
        """
        answer, files = self._client.call(PublicationPlanned(task=task, tensors=tuple(tensors)))
        if len(files) != answer.files:
            for descriptor in files:
                os.close(descriptor)
            raise SourceError(f"{answer.files:,} more files cannot be open in this process", hint=_MORE_FILES)
        return PlannedFiles(files)

    def finish(self, task: int, checksums: Mapping[str, int], settings: str, refusal: NotJudged | None) -> None:
        """The tensors with checksums were written, and config.json gets these keys; or it must not be published."""
        self._client.call(
            PublicationWritten(task=task, checksums=tuple(checksums.items()), settings=settings, refusal=refusal)
        )


class PublicationConsumer(Consumer):
    """Writes the merged tensors of one adapter.

    `dtype` is `preserve`, `as-merged`, or the dtype that the base was loaded in, for a cast.
    """

    takes_tensors = True

    def __init__(
        self,
        layout: StoredLayout,
        connection: Connection,
        task: int,
        dtype: str = PRESERVE,
        *,
        places: Mapping[tuple[str, int], StoredBytes] | None = None,
        fed: SharedReads | None = None,
    ) -> None:
        """`places` are those of the base's stored tensors in `fed`, if the parent cannot copy from there."""
        self._own, self._layout, self._connection, self._task = layout, layout, connection, task
        self.needs_served, self._takers = dtype == AS_MERGED, fed.takers if fed is not None else []
        self._takers.append(self.take)
        self._places = places or {}
        self._files: PlannedFiles | None = None
        self._taken: set[str] = set()
        self._cast: torch.dtype | None = None if dtype in {PRESERVE, AS_MERGED} else getattr(torch, dtype)
        self.needs_whole, self._is_preserved = self._cast is not None, dtype == PRESERVE
        self.settings: dict[str, Any] = {}
        self._problem: GateError | None = None
        self._planned: dict[str, StoredTensor] = {}
        self._expected: frozenset[str] = frozenset()
        self._sent: set[str] = set()
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}  # by a group's first stored tensor
        self._given: dict[str, set[str]] = {}  # likewise
        self._whole = threading.local()
        self._lock = threading.Lock()

    # --- 1. --------------------------------------------------------------------------------------------------------

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        self._close_files()
        self._problem = None
        for seen in (self._taken, self._sent, self._waiting, self._given):
            seen.clear()
        self._expected = frozenset(outlines)
        with self._attempt("the plan"):
            self._refuse_other_dtype()
            if not self._own.base.aliases.keys().isdisjoint(outlines) or self._own.base.newly_initialized:
                self._layout, self.settings = extended(self._own, outlines)
            planned = {
                tensor.name: tensor for name, outline in outlines.items() for tensor in self._stored(name, outline)
            }
            if self._cast is not None:
                planned = {**{tensor.name: tensor for tensor in self._all_cast()}, **planned}
            self._planned = planned
            self._files = self._connection.plan(self._task, tuple(planned.values()))

    def _refuse_other_dtype(self) -> None:
        loaded = self._layout.base.facts.dtype
        if self._cast is not None and loaded != dtype_name(self._cast):
            raise NotPublishedError(
                f"the adapter was merged in {loaded}, expected {dtype_name(self._cast)}, which is to be published",
                hint=f"set base.dtype to {dtype_name(self._cast)}",
            )

    def _stored(self, name: str, outline: Outline) -> Iterator[StoredTensor]:
        """The stored tensors that a changed tensor of the model is written to."""
        shape, dtype = outline
        for group in self._layout.checked_groups(name):
            for source in group.sources:
                header = self._layout.outline(source)
                written = stored_dtype(self._cast if self._cast is not None and dtype.is_floating_point else dtype)
                if self._is_preserved and header.dtype != written:
                    stored = dtype_name(self._layout.places[source].dtype)
                    raise NotPublishedError(
                        f"{source} is stored in {stored}, and was merged in {dtype_name(dtype)}: `preserve` writes "
                        "each tensor in the dtype that it is stored in",
                        hint=f"set base.dtype (--dtype) to {stored}, or publish.dtype to {dtype_name(dtype)}, "
                        f"in {A_FILE}",
                    )
                if is_renamed(group):
                    yield StoredTensor(name=source, dtype=written, shape=tuple(shape), file=header.file)
                elif shape != self._layout.base.tensors[name].shape:
                    raise NotPublishedError(
                        f"{name} was resized to {tuple(shape)}, and is stored in another layout ({group.conversion})",
                        hint="load the adapter on its base at run time",
                    )
                else:
                    yield StoredTensor(name=source, dtype=written, shape=header.shape, file=header.file)

    def _all_cast(self) -> Iterator[StoredTensor]:
        """Every floating stored tensor whose dtype changes, as it will be; all of a dequantized base."""
        assert self._cast is not None  # noqa: S101 - only for a cast
        dtype, places = stored_dtype(self._cast), self._layout.places
        for group in self._layout.loaded_groups():
            loaded = self._layout.base.tensors[self._layout.base.first_name(group.targets[0])]
            for source in group.sources:
                if loaded.is_floating_point() and self._is_cast(source):
                    yield replace(self._layout.outline(source), dtype=dtype, shape=places[source].shape)
        for tensor in self._layout.unloaded():
            if self._is_cast(tensor.name):
                yield replace(tensor, dtype=dtype)

    def _is_cast(self, source: str) -> bool:
        dtype, is_other_base = self._layout.places[source].dtype, self._layout.base.source.dequantized
        return self._cast is not None and dtype.is_floating_point and (is_other_base or dtype != self._cast)

    # --- 2. --------------------------------------------------------------------------------------------------------

    def put(self, name: str, values: torch.Tensor) -> None:
        if self._problem is None:
            with self._attempt(name):
                self._put(name, values.detach().cpu().contiguous())

    def put_rows(self, name: str, rows: torch.Tensor, *, start: int, shape: Sequence[int]) -> None:
        if self._problem is None:
            with self._attempt(name):
                self._put_rows(name, rows, start, tuple(shape))

    def pass_by(self, name: str, rows: torch.Tensor, *, start: int) -> None:  # noqa: ARG002 - 0: it `needs_whole`
        """Cast what the merge does not change while it has values, so that the base is read once."""
        if self._problem is None and self._cast is not None and name not in self._expected:
            with self._attempt(name):
                for group in self._layout.groups(name):
                    if any(source in self._planned for source in group.sources):
                        self._collect(group, name, rows.detach())

    def complete(self, names: Collection[str], untied: Collection[tuple[str, str]]) -> None:
        planned = self._own.base.aliases.keys() - self._layout.base.aliases.keys()
        if self._problem is None and (odd := {name for name, _ in untied} ^ planned):
            hint = "load the adapter on its base at run time"
            self._problem = NotPublishedError(f"the merge does not untie {listing(sorted(odd))} as planned", hint=hint)
        unsent = [name for name in names if self._problem is None and not self._is_sent(name)]
        if unsent:
            self._problem = NotPublishedError(f"{unsent[0]} was merged, and its values were not handed out")

    def _is_sent(self, name: str) -> bool:
        return all(
            group.sources[0] in self._sent or group.sources[0] in self._waiting for group in self._layout.groups(name)
        )

    @contextlib.contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Whatever goes wrong in the block costs the publication. The merge itself goes on."""
        try:
            yield
        except GateError as error:
            self._problem = error
        except OSError as error:
            self._problem = NotPublishedError(
                f"{name} cannot be written: {error.strerror}", hint="free some space there, or publish to another disk"
            )
        except Exception as error:
            self._problem = NotPublishedError(
                f"{name} could not be made ready for writing: {type(error).__name__}: {str(error)[:200]}"
            )

    def _put(self, name: str, values: torch.Tensor) -> None:
        self._check_plan(name, (values.shape, values.dtype))
        for group in self._layout.checked_groups(name):
            self._collect(group, name, values)

    def _put_rows(self, name: str, rows: torch.Tensor, start: int, shape: tuple[int, ...]) -> None:
        if start == 0:
            self._check_plan(name, (torch.Size(shape), rows.dtype))
        groups, is_last = self._layout.checked_groups(name), start + len(rows) == shape[0]
        if all(map(is_renamed, groups)):
            for group in groups:
                self._write(group.sources[0], rows, start=start, is_last=is_last)
            return
        if start == 0:
            self._whole.values = torch.empty(shape, dtype=rows.dtype)
        self._whole.values[start : start + len(rows)].copy_(rows)
        if is_last:
            self._put(name, self._whole.values)

    def _in_written_dtype(self, source: str, values: torch.Tensor) -> torch.Tensor:
        """The values as they are written. Those that transformers keeps in float32 are cast and measured here."""
        if self._cast is None or values.dtype == self._cast or not values.is_floating_point():
            return values
        cast = values.to(self._cast)
        stats = measure(cast, source)
        if not stats.finite:
            raise NotPublishedError(
                f"{source} has values that are not finite in {stats.dtype}: {stats.nan} NaN, "
                f"{stats.posinf + stats.neginf} infinite",
                hint="publish in another dtype",
            )
        return cast

    def _check_plan(self, name: str, outline: Outline) -> None:
        """What was not expected has to have the stored dtype and shape. What was expected, those of the plan."""
        for tensor in self._stored(name, outline):
            planned = self._planned.get(tensor.name, self._layout.outline(tensor.name))
            if (tensor.dtype, tensor.shape) != (planned.dtype, planned.shape):
                raise NotPublishedError(
                    f"{tensor.name} is {tensor.dtype} of shape {tensor.shape} after the merge, "
                    f"expected {planned.dtype} of shape {planned.shape}"
                )

    def _collect(self, group: TensorGroup, name: str, values: torch.Tensor) -> None:
        """Keep a tensor until the merge has given all others of its group, or has ended."""
        with self._lock:
            if self._given.setdefault(group.sources[0], set()) - {name} and group.sources[0] in self._sent:
                raise NotPublishedError(f"{name} was merged again, after {group.sources[0]} had been made of it")
            self._given[group.sources[0]].add(name)
            waiting = self._waiting.setdefault(group.sources[0], {})
            for target in group.targets:
                if self._layout.base.first_name(target) == name:
                    waiting[target] = values if len(group.targets) == 1 else values.clone()
            if len(waiting) < len(group.targets):
                return
            del self._waiting[group.sources[0]]
        self._send_group(group, waiting)

    def _send_group(self, group: TensorGroup, values: Mapping[str, torch.Tensor]) -> None:
        for source, tensor in self._layout.reversed(group, values).items():
            self._write(source, tensor)

    def _write(self, source: str, rows: torch.Tensor, *, start: int = 0, is_last: bool = True) -> None:
        values = self._in_written_dtype(source, rows.detach().cpu()).contiguous()
        if values.numel() and self._files is not None:
            self._files.write(source, start * values[:1].nbytes if start else 0, bytes_of(values))
        if is_last:
            self._sent.add(source)

    def take(self, file: str, start: int, content: memoryview) -> None:
        """Bytes of the base's files. Write a stored tensor that is whole here, and that the merge does not change."""
        place, files = self._places.get((file, start)), self._files
        if place is None or files is None or start + len(content) != place.span.end or self._problem is not None:
            return
        with self._lock:
            is_taken = place.name not in self._planned and place.name not in self._taken and files.lacks(place.name)
            self._taken.add(place.name)
        if is_taken:
            with self._attempt(place.name):
                files.write(place.name, 0, content)

    # --- 3. --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End a publication that is finished, or whose merge has failed."""
        self._takers.remove(self.take)
        self._close_files()

    def _close_files(self) -> None:
        if self._files is not None:
            self._files.close()
        self._files = None

    def finish(self, evidence: Evidence) -> None:
        """Write the remaining tensors, and say which were written. The others are as in the base."""
        if evidence.refusal is not None:
            self._problem = NotPublishedError("the adapter was not merged")
        if self._problem is None:
            with self._attempt("the rest of the model"):
                self._finish()
        checksums = self._files.checksums if self._files is not None else {}
        self.close()
        if self._problem is not None:
            _refuse(self._connection, self._task, self._problem)
            return
        with contextlib.suppress(GateError):  # the parent is gone, or publishes nothing without this message
            self._connection.finish(self._task, checksums, json.dumps(self.settings), None)

    def _finish(self) -> None:
        for group in self._layout.map.groups:
            first = group.sources[0]
            if first in self._waiting or (first in self._planned and first not in self._sent):
                self._send_group(group, self._with_base(group))
        for tensor in self._layout.unloaded():
            self._finish_unloaded(tensor)
        lacking = [place for place in self._places.values() if self._files and self._files.lacks(place.name)]
        if lacking:
            self._own.feed.expect([place.span for place in lacking], whole=False)
            for place in lacking:
                place.read(self._own.feed)  # all consumers of the pass `take` it

    def _with_base(self, group: TensorGroup) -> dict[str, torch.Tensor]:
        """All tensors of a group: those that the merge has given, and the base's."""
        base, values = self._layout.base, dict(self._waiting.pop(group.sources[0], {}))
        names = {target: base.first_name(target) for target in group.targets if target not in values}
        with base.filled(names.values()):
            return values | {target: base.tensors[name].detach().clone() for target, name in names.items()}

    def _finish_unloaded(self, tensor: StoredTensor) -> None:
        """Measure a tensor that transformers does not load, in the dtype in which it is written."""
        dtype = (self._cast if self._is_cast(tensor.name) else None) or self._layout.places[tensor.name].dtype
        values = self._layout.places[tensor.name].read(self._layout.feed).to(dtype)
        stats = measure(values, tensor.name)
        if not stats.finite:
            raise NotPublishedError(
                f"{tensor.name}, which transformers does not load, has values that are not finite in "
                f"{dtype_name(dtype)}: {stats.nan} NaN, {stats.posinf + stats.neginf} infinite",
                hint="repair the base: other programs load this tensor",
            )
        if self._is_cast(tensor.name):
            self._write(tensor.name, values)


def _refuse(connection: Connection, task: int, problem: GateError) -> None:
    with contextlib.suppress(GateError):  # as above
        connection.finish(task, {}, "{}", NotJudged(message=problem.message, hint=problem.hint))


_BY_BITSANDBYTES = frozenset({Quantization.BNB_4BIT, Quantization.BNB_8BIT})


@dataclass(slots=True, kw_only=True)
class PublicationBase:
    """One loaded base, and what the publications on it share. `stored` are the headers of its files.

    `is_fed`: the parent does not copy what a merge leaves alone: it would have to read the base again.
    """

    base: Base
    model_class: ModelClass
    stored: Sequence[StoredTensor]
    feed: SharedReads
    connection: Connection
    is_fed: bool = False
    _layout: StoredLayout | None = None
    _places: dict[tuple[str, int], StoredBytes] = field(default_factory=dict)

    def consumer(self, task: int, dtype: str) -> Consumer:
        """What publishes a task's merge: nothing, if this base allows no publication. The parent gets the reason."""
        try:
            if self._layout is None:
                self._layout = self._made_layout()
        except GateError as error:
            _refuse(self.connection, task, error)
            unwritten = Consumer()
            unwritten.needs_served = dtype == AS_MERGED
            return unwritten
        if self.is_fed and not self._places:
            in_order = sorted(self._layout.places.values(), key=lambda place: place.order)
            self._places = {
                (place.span.file, place.span.start): place for place in in_order if place.span.start < place.span.end
            }
        fed = self.feed if self.is_fed else None
        return PublicationConsumer(self._layout, self.connection, task, dtype, places=self._places, fed=fed)

    def _map(self, headers: tuple[StoredTensor, ...], *, is_plain: bool) -> TensorMap:
        source = self.base.source
        return tensor_map(
            getattr(transformers, self.model_class.class_name),
            source.directory,
            headers,
            dtype=source.options["dtype"],
            is_plain=is_plain,
            **head_options(self.model_class),
        )

    def _made_layout(self) -> StoredLayout:
        source, quantization = self.base.source, self.base.facts.quantization
        if quantization != Quantization.NONE and not source.dequantized:
            raise NotPublishedError(
                f"the base is quantized ({quantization}): its merge cannot be written in that format without "
                "quantizing it again",
                hint=f"set publish.dtype to bfloat16, float16, or float32 in {A_FILE}: then the dequantized merge is "
                "judged and published"
                if quantization in _BY_BITSANDBYTES
                else "publish the merge into the unquantized base",
            )
        try:
            stored = tuple(self.stored)
            weights = packed_weights(stored)
            packed = {tensor.name: tensor for tensor in stored if tensor.name in weights}
            if packed:
                stored = plain_headers(source.directory, stored, self.feed, STORED_DTYPES[self.base.facts.dtype])
            mapping = self._map(stored, is_plain=bool(packed))
            if packed and mapping.mismatched:
                mapping = self._map(tuple(turned(stored, mapping, packed)), is_plain=True)
            return layout_of(self.base, mapping, self.feed, packed)
        except (NoMapError, ValueError, OSError) as error:
            raise NotPublishedError(
                f"the base's headers do not say which stored tensors make {type(self.base.model).__name__}: "
                f"{str(error)[:300]}",
                hint="publish needs a base in safetensors files that transformers loads by its own classes",
            ) from error
