"""The Docker SDK for Python on a runner that lacks it: a private copy, installed by hash, gone after the run.

In: the environment, requirements/launcher.txt of the action's own checkout. Out: `import docker` works inside
`available`. Raises `LauncherError` with what to install. Nothing is shared between jobs: a directory that the next
job would import from is one that this job could poison. Keeps to Python 3.9.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LOCK = Path(__file__).resolve().parents[3] / "requirements" / "launcher.txt"
_OLDEST = 7
_LIMIT_S = 300


@contextlib.contextmanager
def available(environ: Mapping[str, str], lock: Path = LOCK) -> Iterator[None]:
    """Make `import docker` work: the runner's own SDK where it is new enough, else a private one."""
    if _installed():
        yield
        return
    target = Path(tempfile.mkdtemp(prefix="merge-gate-sdk-", dir=environ.get("RUNNER_TEMP")))
    try:
        install(target, lock, environ)
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(target))
        shutil.rmtree(target, ignore_errors=True)


def _installed() -> bool:
    try:
        import docker  # noqa: PLC0415

        return int(docker.__version__.partition(".")[0]) >= _OLDEST
    except (ImportError, AttributeError, ValueError):
        return False


def install(target: Path, lock: Path, environ: Mapping[str, str]) -> None:
    """pip, which is on most runners; --target also works where the system's own environment is closed (PEP 668)."""
    options = ["--quiet", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:"]
    words = [sys.executable, "-I", "-m", "pip", "install", *options, "--target", str(target), "-r", str(lock)]
    try:
        done = subprocess.run(
            words, env=dict(environ), check=False, timeout=_LIMIT_S, capture_output=True, stdin=subprocess.DEVNULL
        )
        trouble = "" if done.returncode == 0 else _last_line(done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = str(error)
    if trouble:
        raise LauncherError(
            f"the Docker SDK for Python is not on this runner and cannot be installed: {trouble}",
            hint=f"install it for {sys.executable} (`pip install 'docker>=7.1'`), or install pip (`apt-get install "
            "python3-pip`) and let the action do it, or use `runtime: native` in merge-gate's image",
        )


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "pip said nothing"
