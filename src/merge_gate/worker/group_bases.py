"""Loads the bases of groups inside the worker: as a skeleton, from a base in memory, or by `from_pretrained`.

In: groups that differ in dtype only, and a class of the model. Out: a `Base` for each. Only this module and child.py
use the engine; both run confined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from merge_gate.errors import EngineError
from merge_gate.files.identity import base_identity
from merge_gate.records.comparison import Comparison
from merge_gate.records.files import FileIdentity, Snapshot
from merge_gate.records.measured import BaseRecord, Evidence
from merge_gate.records.terms import Quantization
from merge_gate.sources.feed import Feed, LocalFeed
from merge_gate.worker.memory import MemoryGroup, gibibytes
from merge_gate.worker.pinned import pinned_directory, verify_base
from merge_gate.worker.protocol import Group, Job, Task
from merge_gate.worker.startup.heap import give_back

if TYPE_CHECKING:
    from merge_gate.engine.adapter_evidence import MergeRequest
    from merge_gate.engine.base.accounting import Account
    from merge_gate.engine.base.loaded_base import Base, ModelClass
    from merge_gate.engine.base.skeleton import FiguresBySpan
    from merge_gate.engine.merge.publication_sinks import PublicationSinks
    from merge_gate.worker.feed_client import FeedClient
    from merge_gate.worker.publish_client import PublishClient


def rounds(groups: Sequence[Group]) -> Iterator[list[int]]:
    """The positions of groups with tasks. Groups of one base come together if it is read in a pass: one for all."""
    left = [position for position, group in enumerate(groups) if group.tasks]
    while left:
        first = groups[left[0]]
        together = [
            position
            for position in left
            if position == left[0] or (first.in_passes and is_same_base(groups[position], first))
        ]
        yield together
        left = [position for position in left if position not in together]


def is_same_base(group: Group, other: Group) -> bool:
    """Whether a group differs from another one in dtype, tasks, and records only."""
    base = replace(group.base, dtype=other.base.dtype)
    return replace(group, base=base, tasks=other.tasks, records=other.records) == other


class MappedBases:
    """The bases that are mapped from the files of a group, for the same base in another dtype."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._bases: dict[ModelClass, tuple[Base, tuple[FileIdentity, ...]]] = {}
        self._accounts: dict[ModelClass, Account] = {}

    def account(self, model_class: ModelClass, group: Group) -> Account:
        """The account of the base as this class, before it is loaded. It is the same for every dtype."""
        from merge_gate.engine.base.accounting import account_for  # noqa: PLC0415 - imports torch

        if model_class not in self._accounts:
            self._accounts[model_class] = account_for(
                group.directory, model_class, group.base.name, group.files.tensors
            )
        return self._accounts[model_class]

    def serves(self, group: Group) -> bool:
        """Whether the group differs from this one in dtype, tasks, and records only."""
        return is_same_base(group, self._group)

    def add(self, model_class: ModelClass, base: Base, identity: tuple[FileIdentity, ...]) -> None:
        """Remember a base if it is mapped: another one takes memory."""
        from merge_gate.engine.base.other_dtype import is_mapped  # noqa: PLC0415 - imports torch

        if base.hollow is None and is_mapped(base):
            self._bases[model_class] = base, identity

    def cast(self, model_class: ModelClass, group: Group, identity: tuple[FileIdentity, ...], job: Job) -> Base | None:
        """One of them in the dtype of this group. None if the base has to be loaded."""
        from merge_gate.engine.base.other_dtype import in_another_dtype, is_mapped_otherwise  # noqa: PLC0415 - imports torch

        is_plain = not group.base.is_quantized and job.device == "cpu"
        if (
            is_plain
            and model_class not in self._bases
            and is_mapped_otherwise(group.directory, model_class, group.base.dtype)
        ):
            self.add(model_class, _load(_in_dtype(group, "auto"), model_class, job), identity)
        base, found = self._bases.get(model_class, (None, ()))
        if base is None or found != identity:
            return None
        return in_another_dtype(base, model_class, group.directory, group.base.dtype)


def _in_dtype(group: Group, dtype: str) -> Group:
    return replace(group, base=replace(group.base, dtype=dtype))


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
        return self.base.feed is not None

    def record(self) -> BaseRecord | None:
        """The figures of a base that was read whole, if the group keeps them and has none of this class."""
        if not self.group.keeps_record or self.model_class.label in {one.model_class for one in self.group.records}:
            return None
        return self.base.record(self.model_class)


@dataclass(slots=True, kw_only=True)
class GroupBases:
    """Loads bases from the files of one directory, which `feed` reads.

    It keeps the last one that takes memory, for the next class, and the figures of tensors of skeletons. So no other
    code may keep such a base. `connection` takes the merged models that are published.
    """

    job: Job
    mapped: MappedBases
    feed: Feed
    """Shared by all skeletons, so that they are filled in one pass."""
    connection: PublishClient | None = None
    client: FeedClient | None = None
    _held: GroupBase | None = None
    _identity: tuple[FileIdentity, ...] = ()
    _figures: FiguresBySpan = field(default_factory=dict)

    def __post_init__(self) -> None:
        from merge_gate.engine.base.shared_reads import SharedReads  # noqa: PLC0415 - imports torch

        self.feed = SharedReads(self.feed)

    def load(self, position: int, group: Group, model_class: ModelClass, account: Account) -> GroupBase:
        """Load the base as this class: from the class before, if that is possible."""
        held, self._held = self._held, None
        base = _in_another_class(held.base, model_class) if held is not None and held.position == position else None
        del held  # a base that is not needed is released before the next one is loaded
        if base is None:
            before, self._identity = self._identity, base_identity(group.directory)
            if before != self._identity:
                self._figures.clear()
            base = _as_published(self._read(group, model_class), group)
        verify_base(group.directory, group.base.name, self._identity)
        _settle(base, account, group.directory)
        record = next((one for one in group.records if one.model_class == model_class.label), None)
        if record is not None and base.feed is not None:
            base.adopt(record)
        self.mapped.add(model_class, base, self._identity)
        loaded = GroupBase(position=position, group=group, model_class=model_class, base=base, identity=self._identity)
        self._held = None if loaded.is_skeleton else loaded
        return loaded

    def _read(self, group: Group, model_class: ModelClass) -> Base:
        base, why_not = _skeleton(group, model_class, self.job, self.feed)
        if base is not None:
            _reuse(base, self._figures)
            return base
        if group.fed and (group.base.is_quantized or group.files.is_streamed):
            base, why_not = _from_feed(group, model_class, self.job, self.feed, why_not)
        base = base or self.mapped.cast(model_class, group, self._identity, self.job)
        base = base or _load(group, model_class, self.job, why_not)
        base.facts = replace(base.facts, no_skeleton=why_not.replace(group.directory, group.base.name))
        return base

    def sinks(self, loaded: GroupBase) -> PublicationSinks | None:
        """What publishes the merges into a base; None if none of them is published."""
        from merge_gate.engine.merge.publication_sinks import PublicationSinks  # noqa: PLC0415 - imports torch

        group = loaded.group
        if self.connection is None or all(task.publishes is None for task in group.tasks):
            return None
        return PublicationSinks(
            base=loaded.base,
            model_class=loaded.model_class,
            stored=group.files.tensors,
            feed=self.feed,
            connection=self.connection,
        )

    def compare(self, loaded: GroupBase, task: Task, request: MergeRequest) -> tuple[Evidence, Comparison]:
        """Merge the task's adapter, and compare each tensor with the finished model's.

        Raises:
            EngineError: the finished model's files changed meanwhile.
        """
        from merge_gate.engine import finished_model  # noqa: PLC0415 - imports torch and PEFT

        snapshot, group = task.compares, loaded.group
        assert snapshot is not None and snapshot.base_files is not None  # noqa: S101, PT018 - the caller has looked
        account = self.mapped.account(loaded.model_class, group)
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
        return self.client.open_aside(position) if position is not None else None

    def keep_figures(self, base: Base) -> None:
        """Keep the figures of a skeleton for another class."""
        from merge_gate.engine.base.skeleton import figures_by_span  # noqa: PLC0415 - imports torch

        self._figures |= figures_by_span(base)


def _settle(base: Base, account: Account, directory: str) -> None:
    from merge_gate.engine.base import accounting  # noqa: PLC0415 - imports torch

    accounting.settle(base, account, directory)


def _skeleton(group: Group, model_class: ModelClass, job: Job, feed: Feed) -> tuple[Base | None, str]:
    """A base without memory, if its files must not be mapped, or are larger than the memory; or why it is none."""
    from merge_gate.engine.base import loaded_base as bases  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.tensor_map import NoMapError  # noqa: PLC0415 - imports torch

    if not group.fed and not (group.one_pass and job.device == "cpu"):
        return None, ""
    source = bases.source_of(group.directory, **_how_to_load(group, job))
    try:
        return skeleton_of(source, model_class, group.files.tensors, feed), ""
    except (NoSkeletonError, NoMapError) as error:
        return None, str(error) or type(error).__name__


def _from_feed(group: Group, model_class: ModelClass, job: Job, feed: Feed, why_not: str) -> tuple[Base | None, str]:
    """A base in memory, which no file is mapped for. None if only `from_pretrained` itself can load it, and why."""
    from merge_gate.engine.base import loaded_base as bases  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.load_from_feed import load_from_feed  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.skeleton import NoSkeletonError  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.tensor_map import NoMapError  # noqa: PLC0415 - imports torch

    give_back()
    source = bases.source_of(group.directory, **_how_to_load(group, job))
    free_bytes = MemoryGroup().free_bytes()
    try:
        return load_from_feed(source, model_class, group.files.tensors, feed, free_bytes=free_bytes), why_not
    except (NoSkeletonError, NoMapError) as error:
        return None, str(error) or why_not


def _reuse(base: Base, figures: FiguresBySpan) -> None:
    from merge_gate.engine.base.skeleton import reuse_figures  # noqa: PLC0415 - imports torch

    reuse_figures(base, figures)


def _load(group: Group, model_class: ModelClass, job: Job, why_not: str = "") -> Base:
    """By `from_pretrained`. `why_not` says why the base is not filled from a feed."""
    from merge_gate.engine.base import loaded_base as bases  # noqa: PLC0415 - imports torch

    _refuse_stubs(group, model_class, why_not)
    give_back()
    return bases.load_base(group.directory, model_class=model_class, **_how_to_load(group, job))


def _how_to_load(group: Group, job: Job) -> dict[str, Any]:
    return {
        "label": group.base.name,
        "revision": group.base.revision,
        "dtype": group.base.dtype,
        "quantization": Quantization(group.base.quantization),
        "device": job.device,
        "trust_remote_code": job.trust_remote_code,
        "allow_pickle": job.allow_pickle,
    }


def _as_published(base: Base, group: Group) -> Base:
    """A quantized base is published with plain weights, if all merges of the group are published in a named dtype."""
    from merge_gate.engine.base import loaded_base as bases  # noqa: PLC0415 - imports torch

    if group.plain_dtype is None or base.hollow is not None:
        return base
    return bases.dequantized_base(base, group.plain_dtype)


def _refuse_stubs(group: Group, model_class: ModelClass, why_not: str) -> None:
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


def _in_another_class(base: Base, model_class: ModelClass) -> Base | None:
    from merge_gate.engine.base import other_class  # noqa: PLC0415 - imports torch

    return other_class.in_another_class(base, model_class)
