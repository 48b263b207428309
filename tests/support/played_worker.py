"""A worker that imports no torch: it sends the events of merges, and has the accidents that are planned for it.

In: `played_workers`, a block in which every worker is played, and `plan`, which says where it dies or hangs. The events
come in the order of the real worker's. `other_workers` is a block of workers with another program.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from merge_gate.records.measured import BaseFacts, Evidence, Forward
from merge_gate.records.terms import Quantization
from merge_gate.worker.batches import batches
from merge_gate.worker.channel import Channel
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseLoading,
    DeviceChosen,
    Finished,
    ForwardRunning,
    Group,
    InProgress,
    Job,
    Listener,
    Merged,
    MergeStarted,
    Task,
)

ACCIDENTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "hang": lambda: time.sleep(600),
}
OVERLAY = """
import sys, types
def main(*descriptors):
    del sys.modules["merge_gate.worker.child"]
    exec({program!r}, {{"descriptors": descriptors}})
sys.modules["merge_gate.worker.child"] = types.ModuleType("merge_gate.worker.child")
sys.modules["merge_gate.worker.child"].main = main
"""
PLAYED = """
import sys
sys.path.append({root!r})
from tests.support.played_worker import main
main(*descriptors)
"""


@contextlib.contextmanager
def other_workers(place: Path, program: str) -> Iterator[None]:
    """Workers that start in this block run a program, which has their `descriptors`, in the place of child.py.

    Python runs `sitecustomize` before they import their own module.
    """
    (place / "overlay").mkdir()
    (place / "overlay" / "sitecustomize.py").write_text(OVERLAY.format(program=program))
    with mock.patch.dict(os.environ, PYTHONPATH=str(place / "overlay")):
        yield


def played_workers(place: Path) -> contextlib.AbstractContextManager[None]:
    """Workers that start in this block are played."""
    return other_workers(place, PLAYED.format(root=str(Path(__file__).parents[2])))


def plan(directory: str | Path, *, load: str = "", merge: str = "", run: str = "") -> None:
    """The accidents of a base or an adapter: the first word of `load` is for the first load, and so on."""
    for moment, accidents in (("load", load), ("merge", merge), ("run", run)):
        Path(directory, f"{moment}.accidents").write_text(accidents)


def main(descriptor: int, *_: int) -> None:
    """In the place of `merge_gate.worker.child.main`."""
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        job = channel.receive(None)
    except (EOFError, OSError):
        os._exit(0)
    assert isinstance(job, Job)
    channel.send(DeviceChosen(device="cpu", device_name="played"))
    for number, group in enumerate(job.groups):
        if group.tasks:
            _play(number, group, channel.send)
    channel.send(Finished())
    channel.close()
    os._exit(0)


def _play(number: int, group: Group, send: Listener) -> None:
    facts = BaseFacts(model=group.base.model, revision=None, dtype="float32", quantization=Quantization.NONE)
    send(BaseLoading(group=number))
    _meet(group.directory, "load")
    send(BaseLoaded(group=number, task=group.tasks[0].index, facts=facts, seconds=0.0))
    in_order = sorted(group.tasks, key=lambda task: task.turn)
    passes = batches([(task, None) for task in in_order]) if group.one_pass else [[(task, None)] for task in in_order]
    for batch in passes:
        tasks = [task for task, _ in batch]
        send(MergeStarted(task=tasks[0].index, others=tuple(task.index for task in tasks[1:])))
        for task in tasks:
            if group.one_pass:
                send(InProgress(task=task.index))
            _meet(task.files[0].directory, "merge")
        _run([task for task in tasks if task.no_forward == ""], group, send)
        for task in tasks:
            forward = Forward(why_not=task.no_forward or None)
            send(Merged(task=task.index, evidence=Evidence(base=facts, peft_type="LORA", forward=forward)))


def _run(tasks: list[Task], group: Group, send: Listener) -> None:
    """Run these adapters as models, after their base."""
    if tasks and group.base_run == "alone":
        send(ForwardRunning(task=tasks[0].index, is_running=True))
        _meet(group.directory, "run")
        send(ForwardRunning(task=tasks[0].index, is_running=False))
    for task in tasks:
        send(ForwardRunning(task=task.index, is_running=True))
    if tasks:
        _meet(group.directory, "run")
    for task in tasks:
        _meet(task.files[0].directory, "run")
    for task in tasks:
        send(ForwardRunning(task=task.index, is_running=False))


def _meet(directory: str, moment: str) -> None:
    """Have the next accident that is planned for this moment."""
    path = Path(directory, f"{moment}.accidents")
    planned = path.read_text().split() if path.exists() else []
    if planned:
        path.write_text(" ".join(planned[1:]))
        ACCIDENTS[planned[0]]()
