"""The gate in this environment, as a child process: inside merge-gate's image, or where merge-gate is installed.

In: a `ContainerRun`, of which the image means nothing here. Out: the gate's exit code, its output as it comes. Raises
`UsageError` where merge-gate is not installed.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from merge_gate.action.docker.container import config_word
from merge_gate.errors import ExitCode, LauncherError, UsageError
from merge_gate.interrupts import STOP_GRACE_S, Interrupted, interruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from merge_gate.action.docker.container import ContainerRun

_PROBE = (
    "import importlib.util as u, sys; sys.exit(0 if u.find_spec('merge_gate') and u.find_spec('merge_gate.cli') else 3)"
)
_CHUNK = 65_536


def missing(environ: Mapping[str, str]) -> str:
    """Say what keeps the gate from running here, an empty string where nothing does."""
    if sys.version_info < (3, 11):  # noqa: UP036 # the runner's own
        return f"{sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or newer"
    probe = subprocess.run([sys.executable, "-P", "-c", _PROBE], env=_environment(environ), check=False)
    return f"merge-gate is not installed for {sys.executable}" if probe.returncode else ""


def run_here(run: ContainerRun, log: Callable[[bytes], None]) -> int:
    """Run the gate in a child process and return its exit code. Must be called in the main thread."""
    trouble = missing(run.environ)
    if trouble:
        raise UsageError(
            f"runtime: native, but {trouble}",
            hint="run the job in merge-gate's image (`container:`), install merge-gate in a step before this one, or "
            "use `runtime: docker`",
        )
    environ, device = gpus_and_device(run)
    # -P: the workspace is the child's working directory and must not be where it imports from.
    words = ["run", config_word(run), "--output", str(run.output), "--device", device, *run.arguments]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "merge_gate", *words],
        cwd=run.workspace,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            with interruptible(run.time_limit_s):
                return _wait(child, log)
        except Interrupted:
            return int(ExitCode.ERROR)


def _wait(child: subprocess.Popen[bytes], log: Callable[[bytes], None]) -> int:
    try:
        _pass_on(child, log)
        code = child.wait()
    except Interrupted as interruption:
        log(f"merge-gate: {interruption}; stopping the gate\n".encode())
        child.terminate()
        try:
            child.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
        raise
    if code in set(ExitCode):
        return code
    raise LauncherError(
        f"the gate ended with exit code {code}, expected 0 to 3", hint="was it killed because memory ran out?"
    )


def _pass_on(child: subprocess.Popen[bytes], log: Callable[[bytes], None]) -> None:
    assert child.stdout is not None  # noqa: S101 # PIPE
    read = child.stdout.read1  # type: ignore[attr-defined] # a BufferedReader
    while chunk := read(_CHUNK):
        log(chunk)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH is dropped: what a step before this one put there would be imported in place of the gate's own."""
    return {name: value for name, value in environ.items() if name != "PYTHONPATH"}


def gpus_and_device(run: ContainerRun) -> tuple[dict[str, str], str]:
    """Narrow the GPUs by CUDA's own variable. Where GPUs were asked for, a CPU is no answer."""
    environ = {**_environment(run.environ), **({"HF_HOME": str(run.hf_cache)} if run.hf_cache else {})}
    asked = run.gpus not in {"auto", "none"}
    if (run.device == "cpu" and asked) or (run.device.startswith("cuda") and run.gpus == "none"):
        raise UsageError(
            f"gpus: {run.gpus} and device: {run.device} contradict each other", hint="leave one of them at auto"
        )
    if run.gpus == "none":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    elif asked and run.gpus != "all":
        environ["CUDA_VISIBLE_DEVICES"] = run.gpus
    return environ, "cuda" if asked and run.device == "auto" else run.device
