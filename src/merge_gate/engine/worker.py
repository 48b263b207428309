"""The process that loads bases and merges, and the supervisor that outlives it.

In: a `Job` of groups, one group per base. Out: events, in order. The parent side (`supervise`) imports no torch; the
child side (`main`) is started as its own interpreter, so that whatever an adapter or a native library does to it
(a crash, out of memory) costs the adapter that was under way and nothing else.

The child never has the caller's directory on `sys.path` (a config that names an importable module must not find the
checkout), reaches no network, and gets no token.

1. The parent starts a child and sends the job. 2. The child sends events until `Finished`. 3. If it dies before, the
adapter under way is `error` (while a base was loading: all of that base), and a new child goes on with the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from merge_gate.errors import EngineError
from merge_gate.records import (
    EVERYTHING,
    AdapterFiles,
    BaseFacts,
    Combine,
    Evidence,
    Quantization,
    Refusal,
    Thresholds,
    record,
)

if TYPE_CHECKING:
    from merge_gate.engine.base import Base, Shape

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN")
"""Variables that the child has no use for: everything it reads is on disk by then."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
}

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""Keeps bitsandbytes, which PEFT imports, from importing torch's compiler: a fifth of all imports, used by nothing here
but bitsandbytes' own quantisation on a CPU."""

TAIL_BYTES = 2000
"""How much of a dead child's output is kept for the message."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch has no class of its own for this: a RuntimeError that names it

QUIET_S = 0.5
"""After how long without a word from the child the listener hears `Quiet`."""

PROGRESS_S = 0.1
"""No more than one word of progress in so long: whoever shows it uses a core that merges."""

LEAVING_S = 10.0
"""How long a child that has closed its pipe may take to end by itself."""


@record
class Task:
    """One adapter (or combination: `combine` is set, `files` are the members') to merge. `index` is the caller's.

    `thresholds` are those of `merge.merge_adapter`.
    """

    index: int
    files: tuple[AdapterFiles, ...]
    combine: Combine | None = None
    thresholds: Thresholds = EVERYTHING


@record
class Group:
    """Adapters on one base in one dtype and quantisation."""

    label: str
    directory: str
    revision: str | None = None
    dtype: str
    quantization: Quantization = Quantization.NONE
    tasks: tuple[Task, ...]


@record
class Job:
    """Everything one run merges."""

    groups: tuple[Group, ...]
    device: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False


# --- events --------------------------------------------------------------------------------------------------------


@record
class Ready:
    """The child has its device."""

    device: str
    device_name: str


@record
class BaseLoading:
    group: int


@record
class BaseLoaded:
    group: int
    facts: BaseFacts
    seconds: float


@record
class Started:
    task: int


@record
class Progressed:
    task: int
    done: int
    total: int
    module: str


@record
class Merged:
    task: int
    evidence: Evidence


@record
class Undecided:
    """A task that could not be judged."""

    task: int
    refusal: Refusal


@record
class Finished:
    pass


@record
class Quiet:
    """The child says nothing at the moment; it is the parent's own."""


Event = Ready | BaseLoading | BaseLoaded | Started | Progressed | Merged | Undecided | Finished | Quiet
Listener = Callable[[Event], None]


# --- the parent's side ---------------------------------------------------------------------------------------------


def supervise(job: Job, listen: Listener, child: Child | None = None) -> None:
    """Run a job to its end. Every task gets exactly one `Merged` or `Undecided`, whatever happens to the child.

    `child` is one that was started before the job was known, so that its imports are done by now.
    """
    while any(group.tasks for group in job.groups):
        watch = _Watch(job, listen)
        quantizes = any(group.quantization is not Quantization.NONE for group in job.groups)
        with child or Child(quantizes=quantizes) as running:
            exit_text = running.run(job, watch.hear)
        child = None
        if exit_text is None:
            watch.close()
            return
        job = watch.bury(exit_text)


class _Watch:
    """What has been heard of one child, so that it is known what its death costs."""

    def __init__(self, job: Job, listen: Listener) -> None:
        self._job = job
        self._listen = listen
        self._settled: set[int] = set()
        self._task: int | None = None
        self._group: int | None = None

    def hear(self, event: Event) -> None:
        if isinstance(event, BaseLoading):
            self._group, self._task = event.group, None
        elif isinstance(event, BaseLoaded):
            self._group = None
        elif isinstance(event, Started):
            self._task = event.task
        elif isinstance(event, Merged | Undecided):
            self._settled.add(event.task)
            self._task = None
        self._listen(event)

    def bury(self, exit_text: str) -> Job:
        """Settle what died with the child; return the job that is left."""
        for index, what in self._lost():
            self._settled.add(index)
            self._listen(Undecided(task=index, refusal=_death(what, exit_text)))
        left = tuple(
            replace(group, tasks=tuple(task for task in group.tasks if task.index not in self._settled))
            for group in self._job.groups
        )
        return replace(self._job, groups=left)

    def close(self) -> None:
        """Nothing may be missing from the report because nothing was said of it."""
        for index in self._open():
            why = "the gate's worker process finished without a word about this adapter"
            self._listen(Undecided(task=index, refusal=Refusal(check=None, message=why, hint="please report this")))

    def _open(self) -> list[int]:
        every = (task.index for group in self._job.groups for task in group.tasks)
        return [index for index in every if index not in self._settled]

    def _lost(self) -> list[tuple[int, str]]:
        if self._task is not None:
            return [(self._task, "while it merged this adapter")]
        if self._group is not None:
            group = self._job.groups[self._group]
            what = f"while it loaded base {group.label}"
            return [(task.index, what) for task in group.tasks if task.index not in self._settled]
        if self._settled:  # it died between two adapters: a new child goes on, and this cannot go on forever
            return []
        return [(index, "before it judged this adapter") for index in self._open()]


def _death(what: str, exit_text: str) -> Refusal:
    return Refusal(
        check=None,
        message=f"the gate's worker process died {what}: {exit_text}",
        hint="if it was killed for memory, use a larger runner or gate this adapter alone; else report it as a bug",
    )


class Child:
    """One worker process; it imports what it needs while it waits for its job. A context manager: leaving ends it."""

    def __init__(self, *, quantizes: bool = False) -> None:
        self._stack = contextlib.ExitStack()
        self._output = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-gate-"))
        self._ours, theirs = Pipe()
        self._stack.callback(self._ours.close)
        self._process = _start(theirs, self._output, directory, {} if quantizes else EAGER)
        theirs.close()
        self._stack.callback(_stop, self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, job: Job, hear: Listener) -> str | None:
        """Send the job and hear its events. None when the child finished, else how it ended."""
        finished = _converse(self._ours, job, hear)
        code = _end_of(self._process)
        return None if finished else _how(code, self._output)


_CHILD = """\
import sys
sys.path.insert(0, sys.argv[1])
import merge_gate
sys.path.append(sys.path.pop(0))
from merge_gate.engine.worker import main
main(int(sys.argv[2]))
"""
"""The parent's own package, whatever else is installed under that name; what stands beside it shadows nothing."""


def _start(theirs: Connection, output: IO[bytes], directory: str, extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, package, str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=directory,
        env={**child_environment(os.environ), "TMPDIR": directory, **extra},  # libraries leave files there
    )


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without its tokens, without relative import paths, and offline."""
    env = {name: value for name, value in environ.items() if name not in SECRETS}
    here = Path.cwd()
    entries = [entry for entry in env.pop("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry).is_absolute()]
    kept = [entry for entry in entries if here != Path(entry) and here not in Path(entry).parents]
    if kept:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return env | OFFLINE


def _converse(ours: Connection, job: Job, hear: Listener) -> bool:
    """Hear all that the child has to say. False when it ended in mid-speech; what `hear` raises is the caller's."""
    try:
        ours.send(job)
    except OSError:
        return False
    while True:
        try:
            event = ours.recv() if ours.poll(QUIET_S) else Quiet()
        except (EOFError, OSError):  # OSError: it died within a message
            return False
        hear(event)
        if isinstance(event, Finished):
            return True


def _end_of(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a child that has nothing more to say."""
    try:
        return child.wait(LEAVING_S)
    except subprocess.TimeoutExpired:
        _stop(child)
        return child.wait()


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()


def _how(code: int, output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - TAIL_BYTES))
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = f"; its last words: {lines[-1][:300]}" if lines else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", most likely because the machine is out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {name}{memory}{said}"
    return f"exit code {code}{said}"


# --- the child's side ----------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Entry point of the child: read a job from the pipe, send events, exit 0."""
    pipe = Connection(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    _end_with_parent()
    gc.disable()  # collections while importing find nothing and take a fifth of the time
    with contextlib.suppress(Exception):  # what cannot be imported is said by the task that needs it
        import merge_gate.engine.merge  # noqa: F401, PLC0415
    gc.freeze()
    gc.enable()
    try:
        job = pipe.recv()
    except (EOFError, OSError):
        os._exit(0)  # there was nothing to merge
    threading.Thread(target=_leave_with_parent, args=(pipe,), daemon=True).start()
    for event in judge_job(job, pipe.send):
        pipe.send(event)
    pipe.send(Finished())
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # libraries' exit handlers have nothing to add, and take seconds


def _end_with_parent() -> None:
    """Ask Linux to end this process with its parent, also while a native call keeps every Python thread waiting."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_with_parent(pipe: Connection) -> None:
    """The parent sends nothing more: whatever arrives now is its end."""
    with contextlib.suppress(OSError):
        pipe.poll(None)
    os._exit(1)


def judge_job(job: Job, progress: Listener) -> Iterator[Event]:
    """Load each base once per shape, merge each task; every exception becomes that task's, and the rest go on."""
    try:
        ready = _device(job.device)
    except EngineError as error:
        for group in job.groups:
            for task in group.tasks:
                yield Undecided(task=task.index, refusal=_refusal(error))
        return
    yield ready
    for position, group in enumerate(job.groups):
        if group.tasks:
            yield from _judge_group(position, group, job, ready.device, progress)


def _device(wanted: str) -> Ready:
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
        return Ready(device=wanted, device_name=torch.cuda.get_device_name(index))
    return Ready(device="cpu", device_name=_cpu_name())


def _cpu_name() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def _judge_group(position: int, group: Group, job: Job, device: str, progress: Listener) -> Iterator[Event]:
    from merge_gate.engine import base as bases  # noqa: PLC0415 - imports torch

    by_shape: dict[Shape, list[Task]] = {}
    for task in group.tasks:
        try:
            shape = bases.shape_for(group.directory, task.files[0], trust_remote_code=job.trust_remote_code)
        except Exception as error:
            yield Undecided(task=task.index, refusal=_refusal(error))
        else:
            by_shape.setdefault(shape, []).append(task)
    for shape, tasks in by_shape.items():
        yield BaseLoading(group=position)
        started = time.perf_counter()
        try:
            base = bases.load_base(
                group.directory,
                shape=shape,
                label=group.label,
                revision=group.revision,
                dtype=group.dtype,
                quantization=group.quantization,
                device=device,
                trust_remote_code=job.trust_remote_code,
                allow_pickle=job.allow_pickle,
            )
        except Exception as error:
            yield from (Undecided(task=task.index, refusal=_refusal(error)) for task in tasks)
            continue
        yield BaseLoaded(group=position, facts=base.facts, seconds=time.perf_counter() - started)
        for task in tasks:
            yield Started(task=task.index)
            yield _judge_task(base, task, progress)


def _judge_task(base: Base, task: Task, progress: Listener) -> Event:
    next_s = 0.0

    def report(done: int, total: int, module: str) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            progress(Progressed(task=task.index, done=done, total=total, module=module))
            next_s = time.monotonic() + PROGRESS_S

    try:
        from merge_gate.engine import merge  # noqa: PLC0415 - imports torch and PEFT

        if task.combine is not None:
            evidence = merge.merge_combination(
                base, task.files, task.combine, thresholds=task.thresholds, progress=report
            )
        else:
            evidence = merge.merge_adapter(base, task.files[0], thresholds=task.thresholds, progress=report)
    except Exception as error:
        return Undecided(task=task.index, refusal=_refusal(error))
    return Merged(task=task.index, evidence=evidence)


def _refusal(error: Exception) -> Refusal:
    """What the report says of an exception that kept the gate from judging."""
    if isinstance(error, EngineError):
        return Refusal(check=None, message=error.message, hint=error.hint)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _CPU_ALLOCATOR in text:
        return Refusal(
            check=None,
            message="out of memory while judging this adapter",
            hint="use a machine (or a GPU) with more memory, or gate the adapter in a smaller dtype",
        )
    if isinstance(error, OSError):
        return Refusal(
            check=None,
            message=f"a file of the adapter or its base could not be read when it was to be merged: {text[:400]}",
            hint="check that nothing changes these files during a run, and that the disk is sound",
        )
    return Refusal(
        check=None,
        message=f"the gate could not judge this adapter: {type(error).__name__}: {text[:400]}",
        hint="if the adapter loads and merges with PEFT itself, please report this as a bug of merge-gate",
    )


def listening(handlers: Mapping[type, Callable[[Any], None]]) -> Listener:
    """A listener that hands each event to the handler of its type."""

    def listen(event: Event) -> None:
        handler = handlers.get(type(event))
        if handler is not None:
            handler(event)

    return listen
