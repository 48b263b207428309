"""kill -9 at random moments over real runs: does anything untrue, or anything at all, remain?

    python tests/tools/kills.py --kills 500 [--seed 1] [--patience 120]

Runs the real command over 12 adapters, good and broken, and kills the parent, the worker or both after a random time
between a millisecond and the length of a whole run. After each kill it holds:

1. The report, if there is one, is strict JSON; it says `pass` or `complete` only where that is so; each verdict in it
   is the one that an undisturbed run gives, or `error` for an adapter whose worker was killed.
2. No process of the run is left, and no half-written report.
3. Where only the worker was killed, the run ends by itself, and its exit code is that of its report.
4. After all kills, an undisturbed run gives every verdict, and no directory of a worker is left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.command import alive, children_of, merge_gate, start, strict_json

ADAPTERS = 12
VICTIMS = ("parent", "worker", "both")
GONE_WITHIN_S = 10.0


def main() -> int:
    words = argparse.ArgumentParser(description="kill -9 at random moments, and look at what is left")
    words.add_argument("--kills", type=int, default=500)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--patience", type=float, default=300.0, help="seconds that a run may take at most")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        return Trial(Path(directory), random.Random(asked.seed), asked.patience).run(asked.kills)


class Trial:
    """One place, its undisturbed verdicts, and what the kills have shown so far."""

    def __init__(self, place: Path, dice: random.Random, patience_s: float) -> None:
        self.place, self.dice, self.patience_s = place, dice, patience_s
        self.scratch = place / "tmp"
        self.scratch.mkdir()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        lay(place)
        began = time.monotonic()
        self.truth = self.undisturbed()
        self.length_s = time.monotonic() - began

    def run(self, kills: int) -> int:
        print(f"an undisturbed run takes {self.length_s:.1f} s: {sorted(Counter(self.truth.values()).items())}")
        for number in range(kills):
            self.kill_once(number)
            if (number + 1) % 25 == 0:
                print(f"{number + 1} kills: {dict(self.counts)}; wrong: {len(self.wrong)}", flush=True)
        self.check(self.undisturbed() == self.truth, "the run after all kills gives other verdicts")
        for directory in self.scratch.glob("merge-gate-*"):
            os.utime(directory, (0, 0))  # what a living run holds is locked; what is young is waited for
        self.undisturbed()
        left = [one.name for one in (*self.scratch.iterdir(), *(self.place / "merge-gate-report").glob(".*.tmp"))]
        self.check(not left, f"left behind: {left}")
        print(f"{kills} kills: {dict(self.counts)}", *self.wrong, sep="\n")
        return 1 if self.wrong else 0

    def undisturbed(self) -> dict[str, tuple[str, str | None]]:
        merge_gate("run", "gate.yml", "--device", "cpu", cwd=self.place, TMPDIR=str(self.scratch))
        return verdicts(strict_json(self.place / "merge-gate-report" / "report.json"))

    def kill_once(self, number: int) -> None:
        victim = self.dice.choice(VICTIMS)
        delay_s = self.dice.uniform(0.001, self.length_s) if number % 3 else self.dice.uniform(0.001, 0.3)
        process = start("run", "gate.yml", "--device", "cpu", cwd=self.place, TMPDIR=str(self.scratch))
        family = self.strike(process, victim, delay_s)
        where = f"kill {number} ({victim} after {delay_s:.3f} s)"
        try:
            code = process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            self.wrong.append(f"{where}: the run did not end")
            return
        deadline = time.monotonic() + GONE_WITHIN_S
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.check(not any(map(alive, family)), f"{where}: a worker outlives its run")
        self.look(where, code)

    def strike(self, process: subprocess.Popen[bytes], victim: str, delay_s: float) -> list[int]:
        time.sleep(delay_s)
        family = children_of(process.pid)
        for pid in {"parent": [process.pid], "worker": family, "both": [*family, process.pid]}[victim]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.counts["had ended"] += 1
        self.counts[victim] += 1
        return family

    def look(self, where: str, code: int) -> None:
        folder = self.place / "merge-gate-report"
        path = folder / "report.json"
        if not path.exists():
            self.counts["no report"] += 1
            self.check(code != 0, f"{where}: exit code 0 without a report")
            return
        report = strict_json(path)
        found = verdicts(report)
        self.counts["complete" if report["complete"] else "unfinished"] += 1
        lost = ("error", "not-judged")
        untrue = {name: verdict for name, verdict in found.items() if verdict not in {self.truth[name], lost}}
        self.check(not untrue, f"{where}: {untrue}")
        self.check(report["complete"] or report["result"] != "pass", f"{where}: an unfinished report says pass")
        if report["complete"]:
            missing, result = set(self.truth) - set(found), report["result"]
            self.check(not missing, f"{where}: a complete report lacks {missing}")
            said = {"pass": 0, "fail": 1, "error": 3}[result]
            self.check(code in {said, -signal.SIGKILL}, f"{where}: exit code {code}, the report says {result}")

    def check(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            self.wrong.append(otherwise)
            print(f"WRONG: {otherwise}", flush=True)


def lay(place: Path) -> None:
    """The demo's base, and twelve adapters: ten good ones, one with a NaN, one that is a pointer."""
    made = merge_gate("demo", "demo", cwd=place)
    assert made.code == 0, made.said
    (place / "demo" / "base").rename(place / "base")
    for number in range(ADAPTERS):
        source = {3: "nan", 7: "lfs-pointer"}.get(number, "good")
        shutil.copytree(place / "demo" / "adapters" / source, place / "adapters" / f"adapter-{number:02}")
    config = {"version": 1, "base": {"model": "./base"}, "adapters": [{"path": "./adapters/*"}]}
    (place / "gate.yml").write_text(json.dumps(config))
    shutil.rmtree(place / "demo")


def verdicts(report: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {one["name"]: (one["verdict"], one["cause"]) for one in report["adapters"]}


if __name__ == "__main__":
    raise SystemExit(main())
