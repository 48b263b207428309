"""Loads the base of a group inside the worker, as a skeleton or by `from_pretrained`.

In: a group, and the feed of its base's files. Out: the loaded base, with what its files lack. It runs confined.
Importing it imports torch and PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.engine.adapter.peft_config import pickled_headers
from merge_gate.engine.base import accounting, loaded_base
from merge_gate.engine.base.accounting import Account
from merge_gate.engine.base.load_from_feed import load_from_feed
from merge_gate.engine.base.loaded_base import Base, ModelClass, Source
from merge_gate.engine.base.skeleton import FiguresBySpan, NoSkeletonError, figures_by_span, skeleton_of
from merge_gate.engine.base.stored_spans import SharedReads
from merge_gate.engine.consumer import Consumer
from merge_gate.files.feed import Feed
from merge_gate.files.identity import base_identity
from merge_gate.records.files import FileIdentity
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import Refused
from merge_gate.records.terms import Quantization
from merge_gate.worker.memory import MemoryGroup, give_back
from merge_gate.worker.pinned import verify_base
from merge_gate.worker.protocol import Group, Job, Listener, PickleListed, Task

if TYPE_CHECKING:
    from merge_gate.worker.call_client import CallClient

ClassedTask = tuple[Task, str | None]
"""A task, and the class that its adapter asks for if it is loaded as another one."""


@dataclass(slots=True, kw_only=True)
class GroupBase:
    """The tasks of a group that need its base as one class.

    While the base is loaded, it is here, with the identity of its files before that, the `consumers` of tasks in
    progress, and what these `kept` of the base. `is_measured`: its facts were sent.
    """

    position: int
    group: Group
    model_class: ModelClass
    tasks: list[ClassedTask] = field(default_factory=list)
    loaded: Base | None = None
    identity: tuple[FileIdentity, ...] = ()
    consumers: dict[int, tuple[Consumer, ...]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    is_measured: bool = False

    @property
    def base(self) -> Base:
        assert self.loaded is not None  # noqa: S101 - it is asked for between its load and its last task
        return self.loaded

    @property
    def is_skeleton(self) -> bool:
        """Whether it takes no memory, and is read in a pass."""
        return self.group.in_passes and self.base.feed is not None

    def close(self, task: int) -> None:
        """Nothing of this merge of the task counts."""
        for consumer in self.consumers.pop(task, ()):
            consumer.close()

    def finish(self, task: int, evidence: Evidence) -> None:
        """The evidence of the task is sent next."""
        for consumer in self.consumers.pop(task, ()):
            consumer.finish(evidence)

    def release(self) -> None:
        """Release its memory for the next class."""
        for task in list(self.consumers):
            self.close(task)
        self.base.template = self.loaded = None
        self.kept.clear()


class GroupBases:
    """Loads bases from the files of one directory, which `feed` reads: all skeletons are filled in one pass.

    It keeps the figures of tensors for the next class. `report` gets events of a merge. `client` calls the parent.
    """

    def __init__(self, job: Job, feed: Feed, report: Listener, client: CallClient | None = None) -> None:
        self.job, self.feed, self.report, self.client = job, SharedReads(feed), report, client
        self._accounts: dict[ModelClass, Account] = {}
        self._identity: tuple[FileIdentity, ...] = ()
        self._figures: FiguresBySpan = {}

    def account(self, load: GroupBase) -> Account:
        """The account of the base as this class, before it is loaded. It is the same for every dtype."""
        if load.model_class not in self._accounts:
            label, stored = load.group.base.name, load.group.files.tensors
            self._accounts[load.model_class] = accounting.account_for(
                load.group.directory, load.model_class, label, stored
            )
        return self._accounts[load.model_class]

    def load(self, load: GroupBase, account: Account) -> None:
        """Load the base as this class."""
        group = load.group
        before, self._identity = self._identity, base_identity(group.directory)
        if before != self._identity:
            self._figures = {}
        self.feed.open_files(group.files.weights)  # before the identity is verified
        base = self._read(group, load.model_class)
        if group.plain_dtype is not None and base.lazy is None:
            base = loaded_base.dequantized_base(base, group.plain_dtype)
        load.loaded, load.identity = base, self._identity
        verify_base(group.directory, group.base.name, self._identity)
        accounting.add_file_facts(load.base, account, group.directory)

    def _read(self, group: Group, model_class: ModelClass) -> Base:
        source = Source(
            directory=group.directory,
            label=group.base.name,
            revision=group.base.revision,
            dtype=group.base.dtype,
            quantization=Quantization(group.base.quantization),
            device=self.job.device,
            trust_remote_code=self.job.trust_remote_code,
            allow_pickle=self.job.allow_pickle,
        )
        base, why_not = None, ""
        if group.fed or self.job.device == "cpu":  # a card gets a skeleton only if the parent reads the files
            try:
                is_mapped = not group.in_passes
                base = skeleton_of(
                    source, model_class, group.files.tensors, self.feed, is_mapped=is_mapped, known=self._figures
                )
            except NoSkeletonError as error:
                why_not = str(error)
        if base is None and group.fed and (group.base.is_quantized or group.files.is_streamed):
            give_back()
            try:
                base = load_from_feed(
                    source, model_class, group.files, self.feed, free_bytes=MemoryGroup().free_bytes()
                )
            except NoSkeletonError as error:
                why_not = str(error)
        if base is None:
            give_back()
            base = loaded_base.load_base(source, model_class)
        if group.in_passes:
            base.facts = replace(base.facts, no_skeleton=why_not.replace(group.directory, group.base.name))
        return base

    def keep_figures(self, base: Base) -> None:
        """Keep the figures of a base for another class."""
        self._figures = {**self._figures, **figures_by_span(base)}


def listed_pickle(path: str) -> PickleListed:
    """The tensors of a pickled file, as torch's restricted unpickler reads them."""
    try:
        return PickleListed(tensors=pickled_headers(Path(path)))
    except Refused as error:
        return PickleListed(refusal=error.refusal)
