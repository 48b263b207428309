"""The publications of the adapters on one base: a sink for each, and what is sent after its merge.

In: a loaded base, the feed of its files, and the connection to the process that writes. Out: sinks for merges, and for
each task the list of its tensors, or the reason why they must not be published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import transformers

from merge_gate.engine.base.loaded_base import Base, ModelClass, head_options
from merge_gate.engine.base.stored_layout import STORED_DTYPES, StoredLayout, layout_of, plain_headers, turned
from merge_gate.engine.base.tensor_map import NoMapError, TensorMap, tensor_map
from merge_gate.engine.merge.publication_sink import Connection, PublicationSink
from merge_gate.errors import GateError, NotPublishedError
from merge_gate.records.config import A_FILE
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import Evidence
from merge_gate.records.packed_weights import packed_weights
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Quantization
from merge_gate.sources.feed import Feed

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
        try:
            if evidence.refusal is not None:
                problem = NotPublishedError("the adapter was not merged")
            elif publication is not None:
                tensors = publication.finish()
        except GateError as error:
            problem = error
        refusal = NotJudged(message=problem.message, hint=problem.hint) if problem is not None else None
        with contextlib.suppress(GateError):  # the parent is gone, or publishes nothing without this message
            self.connection.finish(task, tensors, refusal)

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
