"""Loads the bases of groups inside the worker, as a skeleton or by `from_pretrained`, and merges the groups' tasks.

In: groups that differ in dtype only. Out: events. It runs confined, and of worker/ only this module calls the engine.
Importing it imports torch and PEFT.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter.peft_config import pickled_headers
from merge_gate.engine.adapter_evidence import MergeRequest
from merge_gate.engine.base import accounting, loaded_base
from merge_gate.engine.base.accounting import Account
from merge_gate.engine.base.loaded_base import Base, ModelClass, Source
from merge_gate.engine.base.model_class import model_class_for, read_config
from merge_gate.engine.base.skeleton import FiguresBySpan, NoSkeletonError, figures_by_span, skeleton_of
from merge_gate.engine.base.stored_spans import SharedReads
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.tensors.placement import compute_in_full_precision, confirm_card
from merge_gate.files.feed import Feed
from merge_gate.files.identity import base_identity
from merge_gate.records.features import FEATURES, part
from merge_gate.records.files import FileIdentity, Pattern
from merge_gate.records.measured import BaseFigures, Evidence
from merge_gate.records.refusals import Refused
from merge_gate.records.terms import Quantization
from merge_gate.worker.memory import MemoryGroup, give_back
from merge_gate.worker.pinned import pinned_adapter, verify_base
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseLoading,
    BaseMeasured,
    Event,
    Group,
    Job,
    Listener,
    Merged,
    MergeProgressed,
    MergeStarted,
    PickleListed,
    Task,
    Unjudged,
    undecided,
)

if TYPE_CHECKING:
    from merge_gate.worker.call_client import CallClient

ClassedTask = tuple[Task, str | None]
"""A task, and the class that its adapter asks for if it is loaded as another one."""

TRIAL_TIMEOUT_S = 10.0
"""CPU seconds for all expressions of one adapter. A normal expression takes microseconds for each name."""

PROGRESS_S = 0.1
"""The least time between two events of progress: showing one takes time from a core that merges."""


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

    def new_figures(self) -> BaseFigures | None:
        """The figures of a base that was read whole, if the group keeps them and has none of this class."""
        known = {figures.model_class for figures in self.group.earlier_figures}
        if not self.group.keeps_figures or self.model_class.label in known:
            return None
        return self.base.new_figures(self.model_class)


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
        earlier = next((known for known in group.earlier_figures if known.model_class == load.model_class.label), None)
        if earlier is not None and load.is_skeleton:
            load.base.use_earlier_figures(earlier)

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
                base = part("stream", "load").load_from_feed(
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


# --- the groups' tasks -----------------------------------------------------------------------------------------------


def judge_pinned(groups: dict[int, Group], bases: GroupBases) -> Iterator[Event]:
    """Load the base of these groups once for each class, and merge each task into it."""
    compute_in_full_precision()
    to_load, unknown = _by_class(groups, bases.job)
    yield from unknown
    announced = next(iter(groups)) if not unknown else None
    skeletons: list[GroupBase] = []
    for load in to_load:
        if announced != load.position:
            yield BaseLoading(group=load.position)
        announced = None
        started = time.perf_counter()
        try:
            account = bases.account(load)
            refused = _refused_as_incomplete(load, account)
            yield from refused
            indices = {event.task for event in refused}
            load.tasks = [classed for classed in load.tasks if classed[0].index not in indices]
            if not load.tasks:
                continue
            bases.load(load, account)
        except Exception as error:
            confirm_card(bases.job.device)
            load.loaded = None
            yield from undecided((task for task, _ in load.tasks), error, load.group)
            continue
        yield from _announced(load, time.perf_counter() - started)
        if not load.is_skeleton:
            yield from _judge_tasks([load], bases)
        elif skeletons and not part("stream", "passes").fit([*skeletons, load]):
            yield from _judge_tasks(skeletons, bases)
            skeletons = [load]
        else:
            skeletons.append(load)
    if skeletons:
        yield from _judge_tasks(skeletons, bases)


def _by_class(groups: dict[int, Group], job: Job) -> tuple[list[GroupBase], list[Unjudged]]:
    """The loads that the groups need, and the tasks whose class is not known."""
    group_bases: dict[tuple[int, ModelClass], GroupBase] = {}
    unknown: list[Unjudged] = []
    for position, group in groups.items():
        config = None  # read once: it takes 1.6 ms
        for task in group.tasks:
            try:
                config = config or read_config(group.directory, trust_remote_code=job.trust_remote_code)
                model_class = model_class_for(
                    group.directory,
                    task.files[0],
                    group.files.tensors,
                    trust_remote_code=job.trust_remote_code,
                    config=config,
                )
            except Exception as error:
                unknown += undecided([task], error, group)
                continue
            load = GroupBase(position=position, group=group, model_class=model_class)
            group_bases.setdefault((position, model_class), load).tasks.append((task, model_class.instead_of))
    return list(group_bases.values()), unknown


def _refused_as_incomplete(load: GroupBase, account: Account) -> list[Unjudged]:
    """The tasks whose adapters lack the parameters that the base's files lack."""
    if not account.incomplete or account.map is None:
        return []
    lacking = [task for task, _ in load.tasks if not accounting.brings_all(task.files, account.incomplete)]
    fact = accounting.not_stored(load.group.base.name, account.incomplete, account.map, load.group.directory)
    return [Unjudged(task=task.index, refusal=fact) for task in lacking]


def _announced(load: GroupBase, seconds: float) -> Iterator[Event]:
    task, load.is_measured = load.tasks[0][0].index, not load.base.unmeasured()
    yield BaseLoaded(
        group=load.position,
        task=task,
        facts=load.base.facts,
        identity=load.identity,
        measured=load.is_measured,
        seconds=seconds,
    )
    if load.is_measured and (figures := load.new_figures()) is not None:
        yield BaseMeasured(group=load.position, task=task, facts=load.base.facts, figures=figures)


def _judge_tasks(loaded: list[GroupBase], bases: GroupBases) -> Iterator[Event]:
    """Merge the adapters of these bases, and send the facts of a base ahead of its first evidence.

    No other code may keep a base that takes memory, so that it is released before the next load.
    """
    base_of = {task.index: load for load in loaded for task, _ in load.tasks}
    tasks = [classed for load in loaded for classed in load.tasks]
    batches, judge = [[load] for load in sorted(tasks, key=lambda classed: classed[0].turn)], judge_each
    if loaded[0].group.in_passes:
        batches, judge = list(part("stream", "batches").batches(tasks)), part("stream", "passes").judge_batch
    for batch in batches:
        for load in loaded:
            load.base.weights.keeps &= batch is not batches[-1]
        for event in judge(batch, base_of, bases):
            confirm_card(bases.job.device)
            if isinstance(event, Merged) and not (load := base_of[event.task]).is_measured:
                load.is_measured = True
                yield BaseMeasured(
                    group=load.position, task=event.task, facts=load.base.facts, figures=load.new_figures()
                )
            yield event
    for load in loaded:
        bases.keep_figures(load.base)
        load.release()


def judge_each(batch: list[ClassedTask], base_of: dict[int, GroupBase], bases: GroupBases) -> Iterator[Event]:
    """Merge these tasks one after another."""
    for task, instead_of in batch:
        yield MergeStarted(task=task.index)
        yield _judge_task(task, instead_of, base_of[task.index], bases)


def request_of(
    task: Task, load: GroupBase, pinned: contextlib.ExitStack, progress: Callable[[int, int, str], None]
) -> MergeRequest:
    """The task on the files that were hashed, once its regular expressions have been tried on the base's names."""
    files = tuple(pinned.enter_context(pinned_adapter(member)) for member in task.files)
    names = [name for name, _ in load.base.model.named_modules()]
    for member in files:
        try_patterns(member.config.patterns, names)
    return MergeRequest(
        base=load.base,
        members=files,
        combine=task.combine,
        measure_options=task.measure_options,
        progress=progress,
        free_bytes=MemoryGroup().left_bytes(),
        no_forward=task.why_not("forward") or "",
    )


def with_consumers(
    request: MergeRequest, task: Task, load: GroupBase, bases: GroupBases, pinned: contextlib.ExitStack
) -> MergeRequest:
    """The request with the consumers that the task asks for, in the place of those of an earlier merge."""
    load.close(task.index)
    for asked in task.consumers:
        if asked.why_not or asked.feature not in FEATURES:
            continue
        consumer = part(asked.feature, "consumer").consumer(asked.settings, task, load, bases, pinned)
        if consumer is not None:
            load.consumers[task.index] = (*load.consumers.get(task.index, ()), consumer)
    return replace(request, consumers=load.consumers.get(task.index, ()))


def paced(progress: Listener, task: int) -> Callable[[int, int, str], None]:
    """Report the progress of a merge, but not every module of it."""
    next_s = 0.0

    def report(done: int, total: int, module: str) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            progress(MergeProgressed(task=task, done=done, total=total, module=module))
            next_s = time.monotonic() + PROGRESS_S

    return report


def _judge_task(task: Task, instead_of: str | None, load: GroupBase, bases: GroupBases) -> Event:
    try:
        with contextlib.ExitStack() as pinned:
            try:
                request = request_of(task, load, pinned, paced(bases.report, task.index))
            except Refused as refused:  # by the trial of its regular expressions, before PEFT
                adapter_evidence.measure_wholly(load.base)
                kind, facts = task.files[0].config.peft_type, load.base.facts
                evidence = Evidence(
                    base=facts, peft_type=kind, refusal=refused.refusal, parameters_total=facts.parameters
                )
            else:
                evidence = adapter_evidence.merge(with_consumers(request, task, load, bases, pinned))
        load.finish(task.index, evidence)
    except Exception as error:
        load.close(task.index)
        (event,) = undecided([task], error)
        return event
    return Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))


# --- regular expressions ----------------------------------------------------------------------------------------------


class _TimeOverError(Exception):
    """The CPU time is used up."""


def try_patterns(patterns: Sequence[Pattern], names: Sequence[str], timeout_s: float = TRIAL_TIMEOUT_S) -> None:
    """Match every expression of a config against every name of a base's modules, before PEFT does without a limit.

    It must run in the main thread: the limit is a signal, which interrupts Python's matcher.

    Raises:
        Refused: an expression is invalid, or matching takes longer than `timeout_s`.
    """
    current = None
    try:
        with _limited(timeout_s):
            for current in patterns:
                expression = re.compile(current.expression)
                for name in names:
                    expression.match(name)
                    expression.fullmatch(name)
    except _TimeOverError:
        raise Refused("pattern_refused", pattern=current, names=len(names), seconds=timeout_s) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise Refused(
            "pattern_refused", pattern=current, names=len(names), seconds=timeout_s, problem=str(error)
        ) from None


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def on_alarm(_number: int, _frame: object) -> NoReturn:
        raise _TimeOverError

    before = signal.signal(signal.SIGVTALRM, on_alarm)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
