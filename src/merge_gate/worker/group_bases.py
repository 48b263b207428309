"""Loads the bases of groups inside the worker: as a skeleton, or by `from_pretrained`.

In: groups that differ in dtype only, and a class of the model. Out: a `Base` for each. Only this module and child.py
use the engine; both run confined. Importing this module imports torch and PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merge_gate.engine.adapter_evidence import MergeRequest
from merge_gate.engine.base import accounting
from merge_gate.engine.base import loaded_base as bases
from merge_gate.engine.base.accounting import Account
from merge_gate.engine.base.loaded_base import Base, ModelClass, Source
from merge_gate.engine.base.shared_reads import SharedReads
from merge_gate.engine.base.skeleton import FiguresBySpan, NoSkeletonError, figures_by_span, skeleton_of
from merge_gate.engine.base.tensor_map import NoMapError
from merge_gate.errors import EngineError
from merge_gate.files.identity import base_identity
from merge_gate.records.comparison import Comparison
from merge_gate.records.files import FileIdentity, Snapshot
from merge_gate.records.measured import BaseRecord, Evidence
from merge_gate.records.terms import Quantization
from merge_gate.sources.feed import Feed, LocalFeed
from merge_gate.worker.call_client import CallClient, ParentFeed
from merge_gate.worker.memory import MemoryGroup, gibibytes, give_back
from merge_gate.worker.pinned import pinned_directory, verify_base
from merge_gate.worker.protocol import Group, Job, Task

if TYPE_CHECKING:
    from merge_gate.engine.merge.publication_sinks import PublicationSinks


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBase:
    """A loaded base, the class it was loaded as, and the identity of its files before that."""

    position: int
    group: Group
    model_class: ModelClass
    base: Base
    identity: tuple[FileIdentity, ...]

    @property
    def is_skeleton(self) -> bool:
        """Whether it takes no memory, and is read in a pass."""
        return self.group.in_passes and self.base.feed is not None

    def record(self) -> BaseRecord | None:
        """The figures of a base that was read whole, if the group keeps them and has none of this class."""
        if not self.group.keeps_record or self.model_class.label in {one.model_class for one in self.group.records}:
            return None
        return self.base.record(self.model_class)


@dataclass(slots=True, kw_only=True)
class GroupBases:
    """Loads bases from the files of one directory, which `feed` reads.

    It keeps the figures of tensors for the next class. `client` takes the merged models that are published.
    """

    job: Job
    feed: Feed
    """Shared by all skeletons, so that they are filled in one pass."""
    client: CallClient | None = None
    _accounts: dict[ModelClass, Account] = field(default_factory=dict)
    _identity: tuple[FileIdentity, ...] = ()
    _figures: FiguresBySpan = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.feed = SharedReads(self.feed)

    def account(self, model_class: ModelClass, group: Group) -> Account:
        """The account of the base as this class, before it is loaded. It is the same for every dtype."""
        if model_class not in self._accounts:
            label, stored = group.base.name, group.files.tensors
            self._accounts[model_class] = accounting.account_for(group.directory, model_class, label, stored)
        return self._accounts[model_class]

    def load(self, position: int, group: Group, model_class: ModelClass, account: Account) -> GroupBase:
        """Load the base as this class."""
        before, self._identity = self._identity, base_identity(group.directory)
        if before != self._identity:
            self._figures.clear()
        self.feed.open_files(group.files.weights)  # before the identity is verified
        base = _as_published(self._read(group, model_class), group)
        verify_base(group.directory, group.base.name, self._identity)
        accounting.settle(base, account, group.directory)
        loaded = GroupBase(position=position, group=group, model_class=model_class, base=base, identity=self._identity)
        record = next((one for one in group.records if one.model_class == model_class.label), None)
        if record is not None and loaded.is_skeleton:
            base.adopt(record)
        return loaded

    def _read(self, group: Group, model_class: ModelClass) -> Base:
        source = bases.source_of(
            group.directory,
            label=group.base.name,
            revision=group.base.revision,
            dtype=group.base.dtype,
            quantization=Quantization(group.base.quantization),
            device=self.job.device,
            trust_remote_code=self.job.trust_remote_code,
            allow_pickle=self.job.allow_pickle,
        )
        base, why_not = self._skeleton(group, source, model_class)
        if base is None and group.fed and (group.base.is_quantized or group.files.is_streamed):
            base, why_not = self._from_feed(group, source, model_class, why_not)
        if base is None:
            refuse_stubs(group, model_class, why_not)
            give_back()
            base = bases.load_base(source, model_class)
        if group.in_passes:
            base.facts = replace(base.facts, no_skeleton=why_not.replace(group.directory, group.base.name))
        return base

    def _skeleton(self, group: Group, source: Source, model_class: ModelClass) -> tuple[Base | None, str]:
        """A base that takes no memory, or why it is none. A card gets it only if the parent reads the files."""
        if not group.fed and self.job.device != "cpu":
            return None, ""
        is_mapped, known = not group.in_passes, self._figures
        try:
            base = skeleton_of(source, model_class, group.files.tensors, self.feed, is_mapped=is_mapped, known=known)
        except NoSkeletonError as error:
            return None, str(error) or type(error).__name__
        return base, ""

    def _from_feed(
        self, group: Group, source: Source, model_class: ModelClass, why_not: str
    ) -> tuple[Base | None, str]:
        """A base in memory, which no file is mapped for. None if only `from_pretrained` itself can load it, and why."""
        from merge_gate.engine.base.load_from_feed import load_from_feed  # noqa: PLC0415 - few bases need it

        give_back()
        stored, free_bytes = group.files.tensors, MemoryGroup().free_bytes()
        try:
            return load_from_feed(source, model_class, stored, self.feed, free_bytes=free_bytes), why_not
        except (NoSkeletonError, NoMapError) as error:
            return None, str(error) or why_not

    def sinks(self, loaded: GroupBase) -> PublicationSinks | None:
        """What publishes the merges into a base; None if none of them is published."""
        from merge_gate.engine.merge.publication_sinks import PublicationSinks  # noqa: PLC0415 - few runs publish

        group = loaded.group
        if self.client is None or all(task.publishes is None for task in group.tasks):
            return None
        return PublicationSinks(
            base=loaded.base,
            model_class=loaded.model_class,
            stored=group.files.tensors,
            feed=self.feed,
            connection=self.client,
        )

    def compare(self, loaded: GroupBase, task: Task, request: MergeRequest) -> tuple[Evidence, Comparison]:
        """Merge the task's adapter, and compare each tensor with the finished model's.

        Raises:
            EngineError: the finished model's files changed meanwhile.
        """
        from merge_gate.engine import finished_model  # noqa: PLC0415 - few runs compare

        snapshot, group = task.compares, loaded.group
        assert snapshot is not None and snapshot.base_files is not None  # noqa: S101, PT018 - the caller has looked
        account = self.account(loaded.model_class, group)
        own = finished_model.Files(directory=group.directory, stored=group.files.tensors, feed=self.feed)
        with pinned_directory(snapshot.directory) as directory, LocalFeed(directory, keep=False) as local:
            identity, feed = base_identity(directory), self._feed_of(snapshot) or local
            files = finished_model.Files(
                directory=directory,
                stored=snapshot.base_files.tensors,
                feed=feed,
                is_streamed=feed is not local,
                settings=task.settings,
            )
            compared = finished_model.compared(
                request, files, own, model_class=loaded.model_class, label=snapshot.name, base_map=account.map
            )
            verify_base(directory, snapshot.name, identity)
        return compared

    def _feed_of(self, finished: Snapshot) -> Feed | None:
        """The feed of a finished model that is streamed: the parent has it as a group without tasks."""
        if self.client is None or finished.base_files is None or not finished.base_files.is_streamed:
            return None
        places = (
            position
            for position, group in enumerate(self.job.groups)
            if group.directory == finished.directory and not group.tasks
        )
        position = next(places, None)
        return ParentFeed(self.client, position, is_aside=True) if position is not None else None

    def keep_figures(self, base: Base) -> None:
        """Keep the figures of a base for another class."""
        self._figures |= figures_by_span(base)


def _as_published(base: Base, group: Group) -> Base:
    """A quantized base is published with plain weights, if all merges of the group are published in a named dtype."""
    if group.plain_dtype is None or base.hollow is not None:
        return base
    return bases.dequantized_base(base, group.plain_dtype)


def refuse_stubs(group: Group, model_class: ModelClass, why_not: str) -> None:
    """The weight files of a streamed base are stubs, with headers and without values. Nothing may load them.

    Raises:
        EngineError: the base is streamed.
    """
    if group.files.is_streamed:
        stored, free = gibibytes(group.files.weight_bytes), gibibytes(MemoryGroup().free_bytes() or 0)
        reason = f" ({why_not})" if why_not else ""
        raise EngineError(
            f"base {group.base.name} cannot be streamed: {model_class.class_name} has to be loaded by transformers "
            f"itself{reason}, from {stored} of files, and {free} of memory are free",
            hint=f"set access: download for this base, on a runner whose disk has room for {stored}",
        )
