"""The worker process from inside: loads bases, merges adapters, and sends the measurements.

In: a `Job` from the channel. Out: events. process.py starts it as an interpreter of its own. Only this module, the
engine, and the demo import torch, transformers, and PEFT.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.errors import EngineError, Refused, Undecidable
from merge_gate.files.identity import base_bytes, base_identity
from merge_gate.records.files import FileIdentity
from merge_gate.records.measured import BaseRecord, Evidence
from merge_gate.records.refusals import BaseRaised, Caught, NotJudged, Refusal, WorkerRaised
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import Quantization
from merge_gate.sources.feed import Feed, LocalFeed, SourceError
from merge_gate.worker.channel import Channel
from merge_gate.worker.confine.sandbox import confine, limit
from merge_gate.worker.device import cpu_name
from merge_gate.worker.feed_client import FeedClient
from merge_gate.worker.memory import MemoryGroup, gibibytes
from merge_gate.worker.pinned import pinned_adapter, pinned_directory, verify_base
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseLoading,
    BaseMeasured,
    DeviceChosen,
    Event,
    Finished,
    Group,
    InProgress,
    Job,
    Listener,
    Merged,
    MergeProgressed,
    MergeStarted,
    Task,
    Undecided,
)
from merge_gate.worker.publish_client import PublishClient
from merge_gate.worker.regex_trial import try_patterns
from merge_gate.worker.startup.heap import give_back
from merge_gate.worker.startup.quick_imports import quick_imports

if TYPE_CHECKING:
    from merge_gate.engine.adapter_evidence import MergeRequest
    from merge_gate.engine.base.accounting import Account
    from merge_gate.engine.base.loaded_base import Base, ModelClass
    from merge_gate.engine.base.skeleton import FiguresBySpan

ClassedTask = tuple[Task, str | None]
"""A task, and the class that its adapter asks for if it is loaded as another one."""

ADAPTERS_SHARE = 3
"""Adapters that are merged together may take a third of the free memory."""

_LOADED_BYTES = 4
"""What PEFT's float32 factors take of memory, for each value. The file's own tensors are mapped."""

PROGRESS_S = 0.1
"""The least time between two events of progress: showing one takes time from a core that merges."""


def main(descriptor: int, feed_descriptor: int, publish_descriptor: int) -> None:
    """Entry point of the process: confine itself, import, read a job, send events, exit with 0."""
    channel = Channel(socket.socket(fileno=descriptor))
    sandbox = confine(Path.cwd())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    gc.disable()  # collections while importing find nothing and take a fifth of the time
    for imports in (quick_imports(), contextlib.nullcontext()):  # if the quick way fails, import as usual
        with contextlib.suppress(Exception), imports:  # the task that needs it reports what cannot be imported
            import merge_gate.engine.adapter_evidence  # noqa: F401, PLC0415

            break
    gc.freeze()
    gc.enable()
    try:
        job = channel.receive(None)
    except (EOFError, OSError):
        os._exit(0)  # there is nothing to merge
    assert isinstance(job, Job)  # noqa: S101 - the parent is ours
    _forget_output()
    threading.Thread(target=_leave_with_parent, args=(channel,), daemon=True).start()
    feed = FeedClient(socket.socket(fileno=feed_descriptor))
    connection = PublishClient(socket.socket(fileno=publish_descriptor))
    for event in judge_job(job, channel.send, sandbox, feed, connection):
        channel.send(event)
    channel.send(Finished())
    channel.close()
    sys.stdout.flush()
    os._exit(0)  # libraries' exit handlers have nothing to add, and take seconds


def _forget_output() -> None:
    """Discard what libraries printed while they were imported: it does not tell how this process ends."""
    with contextlib.suppress(OSError):  # the output is not a file
        os.ftruncate(sys.stdout.fileno(), 0)
        os.lseek(sys.stdout.fileno(), 0, os.SEEK_SET)


def _leave_with_parent(channel: Channel) -> None:
    """Exit when the parent does. It sends nothing after the job, so anything that arrives is its end."""
    with contextlib.suppress(OSError):
        channel.wait_for_end()
    os._exit(1)


def judge_job(
    job: Job,
    progress: Listener,
    sandbox: Sandbox,
    feed: FeedClient | None = None,
    connection: PublishClient | None = None,
) -> Iterator[Event]:
    """Load each base once for each class, and merge each task. An exception costs its own task only.

    `feed` gets the bytes of bases that the parent reads. Merged models that are published go out by `connection`.
    """
    del connection  # no task is published yet
    try:
        chosen = _choose_device(job.device)
    except (EngineError, ImportError, OSError) as error:  # torch itself may fail to import
        for group in job.groups:
            for task in group.tasks:
                yield Undecided(task=task.index, refusal=_refusal(error))
        return
    yield replace(chosen, sandbox=limit(sandbox, job, chosen.device))
    job = replace(job, device=chosen.device)
    mapped: MappedBases | None = None
    for position, group in enumerate(job.groups):
        if group.tasks:
            mapped = mapped if mapped is not None and mapped.serves(group) else MappedBases(group)
            yield from _judge_group(position, group, job, progress, mapped, feed=feed)


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
            self._accounts[model_class] = account_for(group.directory, model_class, group.base.name, group.files)
        return self._accounts[model_class]

    def serves(self, group: Group) -> bool:
        """Whether the group differs from this one in dtype, tasks, and records only."""
        own = self._group
        base = replace(group.base, dtype=own.base.dtype)
        return replace(group, base=base, tasks=own.tasks, records=own.records) == own

    def add(self, model_class: ModelClass, base: Base, identity: tuple[FileIdentity, ...]) -> None:
        from merge_gate.engine.base.other_dtype import is_mapped  # noqa: PLC0415 - imports torch

        if base.hollow is None and is_mapped(base):  # a base that is not mapped takes memory
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


def _choose_device(wanted: str) -> DeviceChosen:
    import torch  # noqa: PLC0415 - the child's side only

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        if not torch.cuda.is_available():
            raise EngineError(
                f"device {wanted} was asked for, but torch {torch.__version__} sees no CUDA device here",
                hint="use --device cpu, or run where the GPU is visible (driver, container runtime, torch for CUDA)",
            )
        count = torch.cuda.device_count()
        index = int(wanted.partition(":")[2] or 0)
        if index >= count:
            raise EngineError(
                f"device {wanted} was asked for, but there are only {count} CUDA devices (cuda:0 is first)"
            )
        return DeviceChosen(device=wanted, device_name=torch.cuda.get_device_name(index))
    return DeviceChosen(device="cpu", device_name=cpu_name())


def _judge_group(
    position: int, group: Group, job: Job, progress: Listener, mapped: MappedBases, *, feed: FeedClient | None = None
) -> Iterator[Event]:
    yield BaseLoading(group=position)  # from the first file on, the time limit is that of the base
    try:
        with pinned_directory(group.directory) as directory, LocalFeed(directory, keep=False) as local:
            source = feed.open(position) if group.fed and feed is not None else local
            bases = _Bases(group=replace(group, directory=directory), job=job, mapped=mapped, feed=source)
            yield from _judge_pinned(position, bases.group, job, progress, bases)
    except (OSError, SourceError) as error:
        yield from (Undecided(task=task.index, refusal=_refusal(error)) for task in group.tasks)


@dataclass(slots=True, kw_only=True)
class _Bases:
    """The bases of a group, one class at a time. `feed` has the bytes of their files, which are those of `identity`."""

    group: Group
    job: Job
    mapped: MappedBases
    feed: Feed
    base: Base | None = None
    model_class: ModelClass | None = None
    identity: tuple[FileIdentity, ...] = ()

    def load(self, model_class: ModelClass, account: Account) -> None:
        """Make `base` this class: of the base in the class before, if that is possible."""
        group, held, self.base = self.group, self.base, None
        base = _in_another_class(held, model_class)
        figures = _figures(held)
        del held  # a base that is not needed is released before the next one is loaded
        if base is None:
            before, self.identity = self.identity, base_identity(group.directory)
            base = _skeleton(group, model_class, self.job, self.feed)
            if base is not None and before == self.identity:
                _reuse(base, figures)
            base = base or self.mapped.cast(model_class, group, self.identity, self.job)
            base = base or _load(group, model_class, self.job)
        verify_base(group.directory, group.base.name, self.identity)
        _settle(base, account, group.directory)
        record = next((one for one in group.records if one.model_class == model_class.label), None)
        if record is not None and base.feed is not None:
            base.adopt(record)
        self.mapped.add(model_class, base, self.identity)
        self.base, self.model_class = base, model_class

    def record(self) -> BaseRecord | None:
        """The figures of a base that was read whole, if the group keeps them and has none of this class."""
        known = {one.model_class for one in self.group.records}
        if not self.group.keeps_record or self.base is None or self.model_class is None:
            return None
        if self.model_class.label in known:
            return None
        return self.base.record(self.model_class)


def _judge_pinned(position: int, group: Group, job: Job, progress: Listener, bases: _Bases) -> Iterator[Event]:
    from merge_gate.engine.base.model_class import model_class_for  # noqa: PLC0415 - as above

    is_announced = True
    by_class: dict[ModelClass, list[ClassedTask]] = {}
    for task in group.tasks:
        try:
            model_class = model_class_for(group.directory, task.files[0], trust_remote_code=job.trust_remote_code)
        except Exception as error:
            is_announced = False
            yield Undecided(task=task.index, refusal=_refusal(error, group))
        else:
            by_class.setdefault(model_class, []).append((task, model_class.instead_of))
    for model_class, tasks in by_class.items():
        if not is_announced:
            yield BaseLoading(group=position)
        is_announced = False
        started = time.perf_counter()
        try:
            account = bases.mapped.account(model_class, group)
            refused = _refused_as_incomplete(tasks, account, group)
            yield from (Undecided(task=task.index, refusal=refusal) for task, refusal in refused)
            tasks = [one for one in tasks if one[0] not in {task for task, _ in refused}]  # noqa: PLW2901 - those left
            if not tasks:
                continue
            bases.load(model_class, account)
        except Exception as error:
            yield from (Undecided(task=task.index, refusal=_refusal(error, group)) for task, _ in tasks)
            continue
        seconds = time.perf_counter() - started
        yield from _judge_tasks(position, bases, tasks, progress, seconds)


def _judge_tasks(
    position: int, bases: _Bases, tasks: list[ClassedTask], progress: Listener, seconds: float
) -> Iterator[Event]:
    """Merge the adapters of one class. No other code holds the base, so that it is released before the next load."""
    base = bases.base
    assert base is not None  # noqa: S101 - it was just loaded
    loaded = BaseLoaded(
        group=position,
        task=tasks[0][0].index,
        facts=base.facts,
        identity=bases.identity,
        measured=not base.unmeasured(),
        seconds=seconds,
    )
    yield loaded
    if loaded.measured and (record := bases.record()) is not None:
        yield BaseMeasured(group=position, task=loaded.task, facts=base.facts, record=record)
    batches = _batches(tasks, one_pass=bases.group.one_pass)
    merged = (event for batch in batches for event in _judge_batch(base, batch, progress))
    yield from merged if loaded.measured else _with_facts(position, bases, base, merged)
    base.template = None  # release its memory for the next class


def _with_facts(position: int, bases: _Bases, base: Base, events: Iterator[Event]) -> Iterator[Event]:
    """The events, and the facts of a base that was measured meanwhile, ahead of the first adapter's evidence."""
    for event in events:
        if isinstance(event, Merged):
            yield BaseMeasured(group=position, task=event.task, facts=base.facts, record=bases.record())
            yield event
            break
        yield event
    yield from events


def _refused_as_incomplete(tasks: list[ClassedTask], account: Account, group: Group) -> list[tuple[Task, Refusal]]:
    """The tasks whose adapters lack the parameters that the base's files lack."""
    from merge_gate.engine.base import accounting  # noqa: PLC0415 - imports torch

    if not account.incomplete or account.map is None:
        return []
    lacking = [task for task, _ in tasks if not accounting.brings_all(task.files, account.incomplete)]
    fact = accounting.not_stored(group.base.name, account.incomplete, account.map, group.directory)
    return [(task, fact) for task in lacking]


def _settle(base: Base, account: Account, directory: str) -> None:
    from merge_gate.engine.base import accounting  # noqa: PLC0415 - imports torch

    accounting.settle(base, account, directory)


def _skeleton(group: Group, model_class: ModelClass, job: Job, feed: Feed) -> Base | None:
    """A base without memory, if its files must not be mapped, or are larger than the memory. None if it is loaded."""
    from merge_gate.engine.base import loaded_base as bases  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of  # noqa: PLC0415 - imports torch
    from merge_gate.engine.base.tensor_map import NoMapError, stored_tensors  # noqa: PLC0415 - imports torch

    if not group.fed and not (group.one_pass and job.device == "cpu"):
        return None
    source = bases.source_of(group.directory, **_how_to_load(group, job))
    try:
        stored = group.files.tensors if group.files is not None else ()
        return skeleton_of(source, model_class, stored or stored_tensors(group.directory), feed)
    except (NoSkeletonError, NoMapError):
        return None


def _figures(base: Base | None) -> FiguresBySpan:
    """What is known of the files' tensors, if the base has no memory; {} otherwise."""
    from merge_gate.engine.base.skeleton import figures_by_span  # noqa: PLC0415 - imports torch

    return figures_by_span(base) if base is not None else {}


def _reuse(base: Base, figures: FiguresBySpan) -> None:
    from merge_gate.engine.base.skeleton import reuse_figures  # noqa: PLC0415 - imports torch

    reuse_figures(base, figures)


def _load(group: Group, model_class: ModelClass, job: Job) -> Base:
    from merge_gate.engine.base import loaded_base as bases  # noqa: PLC0415 - imports torch

    _refuse_stubs(group, model_class)
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


def _refuse_stubs(group: Group, model_class: ModelClass) -> None:
    """The weight files of a streamed base are stubs, with headers and without values. Nothing may load them.

    Raises:
        EngineError: the base is streamed.
    """
    if group.files is not None and group.files.is_streamed:
        stored = gibibytes(base_bytes(group.directory) or 0)
        raise EngineError(
            f"base {group.base.name} cannot be streamed: {model_class.class_name} has to be loaded by transformers "
            f"itself, from {stored} of files",
            hint="set access: download for this base",
        )


def _in_another_class(base: Base | None, model_class: ModelClass) -> Base | None:
    from merge_gate.engine.base import other_class  # noqa: PLC0415 - imports torch

    return other_class.in_another_class(base, model_class) if base is not None else None


def _batches(tasks: list[ClassedTask], *, one_pass: bool) -> Iterator[list[ClassedTask]]:
    """Adapters that are merged together: one, or with `one_pass` as many as a third of the free memory holds.

    Those that are merged alone come last.
    """
    alone = [one for one in tasks if one[0].alone]
    room = (MemoryGroup().free_bytes() or 0) // ADAPTERS_SHARE if one_pass else 0
    batch: list[ClassedTask] = []
    held = 0
    for one in (one for one in tasks if not one[0].alone):
        size_bytes = sum(_LOADED_BYTES * math.prod(part.shape) for file in one[0].files for part in file.tensors)
        if batch and held + size_bytes > room:
            yield batch
            batch, held = [], 0
        batch.append(one)
        held += size_bytes
    if batch:
        yield batch
    yield from ([one] for one in alone)


def _judge_batch(base: Base, batch: list[ClassedTask], progress: Listener) -> Iterator[Event]:
    if len(batch) > 1:
        first, *others = (task.index for task, _ in batch)
        yield MergeStarted(task=first, others=tuple(others))
        try:
            merged = _merge_together(base, [task for task, _ in batch], progress)
        except SourceError as error:  # of no use to any adapter
            yield from (Undecided(task=task.index, refusal=_refusal(error)) for task, _ in batch)
            return
        except Exception:  # merged by itself, each adapter says what is wrong
            merged = (None,) * len(batch)
        for (task, instead_of), evidence in zip(batch, merged, strict=True):
            if evidence is not None:
                yield Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))
        batch = [one for one, evidence in zip(batch, merged, strict=True) if evidence is None]
    for task, instead_of in batch:
        yield MergeStarted(task=task.index)
        yield _judge_task(base, task, instead_of, progress)


def _merge_together(base: Base, tasks: list[Task], progress: Listener) -> tuple[Evidence | None, ...]:
    """The evidence of each task; None for one that raises: merged by itself, it says what is wrong with it."""
    from merge_gate.engine import adapter_evidence  # noqa: PLC0415 - imports torch and PEFT

    report = _paced(progress, tasks[0].index)
    counts = [(0, 0)] * len(tasks)

    def add(number: int, done: int, total: int, module: str) -> None:
        counts[number] = done, total
        report(sum(done for done, _ in counts), sum(total for _, total in counts), module)

    pinned = [contextlib.ExitStack() for _ in tasks]
    requests: dict[int, MergeRequest] = {}
    try:
        for number, task in enumerate(tasks):
            on_work = functools.partial(_report_work, progress, task.index)
            on_work()
            with contextlib.suppress(Exception):
                request = _request(task, base, pinned[number], functools.partial(add, number))
                requests[number] = replace(request, on_work=on_work)
        merged = dict(zip(requests, adapter_evidence.merge_together(tuple(requests.values())), strict=True))
    finally:
        changed = {number for number, stack in enumerate(pinned) if not _is_released(stack)}
    return tuple(None if number in changed else merged.get(number) for number in range(len(tasks)))


def _report_work(report: Listener, task: int) -> None:
    """Tell the parent what this thread works on: if the process dies, it is one of these adapters."""
    is_main = threading.current_thread() is threading.main_thread()
    report(InProgress(task=task, thread=None if is_main else threading.get_ident()))


def _is_released(pinned: contextlib.ExitStack) -> bool:
    """Close an adapter's files. False if they changed during the merge."""
    try:
        pinned.close()
    except Exception:
        return False
    return True


def _request(
    task: Task, base: Base, pinned: contextlib.ExitStack, progress: Callable[[int, int, str], None]
) -> MergeRequest:
    """The task on the files that were hashed, once its regular expressions have been tried on the base's names."""
    from merge_gate.engine import adapter_evidence  # noqa: PLC0415 - imports torch and PEFT

    files = tuple(pinned.enter_context(pinned_adapter(one)) for one in task.files)
    names = [name for name, _ in base.model.named_modules()]
    for one in files:
        try_patterns(one.config.patterns, names)
    return adapter_evidence.MergeRequest(
        base=base, members=files, combine=task.combine, measure_options=task.measure_options, progress=progress
    )


def _paced(progress: Listener, task: int) -> Callable[[int, int, str], None]:
    """Report the progress of a merge, but not every module of it."""
    next_s = 0.0

    def report(done: int, total: int, module: str) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            progress(MergeProgressed(task=task, done=done, total=total, module=module))
            next_s = time.monotonic() + PROGRESS_S

    return report


def _judge_task(base: Base, task: Task, instead_of: str | None, progress: Listener) -> Event:
    try:
        from merge_gate.engine import adapter_evidence  # noqa: PLC0415 - imports torch and PEFT

        with contextlib.ExitStack() as pinned:
            try:
                request = _request(task, base, pinned, _paced(progress, task.index))
            except Refused as refused:  # by the trial of its regular expressions, before PEFT
                adapter_evidence.measure_wholly(base)
                kind, total = task.files[0].config.peft_type, base.facts.parameters
                evidence = Evidence(base=base.facts, peft_type=kind, refusal=refused.refusal, parameters_total=total)
            else:
                evidence = adapter_evidence.merge(request)
    except Exception as error:
        return Undecided(task=task.index, refusal=_refusal(error))
    return Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))


def _is_of_an_import(error: Exception) -> bool:
    """Whether Python raised the error while it imported a module."""
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("<frozen importlib") for name in frames)


def _refusal(error: Exception, group: Group | None = None) -> Refusal:
    """The fact behind an exception. A base has the name that the configuration uses."""
    if isinstance(error, Undecidable):
        return _with_label(error.refusal, group) if group is not None else error.refusal
    if isinstance(error, EngineError):
        message = error.message if group is None else error.message.replace(group.directory, group.base.name)
        return NotJudged(message=message, hint=error.hint)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    kinds = tuple(one.__name__ for one in type(error).__mro__)
    return WorkerRaised(error=Caught(kinds=kinds, text=text[:400]), in_import=_is_of_an_import(error))


def _with_label(refusal: Refusal, group: Group) -> Refusal:
    """The fact with the base's name in place of its directory, which is open under another path."""
    match refusal:
        case BaseRaised():
            text = refusal.error.text.replace(group.directory, group.base.name)
            return replace(refusal, error=replace(refusal.error, text=text))
        case _:
            return refusal
