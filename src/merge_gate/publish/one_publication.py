"""Publishes one model, from the plan of its merge to the directory under its name.

In: the tensors that the worker sends, the base's own files, and the verdict. Out: a directory, or `NotPublishedError`.

1. `plan`: the layout, and the files with their headers.            worker's plan
2. `write`: the merged tensors, in any order.                       worker's parts
   `take`: all other tensors, if the base passes through.           bytes of the base
3. `sent`: which of them count.                                     worker's end
4. `complete`: what is left, from another model or the base; read back.
                                                                    the adapter passed
5. `publish`: the files next to the weights; the name.              the base is unchanged

The worker is not trusted. Each of 1 to 3 only records what is wrong, and `complete` raises it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate._internal.text import quoted
from merge_gate.files import json_object, resolve
from merge_gate.files.base_watch import base_directory
from merge_gate.files.headers import DTYPE_BITS, shown
from merge_gate.publish.companions import CompanionFiles, Identities, companions_of, read_inputs
from merge_gate.publish.manifest import MANIFEST_NAME, PublicationFacts, manifest_of, model_card, render
from merge_gate.publish.partial import PartialDirectory
from merge_gate.publish.weight_files import (
    CHUNK_BYTES,
    FLOATING,
    FLOATING_STORED,
    ModelLayout,
    ModelWriter,
    Place,
    cast,
    compare_written,
    merged_layout,
)
from merge_gate.records.config import PublishSpec
from merge_gate.records.files import Entry, FileIdentity, FileRecord, StoredTensor
from merge_gate.records.packed_weights import packed_weights
from merge_gate.records.publication import CARD_NAME
from merge_gate.records.terms import PRESERVE, Finding
from merge_gate.worker.protocol import PublicationSent

_MORE_BYTES = 1 << 30
"""A plan may need twice the size of the base, and so much more."""

_SETTINGS = frozenset({"tie_word_embeddings", "model_type", "architectures", "id2label", "label2id"})
"""Keys of config.json that the tensors of a merge can change."""

_FOREIGN = "please report this: the gate's worker sent data that does not fit the base"


class BaseReader(Protocol):
    """Reads the base's own files."""

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a file from `start` on, or raise a `SourceError`."""


class CanceledError(Exception):
    """The run ends."""


class Publication:
    """One model, and the directory that it gets. Its methods may be called by several threads."""

    def __init__(self, directory: Path, spec: PublishSpec, base: ModelLayout) -> None:
        self.directory, self.spec, self._base = directory, spec, base
        self._stored = {tensor.name: tensor for tensor in base.tensors}
        self._packed = packed_weights(() if spec.dtype == PRESERVE else base.tensors)
        self._lock = threading.RLock()
        self._partial: PartialDirectory | None = None
        self._writer: ModelWriter | None = None
        self._weights: tuple[FileRecord, ...] = ()
        self._error: NotPublishedError | None = None
        self._changes: frozenset[str] = frozenset()
        self.settings: dict[str, object] = {}
        self._written: set[str] = set()
        self._is_sent = self._is_accepted = self._is_closed = self._is_canceled = False

    @property
    def expected(self) -> ModelLayout:
        """The layout, as far as it is known without the adapter."""
        return self._layout(self._cast())

    def _layout(self, changes: Mapping[str, StoredTensor]) -> ModelLayout:
        return merged_layout(self._base, changes, self.spec.max_shard_bytes, self._packed.others)

    def _cast(self) -> dict[str, StoredTensor]:
        return {} if self.spec.dtype == PRESERVE else cast(self._base, self.spec.dtype)

    # --- 1 to 3: the worker ----------------------------------------------------------------------------------------

    def plan(self, tensors: Iterable[StoredTensor]) -> None:
        """Start writing the model, and discard earlier parts."""
        with self._lock:
            if not self._is_accepted and not self._is_canceled:
                self._reset()
                self._attempt(lambda: self._begin(tensors))

    def _begin(self, tensors: Iterable[StoredTensor]) -> None:
        changes, tensors = self._cast(), tuple(tensors)
        for tensor in tensors:
            changes[tensor.name] = self._checked(tensor)
        changes = {name: tensor for name, tensor in changes.items() if not self._is_stored_so(tensor)}
        layout = self._layout(changes)
        if layout.size_bytes > 2 * self.expected.size_bytes + _MORE_BYTES:
            raise NotPublishedError(
                f"the merged model would have {layout.size_bytes:,} bytes, expected about {self.expected.size_bytes:,}",
                hint=_FOREIGN,
            )
        self._changes = frozenset(changes) | {tensor.name for tensor in tensors}
        self._partial = PartialDirectory(self.directory)
        self._writer = ModelWriter(self._partial.model, layout)

    def _checked(self, tensor: StoredTensor) -> StoredTensor:
        """A tensor in the worker's plan, if its dtype is the one to publish."""
        stored = self._stored.get(tensor.name)
        expected = stored.dtype if stored is not None else tensor.dtype
        if self.spec.dtype != PRESERVE and (expected in FLOATING_STORED or tensor.name in self._packed):
            expected = FLOATING[self.spec.dtype]
        if not self._is_in_model(tensor):
            raise _misfit(tensor.name, "has a shape that the packed weights do not have")
        is_text = tensor.name.encode(errors="replace").decode() == tensor.name  # no surrogates
        if tensor.dtype != expected or tensor.dtype not in DTYPE_BITS or not is_text:
            raise NotPublishedError(
                f"the merged tensor {shown(tensor.name)} has dtype {shown(tensor.dtype)}, expected {expected}",
                hint=_FOREIGN,
            )
        return replace(tensor, file=stored.file if stored is not None else "")

    def _is_in_model(self, tensor: StoredTensor) -> bool:
        """A packed weight has as many values as its bytes hold. What belongs to it is not in the model."""
        count = self._packed.counts.get(tensor.name)
        has_count = count is None or math.prod(tensor.shape) in {count, count - (tensor.name in self._packed.states)}
        return has_count and tensor.name not in self._packed.others

    def _is_stored_so(self, tensor: StoredTensor) -> bool:
        stored = self._stored.get(tensor.name)
        return stored is not None and (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Write bytes of a merged tensor."""
        with self._lock:
            writer = self._writer
            if writer is not None and not self._is_sent:
                self._written.add(name)
                self._attempt(lambda: writer.write(name, offset, content))

    def take(self, file: str, start: int, content: memoryview) -> None:
        """Write what these bytes of the base's file `file` hold of tensors that the merge does not change."""
        with self._lock:
            writer = self._writer
            if writer is not None and not self._is_closed and not self._is_canceled:
                self._attempt(lambda: self._take(writer, file, start, content))

    def _take(self, writer: ModelWriter, file: str, start: int, content: memoryview) -> None:
        end = start + len(content)
        places = self._sources.get(file, ())
        first = bisect.bisect_right(places, start, key=lambda place: place.end)
        for place in itertools.takewhile(lambda place: place.start < end, places[first:]):
            name, begin, until = place.tensor.name, max(start, place.start), min(end, place.end)
            if begin < until and self._is_as_in_base(name) and not writer.is_written(writer.places(name)[-1]):
                writer.write(name, begin - place.start, content[begin - start : until - start])

    def _is_as_in_base(self, name: str) -> bool:
        """Whether the model has a tensor that the worker did not plan and did not send."""
        return name not in self._changes and name not in self._written and name not in self._packed.others

    @functools.cached_property
    def _sources(self) -> dict[str, list[Place]]:
        """The places in each file of the base that count, in their order. A name in two files has the last one."""
        sources: dict[str, list[Place]] = {}
        for places in self._base.places().values():
            sources.setdefault(places[-1].tensor.file, []).append(places[-1])
        return {file: sorted(places, key=lambda place: place.start) for file, places in sources.items()}

    def sent(self, message: PublicationSent) -> None:
        """The worker has sent all that it wants to send."""
        with self._lock:
            if self._is_accepted:
                return
            if message.refusal is not None:
                self._fail(NotPublishedError(message.refusal.message, hint=message.refusal.hint))
            elif self._error is None:
                self._attempt(lambda: self._count(message.tensors, message.settings))
            self._is_sent = True

    def _count(self, tensors: Iterable[StoredTensor], settings: str) -> None:
        """The tensors that count must have arrived whole. Of all others, the base's bytes are published."""
        if self._writer is None:
            raise NotPublishedError("the gate's worker sent no plan of the merged model", hint=_FOREIGN)
        try:
            given = json_object.parse(settings.encode())
        except json_object.InvalidObjectError as error:
            raise NotPublishedError(f"what the gate's worker sent for config.json {error}", hint=_FOREIGN) from None
        self.settings = {key: value for key, value in given.items() if key in _SETTINGS}
        final = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        layout = self._writer.layout
        for tensor in layout.tensors:
            if tensor.name in final and final.pop(tensor.name) != (tensor.dtype, tensor.shape):
                raise _misfit(tensor.name, "has another dtype or shape than planned")
        if final:
            raise _misfit(next(iter(final)), "arrived without a plan")
        counts = {tensor.name for tensor in tensors}
        for place in (place for file in layout.files for place in file.places):
            name = place.tensor.name
            if name in counts and not self._writer.is_written(place):
                raise _misfit(name, "arrived only in part")
            if name not in counts and not self._is_stored_so(place.tensor):
                raise _misfit(name, "did not arrive, and the base's own bytes do not fit")
            if name in self._written - counts:
                self._writer.forget(place)

    def _attempt(self, step: Callable[[], object]) -> None:
        try:
            step()
        except NotPublishedError as error:
            self._fail(error)
        except OSError as error:
            self._fail(self._disk(error))
        except (ValueError, MemoryError) as error:
            self._fail(NotPublishedError(f"the merged model does not fit the base: {str(error)[:200]}", hint=_FOREIGN))

    def _fail(self, error: NotPublishedError) -> None:
        """The first error counts. The disk is freed at once."""
        self._remove()
        self._error = self._error or error

    def _disk(self, error: OSError) -> NotPublishedError:
        return NotPublishedError(
            f"the model cannot be written to {quoted(str(self.directory), 200)}: {error.strerror or error}",
            hint="free some space there, or publish to another disk",
        )

    # --- 4 and 5: the adapter passed -------------------------------------------------------------------------------

    def accept(self) -> None:
        """The merge was judged: what the worker plans or sends from now on is ignored."""
        with self._lock:
            self._is_accepted = True

    def complete(self, base: BaseReader, others: Sequence[Publication] = ()) -> None:
        """Copy the tensors that the merge left alone, and read everything back.

        `others` are models of the same base: what they have is not read from the base again.

        Raises:
            NotPublishedError: the model cannot be published.
            CanceledError: the run ends.
        """
        with self._lock:
            self._is_accepted = self._is_closed = True
            if self._error is not None:
                raise self._error
            if self._writer is None or not self._is_sent:
                raise NotPublishedError("the gate's worker did not send the merged model", hint=_FOREIGN)
            writer = self._writer
        try:
            self._copy(base, writer, others)
            if writer.layout.index is not None:
                self._weights = (writer.add_file(writer.layout.index.name, writer.layout.index.head),)
            self._weights += writer.read_back(self._go_on)
        except OSError as error:
            raise self._disk(error) from error

    def _copy(self, base: BaseReader, writer: ModelWriter, others: Sequence[Publication]) -> None:
        sources = self._base.places()
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for place in list(writer.missing()):
            source = sources[place.tensor.name][-1]
            for offset in range(0, place.size_bytes, CHUNK_BYTES):
                self._go_on()
                piece = buffer[: min(CHUNK_BYTES, place.size_bytes - offset)]
                if not any(other.lend(place.tensor.name, offset, piece) for other in others):
                    try:
                        base.read(source.tensor.file, source.start + offset, piece)
                    except GateError as error:
                        raise NotPublishedError(error.message, hint=error.hint) from error
                writer.write(place.tensor.name, offset, piece)

    def lend(self, name: str, offset: int, into: memoryview) -> bool:
        """Fill `into` with bytes of a tensor that is as in the base. False if this model is not complete."""
        with self._lock:
            if self._writer is None or not self._weights or not self._is_as_in_base(name):
                return False
            try:
                self._writer.read(name, offset, into)
            except (OSError, NotPublishedError):
                return False
            return True

    def _go_on(self) -> None:
        if self._is_canceled:
            raise CanceledError

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor as it is written."""
        return self._writer.layout.tensors if self._writer is not None else ()

    @property
    def base_tensors(self) -> tuple[StoredTensor, ...]:
        return self._base.tensors

    def publish(
        self, facts: PublicationFacts, seen: Identities, *, replaces: tuple[FileIdentity, ...] | None
    ) -> tuple[tuple[FileRecord, ...], tuple[Finding, ...]]:
        """Write the files next to the weights, compare the whole with the plan, and give the directory its name.

        Returns the files of the directory, and what there is to say about them.

        `seen`: the expected files next to the weights. `replaces`: the identity of an earlier model of this name, which
        may be replaced; None if there is none.
        """
        writer, partial = self._writer, self._partial
        if writer is None or partial is None or not self._weights:
            raise AssertionError("the model was not completed")
        try:
            base = base_directory(facts.entry)
            read = read_inputs(base, [member.directory for member in facts.entry.members], facts, seen)
            more, findings = companions_of(base, read, facts)
            inputs = input_files(facts.entry, facts.base.files, *read)
            files = (*self._weights, *(writer.add_file(name, data) for name, (_, data) in more.items()))
            content = manifest_of(facts, inputs, files, findings)
            files = tuple(sorted((*files, writer.add_file(CARD_NAME, model_card(content))), key=lambda file: file.path))
            manifest = writer.add_file(MANIFEST_NAME, render(replace(content, files=files)))
            compare_written(partial.model, writer.layout)
            partial.publish(replaces=replaces)
        except OSError as error:
            raise self._disk(error) from error
        return (*files, manifest), tuple(findings)

    # --- the end ---------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop writing. `discard` removes the written files."""
        self._is_canceled = True

    def discard(self) -> None:
        """Remove the written files, unless the model already has its name."""
        with self._lock:
            self._reset()

    def _reset(self) -> None:
        self._remove()
        self._weights, self._error = (), None
        self._written.clear()
        self._is_sent = False

    def _remove(self) -> None:
        self._writer = None
        if self._partial is not None:
            self._partial.remove()
        self._partial = None


def _misfit(name: str, how: str) -> NotPublishedError:
    return NotPublishedError(f"the merged tensor {shown(name)} {how}", hint=_FOREIGN)


# --- the files that a model is made of, for merge-gate.json ----------------------------------------------------------


def input_files(
    entry: Entry, weights: Iterable[FileRecord], base: CompanionFiles, *adapters: CompanionFiles
) -> list[tuple[FileRecord, ...]]:
    """The files of an entry's base, and those of each adapter, sorted by name: what the merge read, and what is copied.

    A base also has settings in JSON. Its code is not listed: a model that runs code is not published.

    `weights` are the base's weight files with the index. `base` and `adapters` are what a publication read of each.

    Raises:
        OSError: a file cannot be read.
    """
    directory = base_directory(entry)
    known = {file.path: file for file in (*weights, *_records(base.files))}
    settings = {name for name in resolve.base_setting_files(directory) if not name.endswith(".py")} - set(known)
    of_adapters = (
        {file.path: file for file in (*_records(own.without_config), *member.files)}
        for own, member in zip(adapters, entry.members, strict=True)
    )
    return [
        _sorted((*known.values(), *_digests(directory, settings))),
        *(_sorted(files.values()) for files in of_adapters),
    ]


def _records(files: Mapping[str, bytes]) -> Iterator[FileRecord]:
    for name, data in files.items():
        yield FileRecord(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _digests(directory: str, names: Iterable[str]) -> Iterator[FileRecord]:
    for name in names:
        place = Path(directory, name)
        yield FileRecord(path=name, size_bytes=place.stat().st_size, sha256=resolve.digest_file(place))


def _sorted(files: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    return tuple(sorted(files, key=lambda file: file.path))
