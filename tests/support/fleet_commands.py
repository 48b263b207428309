"""All ways in which one fleet is judged to the same report: the commands, in their order, and how a run is killed.

In: a directory with fleet.yml. Out: `ways`, what is to be run there. Each that has a `report` must have that of the
first.
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from merge_gate.records.report import Report
from merge_gate.report.formats.json_report import read

SHARDS = 4
FIRST = "cold"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One command. `report`: where its report lies, if it is of the whole fleet; `killed`: with -9, in the middle."""

    name: str
    words: tuple[str, ...]
    report: str | None = None
    killed: bool = False


def ways(*, with_ray: bool) -> Iterator[Way]:
    """Cold, warm, in shards, combined, over a local Ray cluster, killed and run again."""
    yield _run("cold", FIRST, "--cache", "cache")
    yield _run("warm", "warm", "--cache", "cache")
    for number in range(1, SHARDS + 1):
        part = f"{number}/{SHARDS}"
        yield Way(
            name=f"shard {number} of {SHARDS}",
            words=("run", "fleet.yml", "--device", "cpu", "--shard", part, "--output", f"shards/{number}"),
        )
    yield Way(
        name="their combination", words=("report", "combine", "shards", "--output", "combined"), report="combined"
    )
    if with_ray:
        yield _run("on a local Ray cluster", "ray", "--ray")
    killed = _run("killed", "killed", "--cache", "killed-cache")
    yield replace(killed, report=None, killed=True)
    yield replace(killed, name="run again", killed=False)


def _run(name: str, output: str, *more: str) -> Way:
    return Way(name=name, words=("run", "fleet.yml", "--device", "cpu", "--output", output, *more), report=output)


def kill_in_the_middle(process: subprocess.Popen[bytes], report: Path, at: int) -> int:
    """kill -9 a run once so many adapters are in its report; how many there were then."""
    while process.poll() is None:
        judged = in_report(report)
        if judged >= at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.1)
    return in_report(report)


def in_report(report: Path) -> int:
    try:
        return len(json.loads(report.read_bytes())["adapters"])
    except (OSError, ValueError):
        return 0


def stored(directory: Path) -> Report:
    """The report in a directory."""
    return read((directory / "report.json").read_bytes(), str(directory))
