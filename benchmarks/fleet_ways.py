"""One fleet, judged whole, in four shards and on a local Ray cluster: the same report, and what each way took.

    python benchmarks/fleet_ways.py DIR --adapters 1000

DIR is new or was made by this script. Prints a row for each way: seconds by the clock, processor seconds of everything
that was started and waited for (Ray's workers are not), and whether the report is that of the whole run but for times.
Exit code 1 where one is not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from merge_gate.report.json_report import read
from tests.fleet.tiny import VARIANTS, lay_fleet, same
from tests.models import Shelf

if TYPE_CHECKING:
    from merge_gate.records.report import Report

SHARDS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--adapters", type=int, default=1000)
    arguments = parser.parse_args()
    place: Path = arguments.directory
    if not (place / "fleet.yml").exists():
        place.mkdir(parents=True, exist_ok=True)
        lay_fleet(Shelf(place / "shelf"), place, each=-(-arguments.adapters // len(VARIANTS)))
    print("| way | s by the clock | s of processors | same report |\n|---|---|---|---|")
    taken = timed(place, ["run", "fleet.yml", "--output", "whole"])
    whole = same(stored(place / "whole"))
    print(row("whole", *taken, ""), flush=True)
    parts = [
        timed(place, ["run", "fleet.yml", "--shard", f"{number}/{SHARDS}", "--output", f"shards/{number}"])
        for number in range(1, SHARDS + 1)
    ]
    for number, taken in enumerate(parts, 1):
        print(row(f"shard {number} of {SHARDS}", *taken, ""), flush=True)
    taken = timed(place, ["report", "combine", "shards", "--output", "combined"])
    alike = [same(stored(place / "combined")) == whole]
    print(row("the four combined", *taken, alike[-1]), flush=True)
    taken = timed(place, ["run", "fleet.yml", "--output", "ray", "--ray"])
    alike.append(same(stored(place / "ray")) == whole)
    print(row("local Ray cluster", *taken, alike[-1]))
    return 0 if all(alike) else 1


def timed(place: Path, words: list[str]) -> tuple[float, float]:
    """Seconds by the clock and of processors. The fleet has broken adapters, so that the exit code is 0 or 1."""
    before, began = os.times(), time.monotonic()
    with (place / "log").open("wb") as log:
        code = subprocess.run(
            [sys.executable, "-P", "-m", "merge_gate", *words], cwd=place, check=False, stdout=log, stderr=log
        ).returncode
    if code not in {0, 1}:
        raise SystemExit(f"{' '.join(words)} ended with {code}; see {place / 'log'}")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, spent


def stored(directory: Path) -> Report:
    path = directory / "report.json"
    return read(path.read_bytes(), str(path))


def row(name: str, clock_s: float, processor_s: float, alike: object) -> str:
    said = {True: "yes", False: "NO"}.get(alike, alike) if isinstance(alike, bool) else alike
    return f"| {name} | {clock_s:.1f} | {processor_s:.1f} | {said} |"


if __name__ == "__main__":
    raise SystemExit(main())
