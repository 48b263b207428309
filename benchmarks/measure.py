"""Run a command and measure all of it: wall and CPU seconds, and the peak anonymous memory of its process tree.

In: an argument list. Out: `Measured`. RssAnon counts what a process has written, not the pages of a memory-mapped
file, which the kernel can drop at any time. It is read for the whole tree every 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_S = 0.02
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run. `exit_code` is negative for a signal; `over_limit` says that the tree was killed for its memory."""

    wall_s: float
    user_s: float
    system_s: float
    peak_anon_mib: float
    exit_code: int
    over_limit: bool = False


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def process_tree(pid: int) -> list[int]:
    """The process and its descendants."""
    return [pid, *(member for child in _children(pid) for member in process_tree(child))]


def anon_bytes(pid: int) -> int:
    """RssAnon of one process; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


class _Sampler(threading.Thread):
    """Watches a process group until told to stop; ends it when it holds more than `max_bytes`."""

    def __init__(self, pid: int, max_bytes: int | None) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.over_limit = False
        self._pid, self._limit_bytes = pid, max_bytes
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            held = sum(anon_bytes(pid) for pid in process_tree(self._pid))
            self.peak_bytes = max(self.peak_bytes, held)
            if self._limit_bytes is not None and held > self._limit_bytes:
                self.over_limit = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        self._done.set()
        self.join()


def measure(command: list[str], *, max_bytes: int | None = None, env: dict[str, str] | None = None) -> Measured:
    """Run the command in a process group of its own. Its output is shown only if it could not be started or died."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **(env or {})}
        )
        sampler = _Sampler(process.pid, max_bytes)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # a stopped benchmark leaves no one behind
            raise
        wall_s = time.perf_counter() - start
        sampler.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1) and not sampler.over_limit:
            output.seek(0)
            sys.stderr.write(output.read()[-4000:].decode(errors="replace"))
    return Measured(
        wall_s=round(wall_s, 3),
        user_s=round(usage.ru_utime, 3),
        system_s=round(usage.ru_stime, 3),
        peak_anon_mib=round(sampler.peak_bytes / MIB, 1),
        exit_code=process.returncode,
        over_limit=sampler.over_limit,
    )


def median(runs: list[Measured]) -> dict[str, float]:
    """Median time and peak memory of several runs, with the extremes of the times."""
    walls = [run.wall_s for run in runs]
    return {
        "wall_s": statistics.median(walls),
        "wall_s_least": min(walls),
        "wall_s_most": max(walls),
        "user_s": statistics.median(run.user_s for run in runs),
        "peak_anon_mib": statistics.median(run.peak_anon_mib for run in runs),
        "runs": len(runs),
    }


def alternate(commands: dict[str, list[str]], *, repeat: int, **options) -> dict[str, dict]:
    """Run the commands in turn, `repeat` rounds of them, so that a slow minute of the machine hits all alike."""
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            runs[name].append(measure(command, **options))
            print(f"  {name}: {asdict(runs[name][-1])}", flush=True)
    failed = {name: [run.exit_code for run in done if run.exit_code] for name, done in runs.items()}
    if any(failed.values()):
        raise SystemExit(f"a measured command failed, so its time means nothing: {failed}")
    return {name: median(done) for name, done in runs.items()}


if __name__ == "__main__":
    print(asdict(measure(sys.argv[1:])))
