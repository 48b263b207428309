"""Runs that publish and are killed, and what they may leave: whole models under their names, and an unchanged base.

In: a directory with a base and adapters. Out: whether everything in the target is whole.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.support.command import COMMAND, environment

CORES = os.cpu_count() or 1
ROOT = Path(__file__).parents[2]
PLAYED = (sys.executable, "-m", "tests.support.played_merges")
OUTPUT = "merge-gate-report"
PATIENCE_S = 120.0
ENDS = {0: "published", 2: "refused at its start", 3: "lost a name to another run", -signal.SIGKILL: "killed"}

_FILLED = """
import os, shutil, sys
from pathlib import Path
from merge_gate.features.publish import partial
from merge_gate.files.identity import directory_identity
place = Path(sys.argv[1])
rename = Path.rename
made = partial.PartialDirectory(place / "one")
(made.model / "model.safetensors").write_bytes(b"new")

def kill(*_):
    os.kill(os.getpid(), 9)
"""


def killed(place: Path, *lines: str) -> None:
    """Run a program that fills the partial directory of `place / "one"`, and then these lines, one of which kills it.

    The lines know `place`, `made` (the partial directory), `kill`, and `rename` (of `Path`).
    """
    done = subprocess.run([sys.executable, "-c", "\n".join((_FILLED, *lines)), str(place)], check=False)
    assert done.returncode == -signal.SIGKILL


def killed_before_a_look(place: Path, change: str = "") -> None:
    """Kill a program after `change`, and after the exchange of two models, before what came out of it is looked at."""
    exchange = ("partial.directory_identity = kill", "made.publish(replaces=before)")
    killed(place, 'before = directory_identity(place / "one")', change, *exchange)


class KilledRuns:
    """One directory, and an undisturbed run in it. `adapters` are words of the real command; empty plays the worker."""

    def __init__(self, place: Path, dice: random.Random, adapters: tuple[str, ...] = ()) -> None:
        self.place, self.dice = place, dice
        self.target = place / "merged"
        run = (*COMMAND, "run", *adapters, "--base", "base", "--device", "cpu") if adapters else PLAYED
        self.command = (*run, "--publish", "merged")
        self.base = digests(place / "base")
        began_s = time.monotonic()
        process = self.start()
        self.wait_for_partial(process)
        first_s = time.monotonic()
        assert process.wait(PATIENCE_S) == 0, (place / "log").read_text()
        self.length_s, self.writing_s = time.monotonic() - began_s, time.monotonic() - first_s
        self.models = set(self.named())
        assert self.models

    def start(self, *prefix: str, output: str = OUTPUT) -> subprocess.Popen[bytes]:
        with (self.place / ("log" if output == OUTPUT else f"{output}.log")).open("wb") as log:
            return subprocess.Popen(
                [*prefix, *self.command, "--output", output],
                cwd=self.place,
                env=environment(PYTHONPATH=str(ROOT)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def partials(self) -> list[str]:
        return [path.name for path in self.target.glob(".*")]

    def named(self) -> list[str]:
        return [path.name for path in self.target.glob("[!.]*")]

    def wait_for_partial(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the run writes a model. What an earlier run left does not count: it is removed first."""
        leftovers = {name: (self.target / name).stat().st_ino for name in self.partials()}
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s and process.poll() is None:
            for name in self.partials():
                try:
                    if (self.target / name).stat().st_ino != leftovers.get(name):
                        return
                except FileNotFoundError:
                    continue
            time.sleep(0.001)

    def kill_once(self) -> str:
        """Kill a run and its worker while it publishes, and look at what is left. Returns how far it came."""
        process = self.start()
        self.wait_for_partial(process)
        time.sleep(self.dice.uniform(0, self.writing_s))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        self.check()
        return "killed" if process.returncode == -signal.SIGKILL else "finished"

    def race(self, publishers: int, *, kills: bool) -> Counter[str]:
        """Runs publish the same names at once, and with `kills` one of them is killed. Returns how they ended.

        Each name is a whole model then. A run that is not killed publishes a name, or another run does.
        """
        places = [self.place / f"report-{number}" for number in range(publishers)]
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        processes = [self.start(output=place.name) for place in places]
        if kills:
            time.sleep(self.dice.uniform(self.length_s - self.writing_s, self.length_s * publishers / CORES))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(processes[0].pid, signal.SIGKILL)
        codes = [process.wait(PATIENCE_S) for process in processes]
        self.check()
        assert set(self.named()) == self.models
        published: set[str] = set()
        for code, place in zip(codes, places, strict=True):
            log = place.with_suffix(".log").read_text()
            assert code in ENDS, log
            assert code in {0, -signal.SIGKILL} or "another run of merge-gate is writing" in log, log
            if code in {0, 3}:
                entries = json.loads((place / "report.json").read_bytes())["adapters"]
                published |= {entry["name"] for entry in entries if entry["cause"] is None}
        assert kills or (published, self.partials()) == (self.models, [])
        return Counter(ENDS[code] for code in codes)

    def check(self) -> None:
        """Everything that has a name is whole, and the base is unchanged."""
        for name in self.named():
            check_whole(self.target / name)
        assert digests(self.place / "base") == self.base

    def finish(self) -> None:
        """An undisturbed run publishes every model, and leaves nothing else."""
        process = self.start()
        assert process.wait(PATIENCE_S) == 0, (self.place / "log").read_text()
        self.check()
        assert (set(self.named()), self.partials()) == (self.models, [])


def check_whole(model: Path) -> None:
    """Every file of a published directory is as its manifest says, and there is no other."""
    listed = {file["path"]: file["sha256"] for file in json.loads((model / "merge-gate.json").read_bytes())["files"]}
    found = digests(model)
    found.pop("merge-gate.json")
    assert found == listed, model


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lay_real(place: Path) -> tuple[str, ...]:
    """A base of 6 million parameters and two adapters. Returns the adapters' names."""
    from tests.support.models import llama, make_adapter  # noqa: PLC0415 - imports torch

    place.mkdir()
    llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2).save_pretrained(place / "base")
    for seed, name in enumerate(("one", "two")):
        make_adapter(place / "base", place / name, seed=seed)
    return ("one", "two")
