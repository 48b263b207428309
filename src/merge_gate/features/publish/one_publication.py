"""Publishes one model, from the plan of its merge to the directory under its name.

In: what the worker plans and writes, the base's own files, and the verdict. Out: a directory, or `NotPublishedError`.

1. `plan`: the layout, and the files with their headers.            worker's plan
2. `written`: the checksums of what the worker wrote.               worker's end
3. `complete`: the rest, from the base; read back.                  the adapter passed, and the worker has ended
4. `publish`: the files next to the weights; the name.              the base is unchanged

The worker is not trusted: it can lie about the values, and not about files, sizes, and names. What any of these steps
raises costs the publication (feature.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from merge_gate._internal.errors import NotPublishedError
from merge_gate.features.publish.calls import PublicationWritten
from merge_gate.features.publish.companions import CompanionFiles, Identities, companions_of, read_inputs
from merge_gate.features.publish.manifest import PublicationFacts, manifest_of, model_card, render
from merge_gate.features.publish.packed_weights import packed_weights
from merge_gate.features.publish.partial import PartialDirectory
from merge_gate.features.publish.weight_files import ModelLayout, ModelWriter, cast, merged_layout, refuse_other_files
from merge_gate.files import json_object, resolve
from merge_gate.files.base_watch import base_directory
from merge_gate.files.headers import shown
from merge_gate.records.config import PublishSpec
from merge_gate.records.files import CARD_NAME, MANIFEST_NAME, Entry, FileIdentity, HashedFile, StoredTensor
from merge_gate.records.terms import AS_MERGED, PRESERVE, Finding
from merge_gate.worker.protocol import ConsumerSpec

_MORE_BYTES = 1 << 30
"""A planned model may have twice the expected size, and so much more. So may its largest file."""

_SETTINGS = frozenset({"tie_word_embeddings", "model_type", "architectures", "id2label", "label2id"})
"""Keys of config.json that the tensors of a merge can change."""

_FOREIGN = "please report this: the gate's worker sent data that does not fit the base"


def publishing(dtype: str, *, files: int = 1, most_bytes: int = 0) -> ConsumerSpec:
    """How a merge is published: in about so many open `files`. No file may have more than `most_bytes`.

    `dtype` is `preserve`, the dtype that all floating tensors are cast to, or `as-merged`: then only what the merge
    changes is written, and `Evidence.served` is filled.
    """
    plain = None if dtype in {PRESERVE, AS_MERGED} else dtype
    return ConsumerSpec(feature="publish", settings=dtype, files=files, most_bytes=most_bytes, plain_dtype=plain)


class Publication:
    """One model, and the directory that it gets.

    The layout `base` is that of the files in `directory`, or of stubs that have no values if `is_streamed`.
    """

    def __init__(
        self, target: Path, spec: PublishSpec, base: ModelLayout, directory: str, *, is_streamed: bool = False
    ) -> None:
        self.directory, self.spec, self._base = target, spec, base
        self._base_directory, self._is_streamed = directory, is_streamed
        self._cast = {} if spec.dtype == PRESERVE else cast(base, spec.dtype)
        self._stored = {tensor.name: (tensor.dtype, tensor.shape) for tensor in base.tensors}
        self.expected = self._layout(self._cast)
        self._partial: PartialDirectory | None = None
        self._writer: ModelWriter | None = None
        self._weights: tuple[HashedFile, ...] = ()
        self.settings: dict[str, object] = {}
        self._planned: frozenset[str] = frozenset()
        self._is_written = self.is_accepted = False

    def _layout(self, changes: Mapping[str, StoredTensor]) -> ModelLayout:
        dropped = packed_weights(() if self.spec.dtype == PRESERVE else self._base.tensors).others
        return merged_layout(self._base, changes, self.spec.max_shard_bytes, dropped)

    @property
    def publishing(self) -> ConsumerSpec:
        """What the worker has to know of it, from the layout as far as it is known without the adapter."""
        most_bytes = 2 * self.expected.largest_bytes + _MORE_BYTES
        return publishing(self.spec.dtype, files=len(self.expected.files), most_bytes=most_bytes)

    # --- 1 and 2: the worker ---------------------------------------------------------------------------------------

    def plan(self, tensors: Iterable[StoredTensor]) -> tuple[int, ...]:
        """Make the files of the model, and discard earlier ones. Returns them, open; the caller closes them."""
        self.discard()
        planned = self._cast | {tensor.name: tensor for tensor in tensors}
        self._planned = frozenset(planned)
        changes = (item for item in planned.items() if self._stored.get(item[0]) != (item[1].dtype, item[1].shape))
        layout = self._layout(dict(changes))
        largest, most_bytes = layout.largest_bytes, 2 * self.expected.size_bytes + _MORE_BYTES
        if layout.size_bytes > most_bytes or largest > self.publishing.most_bytes:
            raise NotPublishedError(
                f"the merged model would have {layout.size_bytes:,} bytes, and {largest:,} in one file, expected about "
                f"{self.expected.size_bytes:,}",
                hint=_FOREIGN,
            )
        self._partial = PartialDirectory(self.directory)
        self._writer = ModelWriter(self._partial.model, layout)
        return self._writer.make_files()

    def written(self, message: PublicationWritten) -> None:
        """The worker has written all that it wants to write: what it planned. The rest is copied from a local base."""
        if message.refusal is not None:
            raise NotPublishedError(message.refusal.message, hint=message.refusal.hint)
        if self._writer is None:
            raise NotPublishedError("the gate's worker sent no plan of the merged model", hint=_FOREIGN)
        try:
            given = json_object.parse(message.settings.encode())
        except json_object.InvalidObjectError as error:
            raise NotPublishedError(f"what the gate's worker sent for config.json {error}", hint=_FOREIGN) from None
        self.settings = {key: value for key, value in given.items() if key in _SETTINGS}
        self._writer.checksums = dict(message.checksums)
        for place in self._writer.missing():
            if self._is_streamed or place.tensor.name in self._planned:
                raise NotPublishedError(
                    f"the merged tensor {shown(place.tensor.name)} was not written, and cannot be copied from the base",
                    hint=_FOREIGN,
                )
        self._is_written = True

    # --- 3 and 4: the adapter passed -------------------------------------------------------------------------------

    def complete(self) -> None:
        """Copy the tensors that the worker did not write, and read everything back. No worker may be alive."""
        writer = self._writer
        if writer is None or not self._is_written:
            raise NotPublishedError("the gate's worker did not write the merged model", hint=_FOREIGN)
        writer.copy(self._base, self._base_directory)
        if writer.layout.index is not None:
            self._weights = (writer.add_file(writer.layout.index.name, writer.layout.index.head),)
        self._weights += writer.read_back()

    def stop(self) -> None:
        """Let `complete` end, if it runs."""
        if self._writer is not None:
            self._writer.is_stopped = True

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor as it is written."""
        return self._writer.layout.tensors if self._writer is not None else ()

    @property
    def base_tensors(self) -> tuple[StoredTensor, ...]:
        return self._base.tensors

    def publish(
        self, facts: PublicationFacts, seen: Identities, *, replaces: tuple[FileIdentity, ...] | None
    ) -> tuple[tuple[HashedFile, ...], tuple[Finding, ...]]:
        """Write the files next to the weights, and give the directory its name.

        Returns the files of the directory, and what there is to say about them.

        `seen`: the expected files next to the weights. `replaces`: the identity of an earlier model of this name, which
        may be replaced; None if there is none.
        """
        writer, partial = self._writer, self._partial
        if writer is None or partial is None or not self._weights:
            raise AssertionError("the model was not completed")
        base = base_directory(facts.entry)
        read = read_inputs(base, [member.directory for member in facts.entry.members], facts, seen)
        more, findings = companions_of(base, read, facts)
        inputs = input_files(facts.entry, facts.base.files, *read)
        files = (*self._weights, *(writer.add_file(name, data) for name, (_, data) in more.items()))
        content = manifest_of(facts, inputs, files, findings)
        files = tuple(sorted((*files, writer.add_file(CARD_NAME, model_card(content))), key=lambda file: file.path))
        manifest = writer.add_file(MANIFEST_NAME, render(replace(content, files=files)))
        refuse_other_files(partial.model, writer.layout)
        partial.publish(replaces=replaces)
        return (*files, manifest), tuple(findings)

    def discard(self) -> None:
        """Remove the written files, unless the model already has its name."""
        self._writer, self._weights, self._is_written = None, (), False
        if self._partial is not None:
            self._partial.remove()
        self._partial = None


# --- the files that a model is made of, for merge-gate.json ----------------------------------------------------------


def input_files(
    entry: Entry, weights: Iterable[HashedFile], base: CompanionFiles, *adapters: CompanionFiles
) -> list[tuple[HashedFile, ...]]:
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


def _records(files: Mapping[str, bytes]) -> Iterator[HashedFile]:
    for name, data in files.items():
        yield HashedFile(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _digests(directory: str, names: Iterable[str]) -> Iterator[HashedFile]:
    for name in names:
        place = Path(directory, name)
        yield HashedFile(path=name, size_bytes=place.stat().st_size, sha256=resolve.digest_file(place))


def _sorted(files: Iterable[HashedFile]) -> tuple[HashedFile, ...]:
    return tuple(sorted(files, key=lambda file: file.path))
