"""Runs the gate in this environment, as a child process: in merge-gate's image, or with an installed merge-gate.

A `ContainerRun` goes in; its image is ignored. The gate's exit code comes out, and its output is passed on as it comes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.action.docker.container import gate_words
from merge_gate.errors import ExitCode, LauncherError, UsageError
from merge_gate.interrupts import STOP_GRACE_S, Interrupted, interruptible
from merge_gate.output_files import PUBLISH_WITHIN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from merge_gate.action.docker.container import ContainerRun

_PROBE = (
    "import importlib.util as u, sys; sys.exit(0 if u.find_spec('merge_gate') and u.find_spec('merge_gate.cli') else 3)"
)
_CHUNK = 65_536
_HUB_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
"""Variables that put the Hub's cache elsewhere than in HF_HOME."""


def missing(environ: Mapping[str, str]) -> str:
    """Return the reason why the gate cannot run here; empty if it can."""
    if sys.version_info < (3, 11):  # noqa: UP036 # the runner's own
        return f"{sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or newer"
    probe = subprocess.run([sys.executable, "-P", "-c", _PROBE], env=_environment(environ), check=False)
    return f"merge-gate is not installed for {sys.executable}" if probe.returncode else ""


def run_here(run: ContainerRun, log: Callable[[bytes], None]) -> int:
    """Run the gate in a child process and return its exit code. Must be called in the main thread."""
    reason = missing(run.environ)
    if reason:
        raise UsageError(
            f"runtime: native, but {reason}",
            hint="run the job in merge-gate's image (`container:`), install merge-gate in a step before this one, or "
            "use `runtime: docker`",
        )
    environ, device = gpus_and_device(run)
    is_elsewhere = run.publish is not None and run.workspace not in run.publish.parents  # the workflow says so
    environ[PUBLISH_WITHIN] = str(run.publish if is_elsewhere else run.workspace)
    # -P keeps the workspace, the child's working directory, off its import path.
    words = gate_words(run, device)
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
        f"the gate ended with exit code {code}, expected 0 to 3", hint="check whether it was killed for lack of memory"
    )


def _pass_on(child: subprocess.Popen[bytes], log: Callable[[bytes], None]) -> None:
    assert child.stdout is not None  # noqa: S101 # PIPE
    read = child.stdout.read1  # type: ignore[attr-defined] # a BufferedReader
    while chunk := read(_CHUNK):
        log(chunk)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without PYTHONPATH: modules of an earlier step would be imported instead of the gate's own."""
    return {name: value for name, value in environ.items() if name != "PYTHONPATH"}


def gpus_and_device(run: ContainerRun) -> tuple[dict[str, str], str]:
    """Limit the GPUs by CUDA's own variable. If GPUs were requested, the run must not fall back to the CPU."""
    environ = _environment(run.environ)
    if run.hf_cache:
        # A token that `hf auth login` has stored stays where it is.
        home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        token = {"HF_TOKEN_PATH": str(home.expanduser() / "token"), **environ}
        environ = {name: value for name, value in token.items() if name not in _HUB_CACHES}
        environ["HF_HOME"] = str(run.hf_cache)
    requested = run.gpus not in {"auto", "none"}
    if (run.device == "cpu" and requested) or (run.device.startswith("cuda") and run.gpus == "none"):
        raise UsageError(
            f"gpus: {run.gpus} and device: {run.device} contradict each other", hint="leave one of them at auto"
        )
    if run.gpus == "none":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    elif requested and run.gpus != "all":
        environ["CUDA_VISIBLE_DEVICES"] = run.gpus
    return environ, "cuda" if requested and run.device == "auto" else run.device
