"""Starts the worker process, sends it a job, and ends it.

A `Job` goes in. The process's events come out, and how it ended. The process runs child.py in its own interpreter, so
a crash in a native library does not reach the parent.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Self

from merge_gate.worker.call_service import LINES, CallService, Feeds
from merge_gate.worker.channel import Channel, GarbledError, Line
from merge_gate.worker.memory import REUSE, MemoryGroup, gibibytes
from merge_gate.worker.private_directory import private_directory
from merge_gate.worker.protocol import Event, Finished, Idle, Job, Listener, Publisher
from merge_gate.worker.sandbox import caches

PASSED = re.compile(
    r"(PATH|HOME|USER|LOGNAME|LANG(UAGE)?|TZ|TERM|CC|CXX|VIRTUAL_ENV|CONDA_PREFIX|HF_(HOME|HUB_CACHE)|HF_HUB_DISABLE_\w+"
    r"|XDG_CACHE_HOME|MERGE_GATE_(SANDBOX|DEBUG)"
    r"|(LC|LD|DYLD|MALLOC|GLIBC|OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|DNNL|ONEDNN|ATEN|CUDA|CUDNN|CUBLAS|NVIDIA|HIP|HSA|ROCR|ROCM"
    r"|MIOPEN|BNB|TRITON|COVERAGE)_\w+|(PYTHON|TORCH|PYTORCH)\w+)"
)
"""The variables that the process gets, if their names hold none of `SECRETS`: for the system, Python, and the libraries
that compute. All files that it reads are on disk when it gets its job."""

SECRETS = re.compile("TOKEN|SECRET|KEY|PASS|CREDENTIAL|AUTH")

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

    def run(
        self,
        job: Job,
        listen: Listener,
        *,
        is_overdue: Callable[[], bool],
        feeds: Feeds | None = None,
        publisher: Publisher | None = None,
    ) -> Ending | None:
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
            return Ending(f"it sent something that is not an event of the gate ({error})", _GARBLED)
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


class Ending(NamedTuple):
    """How a process ended, as text, and what to do about it."""

    text: str
    hint: str


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
    env = {name: value for name, value in environ.items() if PASSED.fullmatch(name) and not SECRETS.search(name)}
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


def describe_exit(code: int, output: IO[bytes], *, out_of_memory: str | None = None) -> Ending:
    """How a process ended. `output` is what it printed, `out_of_memory` the result of `_memory_ran_out`."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - TAIL_BYTES))
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines() if line.strip()]
    last_line = f"; its last line: {lines[-1][:300]}" if lines else ""
    if code >= 0:
        return Ending(
            f"exit code {code}{last_line}", _MEMORY if any(word in last_line for word in _NO_MEMORY) else _BUG
        )
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code != signal.SIGKILL:
        return Ending(f"killed by {name}{last_line}", _HINTS.get(name, _BUG))
    if out_of_memory is None:
        return Ending(f"killed by {name}, most likely because the machine is out of memory{last_line}", _MEMORY)
    if out_of_memory:
        return Ending(f"killed by {name}, out of memory: {out_of_memory}{last_line}", _MEMORY)
    return Ending(f"killed by {name} from outside: the kernel reports no out-of-memory kill{last_line}", _KILLED)


_MEMORY = "use a machine (or a limit) with more memory, or gate this adapter alone or in a smaller dtype"
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
