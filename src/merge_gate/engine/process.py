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
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Self

from merge_gate.engine.protocol import Finished, Idle, Job, Listener

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

IDLE_S = 0.5
"""After how long without a word from the child the listener hears `Idle`."""

LEAVING_S = 10.0
"""How long a child that has closed its pipe may take to end by itself."""


class WorkerProcess:
    """One child; it imports what it needs while it waits for its job. A context manager: leaving ends it."""

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

    def run(self, job: Job, listen: Listener) -> str | None:
        """Send the job and pass on its events. None when the child finished, else how it ended."""
        finished = _converse(self._ours, job, listen)
        code = _exit_code(self._process)
        return None if finished else describe_exit(code, self._output)


_BOOTSTRAP = """\
import sys
sys.path.insert(0, sys.argv[1])
import merge_gate
sys.path.append(sys.path.pop(0))
from merge_gate.engine.child import main
main(int(sys.argv[2]))
"""
"""The parent's own package, whatever else is installed under that name; what stands beside it shadows nothing."""


def _start(theirs: Connection, output: IO[bytes], directory: str, extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOTSTRAP, package, str(theirs.fileno())],
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


def _converse(ours: Connection, job: Job, listen: Listener) -> bool:
    """Pass on every event. False when the child ended before its last one; what `listen` raises is the caller's."""
    try:
        ours.send(job)
    except OSError:
        return False
    while True:
        try:
            event = ours.recv() if ours.poll(IDLE_S) else Idle()
        except (EOFError, OSError):  # OSError: it died within a message
            return False
        listen(event)
        if isinstance(event, Finished):
            return True


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


def describe_exit(code: int, output: IO[bytes]) -> str:
    """How a child ended, in words; `output` is what it printed."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - TAIL_BYTES))
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = f"; its last words: {lines[-1][:300]}" if lines else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", most likely because the machine is out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {name}{memory}{said}"
    return f"exit code {code}{said}"
