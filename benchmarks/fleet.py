"""A fleet: what 1,000 adapters on three bases cost cold, warm, and with ten changed, and whether the reports are alike.

    python benchmarks/fleet.py                    # 1,000 adapters; minutes
    python benchmarks/fleet.py --count 60         # a smoke run
    python benchmarks/fleet.py --ray              # over a local Ray cluster as well; needs the extra `ray`

In: how many adapters. Out: a table of whole processes, imports and all, in the order in which they run: cold (an empty
cache), warm, ten adapters changed, the ten alone without a cache, in four shards and their combination, killed (-9) in
the middle and resumed. Each report of the whole fleet must be the cold one but for times and marks; exit code 1 where
one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inputs import GATE
from make_adapters import make_adapters
from make_base import make_base
from measure import Measured, measure

SIZE = "pico"
BASES = 3
CHANGED = 10
SHARDS = 4


def main() -> int:
    words = argparse.ArgumentParser(description="1,000 adapters: cold, warm, changed, in shards, resumed")
    words.add_argument("--count", type=int, default=1000)
    words.add_argument("--work", type=Path, help="where the fleet is made (default: a temporary directory)")
    words.add_argument("--ray", action="store_true", help="over a local Ray cluster as well")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-", dir=asked.work) as directory:
        fleet = Fleet(Path(directory), asked.count)
        fleet.run(with_ray=asked.ray)
    return 1 if fleet.others else 0


class Fleet:
    """The fleet on disk, and the report that all others are held against."""

    def __init__(self, place: Path, count: int) -> None:
        self.place, self.others = place, 0
        self.adapters: list[Path] = []
        entries = []
        for number in range(BASES):
            base = place / f"base-{number}"
            make_base(SIZE, base)
            share = count // BASES + (number < count % BASES)
            made = make_adapters(SIZE, base, place / f"adapters-{number}", share)
            self.adapters += made
            entries += [
                {"name": f"{number}-{one.name}", "path": str(one), "base": {"model": str(base)}} for one in made
            ]
        (place / "fleet.yml").write_text(json.dumps({"version": 1, "adapters": entries}), encoding="utf-8")
        print(
            f"{count} adapters on {BASES} bases ({SIZE}); {platform.machine()}, Python {platform.python_version()}, "
            f"torch {version('torch')}, PEFT {version('peft')}; load average {os.getloadavg()[0]:.1f}",
            flush=True,
        )

    def run(self, *, with_ray: bool) -> None:
        cache = ("--cache", str(self.place / "cache"))
        self.told("cold", self.gate("cold", *cache))
        self.told("warm", self.gate("warm", *cache), "warm")
        self.told("whole, without a cache", self.gate("whole"), "whole")
        for index in range(SHARDS):
            self.told(
                f"shard {index + 1} of {SHARDS}", self.gate(f"shards/{index}", "--shard", f"{index + 1}/{SHARDS}")
            )
        combine = [GATE, "report", "combine", str(self.place / "shards"), "--output", str(self.place / "combined")]
        self.told("combined", measure(combine), "combined")
        if with_ray:
            self.told("over Ray", self.gate("ray", "--ray"), "ray")
        self.kill("killed")
        self.told("resumed", self.gate("killed", "--resume"), "killed")
        self.change()
        self.told("ten changed", self.gate("changed", *cache))
        only = [word for one in self.changed() for word in ("--only", one)]
        self.told("the ten alone, without a cache", self.gate("ten", *only))
        cached = sum(one["cached"] for one in self.report("changed")["adapters"])
        print(f"of the run with ten changed, {cached} were cached")

    def gate(self, output: str, *words: str) -> Measured:
        return measure(self.command(output, *words))

    def command(self, output: str, *words: str) -> list[str]:
        named = ["--device", "cpu", "--output", str(self.place / output)]
        return [GATE, "run", str(self.place / "fleet.yml"), *named, *words]

    def told(self, what: str, measured: Measured, output: str | None = None) -> None:
        alike = ""
        if output is not None:
            is_alike = same(self.report(output)) == same(self.report("cold"))
            self.others += not is_alike
            alike = "  the report of the cold run but for times and marks" if is_alike else "  ANOTHER REPORT"
        cpu_s = measured.user_s + measured.system_s
        print(
            f"{what:<32} exit {measured.exit_code}  wall {measured.wall_s:8.2f} s  CPU {cpu_s:8.2f} s  "
            f"{measured.peak_anon_mib:6.0f} MiB{alike}",
            flush=True,
        )

    def report(self, output: str) -> Any:
        return json.loads((self.place / output / "report.json").read_bytes())

    def kill(self, output: str) -> None:
        """kill -9 a run once a third of it is in its report."""
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(self.command(output), **silent) as process:
            while process.poll() is None:
                time.sleep(0.2)
                try:
                    judged = len(self.report(output)["adapters"])
                except (OSError, ValueError):
                    continue
                if judged >= len(self.adapters) // 3:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
        print(f"killed with {len(self.report(output)['adapters'])} in the report", flush=True)

    def changed(self) -> list[str]:
        step = max(len(self.adapters) // CHANGED, 1)
        return [f"{one.parent.name[-1]}-{one.name}" for one in self.adapters[::step][:CHANGED]]

    def change(self) -> None:
        """Other weights for ten adapters."""
        for name in self.changed():
            number, _, folder = name.partition("-")
            file = self.place / f"adapters-{number}" / folder / "adapter_model.safetensors"
            data = bytearray(file.read_bytes())
            data[-4] ^= 1  # the lowest bits of a float32
            file.write_bytes(data)


def same(report: Any) -> Any:
    """A report without times and marks."""
    adapters = [{**one, "seconds": 0, "judged": None, "cached": False} for one in report["adapters"]]
    environment = {**report["environment"], "sandbox": None}
    return {**report, "adapters": adapters, "environment": environment, "shard": None}


if __name__ == "__main__":
    sys.exit(main())
