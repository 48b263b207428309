"""Owns the worker process, and decides what its death or a time limit costs.

In: a `Job`, with one group for each base. Out: events, in order. Every task gets exactly one `Merged` or `Unjudged`.

1. A process gets the job, and sends events until `Finished`. It runs child.py in its own interpreter, so a crash in a
   native library does not reach this one.
2. If it dies or exceeds a time limit while it merges an adapter, that adapter is `error`. A new process continues.
3. If it dies elsewhere (imports, the load of a base, between two adapters), a new process tries the same again, once.
   Then the adapters that waited for it are `error`. A load that exceeds its limit is not tried again.
4. If it dies or exceeds its time limit while it merges several adapters in one pass, a new process merges those that
   were in progress one at a time, and the others in one pass as before. If none was, it merges them in two passes.
5. If it dies or exceeds a time limit while adapters run as models, a new process runs their base alone, and then each
   of them. A base that dies alone is not run any more, and neither is an adapter.

The process has no token and no network. The caller's directory is never on its `sys.path`, because a config that names
an importable module must not find the checkout.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Self, assert_never

from merge_gate._internal.errors import EngineError, GateError
from merge_gate._internal.text import counted, quoted
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.worker.call_service import LINES, CallService, Feeds
from merge_gate.worker.channel import Channel, GarbledError, Line
from merge_gate.worker.memory import REUSE, MemoryGroup, gibibytes
from merge_gate.worker.private_directory import private_directory
from merge_gate.worker.protocol import (
    DEFAULT_LIMIT_S,
    BaseLoaded,
    BaseLoading,
    BaseMeasured,
    DeviceChosen,
    Event,
    Finished,
    ForwardRunning,
    Idle,
    InProgress,
    Job,
    Listener,
    Merged,
    MergeProgressed,
    MergeStarted,
    PickleListed,
    PickleNamed,
    Publisher,
    Task,
    Unjudged,
)
from merge_gate.worker.sandbox import caches

MOST_THREADS = 64
"""A worker that names more threads than this is not the gate's own code; the others are ignored."""

FIRST_NOTE_S = 60.0
"""A note names an adapter or a loading base after so long without an event, and again after twice as long."""

FORWARD_SHARE = 2
"""The model of an adapter may run for half of the time limit of its merge, also together with others."""

_MERGING = "while it merged this adapter"
_RUNNING = "while it ran the model"
_RUNNING_BASE = "while it ran the base, without an adapter"

PASSED = re.compile(
    r"(PATH|HOME|USER|LOGNAME|LANG(UAGE)?|TZ|TERM|CC|CXX|VIRTUAL_ENV|CONDA_PREFIX|HF_(HOME|HUB_CACHE)|HF_HUB_DISABLE_\w+"
    r"|XDG_CACHE_HOME|MERGE_GATE_(SANDBOX|DEBUG)"
    r"|(LC|LD|DYLD|MALLOC|GLIBC|OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|DNNL|ONEDNN|ATEN|CUDA|CUDNN|CUBLAS|NVIDIA|HIP|HSA|ROCR|ROCM"
    r"|MIOPEN|BNB|TRITON|COVERAGE)_\w+|(PYTHON|TORCH|PYTORCH)\w+)"
)
"""The variables that the process gets, if none of `WITHHELD` is in their names: for the system, Python, and the
libraries that compute. All files that it reads are on disk when it gets its job."""

WITHHELD = re.compile("TOKEN|SECRET|KEY|PASS|CREDENTIAL|AUTH|TF32")  # TF32 rounds what a card multiplies

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCHDYNAMO_DISABLE": "1",  # torch compiles nothing: its compiler runs programs, which the sandbox refuses
}

SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Idle threads of torch sleep, so that they do not spin on a core that merges. The caller's own value wins."""

TAIL_BYTES = 2000
"""How much of the output of a dead process is kept for the message."""

IDLE_S = 0.5
"""The listener gets `Idle` after so long without an event."""

EXIT_TIMEOUT_S = 10.0
"""How long a process may take to exit after it has closed its pipe."""


class WorkerSlot:
    """The owner of a run's worker process. There is at most one at a time.

    1. It is started before the configuration is read, and imports what it needs meanwhile.    `start_early`
    2. It gets a job. After that, or after its death, the next job gets a new process.         `run`
    3. Without adapters, a job only reports the device. It takes the process like any other.   `choose_device`
    4. It ends with the `with` block, or earlier if there is nothing to merge.                 `end`
    """

    def __init__(self) -> None:
        self._process: WorkerProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def is_started(self) -> bool:
        return self._process is not None

    def start_early(self) -> None:
        """Start the process if that is possible. If not, `start` tries again and raises the reason."""
        with contextlib.suppress(GateError, OSError):
            self.start()

    def start(self) -> None:
        """Start the process, unless there is one."""
        if self._process is None:
            self._process = WorkerProcess()

    def run(
        self, job: Job, attempt: Attempt, feeds: Feeds | None = None, publisher: Publisher | None = None
    ) -> NotJudged | None:
        """Run a job in the process. None if it finished, or how the process ended."""
        self.start()
        assert self._process is not None  # noqa: S101 - `start` made one
        try:
            return self._process.run(
                job, attempt.receive, is_overdue=attempt.is_overdue, feeds=feeds, publisher=publisher
            )
        finally:
            self.end()

    def read_pickle(self, path: str) -> tuple[StoredTensor, ...] | Refusal:
        """The tensors of a pickled file, as torch's restricted unpickler lists them in the process, or why it refuses.

        Raises:
            EngineError: the process died, or took too long.
        """
        self.start()
        assert self._process is not None  # noqa: S101 - `start` made one
        listed = self._process.read_pickle(path)
        if isinstance(listed.refusal, NotJudged):
            self.end()
            message = f"{quoted(Path(path).name, 120)} could not be read: {listed.refusal.message}"
            raise EngineError(message, hint=listed.refusal.hint)
        return listed.refusal or listed.tensors

    def choose_device(self, requested: str) -> DeviceChosen | None:
        """The device that torch would choose for `requested`, and its name. None if the process fails."""
        chosen: list[DeviceChosen] = []

        def listen(event: Event) -> None:
            if isinstance(event, DeviceChosen):
                chosen.append(event)

        job = Job(groups=(), device=requested)
        self.run(job, Attempt(job, listen))
        return chosen[-1] if chosen else None

    def end(self) -> None:
        """End the process, whatever it does. May be called more than once."""
        if self._process is not None:
            self._process.end()
        self._process = None


def supervise(
    job: Job, listen: Listener, worker: WorkerSlot, feeds: Feeds | None = None, publisher: Publisher | None = None
) -> None:
    """Run a job to its end. Every task gets exactly one `Merged` or `Unjudged`, whatever happens to the process.

    `worker` may hold a process that was started before the job was known. `feeds` opens the bases that this process
    reads for the worker; without it, they are local. `publisher` gets the tensors of the merges that are published.
    """
    feeds = feeds or Feeds()
    tried: set[tuple[str, int]] = set()
    while any(group.tasks for group in job.groups):
        attempt = Attempt(job, listen)
        ending = worker.run(job, attempt, feeds, publisher)  # 1
        if ending is None:
            attempt.report_rest()
            return
        if attempt.is_at_a_batch:
            pass  # 4: `left` has its suspects one at a time
        elif attempt.is_at_a_forward:
            attempt.end_forward(ending)  # 5
        elif attempt.is_at_an_adapter or attempt.place in tried or attempt.is_overdue():
            attempt.report_death(ending)  # 2
        else:
            tried.add(attempt.place)  # 3
        job = attempt.left()


class Attempt:
    """The events of one process on a job, which say what its death costs."""

    def __init__(self, job: Job, listen: Listener) -> None:
        self._job = job
        self._listen = listen
        self._reported: set[int] = set()
        self._task: int | None = None
        self._others: tuple[int, ...] = ()
        self._no_forward: dict[int, str] = {}
        self._alone: dict[int, int] = {}  # tasks that run alone now
        self._base_runs = {number: group.base_run for number, group in enumerate(job.groups)}
        self._in_progress: dict[int | None, int] = {}  # by thread
        self._group: int | None = None
        self._progress = ""
        self._begin(DEFAULT_LIMIT_S)

    def _begin(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began_s = self._last_event_s = time.monotonic()
        self._next_note_s = FIRST_NOTE_S
        self._running: dict[int, float] = {}  # tasks whose models run, and since when
        self._ran_s = defaultdict[int, float](float)  # how long those of each task ran before
        self._paused_s = self._paused_at_s = 0.0  # the time in which any ran does not count as the merge's

    def receive(self, event: Event) -> None:  # noqa: C901 - a case for each event
        """Record what the process does now, and pass the event on.

        An event about anything but an open task is dropped: code that comes with a base could send it.
        """
        if not self._concerns(event) or self._is_repeated(event):
            return
        match event:
            case BaseLoading():
                self._group, self._task, self._progress = event.group, None, ""
                self._begin(max(task.limit_s for task in self._job.groups[event.group].tasks))
            case BaseLoaded():
                self._group = None
                self._begin(DEFAULT_LIMIT_S)
            case MergeStarted():
                self._task, self._others, self._progress = event.task, event.others, ""
                self._in_progress = {}
                merging = {event.task, *event.others}
                self._begin(sum(task.limit_s for task in self._tasks() if task.index in merging))
            case InProgress():
                self._note_in_progress(event)
            case MergeProgressed():
                self._progress = f" (at {event.done:,} of {counted(event.total, 'module')}, {event.module})"
                self._last_event_s, self._next_note_s = time.monotonic(), FIRST_NOTE_S
            case ForwardRunning():
                self._note_forward(event)
            case Merged() | Unjudged():
                self._reported.add(event.task)
                self._group, self._task, self._others = None, None, ()  # no base is loading any more
                self._begin(DEFAULT_LIMIT_S)
            case Idle():
                event = self._silence()
            case DeviceChosen() | BaseMeasured() | Finished():
                pass
            case _:
                assert_never(event)
        self._listen(event)

    def _concerns(self, event: Event) -> bool:
        """Whether an event is about tasks that are open, and about one of the job's groups."""
        groups, tasks = dict(enumerate(self._job.groups)), set(self._open())
        try:
            match event:
                case BaseLoading():
                    is_fit = event.group in groups and bool(groups[event.group].tasks)
                case BaseLoaded() | BaseMeasured():
                    is_fit = event.group in groups and event.task in tasks
                case MergeStarted():
                    is_fit = {event.task, *event.others} <= tasks
                case InProgress():
                    is_fit = event.task in tasks and isinstance(event.thread, int | None)
                case MergeProgressed():
                    is_fit = event.task in tasks and isinstance(event.done, int) and isinstance(event.total, int)
                case ForwardRunning():
                    may_run = {task.index for task in self._tasks() if not task.no_forward}
                    is_fit = event.task in may_run & tasks & {self._task, *self._others}
                case Merged() | Unjudged():
                    is_fit = event.task in tasks
                case _:
                    is_fit = True
        except TypeError as error:  # its fields have other types
            raise GarbledError(str(error)[:200]) from error
        return is_fit

    def _is_repeated(self, event: Event) -> bool:
        """Whether an event says again what the process does. It would start the time limit again."""
        match event:
            case BaseLoading():
                return event.group == self._group
            case MergeStarted():
                return (event.task, event.others) == (self._task, self._others)
        return False

    def _note_in_progress(self, event: InProgress) -> None:
        if event.thread is None:
            self._in_progress.clear()
        self._in_progress.pop(None, None)
        if event.thread in self._in_progress or len(self._in_progress) < MOST_THREADS:
            self._in_progress[event.thread] = event.task

    def _note_forward(self, event: ForwardRunning) -> None:
        now_s = time.monotonic()
        self._paused_s, self._paused_at_s = self._pause_s(), now_s
        self._ran_s[event.task] += now_s - self._running.pop(event.task, now_s)
        if event.is_running:
            self._running[event.task] = now_s
        else:
            self._base_runs[self._group_of(event.task)] = "ran"

    def _pause_s(self) -> float:
        return self._paused_s + (time.monotonic() - self._paused_at_s if self._running else 0.0)

    def _silence(self) -> Idle:
        silent_s = time.monotonic() - self._last_event_s
        base = self._job.groups[self._group].base.name if self._group is not None else ""
        if (self._task is None and not base) or silent_s < self._next_note_s:
            return Idle()
        self._next_note_s *= 2
        return Idle(task=self._task, base=base, seconds=silent_s, limit_s=self._limit_of_now())

    def _limit_of_now(self) -> float:
        if not self._running:
            return self._limit_s
        return max(task.limit_s for task in self._tasks() if task.index in self._running) / FORWARD_SHARE

    def is_overdue(self) -> bool:
        """Whether what the process does now exceeds its time limit. A merge and each of its models have their own."""
        now_s = time.monotonic()
        if not self._running:
            return now_s - self._began_s - self._paused_s > self._limit_s
        limits_s = {task.index: task.limit_s / FORWARD_SHARE for task in self._tasks() if task.index in self._running}
        return any(self._ran_s[task] + now_s - self._running[task] > limit_s for task, limit_s in limits_s.items())

    @property
    def is_at_a_batch(self) -> bool:
        """Whether several adapters are being merged together, and fewer of them would make a difference."""
        return bool(self._smaller_passes())

    @property
    def is_at_an_adapter(self) -> bool:
        """Whether the process merges an adapter, which is then to blame for a death."""
        return self._task is not None

    @property
    def is_at_a_forward(self) -> bool:
        """Whether adapters run as models. A death costs that measurement, and no adapter is to blame."""
        return bool(self._running)

    def end_forward(self, ending: NotJudged) -> None:
        """Note what the next process does not run as a model, and what it runs alone."""
        is_late = self.is_overdue()
        number = self._group_of(next(iter(self._running)))
        base_run, lost = self._base_runs[number], list(self._running)
        what = _RUNNING_BASE if base_run == "alone" else _RUNNING
        if base_run == "alone":
            lost = [one.index for one in self._job.groups[number].tasks if not one.no_forward]
            for index in lost:
                self._listen(ForwardRunning(task=index, is_running=True))
        elif not base_run or len(lost) > 1:
            self._base_runs[number] = base_run or "alone"
            self._alone = dict.fromkeys(lost, 1)
            return
        why = _late(what, self._limit_of_now()) if is_late else _death(what, ending)
        self._no_forward = dict.fromkeys(lost, why.message)

    @property
    def place(self) -> tuple[str, int]:
        """Where in the job the process is. A second death at the same place is no accident."""
        if self._group is not None:
            return "base", self._group
        return "between", len(self._open())

    def report_death(self, ending: NotJudged) -> None:
        """Report that the tasks that the death costs could not be judged."""
        late_s = self._limit_s if self.is_overdue() else None
        for index, what in self._lost():
            self._reported.add(index)
            refusal = _death(what, ending) if late_s is None else _late(f"{what}{self._progress}", late_s)
            self._listen(Unjudged(task=index, refusal=refusal))

    def left(self) -> Job:
        """The job without the tasks that are reported. After the death of a pass, its suspects are in smaller ones."""
        smaller = self._alone or self._smaller_passes()
        groups = tuple(
            replace(
                group,
                base_run=self._base_runs[number],
                tasks=tuple(
                    replace(
                        task,
                        most_together=smaller.get(task.index, task.most_together),
                        no_forward=self._no_forward.get(task.index, task.no_forward),
                    )
                    for task in group.tasks
                    if task.index not in self._reported
                ),
            )
            for number, group in enumerate(self._job.groups)
        )
        return replace(self._job, groups=groups)

    def _smaller_passes(self) -> dict[int, int]:
        """How many adapters the next passes of the suspects may have, if that is fewer than before.

        Suspects are the adapters that were in progress, each alone, or else both halves of the pass.
        """
        batch = frozenset(self._others if self._task is None else (self._task, *self._others))
        if len(batch) < 2 or self._running:  # noqa: PLR2004 - a pass of several
            return {}
        in_progress = batch.intersection(self._in_progress.values())
        most = 1 if in_progress else (len(batch) + 1) // 2
        suspects = in_progress or batch
        return {
            task.index: most
            for task in self._tasks()
            if task.index in suspects and (most < task.most_together or not task.most_together)
        }

    def report_rest(self) -> None:
        """Report that tasks without a result could not be judged, so that none is missing in the report."""
        for index in self._open():
            why = "the gate's worker process finished without a result for this adapter"
            self._listen(Unjudged(task=index, refusal=NotJudged(message=why, hint="please report this")))

    def _tasks(self) -> list[Task]:
        return [task for group in self._job.groups for task in group.tasks]

    def _group_of(self, index: int) -> int:
        return next(
            number for number, one in enumerate(self._job.groups) if index in {task.index for task in one.tasks}
        )

    def _open(self) -> list[int]:
        return [task.index for task in self._tasks() if task.index not in self._reported]

    def _lost(self) -> list[tuple[int, str]]:
        if self._task is not None:
            return [(self._task, _MERGING)]
        if self._group is not None:
            group = self._job.groups[self._group]
            what = f"while it loaded base {group.base.name}"
            return [(task.index, what) for task in group.tasks if task.index not in self._reported]
        return [(index, "before it came to this adapter") for index in self._open()]


def _death(what: str, ending: NotJudged) -> NotJudged:
    again = "" if what in {_MERGING, _RUNNING, _RUNNING_BASE} else " twice"
    message = f"the gate's worker process died{again} {what}: {ending.message}"
    return NotJudged(message=message, hint=ending.hint, log=ending.log)


def _late(what: str, limit_s: float) -> NotJudged:
    return NotJudged(
        message=f"the gate's worker process was ended {what}: the time limit of {limit_s:g} s was over",
        hint="if the adapter or its base is large or the machine slow, set limits: {seconds: …} for the adapter",
    )


# --- the process -----------------------------------------------------------------------------------------------------


class WorkerProcess:
    """One process. It imports what it needs while it waits for its job. Leaving the `with` block ends it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._output = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        directory = self._stack.enter_context(private_directory())
        self._memory = MemoryGroup()
        self._kills_before = self._memory.kills()
        own_socket, child_socket = socket.socketpair()
        self._channel = Channel(own_socket)
        self._stack.callback(self._channel.close)
        self._lines, of_child = zip(*(Line.pair() for _ in range(LINES)), strict=True)
        for line in self._lines:
            self._stack.callback(line.close)
        descriptors = [child_socket.fileno(), *(one for line in of_child for one in line.descriptors)]
        self._process = _start(descriptors, self._output, directory)
        child_socket.close()
        for line in of_child:
            line.close()
        self._stack.callback(_stop, self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process, whatever it does. May be called more than once."""
        self._stack.close()

    def read_pickle(self, path: str) -> PickleListed:
        """Ask for the tensors of a pickled file. Without an answer, the refusal is how the process ended."""
        try:
            self._channel.send(PickleNamed(path=path))
            answer = self._channel.receive(DEFAULT_LIMIT_S)
        except (EOFError, OSError):
            return PickleListed(refusal=describe_exit(_exit_code(self._process), self._output))
        except GarbledError as error:
            return PickleListed(
                refusal=NotJudged(message=f"the worker sent no list of tensors ({error})", hint=_GARBLED)
            )
        if isinstance(answer, PickleListed):
            return answer
        return PickleListed(refusal=_late("while it listed pickled weights", DEFAULT_LIMIT_S))

    def run(
        self,
        job: Job,
        listen: Listener,
        *,
        is_overdue: Callable[[], bool],
        feeds: Feeds | None = None,
        publisher: Publisher | None = None,
    ) -> NotJudged | None:
        """Send the job and pass on its events. None if the process finished, or how it ended.

        `is_overdue` is called after each event. If it returns true, the process is ended. `feeds` opens the bases that
        this process reads for it. `publisher` gets the tensors of the merges that are published.
        """
        published = [task.index for group in job.groups for task in group.tasks if task.publishes is not None]
        service = CallService(
            self._lines, lambda position: (feeds or Feeds()).open(job.groups[position]), publisher, published
        )
        service.start()
        self._stack.callback(service.close)
        try:
            finished = _converse(self._channel, job, listen, is_overdue)
        except GarbledError as error:
            _stop(self._process)
            return NotJudged(message=f"it sent something that is not an event of the gate ({error})", hint=_GARBLED)
        if is_overdue() and not finished:
            _stop(self._process)
        code = _exit_code(self._process)
        if published:
            service.drain()
        if finished:
            return None
        return describe_exit(code, self._output, out_of_memory=self._memory_ran_out(code))

    def _memory_ran_out(self, code: int) -> str | None:
        """Which limit the process exceeded, and its peak. Empty if memory is not the reason, None if unknown."""
        kills = self._memory.kills()
        if code != -signal.SIGKILL or kills is None or self._kills_before is None:
            return None
        if kills == self._kills_before:
            return ""
        limit, peak = self._memory.limit_bytes(), self._memory.peak_bytes()
        allowed = f"the control group may use {gibibytes(limit)}" if limit is not None else "the machine has no more"
        return f"{allowed}, and used {gibibytes(peak)} at its peak" if peak is not None else allowed


_BOOTSTRAP = """\
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[2]):
    os._exit(1)
sys.path.insert(0, sys.argv[1])
import merge_gate
sys.path.append(sys.path.pop(0))
from merge_gate.worker.child import main
main(*map(int, sys.argv[3:]))
"""
"""1. Linux ends this process with its parent (PR_SET_PDEATHSIG), also while a native call blocks every Python thread.
If the parent died before that, its process id differs. 2. The package is the parent's own, whatever else is installed
under its name. The other files in its directory shadow nothing, because that directory goes to the end of the path."""


def _start(descriptors: Sequence[int], output: IO[bytes], directory: str) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOTSTRAP, package, str(os.getpid()), *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=directory,
        env=child_environment(os.environ) | caches(directory),
    )


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the process needs of the caller's environment, without relative import paths, and offline."""
    env = {name: value for name, value in environ.items() if PASSED.fullmatch(name) and not WITHHELD.search(name)}
    here = Path.cwd()
    entries = [entry for entry in env.pop("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry).is_absolute()]
    kept = [entry for entry in entries if here != Path(entry) and here not in Path(entry).parents]
    if kept:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return SLEEPING_THREADS | REUSE | env | OFFLINE


def _converse(channel: Channel, job: Job, listen: Listener, is_overdue: Callable[[], bool]) -> bool:
    """Pass on every event. False if the process ended before its last one, or is overdue.

    Exceptions of `listen` go to the caller.

    Raises:
        GarbledError: the process sent something else.
    """
    threading.Thread(target=_send, args=(channel, job), daemon=True).start()  # a stopped process does not read
    patience_s = 0.0  # the process imports, or reads the job: time for what the listener does meanwhile
    while not is_overdue():
        try:
            event = channel.receive(patience_s) or Idle()
        except (EOFError, OSError):  # OSError: the process died within a message
            return False
        patience_s = IDLE_S
        if not isinstance(event, Event):
            raise GarbledError(type(event).__name__)
        listen(event)
        if isinstance(event, Finished):
            return True
    return False


def _send(channel: Channel, job: Job) -> None:
    with contextlib.suppress(OSError):  # the process is gone, and `receive` raises
        channel.send(job)


def _exit_code(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that has closed its pipe. One that cannot be ended counts as killed."""
    try:
        return child.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _stop(child)
        return child.returncode if child.returncode is not None else -signal.SIGKILL


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Kill a process. One that waits for a mount that does not answer cannot be killed: no one waits for it."""
    if child.poll() is None:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(EXIT_TIMEOUT_S)


def describe_exit(code: int, output: IO[bytes], *, out_of_memory: str | None = None) -> NotJudged:
    """How a process ended, and what to do about it. `output` is what it printed; see `_memory_ran_out`."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - TAIL_BYTES))
    text = output.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last_line = f"; its last line: {lines[-1][:300]}" if lines else ""
    if code >= 0:
        hint = _MEMORY if any(word in last_line for word in _NO_MEMORY) else _GPU if "GPU failed" in last_line else _BUG
        return NotJudged(message=f"exit code {code}{last_line}", hint=hint, log=text or None)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code != signal.SIGKILL:
        return NotJudged(message=f"killed by {name}{last_line}", hint=_HINTS.get(name, _BUG), log=text or None)
    how, hint = " from outside: the kernel reports no out-of-memory kill", _KILLED
    if out_of_memory is None:
        how, hint = ", most likely because the machine is out of memory", _MEMORY
    elif out_of_memory:
        how, hint = f", out of memory: {out_of_memory}", _MEMORY
    return NotJudged(message=f"killed by {name}{how}{last_line}", hint=hint)


_MEMORY = "use a machine (or a limit) with more memory, or gate this adapter alone or in a smaller dtype"
_GPU = "run `nvidia-smi`, and look for `Xid` in the kernel's log (dmesg); if the GPU is sound, gate with --device cpu"
_NO_MEMORY = ("failed to map segment", "Cannot allocate memory", "MemoryError", "std::bad_alloc")
"""The last lines of a process that a limit on memory (ulimit -v) ended contain one of these."""
_KILLED = "find out what sent the signal (a limit of the runner, a canceled job), and run the gate again"
_GARBLED = "the base's own code, or a library, wrote to the gate's channel: use a base without its own code"
_BUG = "run the gate again; if it happens again, report it as a bug, with the adapter's config"
_HINTS = {
    "SIGBUS": "a file was cut short while it was read, or the disk failed: let nothing write to base and adapters "
    "during a run, and gate them again",
    "SIGTERM": _KILLED,
    "SIGINT": _KILLED,
    "SIGXCPU": "a limit on computing time was reached: raise it, or gate fewer adapters in one run",
}
