"""A fleet: what 1,000 adapters on three bases cost in every way, with ten changed, and whether the reports are alike.

    python benchmarks/fleet.py                    # 1,000 adapters; minutes
    python benchmarks/fleet.py --count 60         # a smoke run
    python benchmarks/fleet.py --ray              # over a local Ray cluster as well; needs the extra `ray`
    python benchmarks/fleet.py --only-changed     # cold, then warm, ten changed and those ten alone

In: how many adapters. Out: a table of whole processes, imports and all, in the order in which they run: cold (an empty
cache), warm, in four shards and their combination, killed (-9) in the middle and run again; then, in turn, as often as
`--repeat` says, warm, ten changed, and those ten alone without a cache, with their medians. Each report of the whole
fleet must be the cold one but for times and marks; exit code 1 where one is not. The tests do the same with adapters
of their own (tests/run/test_every_way.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from inputs import GATE
from make_adapters import make_adapters
from make_base import make_base
from measure import Measured, measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.fleet_commands import FIRST, Way, kill_in_the_middle, stored, ways
from tests.support.small_fleet import same

SIZE = "pico"
BASES = 3
CHANGED = 10


def main() -> int:
    words = argparse.ArgumentParser(description="1,000 adapters: cold, warm, in shards, after a kill, ten changed")
    words.add_argument("--count", type=int, default=1000)
    words.add_argument("--repeat", type=int, default=3, help="rounds of what is measured in turn (default 3)")
    words.add_argument("--work", type=Path, help="where the fleet is made (default: a temporary directory)")
    words.add_argument("--ray", action="store_true", help="over a local Ray cluster as well")
    words.add_argument("--only-changed", action="store_true", help="no shards, no kill")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-", dir=asked.work) as directory:
        fleet = Fleet(Path(directory), asked.count)
        for way in ways(with_ray=asked.ray):
            if not asked.only_changed or way.report == FIRST:
                fleet.judge(way)
        fleet.in_turn(asked.repeat)
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
            f"{count} adapters on {BASES} bases ({SIZE}); {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, torch {version('torch')}, PEFT {version('peft')}; {load()}",
            flush=True,
        )

    def judge(self, way: Way) -> None:
        """Run it where the fleet is, and compare its report."""
        if way.killed:
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with subprocess.Popen([GATE, *way.words], cwd=self.place, **silent) as process:
                report = self.place / way.words[-1] / "report.json"
                judged = kill_in_the_middle(process, report, len(self.adapters) // 3)
            print(f"killed with {judged} in the report", flush=True)
            return
        alike = ""
        measured = self.measured(way.words)
        if way.report is not None:
            is_alike = same(stored(self.place / way.report)) == same(stored(self.place / FIRST))
            self.others += not is_alike
            alike = "  the report of the cold run but for times and marks" if is_alike else "  ANOTHER REPORT"
        print(f"{told(way.name, [measured])}  exit {measured.exit_code}{alike}", flush=True)

    def measured(self, words: tuple[str, ...]) -> Measured:
        return measure(["env", "--chdir", str(self.place), GATE, *words])

    def in_turn(self, repeat: int) -> None:
        """Warm, ten changed, the ten alone: one after the other, so that a slow minute hits all alike."""
        run = ("run", "fleet.yml", "--device", "cpu", "--output")
        only = [word for one in self.changed() for word in ("--only", one)]
        cache = ("--cache", "cache")
        commands = {
            "warm": (*run, "warm", *cache),
            "ten changed": (*run, "changed", *cache),
            "those ten alone, without a cache": (*run, "ten", *only),
        }
        runs: dict[str, list[Measured]] = {name: [] for name in commands}
        for _ in range(repeat):
            for name, words in commands.items():
                if name == "ten changed":
                    self.change()
                runs[name].append(self.measured(words))
            cached = sum(one.cached for one in stored(self.place / "changed").adapters)
            self.others += cached != len(self.adapters) - min(CHANGED, len(self.adapters))
        print(f"medians of {repeat}; {load()}")
        for name, figures in runs.items():
            print(told(name, figures))
        ten, alone = (median(one.wall_s for one in runs[name]) for name in list(commands)[1:])
        print(f"ten changed take {ten / alone:.2f} times what they take alone")

    def changed(self) -> list[str]:
        step = max(len(self.adapters) // CHANGED, 1)
        return [f"{one.parent.name[-1]}-{one.name}" for one in self.adapters[::step][:CHANGED]]

    def change(self) -> None:
        """Other weights for ten adapters."""
        for name in self.changed():
            number, _, folder = name.partition("-")
            file = self.place / f"adapters-{number}" / folder / "adapter_model.safetensors"
            data = bytearray(file.read_bytes())
            data[-4] = (data[-4] + 1) % 256  # the lowest bits of a float32
            file.write_bytes(data)


def told(what: str, runs: list[Measured]) -> str:
    wall_s = median(one.wall_s for one in runs)
    cpu_s = median(one.user_s + one.system_s for one in runs)
    peak_mib = median(one.peak_anon_mib for one in runs)
    return f"{what:<32} {wall_s:8.2f} s  CPU {cpu_s:8.2f} s  {peak_mib:6.0f} MiB"


def load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
