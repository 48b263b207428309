"""The worker process from inside: loads bases, merges adapters, and sends the measurements.

In: a `Job` from the channel. Out: events. process.py starts it as a separate interpreter. Only this module,
group_bases.py, the engine, the demo, and integrations/ use torch, transformers, or PEFT.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.errors import EngineError
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import Caught, NotJudged, Refusal, Refused, Undecidable
from merge_gate.records.report import Sandbox
from merge_gate.sources.feed import LocalFeed, SourceError
from merge_gate.worker.call_client import CallClient
from merge_gate.worker.channel import Channel, Line
from merge_gate.worker.confine.sandbox import confine, limit
from merge_gate.worker.device import cpu_name
from merge_gate.worker.memory import ClassedTask, MemoryGroup, batches
from merge_gate.worker.pinned import pinned_adapter, pinned_directory
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseLoading,
    BaseMeasured,
    Compared,
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
from merge_gate.worker.quick_imports import quick_imports
from merge_gate.worker.regex_trial import try_patterns

if TYPE_CHECKING:
    from merge_gate.engine.adapter_evidence import MergeRequest
    from merge_gate.engine.base.accounting import Account
    from merge_gate.engine.base.loaded_base import Base, ModelClass
    from merge_gate.engine.merge.publication_sinks import PublicationSinks
    from merge_gate.worker.group_bases import GroupBase, GroupBases

Merger = Callable[["MergeRequest"], Evidence]
"""Merges one adapter; for a finished model, with a comparison."""

SinksByTask = dict[int, "PublicationSinks"]
"""What takes the merged tensors of tasks that are published."""

SKELETONS_SHARE = 4
"""What several skeletons of a pass hold for good may take a quarter of the free memory."""

HASHED_AT_A_TIME = 4
"""The files of so many adapters are hashed at a time when a pass is over, and nothing else is left to do."""

_ENGINE = "merge_gate.engine.adapter_evidence"

PROGRESS_S = 0.1
"""The least time between two events of progress: showing one takes time from a core that merges."""


def main(descriptor: int, *of_lines: int) -> None:
    """Entry point of the process: confine itself, import, read a job, send events, exit with 0."""
    channel = Channel(socket.socket(fileno=descriptor))
    sandbox = confine(Path.cwd())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    _import_engine()
    try:
        job = channel.receive(None)
    except (EOFError, OSError):
        os._exit(0)  # there is nothing to merge
    assert isinstance(job, Job)  # noqa: S101 - the parent is ours
    _forget_output()
    threading.Thread(target=_leave_with_parent, args=(channel,), daemon=True).start()
    client = CallClient([Line.of(*pair) for pair in zip(of_lines[::2], of_lines[1::2], strict=True)])
    for event in judge_job(job, channel.send, sandbox, client):
        channel.send(event)
    channel.send(Finished())
    channel.close()
    sys.stdout.flush()
    os._exit(0)  # libraries' exit handlers have nothing to add, and take seconds


def _import_engine() -> None:
    """Import what merges. If the quick way fails, import as usual; the task that needs it reports what cannot be."""
    gc.disable()  # collections while importing find nothing and take a fifth of the time
    try:
        with quick_imports():
            importlib.import_module(_ENGINE)
    except Exception:
        with contextlib.suppress(Exception):
            importlib.import_module(_ENGINE)
    gc.freeze()
    gc.enable()


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
    client: CallClient | None = None,
) -> Iterator[Event]:
    """Load each base once for each class, and merge each task. An exception costs its own task only.

    `client` gets the bytes of bases that the parent reads, and takes the merged models that are published.
    """
    try:
        chosen = _choose_device(job.device)
    except (EngineError, ImportError, OSError) as error:  # torch itself may fail to import
        yield from _all_undecided([*range(len(job.groups))], job, error)
        return
    yield replace(chosen, sandbox=limit(sandbox, job, chosen.device))
    job = replace(job, device=chosen.device)
    for positions in rounds(job.groups):
        yield from _judge_groups(positions, job, progress, client)


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


def _judge_groups(positions: list[int], job: Job, progress: Listener, client: CallClient | None) -> Iterator[Event]:
    """Judge the groups at these positions, which have one base, in several dtypes."""
    first = job.groups[positions[0]]
    yield BaseLoading(group=positions[0])  # from the first file on, the time limit is that of the base
    try:
        from merge_gate.worker.group_bases import GroupBases  # noqa: PLC0415 - imports torch and PEFT
    except Exception as error:
        yield from _all_undecided(positions, job, error)
        return
    try:
        with pinned_directory(first.directory) as directory, LocalFeed(directory, keep=not first.one_pass) as local:
            source = client.feed(positions[0]) if first.fed and client is not None else local
            bases = GroupBases(job=job, feed=source, client=client)
            groups = {position: replace(job.groups[position], directory=directory) for position in positions}
            yield from _judge_pinned(groups, job, progress, bases)
    except (OSError, SourceError) as error:
        yield from _all_undecided(positions, job, error)


def _all_undecided(positions: list[int], job: Job, error: Exception) -> Iterator[Event]:
    tasks = [task for position in positions for task in job.groups[position].tasks]
    yield from (Undecided(task=task.index, refusal=_refusal(error)) for task in tasks)


@dataclass(slots=True, kw_only=True)
class _ToLoad:
    """The tasks of a group that need the base as one class."""

    position: int
    group: Group
    model_class: ModelClass
    tasks: list[ClassedTask]


def _judge_pinned(groups: dict[int, Group], job: Job, progress: Listener, bases: GroupBases) -> Iterator[Event]:
    to_load, undecided = _by_class(groups, job)
    yield from undecided
    announced = next(iter(groups)) if not undecided else None
    skeletons: list[_LoadedBase] = []
    for one in to_load:
        if announced != one.position:
            yield BaseLoading(group=one.position)
        announced = None
        started = time.perf_counter()
        try:
            account = bases.account(one.model_class, one.group)
            refused = _refused_as_incomplete(one.tasks, account, one.group)
            yield from (Undecided(task=task.index, refusal=refusal) for task, refusal in refused)
            one.tasks = [classed for classed in one.tasks if classed[0] not in {task for task, _ in refused}]
            if not one.tasks:
                continue
            loaded = _LoadedBase(found=bases.load(one.position, one.group, one.model_class, account), tasks=one.tasks)
        except Exception as error:
            yield from (Undecided(task=task.index, refusal=_refusal(error, one.group)) for task, _ in one.tasks)
            continue
        yield from _announce(loaded, time.perf_counter() - started)
        if not loaded.found.is_skeleton:
            yield from _judge_tasks([loaded], bases, progress)
        elif skeletons and not _fit(skeletons, loaded):
            yield from _judge_tasks(skeletons, bases, progress)
            skeletons = [loaded]
        else:
            skeletons.append(loaded)
        del loaded  # nothing here may keep a base that takes memory
    if skeletons:
        yield from _judge_tasks(skeletons, bases, progress)


def _by_class(groups: dict[int, Group], job: Job) -> tuple[list[_ToLoad], list[Undecided]]:
    """The loads that the groups need, and the tasks whose class is not known."""
    from merge_gate.engine.base.model_class import model_class_for  # noqa: PLC0415 - imports torch

    found: dict[tuple[int, ModelClass], _ToLoad] = {}
    undecided: list[Undecided] = []
    for position, group in groups.items():
        for task in group.tasks:
            try:
                model_class = model_class_for(
                    group.directory, task.files[0], group.files.tensors, trust_remote_code=job.trust_remote_code
                )
            except Exception as error:
                undecided.append(Undecided(task=task.index, refusal=_refusal(error, group)))
                continue
            one = _ToLoad(position=position, group=group, model_class=model_class, tasks=[])
            found.setdefault((position, model_class), one).tasks.append((task, model_class.instead_of))
    return list(found.values()), undecided


@dataclass(slots=True, kw_only=True)
class _LoadedBase:
    """A base and the tasks that are merged into it. `is_measured`: its facts were sent."""

    found: GroupBase
    tasks: list[ClassedTask]
    is_measured: bool = False


def _announce(loaded: _LoadedBase, seconds: float) -> Iterator[Event]:
    found, task = loaded.found, loaded.tasks[0][0].index
    loaded.is_measured = not found.base.unmeasured()
    yield BaseLoaded(
        group=found.position,
        task=task,
        facts=found.base.facts,
        identity=found.identity,
        measured=loaded.is_measured,
        seconds=seconds,
    )
    if loaded.is_measured and (record := found.record()) is not None:
        yield BaseMeasured(group=found.position, task=task, facts=found.base.facts, record=record)


def _measured(loaded: _LoadedBase, task: int) -> BaseMeasured:
    found, loaded.is_measured = loaded.found, True
    return BaseMeasured(group=found.position, task=task, facts=found.base.facts, record=found.record())


def _fit(skeletons: list[_LoadedBase], another: _LoadedBase) -> bool:
    """Whether another skeleton may be in the same pass: tensors that have values for good take memory."""
    room = (MemoryGroup().free_bytes() or 0) // SKELETONS_SHARE
    all_of_them = (one.found.base.hollow for one in (*skeletons, another))
    return sum(hollow.kept_bytes() for hollow in all_of_them if hollow is not None) <= room


def _judge_tasks(loaded: list[_LoadedBase], bases: GroupBases, progress: Listener) -> Iterator[Event]:
    """Merge the adapters of these bases, and send the facts of a base ahead of its first evidence.

    No other code may keep a base that takes memory, so that it is released before the next load.
    """
    base_of = {task.index: one for one in loaded for task, _ in one.tasks}
    tasks = [classed for one in loaded for classed in one.tasks]
    skeletons = [one.found.base for one in loaded if one.found.is_skeleton]
    sinks = {task.index: found for one in loaded if (found := bases.sinks(one.found)) for task, _ in one.tasks}
    comparing = {
        task.index: functools.partial(_compared, bases, one.found, task, progress)
        for one in loaded
        for task, _ in one.tasks
        if task.compares is not None
    }
    for batch in batches(tasks, one_pass=loaded[0].found.group.in_passes):
        of_batch = {task.index: base_of[task.index].found.base for task, _ in batch}
        for event in _judge_batch(of_batch, batch, skeletons, progress, sinks, comparing=comparing):
            if isinstance(event, Merged) and not base_of[event.task].is_measured:
                yield _measured(base_of[event.task], event.task)
            yield event
    for one in loaded:
        one.found.base.template = None  # release its memory for the next class
        bases.keep_figures(one.found.base)


def _refused_as_incomplete(tasks: list[ClassedTask], account: Account, group: Group) -> list[tuple[Task, Refusal]]:
    """The tasks whose adapters lack the parameters that the base's files lack."""
    from merge_gate.engine.base import accounting  # noqa: PLC0415 - imports torch

    if not account.incomplete or account.map is None:
        return []
    lacking = [task for task, _ in tasks if not accounting.brings_all(task.files, account.incomplete)]
    fact = accounting.not_stored(group.base.name, account.incomplete, account.map, group.directory)
    return [(task, fact) for task in lacking]


def _judge_batch(
    bases: dict[int, Base],
    batch: list[ClassedTask],
    others: list[Base],
    progress: Listener,
    sinks: SinksByTask,
    *,
    comparing: Mapping[int, Merger],
) -> Iterator[Event]:
    """Merge these tasks into their `bases`, by index. A pass over several adapters measures `others` as well."""
    if len(batch) > 1 or (len(others) > 1 and batch[0][0].most_together != 1):
        first, *further = (task.index for task, _ in batch)
        yield MergeStarted(task=first, others=tuple(further))
        try:
            merged = _merge_together(bases, [task for task, _ in batch], others, progress, sinks)
        except SourceError as error:  # of no use to any adapter
            yield from (Undecided(task=task.index, refusal=_refusal(error)) for task, _ in batch)
            return
        except Exception:  # merged by itself, each adapter says what is wrong
            merged = (None,) * len(batch)
        for (task, instead_of), evidence in zip(batch, merged, strict=True):
            if evidence is not None:
                _finish_publication(task, evidence, sinks)
                yield Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))
        batch = [one for one, evidence in zip(batch, merged, strict=True) if evidence is None]
    for task, instead_of in batch:
        yield MergeStarted(task=task.index)
        yield _judge_task(bases[task.index], task, instead_of, progress, sinks, compared=comparing.get(task.index))


def _finish_publication(task: Task, evidence: Evidence, sinks: SinksByTask) -> None:
    """Send the remaining tensors of a merged model, before its evidence."""
    if task.publishes is not None and task.index in sinks:
        sinks[task.index].finish(task.index, evidence)


def _merge_together(
    bases: dict[int, Base], tasks: list[Task], others: list[Base], progress: Listener, sinks: SinksByTask
) -> tuple[Evidence | None, ...]:
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
                request = _request(task, bases[task.index], pinned[number], functools.partial(add, number), sinks)
                requests[number] = replace(request, on_work=on_work)
        evidence = adapter_evidence.merge_together(tuple(requests.values()), others)
        merged = dict(zip(requests, evidence, strict=True))
    finally:
        with ThreadPoolExecutor(HASHED_AT_A_TIME) as pool:
            is_released = list(pool.map(_is_released, pinned))
        changed = {number for number, is_same in enumerate(is_released) if not is_same}
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
    task: Task,
    base: Base,
    pinned: contextlib.ExitStack,
    progress: Callable[[int, int, str], None],
    sinks: SinksByTask,
) -> MergeRequest:
    """The task on the files that were hashed, once its regular expressions have been tried on the base's names."""
    from merge_gate.engine import adapter_evidence  # noqa: PLC0415 - imports torch and PEFT

    files = tuple(pinned.enter_context(pinned_adapter(one)) for one in task.files)
    names = [name for name, _ in base.model.named_modules()]
    for one in files:
        try_patterns(one.config.patterns, names)
    of_base = sinks.get(task.index) if task.publishes is not None else None
    return adapter_evidence.MergeRequest(
        base=base,
        members=files,
        combine=task.combine,
        measure_options=task.measure_options,
        progress=progress,
        free_bytes=MemoryGroup().left_bytes(),
        sink=of_base.sink(task.index, task.publishes or "") if of_base is not None else None,
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


def _judge_task(
    base: Base, task: Task, instead_of: str | None, progress: Listener, sinks: SinksByTask, *, compared: Merger | None
) -> Event:
    try:
        from merge_gate.engine import adapter_evidence  # noqa: PLC0415 - imports torch and PEFT

        with contextlib.ExitStack() as pinned:
            try:
                request = _request(task, base, pinned, _paced(progress, task.index), sinks)
            except Refused as refused:  # by the trial of its regular expressions, before PEFT
                adapter_evidence.measure_wholly(base)
                kind, total = task.files[0].config.peft_type, base.facts.parameters
                evidence = Evidence(base=base.facts, peft_type=kind, refusal=refused.refusal, parameters_total=total)
            else:
                evidence = (compared or adapter_evidence.merge)(request)
        _finish_publication(task, evidence, sinks)
    except Exception as error:
        return Undecided(task=task.index, refusal=_refusal(error))
    return Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))


def _compared(bases: GroupBases, base: GroupBase, task: Task, progress: Listener, request: MergeRequest) -> Evidence:
    """Merge an adapter, compare each tensor with a finished model's, and send the comparison."""
    evidence, comparison = bases.compare(base, task, request)
    progress(Compared(task=task.index, comparison=comparison))
    return evidence


def _is_of_an_import(error: Exception) -> bool:
    """Whether Python raised the error while it imported a module."""
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("<frozen importlib") for name in frames)


def _refusal(error: Exception, group: Group | None = None) -> Refusal | NotJudged:
    """The fact behind an exception. A base has the name that the configuration uses."""
    if isinstance(error, Undecidable):
        return _with_label(error.refusal, group) if group is not None else error.refusal
    if isinstance(error, EngineError):
        message = error.message if group is None else error.message.replace(group.directory, group.base.name)
        return NotJudged(message=message, hint=error.hint)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    kinds = tuple(one.__name__ for one in type(error).__mro__)
    caught = Caught(kinds=kinds, text=text[:400])
    return Undecidable("worker_raised", error=caught, in_import=_is_of_an_import(error)).refusal


def _with_label(refusal: Refusal, group: Group) -> Refusal:
    """The fact with the base's name in place of its directory, which is open under another path."""
    error = refusal.fields.get("error")
    if not isinstance(error, Caught):
        return refusal
    named = replace(error, text=error.text.replace(group.directory, group.base.name))
    return replace(refusal, fields={**refusal.fields, "error": named})
