"""The stored tensors of merged models, handed out while their adapters are merged and measured.

In: a loaded base, the feed of its files, and merged tensors, as a sink gets them. Out: bytes of stored tensors for a
`Connection`, and at the end of each task the list of them, or the reason why the model must not be published. Judges
nothing, and writes no files.

1. `expect`: the merge begins. Each tensor that it can change has to have a stored one, in the dtype of the merge.
2. `put`, `put_rows`: the merged values go out, converted to the stored layout if necessary.
3. `finish`: what was expected and did not change goes out as the base has it. For a cast, so does every other floating
   tensor that is stored in another dtype. Tensors that transformers does not load are measured here.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate._internal.text import listing
from merge_gate.engine.base.loaded_base import Base, ModelClass, head_options
from merge_gate.engine.base.stored_layout import (
    STORED_DTYPES,
    StoredLayout,
    extended,
    is_renamed,
    layout_of,
    plain_headers,
    stored_dtype,
    turned,
)
from merge_gate.engine.base.stored_spans import bytes_of
from merge_gate.engine.base.tensor_map import NoMapError, TensorGroup, TensorMap, tensor_map
from merge_gate.engine.merge.merged_tensors import Outline
from merge_gate.engine.tensors.measure import dtype_name, measure
from merge_gate.records.config import A_FILE
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import Evidence
from merge_gate.records.packed_weights import packed_weights
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import AS_MERGED, PRESERVE, Quantization
from merge_gate.sources.feed import Feed

ROWS_BYTES = 1 << 22
"""Rows are sent in parts of about this size."""


class Connection(Protocol):
    """Takes the stored tensors of tasks (worker/call_client.py). Several threads may send different tensors."""

    def plan(self, task: int, tensors: Sequence[StoredTensor]) -> None:
        """The merge begins, perhaps again: these stored tensors will be sent, with these dtypes and shapes."""

    def send(self, task: int, name: str, offset: int, values: memoryview) -> None:
        """Bytes of a stored tensor, from `offset` of the tensor on."""

    def finish(self, task: int, tensors: Sequence[StoredTensor], settings: str, refusal: NotJudged | None) -> None:
        """All tensors of a task were sent, and config.json gets these keys; or it must not be published."""


class PublicationSink:
    """A sink for one adapter.

    `dtype` is `preserve`, `as-merged`, or the dtype that the base was loaded in, for a cast.
    """

    def __init__(self, layout: StoredLayout, connection: Connection, task: int, dtype: str = PRESERVE) -> None:
        self._own, self._layout, self._connection, self._task = layout, layout, connection, task
        self._cast: torch.dtype | None = None if dtype in {PRESERVE, AS_MERGED} else getattr(torch, dtype)
        self._is_preserved = dtype == PRESERVE
        self.settings: dict[str, Any] = {}
        self._problem: GateError | None = None
        self._planned: dict[str, StoredTensor] = {}
        self._expected: frozenset[str] = frozenset()
        self._sent: dict[str, StoredTensor] = {}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}  # by a group's first stored tensor
        self._given: dict[str, set[str]] = {}  # likewise
        self._rows = threading.local()
        self._lock = threading.Lock()

    # --- 1. --------------------------------------------------------------------------------------------------------

    def expect(self, outlines: Mapping[str, Outline]) -> None:
        self._problem = None
        self._sent.clear()
        self._waiting.clear()
        self._given.clear()
        self._expected = frozenset(outlines)
        with self._attempt("the plan"):
            self._refuse_other_dtype()
            if not self._own.base.aliases.keys().isdisjoint(outlines) or self._own.base.newly_initialized:
                self._layout, self.settings = extended(self._own, outlines)
            planned = {one.name: one for name, outline in outlines.items() for one in self._stored(name, outline)}
            if self._cast is not None:
                planned = {**{one.name: one for one in self._all_cast()}, **planned}
            self._planned = planned
            self._connection.plan(self._task, tuple(planned.values()))

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
        for group in self._layout.loaded_groups():
            loaded = self._layout.base.tensors[self._layout.base.first_name(group.targets[0])]
            for source in group.sources:
                if loaded.is_floating_point() and self._is_cast(source):
                    yield self._as_written(source, torch.Size(self._layout.places[source].shape), self._cast)
        for one in self._layout.unloaded():
            if self._is_cast(one.name):
                yield self._as_written(one.name, torch.Size(one.shape), self._cast)

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

    def pass_by(self, name: str, values: torch.Tensor) -> None:
        """Cast what the merge does not change while it has values, so that the base is read once."""
        if self._problem is None and self._cast is not None and name not in self._expected:
            with self._attempt(name):
                for group in self._layout.groups(name):
                    if any(source in self._planned for source in group.sources):
                        self._collect(group, name, values.detach())

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
        except Exception as error:
            self._problem = NotPublishedError(
                f"{name} could not be made ready for writing: {type(error).__name__}: {str(error)[:200]}"
            )

    def _put(self, name: str, values: torch.Tensor) -> None:
        self._check_plan(name, (values.shape, values.dtype))
        for group in self._layout.checked_groups(name):
            self._collect(group, name, values)

    def _put_rows(self, name: str, rows: torch.Tensor, start: int, shape: tuple[int, ...]) -> None:
        held = self._rows
        if start == 0:
            self._check_plan(name, (torch.Size(shape), rows.dtype))
            groups = self._layout.checked_groups(name)
            whole = not all(map(is_renamed, groups))
            count = shape[0] if whole else min(shape[0], max(ROWS_BYTES // (rows[0].nbytes or 1), len(rows)))
            held.buffer = torch.empty((count, *shape[1:]), dtype=rows.dtype)
            held.sources = () if whole else tuple(group.sources[0] for group in groups)
            held.first, held.filled = 0, 0
        if held.filled + len(rows) > len(held.buffer):
            self._send_rows()
        if len(rows) > len(held.buffer):
            held.buffer = torch.empty((len(rows), *shape[1:]), dtype=rows.dtype)
        held.buffer[held.filled : held.filled + len(rows)].copy_(rows)
        held.filled += len(rows)
        if start + len(rows) < shape[0]:
            return
        if not held.sources:
            self._put(name, held.buffer)
            return
        written = self._send_rows()
        for source in held.sources:
            self._sent[source] = self._as_written(source, torch.Size(shape), written)

    def _send_rows(self) -> torch.dtype:
        held = self._rows
        part = self._in_written_dtype(held.sources[0], held.buffer[: held.filled]) if held.sources else held.buffer
        row_bytes = part[0].nbytes if len(part) else 0
        for source in held.sources:
            self._connection.send(self._task, source, held.first * row_bytes, bytes_of(part))
        held.first, held.filled = held.first + held.filled, 0
        dtype: torch.dtype = part.dtype
        return dtype

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
        for one in self._stored(name, outline):
            planned = self._planned.get(one.name, self._layout.outline(one.name))
            if (one.dtype, one.shape) != (planned.dtype, planned.shape):
                raise NotPublishedError(
                    f"{one.name} is {one.dtype} of shape {one.shape} after the merge, expected {planned.dtype} of "
                    f"shape {planned.shape}"
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
            self._send_whole(source, tensor)

    def _send_whole(self, source: str, values: torch.Tensor) -> None:
        values = self._in_written_dtype(source, values.cpu()).contiguous()
        if values.numel():
            self._connection.send(self._task, source, 0, bytes_of(values))
        self._sent[source] = self._as_written(source, values.shape, values.dtype)

    def _as_written(self, source: str, shape: torch.Size, dtype: torch.dtype) -> StoredTensor:
        file = self._layout.outline(source).file
        return StoredTensor(name=source, dtype=stored_dtype(dtype), shape=tuple(shape), file=file)

    # --- 3. --------------------------------------------------------------------------------------------------------

    def finish(self) -> tuple[StoredTensor, ...]:
        """Send the remaining tensors. Returns all stored tensors that were sent; the others are as in the base.

        Raises:
            GateError: the merged model must not be published.
        """
        if self._problem is None:
            with self._attempt("the rest of the model"):
                self._finish()
        if self._problem is not None:
            raise self._problem
        return tuple(self._sent.values())

    def _finish(self) -> None:
        for group in self._layout.map.groups:
            first = group.sources[0]
            if first in self._waiting or (first in self._planned and first not in self._sent):
                self._send_group(group, self._with_base(group))
        for one in self._layout.unloaded():
            self._finish_unloaded(one)

    def _with_base(self, group: TensorGroup) -> dict[str, torch.Tensor]:
        """All tensors of a group: those that the merge has given, and the base's."""
        base, values = self._layout.base, dict(self._waiting.pop(group.sources[0], {}))
        names = {target: base.first_name(target) for target in group.targets if target not in values}
        with base.filled(names.values()):
            return values | {target: base.tensors[name].detach().clone() for target, name in names.items()}

    def _finish_unloaded(self, one: StoredTensor) -> None:
        """Measure a tensor that transformers does not load, in the dtype in which it is written."""
        dtype = (self._cast if self._is_cast(one.name) else None) or self._layout.places[one.name].dtype
        for start, stored in self._layout.blocks(one.name):
            values = stored.to(dtype)
            stats = measure(values, one.name)
            if not stats.finite:
                raise NotPublishedError(
                    f"{one.name}, which transformers does not load, has values that are not finite in "
                    f"{dtype_name(dtype)}: {stats.nan} NaN, {stats.posinf + stats.neginf} infinite",
                    hint="repair the base: other programs load this tensor",
                )
            if self._is_cast(one.name):
                self._connection.send(self._task, one.name, start * dtype.itemsize, bytes_of(values))
        if self._is_cast(one.name):
            self._sent[one.name] = self._as_written(one.name, torch.Size(one.shape), dtype)


_BY_BITSANDBYTES = frozenset({Quantization.BNB_4BIT, Quantization.BNB_8BIT})


@dataclass(slots=True, kw_only=True)
class PublicationSinks:
    """The publications on one loaded base. `stored` are the headers of its files."""

    base: Base
    model_class: ModelClass
    stored: Sequence[StoredTensor]
    feed: Feed
    connection: Connection
    _layout: StoredLayout | None = None
    _problems: dict[int, GateError] = field(default_factory=dict)
    _open: dict[int, PublicationSink] = field(default_factory=dict)

    def sink(self, task: int, dtype: str) -> PublicationSink | None:
        """A sink for a task. None if this base allows no publication: `finish` says why."""
        try:
            if self._layout is None:
                self._layout = self._made_layout()
        except GateError as error:
            self._problems[task] = error
            return None
        self._open[task] = PublicationSink(self._layout, self.connection, task, dtype)
        return self._open[task]

    def finish(self, task: int, evidence: Evidence) -> None:
        """Send the remaining tensors of a task, and the list of its tensors."""
        publication, problem = self._open.pop(task, None), self._problems.pop(task, None)
        tensors: Sequence[StoredTensor] = ()
        settings = ""
        try:
            if evidence.refusal is not None:
                problem = NotPublishedError("the adapter was not merged")
            elif publication is not None:
                tensors, settings = publication.finish(), json.dumps(publication.settings)
        except GateError as error:
            problem = error
        refusal = NotJudged(message=problem.message, hint=problem.hint) if problem is not None else None
        with contextlib.suppress(GateError):  # the parent is gone, or publishes nothing without this message
            self.connection.finish(task, tensors, settings, refusal)

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
            packed = {one.name: one for one in stored if one.name in weights}
            if packed:
                stored = plain_headers(source.directory, stored, self.feed, STORED_DTYPES[self.base.facts.dtype])
            found = self._map(stored, is_plain=bool(packed))
            if packed and found.mismatched:
                found = self._map(tuple(turned(stored, found, packed)), is_plain=True)
            return layout_of(self.base, found, self.feed, packed)
        except (NoMapError, ValueError, OSError) as error:
            raise NotPublishedError(
                f"the base's headers do not say which stored tensors make {type(self.base.model).__name__}: "
                f"{str(error)[:300]}",
                hint="publish needs a base in safetensors files that transformers loads by its own classes",
            ) from error
