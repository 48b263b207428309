"""The worker process from inside: it confines itself, imports the engine, and judges the groups of a job.

In: names of pickled files, and then a `Job` with its channels for calls. Out: the tensors of the files, and events.
process.py starts it as an interpreter of its own. It imports torch, the engine and merging/ last, when it is confined.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import CardError, EngineError, SourceError
from merge_gate.files.feed import LocalFeed
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import Sandbox
from merge_gate.worker.channel import MOST_FILES, Channel
from merge_gate.worker.device import cpu_name, why_no_card
from merge_gate.worker.encoding import EncodingError
from merge_gate.worker.parent_feed import ParentFeed
from merge_gate.worker.pinned import pinned_directory
from merge_gate.worker.protocol import (
    BaseLoading,
    DeviceChosen,
    Event,
    Finished,
    Group,
    Job,
    Listener,
    Merged,
    PickleListed,
    PickleNamed,
    Unjudged,
    refusal_of,
    undecided,
)
from merge_gate.worker.quick_imports import quick_imports
from merge_gate.worker.sandbox import confine, limit

if TYPE_CHECKING:
    from merge_gate.worker.call_client import CallClient

_ENGINE = "merge_gate.engine.adapter_evidence"


def main(descriptor: int) -> None:
    """Entry point of the process: confine itself, import, list pickles, read a job, send events, exit with 0."""
    channel = Channel(socket.socket(fileno=descriptor), most_files=MOST_FILES)
    sandbox = confine(Path.cwd())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    _import_engine()
    try:
        while isinstance(job := channel.receive(None), PickleNamed):
            channel.send(_listed(job))
    except (EOFError, OSError):
        os._exit(0)  # there is nothing to merge
    assert isinstance(job, Job)  # noqa: S101 - the parent is ours
    _forget_output()
    threading.Thread(target=_leave_with_parent, args=(channel,), daemon=True).start()
    try:
        for event in judge_job(job, channel.send, sandbox, _client(channel.taken_files())):
            _send(channel, event)
    except CardError as error:  # the last line of the output
        sys.stderr.write(f"{error}\n")
        os._exit(1)
    channel.send(Finished())
    channel.close()
    sys.stdout.flush()
    os._exit(0)  # libraries' exit handlers have nothing to add, and take seconds


def _send(channel: Channel, event: Event) -> None:
    """Send an event. A merge whose evidence cannot be sent could not be judged."""
    try:
        channel.send(event)
    except EncodingError as error:
        if not isinstance(event, Merged):
            raise
        channel.send(Unjudged(task=event.task, refusal=refusal_of(error)))


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


def _listed(pickled: PickleNamed) -> PickleListed:
    """The tensors of a pickled file."""
    try:
        from merge_gate.worker.merging.group_bases import listed_pickle  # noqa: PLC0415 - imports torch and PEFT
    except Exception as error:
        return PickleListed(refusal=NotJudged(message=f"{type(error).__name__}: {error}"[:400]))
    return listed_pickle(pickled.path)


def _client(ends: Sequence[int]) -> CallClient | None:
    """What calls services of the parent; None if the job has none."""
    if not ends:
        return None
    from merge_gate.worker.call_client import CallClient  # noqa: PLC0415 - few jobs have calls

    return CallClient.of(ends)


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


def judge_job(job: Job, progress: Listener, sandbox: Sandbox, client: CallClient | None = None) -> Iterator[Event]:
    """Load each base once for each class, and merge each task. An exception costs its own task only.

    `client` calls the parent for features.
    """
    try:
        chosen = _choose_device(job.device)
    except (EngineError, ImportError, OSError) as error:  # torch itself may fail to import
        yield from undecided((task for group in job.groups for task in group.tasks), error)
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
    """Whether a group differs from another one in dtype and tasks only."""
    base = replace(group.base, dtype=other.base.dtype)
    return replace(group, base=base, tasks=other.tasks) == other


def _choose_device(wanted: str) -> DeviceChosen:
    import torch  # noqa: PLC0415 - the child's side only

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        if not torch.cuda.is_available():
            raise EngineError(
                f"device {wanted} was asked for, but torch {torch.__version__} sees no CUDA device here",
                hint=why_no_card(os.environ),
            )
        count = torch.cuda.device_count()
        index = int(wanted.partition(":")[2] or torch.cuda.current_device())
        if index >= count:
            raise EngineError(
                f"device {wanted} was asked for, but there are only {count} CUDA devices (cuda:0 is first)"
            )
        return DeviceChosen(device=f"cuda:{index}", device_name=torch.cuda.get_device_name(index))
    return DeviceChosen(device="cpu", device_name=cpu_name())


def _judge_groups(positions: list[int], job: Job, progress: Listener, client: CallClient | None) -> Iterator[Event]:
    """Judge the groups at these positions, which have one base, in several dtypes."""
    first = job.groups[positions[0]]
    open_tasks = {task.index: task for position in positions for task in job.groups[position].tasks}
    yield BaseLoading(group=positions[0])  # from the first file on, the time limit is that of the base
    try:
        from merge_gate.worker.merging.group_bases import GroupBases  # noqa: PLC0415 - imports torch and PEFT
        from merge_gate.worker.merging.judge_groups import judge_pinned  # noqa: PLC0415
    except Exception as error:
        yield from undecided(open_tasks.values(), error)
        return
    try:
        with pinned_directory(first.directory) as directory, LocalFeed(directory, keep=not first.one_pass) as local:
            source = ParentFeed(client, positions[0]).begin() if first.fed and client else local
            bases = GroupBases(job=job, feed=source, report=progress, client=client)
            groups = {position: replace(job.groups[position], directory=directory) for position in positions}
            for event in judge_pinned(groups, bases):
                if isinstance(event, Merged | Unjudged):
                    del open_tasks[event.task]
                yield event
    except (OSError, SourceError) as error:
        yield from undecided(open_tasks.values(), error)
