"""The time that `--publish` adds to `merge-gate run`, against `cp` and two `sha256sum` of the same bytes.

    python benchmarks/publish.py --size tiny|1.1b|7b [--repeat 3] [--work DIR] [--memory]

In: a size of make_base.py. Out: a table on standard output. Each round runs the gate without and with `--publish`, and
then `cp` and `sha256sum` twice, of the base's weight files, onto the same disk. `--memory` also runs the gate with
`--publish` in a cgroup (limited.py, as root), and prints its peak of anonymous and shared memory. `--repeat 0` measures
no time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

import limited
from make_adapters import make_adapters
from make_base import make_base
from measure import Measured, measure

RATIO, LIMIT_GIB = 1.5, 1.5
REFERENCE = 'cp "$@" "$0"/ && sha256sum "$0"/* && sha256sum "$0"/*'


def main() -> None:
    """Make the inputs once, and alternate the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/merge-gate-publish"))
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    base = make_base(asked.size, asked.work / asked.size / "base")
    (adapter,) = make_adapters(asked.size, base, asked.work / asked.size / "adapters", 1)
    gate = [sys.executable, "-P", "-m", "merge_gate", "run", str(adapter), "--base", str(base)]
    run = [*gate, "-o", str(asked.work / "report")]
    target, copy = asked.work / "published", asked.work / "copied"
    publish = [*run, "--publish", str(target)]
    files = sorted(base.glob("*.safetensors"))
    reference = ["sh", "-c", REFERENCE, str(copy), *map(str, files)]
    rounds: dict[str, list[Measured]] = {"run": [], "run --publish": [], "cp + 2 x sha256sum": []}
    for number in range(asked.repeat + 1 if asked.repeat else 0):
        for name, command in zip(rounds, (run, publish, reference), strict=True):
            for directory in (target, copy):
                shutil.rmtree(directory, ignore_errors=True)
            copy.mkdir(parents=True)
            measured = measure(command)
            if measured.exit_code:
                raise SystemExit(f"{name} ended with {measured.exit_code}")
            if number:  # the first round warms the page cache
                rounds[name].append(measured)
    size_bytes = sum(file.stat().st_size for file in files)
    if asked.repeat:
        show(asked.size, size_bytes, rounds)
    if asked.memory:
        shutil.rmtree(target, ignore_errors=True)
        held = limited.run(publish)
        print(f"peak memory of the cgroup: {held.peak_bytes / (1 << 30):.2f} GiB (wanted {LIMIT_GIB})")


def show(size: str, size_bytes: int, rounds: dict[str, list[Measured]]) -> None:
    """Print the table, and the ratio."""
    repeat = len(rounds["run"])
    print(f"{size}: {size_bytes / (1 << 30):.2f} GiB of weights, median of {repeat}")
    print("| command | wall s | CPU s | peak anonymous MiB |\n|---|--:|--:|--:|")
    for name, found in rounds.items():
        cpu_s = statistics.median(one.user_s + one.system_s for one in found)
        peak_mib = max(one.peak_anon_mib for one in found)
        print(f"| {name} | {wall_s(found):.2f} | {cpu_s:.2f} | {peak_mib:.0f} |")
    added_s = wall_s(rounds["run --publish"]) - wall_s(rounds["run"])
    reference_s = wall_s(rounds["cp + 2 x sha256sum"])
    print(f"--publish adds {added_s:.2f} s, {added_s / reference_s:.2f} of the reference (wanted {RATIO})")


def wall_s(found: list[Measured]) -> float:
    return statistics.median(one.wall_s for one in found)


if __name__ == "__main__":
    main()
