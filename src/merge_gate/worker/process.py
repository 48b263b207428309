"""The worker process as its parent sees it: started, spoken to, ended.

In: a `Job`. Out: the child's events, and how it ended. Imports no torch: the child (child.py) is its own interpreter,
so that whatever an adapter or a native library does to it (a crash, out of memory) costs the parent nothing.

The child never has the caller's directory on `sys.path` (a config that names an importable module must not find the
checkout), reaches no network, and gets no token.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple, Self

from merge_gate.worker.channel import Channel, GarbledError
from merge_gate.worker.confine.private_directory import private_directory
from merge_gate.worker.confine.sandbox import caches
from merge_gate.worker.memory import MemoryGroup, gibibytes
from merge_gate.worker.protocol import Event, Finished, Idle, Job, Listener
from merge_gate.worker.startup.heap import REUSE

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN",
    "MERGE_GATE_CACHE_KEY",
)  # fmt: skip
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

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of torch's own that have nothing to do sleep, instead of trying again and again on a core that merges. What
the caller has set stays."""

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""torch compiles nothing, so that its compiler need not be imported (quick_imports.py). PEFT's own imports ask for it.
Nothing here uses it but bitsandbytes' own quantisation on a CPU."""

TAIL_BYTES = 2000
"""How much of a dead child's output is kept for the message."""

IDLE_S = 0.5
"""After how long without a word from the child the listener hears `Idle`."""

LEAVING_S = 10.0
"""How long a child that has closed its pipe may take to end by itself."""


class WorkerProcess:
    """One child; it imports what it needs while it waits for its job. A context manager: leaving ends it."""

    def __init__(self, *, quantizes: bool = False) -> None:
        self._stack = contextlib.ExitStack()
        self._output = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        directory = self._stack.enter_context(private_directory())
        self._memory = MemoryGroup()
        self._kills_before = self._memory.kills()
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._stack.callback(self._channel.close)
        self._process = _start(theirs, self._output, directory, {} if quantizes else EAGER)
        theirs.close()
        self._stack.callback(_stop, self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the child, whatever it is at; may be called more than once."""
        self._stack.close()

    def run(self, job: Job, listen: Listener, *, is_overdue: Callable[[], bool]) -> Ending | None:
        """Send the job and pass on its events. None when the child finished, else how it ended.

        `is_overdue` is asked after each event; a child that is too late is ended.
        """
        try:
            finished = _converse(self._channel, job, listen, is_overdue)
        except GarbledError as error:
            _stop(self._process)
            return Ending(f"it sent what is no event of the gate's ({error})", _GARBLED)
        if finished:
            _exit_code(self._process)
            return None
        if is_overdue():
            _stop(self._process)
        code = _exit_code(self._process)
        return describe_exit(code, self._output, out_of_memory=self._memory_ran_out(code))

    def _memory_ran_out(self, code: int) -> str | None:
        """What the kernel says of a SIGKILL: where and how much; empty if it was no lack of memory, None if unknown."""
        kills = self._memory.kills()
        if code != -signal.SIGKILL or kills is None or self._kills_before is None:
            return None
        if kills == self._kills_before:
            return ""
        limit, peak = self._memory.limit_bytes(), self._memory.peak_bytes()
        allowed = f"the control group may use {gibibytes(limit)}" if limit is not None else "the machine has no more"
        return f"{allowed}, and used {gibibytes(peak)} at its peak" if peak is not None else allowed


class Ending(NamedTuple):
    """How a child ended, in words, and what to do about it."""

    text: str
    hint: str


_BOOTSTRAP = """\
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[3]):
    os._exit(1)
sys.path.insert(0, sys.argv[1])
import merge_gate
sys.path.append(sys.path.pop(0))
from merge_gate.worker.child import main
main(int(sys.argv[2]))
"""
"""1. Linux ends this process with its parent (PR_SET_PDEATHSIG), also while a native call keeps every Python thread
waiting; a parent that died before that shows by its number. 2. The package is the parent's own, whatever else is
installed under that name; what stands beside it shadows nothing."""


def _start(theirs: socket.socket, output: IO[bytes], directory: str, extra: dict[str, str]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOTSTRAP, package, str(theirs.fileno()), str(os.getpid())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=directory,
        env=child_environment(os.environ) | caches(directory) | extra,
    )


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without its tokens, without relative import paths, and offline."""
    env = {name: value for name, value in environ.items() if name not in SECRETS}
    here = Path.cwd()
    entries = [entry for entry in env.pop("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry).is_absolute()]
    kept = [entry for entry in entries if here != Path(entry) and here not in Path(entry).parents]
    if kept:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return WAITING | REUSE | env | OFFLINE


def _converse(channel: Channel, job: Job, listen: Listener, is_overdue: Callable[[], bool]) -> bool:
    """Pass on every event. False when the child ended before its last one, or is overdue.

    What `listen` raises is the caller's.

    Raises:
        GarbledError: the child sent something else.
    """
    threading.Thread(target=_send, args=(channel, job), daemon=True).start()  # a child that is stopped does not read
    patience_s = 0.0  # it imports, or reads the job: time for what the listener does meanwhile
    while not is_overdue():
        try:
            event = channel.receive(patience_s) or Idle()
        except (EOFError, OSError):  # OSError: it died within a message
            return False
        patience_s = IDLE_S
        if not isinstance(event, Event):
            raise GarbledError(type(event).__name__)
        listen(event)
        if isinstance(event, Finished):
            return True
    return False


def _send(channel: Channel, job: Job) -> None:
    with contextlib.suppress(OSError):  # it is gone, which whoever listens will hear
        channel.send(job)


def _exit_code(child: subprocess.Popen[bytes]) -> int:
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


def describe_exit(code: int, output: IO[bytes], *, out_of_memory: str | None = None) -> Ending:
    """How a child ended; `output` is what it printed, `out_of_memory` as `_memory_ran_out` says it."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - TAIL_BYTES))
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = f"; its last words: {lines[-1][:300]}" if lines else ""
    if code >= 0:
        return Ending(f"exit code {code}{said}", _MEMORY if any(word in said for word in _NO_MEMORY) else _BUG)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code != signal.SIGKILL:
        return Ending(f"killed by {name}{said}", _HINTS.get(name, _BUG))
    if out_of_memory is None:
        return Ending(f"killed by {name}, most likely because the machine is out of memory{said}", _MEMORY)
    if out_of_memory:
        return Ending(f"killed by {name}, out of memory: {out_of_memory}{said}", _MEMORY)
    return Ending(f"killed by {name} from outside: the kernel counts no death for want of memory{said}", _KILLED)


_MEMORY = "use a machine (or a limit) with more memory, or gate this adapter alone or in a smaller dtype"
_NO_MEMORY = ("failed to map segment", "Cannot allocate memory", "MemoryError", "std::bad_alloc")
"""Last words of a process that a limit on memory (ulimit -v) has ended."""
_KILLED = "find out what sent the signal (a limit of the runner, a cancelled job), and run the gate again"
_GARBLED = "the base's own code, or a library, wrote to the gate's line: use a base without code of its own"
_BUG = "run the gate again; if it happens again, report it as a bug, with the adapter's config"
_HINTS = {
    "SIGBUS": "a file was cut short while it was read, or the disk failed: let nothing write to base and adapters "
    "during a run, and gate them again",
    "SIGTERM": _KILLED,
    "SIGINT": _KILLED,
    "SIGXCPU": "a limit on computing time was reached: raise it, or gate fewer adapters in one run",
}
