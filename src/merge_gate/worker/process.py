"""The worker process: its start, its environment, the conversation on a job, and how it ended.

In: a job, and what receives its events. Out: None if the process finished, or the reason why it did not.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from merge_gate._internal.private_directory import private_directory
from merge_gate._internal.text import gibibytes
from merge_gate.records.refusals import NotJudged
from merge_gate.worker import protocol
from merge_gate.worker.channel import FROM_WORKER, Channel, limits_of
from merge_gate.worker.device import OF_DRIVERS
from merge_gate.worker.encoding import EncodingError, GarbledError, encoded
from merge_gate.worker.memory import REUSE, MemoryGroup
from merge_gate.worker.protocol import DEFAULT_TIMEOUT_S, Event, Job
from merge_gate.worker.sandbox import caches

if TYPE_CHECKING:
    from merge_gate.worker.call_service import Service
    from merge_gate.worker.supervisor import Attempt, Services

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
    "USE_HUB_KERNELS": "0",  # transformers replaces no layer by code from the Hub or its cache,
    "KERNELS_CACHE": os.devnull,  # and bitsandbytes no operation
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


class WorkerProcess(contextlib.ExitStack):
    """One process. It imports what it needs while it waits for its job. `close` ends it, whatever it does."""

    def __init__(self) -> None:
        super().__init__()
        self._output = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        directory = self.enter_context(private_directory())
        self._memory = MemoryGroup()
        self._kills_before = self._memory.kills()
        own_socket, child_socket = socket.socketpair()
        self._channel = Channel(own_socket, FROM_WORKER)
        self._channel.limits = limits_of(None)
        self.callback(self._channel.close)
        self._services = self.enter_context(contextlib.ExitStack())  # they end after the process
        self._process = _start(child_socket.fileno(), self._output, directory)
        child_socket.close()
        self.callback(_stop, self._process)
        self.enter_context(_stopping_together(self._process))

    def read_pickle(self, path: str) -> protocol.PickleListed:
        """Ask for the tensors of a pickled file. Without an answer, the refusal is how the process ended."""
        try:
            self._channel.send(protocol.PickleNamed(path=path))
            answer = self._channel.receive(DEFAULT_TIMEOUT_S)
        except (EOFError, OSError):
            return protocol.PickleListed(refusal=describe_exit(_exit_code(self._process), self._output))
        except GarbledError as error:
            return protocol.PickleListed(
                refusal=NotJudged(message=f"the worker sent no list of tensors ({error})", hint=_GARBLED)
            )
        if isinstance(answer, protocol.PickleListed):
            return answer
        return protocol.PickleListed(refusal=late("while it listed pickled weights", DEFAULT_TIMEOUT_S))

    def run(self, attempt: Attempt, services: Services = ()) -> NotJudged | None:
        """Send the job and pass on its events. None if the process finished, or how it ended."""
        data = _encoded_job(attempt)
        self._channel.limits = limits_of(attempt.job)
        ends = self._answered([made for service in services if (made := service(attempt.job)) is not None], attempt.job)
        try:
            finished = _converse(self._channel, data, attempt, ends)
        except GarbledError as error:
            _stop(self._process)
            return NotJudged(message=f"it sent something that is not an event of the gate ({error})", hint=_GARBLED)
        if attempt.is_overdue() and not finished:
            _stop(self._process)
        code = _exit_code(self._process)
        if finished:
            return None
        return describe_exit(code, self._output, out_of_memory=self._memory_ran_out(code))

    def _answered(self, services: Sequence[Service], job: Job) -> Sequence[int]:
        """Let these services answer calls. Returns the process's ends of the channels."""
        if not services:
            return ()
        from merge_gate.worker.call_service import CallService  # noqa: PLC0415 - few jobs have calls

        calls = CallService(services, job)
        self._services.callback(calls.close)
        return calls.start()

    def _memory_ran_out(self, code: int) -> str | None:
        """Which limit the process exceeded, and its peak. Empty if memory is not the reason, None if unknown."""
        kills = self._memory.kills()
        if code != -signal.SIGKILL or kills is None or self._kills_before is None:
            return None
        if kills == self._kills_before:
            return ""
        limit, peak = self._memory.max_bytes(), self._memory.peak_bytes()
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
main(int(sys.argv[3]))
"""
"""1. Linux ends this process with its parent (PR_SET_PDEATHSIG), also while a native call blocks every Python thread.
If the parent died before that, its process id differs. 2. The package is the parent's own, whatever else is installed
under its name. The other files in its directory shadow nothing, because that directory goes to the end of the path."""


def _start(descriptor: int, output: IO[bytes], directory: str) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOTSTRAP, package, str(os.getpid()), str(descriptor)],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=directory,
        env=child_environment(os.environ) | caches(directory),
        start_new_session=True,  # no terminal is its own
    )


@contextlib.contextmanager
def _stopping_together(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A `with` block in which Ctrl-Z stops the process with this one, and `fg` continues both.

    It is in another session, so it does not get the terminal's signals. At the others, this process ends it.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
        yield
        return

    def stop(*_: object) -> None:
        child.send_signal(signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # until `fg`
        signal.signal(signal.SIGTSTP, stop)
        child.send_signal(signal.SIGCONT)

    signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the process needs of the caller's environment, without relative import paths, and offline."""
    env = {name: value for name, value in environ.items() if PASSED.fullmatch(name) and not WITHHELD.search(name)}
    here = Path.cwd()
    entries = [entry for entry in env.pop("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry).is_absolute()]
    kept = [entry for entry in entries if here != Path(entry) and here not in Path(entry).parents]
    if kept:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return SLEEPING_THREADS | REUSE | env | OFFLINE


def _encoded_job(attempt: Attempt) -> bytes:
    """The job as bytes, without the tasks that cannot be sent: they are reported."""
    try:
        return encoded(attempt.job)
    except EncodingError:
        for task in [task for group in attempt.job.groups for task in group.tasks]:
            try:
                encoded(task)
            except EncodingError as error:
                attempt.refuse(
                    task.index, NotJudged(message=f"the gate's worker process cannot get it: {error}", hint=_BUG)
                )
        return encoded(attempt.job)


def _converse(channel: Channel, data: bytes, attempt: Attempt, ends: Sequence[int]) -> bool:
    """Send the job, and pass on every event. False if the process ended before its last one, or is overdue.

    Raises:
        GarbledError: the process sent something else.
    """
    sending = threading.Thread(target=_send, args=(channel, data, ends), daemon=True)
    sending.start()  # a stopped process does not read
    patience_s = 0.0  # the process imports, or reads the job: time for what the listener does meanwhile
    while not attempt.is_overdue():
        try:
            event = channel.receive(patience_s) or protocol.Idle()
        except (EOFError, OSError):  # OSError: the process died within a message
            return False
        patience_s = IDLE_S
        if not isinstance(event, Event):
            raise GarbledError(type(event).__name__)
        attempt.receive(event)
        if isinstance(event, protocol.Finished):
            return True
    return False


def _send(channel: Channel, data: bytes, ends: Sequence[int]) -> None:
    with contextlib.suppress(OSError):  # the process is gone, and `receive` raises
        channel.send_encoded(data, ends)
    for descriptor in ends:
        os.close(descriptor)


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


def late(what: str, timeout_s: float) -> NotJudged:
    return NotJudged(
        message=f"the gate's worker process was ended {what}: the time limit of {timeout_s:g} s was over",
        hint="if the adapter or its base is large or the machine slow, set limits: {seconds: …} for the adapter",
    )


_MEMORY = "use a machine (or a limit) with more memory, or gate this adapter alone or in a smaller dtype"
_GPU = (
    "run `nvidia-smi`, and look for `Xid` in the kernel's log (dmesg); if the GPU is sound, the driver may need a call "
    f"that the sandbox refuses ({', '.join(OF_DRIVERS)}): try MERGE_GATE_SANDBOX=off, or gate with --device cpu"
)
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
