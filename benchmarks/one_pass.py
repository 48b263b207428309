"""Whole runs of the gate on bases that are in memory, that do not fit in it, or that are on no disk.

    python benchmarks/one_pass.py [ROW …] [--work DIR] [--repeat N] [--size SIZE]
    python benchmarks/one_pass.py local-1.1b-8 cached-lora-8 --against DIR --pairs 5

A line of JSON for each run: wall and CPU seconds, the peak of anonymous and shared memory of all processes, and the
bytes that came from the disk. Another line for each row has the medians. With `--against`, the same rows run in turn
with the gate in DIR/.venv, which is a checkout of another version; the last line of a row compares the two.

Rows `cached-…` run with the base in the page cache, rows `local-…` with a cold one and within a limit. Rows `stream-…`
read the base from hub_server.py by ranges. Needs root (cgroups, the page cache). Bases and adapters are made in DIR,
16 GB for `local-7b-…`. `--size tiny` is a smoke run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hub_server import repository
from inputs import COMBINED, Job
from limited import Limited, drop_caches, run
from make_adapters import make_adapters
from make_base import SIZES, make_base
from rows import ROWS as CACHED

HERE = Path(__file__).parent
GIB = 1 << 30
LIMIT_BYTES = 6 * GIB
RATE = 200
"""Megabytes a second of a streamed base, unless a row has no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`job` on a base of `size` within `max_bytes`. `is_cached`: the base's files are in the page cache."""

    size: str
    job: Job = field(default_factory=Job)
    max_bytes: int | None = None
    streams: bool = False
    rate: float = 0.0
    is_cached: bool = False


STREAMED = Row(size="8b", max_bytes=LIMIT_BYTES, streams=True, rate=RATE)

ROWS = {
    "cached-0.1b": Row(size="0.1b", is_cached=True),
    "cached-lora-1": Row(size="1.1b", is_cached=True),
    **{f"cached-{name}": Row(size="1.1b", job=row.job, is_cached=True) for name, row in CACHED.items()},
    "cached-8b-8": Row(size="8b", job=Job(count=8), is_cached=True),
    "local-1.1b-8": Row(size="1.1b", job=Job(count=8), max_bytes=3 * GIB // 2),
    "local-1.1b-4-dtypes": Row(size="1.1b", job=Job(count=4, dtypes=("bfloat16", "float16")), max_bytes=3 * GIB // 2),
    "local-7b-4": Row(size="7b", job=Job(count=4), max_bytes=8 * GIB),
    "local-7b-4-small": Row(size="7b", job=Job(count=4), max_bytes=4 * GIB),
    "stream-1.1b-1": replace(STREAMED, size="1.1b"),
    "stream-1.1b-8": replace(STREAMED, size="1.1b", job=Job(count=8)),
    "stream-8b-1": STREAMED,
    "stream-8b-8": replace(STREAMED, job=Job(count=8)),
    "stream-70b-2": Row(size="70b", job=Job(count=2), streams=True),
    "stream-70b-2-slice": Row(size="70b-slice", job=Job(count=2), streams=True),
}


@contextlib.contextmanager
def hub(size: str, rate: float) -> Iterator[str]:
    """The address of a Hub that has the base."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "hub_server.py", str(port), size, "--rate", str(rate)]
    server = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def config(row: Row, base: str, adapters: list[Path]) -> str:
    settings: dict[str, object] = {"model": base, "dtype": list(row.job.dtypes), "quantization": row.job.quantization}
    settings |= {"access": "stream"} if row.streams else {}
    entries: list[dict[str, object]] = [{"path": str(one)} for one in adapters]
    if row.job.combine:
        names = [one.name for one in adapters]
        combine = {"method": row.job.combine, "adapters": names, "weights": [1 / len(names)] * len(names)}
        entries.append({"name": COMBINED, "combine": combine | {"density": 0.5}})
    return json.dumps({"version": 1, "base": settings, "adapters": entries})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A row whose inputs are there. `python` runs the gate's version that is measured."""

    name: str
    row: Row
    work: Path
    base: str
    adapters: list[Path]

    def once(self, python: str, address: str) -> Limited:
        """One run. A Hub at `address` has the base if the row streams it."""
        home, log = self.work / "home", self.work / f"{self.name}.log"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        (self.work / "merge-gate.yml").write_text(config(self.row, self.base, self.adapters))
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"} if self.row.streams else {"HF_HUB_OFFLINE": "1"}
        environment = os.environ | {"HF_HOME": str(home / "hf"), "TMPDIR": str(home)} | online
        command = self._command(python, home)
        with log.open("wb") as output:
            options = {"cwd": self.work, "env": environment, "stdout": output, "stderr": output}
            if self.row.is_cached:
                self._read_base()
            else:
                drop_caches()
            measured = run(command, max_bytes=self.row.max_bytes, **options)
        if measured.exit_code:
            raise SystemExit(f"{self.name}: exit code {measured.exit_code}\n{log.read_text()[-2000:]}")
        return measured

    def _command(self, python: str, home: Path) -> list[str]:
        command = [python, "-P", "-m", "merge_gate", "run", "merge-gate.yml", "--output", str(home / "report")]
        return [*command, "--only", COMBINED] if self.row.job.combine else command

    def _read_base(self) -> None:
        for path in (
            *Path(self.base).glob("*.safetensors"),
            *(file for one in self.adapters for file in one.iterdir()),
        ):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def prepared(name: str, row: Row, work: Path) -> Prepared:
    base = f"bench/{row.size}" if row.streams else str(work / f"base-{row.size}")
    kind = "" if row.job.kind == "lora" else f"-{row.job.kind}"
    adapters = make_adapters(row.size, Path(base), work / f"adapters-{row.size}{kind}", row.job.count, row.job.kind)
    if not row.streams:
        make_base(row.size, Path(base))
    return Prepared(name=name, row=row, work=work, base=base, adapters=adapters)


# --- figures -------------------------------------------------------------------------------------------------------


def medians(runs: Sequence[Limited]) -> dict[str, object]:
    found: dict[str, object] = {
        key: statistics.median(getattr(one, key) for one in runs)
        for key in ("wall_s", "cpu_s", "peak_bytes", "read_bytes")
    }
    cpu = [one.cpu_s for one in runs]
    walls = [one.wall_s for one in runs]
    return found | {
        "runs": len(runs),
        "wall_spread": round((max(walls) - min(walls)) / statistics.median(walls), 3),
        "cpu_spread": round((max(cpu) - min(cpu)) / statistics.median(cpu), 3),
    }


def rate_of(row: Row, wall_s: float) -> dict[str, object]:
    """What the base's bytes took, if all of them were streamed."""
    if not row.streams:
        return {}
    size = sum(shard.size for shard in repository(row.size)[1].values())
    least = {"of_size_by_rate": round(wall_s / (size / (row.rate * 1e6)), 3)} if row.rate else {}
    return {"base_bytes": size, "gb_per_s": round(size / 1e9 / wall_s, 3)} | least


def ratios(ours: Sequence[Limited], theirs: Sequence[Limited]) -> dict[str, float]:
    """Of the medians, ours over the other version's."""
    return {
        key: round(statistics.median(getattr(one, key) for one in ours) / other, 3)
        for key in ("wall_s", "cpu_s", "peak_bytes", "read_bytes")
        if (other := statistics.median(getattr(one, key) for one in theirs))
    }


def show(name: str, which: str, figures: dict[str, object]) -> None:
    print(json.dumps({"row": name, "which": which} | figures | {"load": os.getloadavg()[0]}), flush=True)


def measure(one: Prepared, pythons: dict[str, str], repeat: int) -> None:
    """Run a row `repeat` times with each version, in turn."""
    runs: dict[str, list[Limited]] = {which: [] for which in pythons}
    row = one.row
    with hub(row.size, row.rate) if row.streams else contextlib.nullcontext("") as address:
        for _ in range(repeat):
            for which, python in pythons.items():
                runs[which].append(one.once(python, address))
                show(one.name, which, asdict(runs[which][-1]))
    for which, found in runs.items():
        show(one.name, f"{which}, median", medians(found) | rate_of(row, medians(found)["wall_s"]))
    if len(runs) > 1:
        show(one.name, "ours / other", ratios(*runs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=list(ROWS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "merge-gate-one-pass"))
    parser.add_argument("--repeat", "--pairs", type=int, default=1, help="runs of each row and version")
    parser.add_argument("--against", type=Path, help="a checkout of another version, with it in its .venv")
    parser.add_argument("--size", choices=SIZES, help="another size of base for all rows")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    pythons = {"ours": sys.executable}
    if asked.against is not None:
        pythons["other"] = str(asked.against.absolute() / ".venv/bin/python")
        if streamed := [name for name in asked.rows if ROWS[name].streams]:
            parser.error(f"--against: the other version streams no base ({', '.join(streamed)})")
    for name in asked.rows:
        row = replace(ROWS[name], size=asked.size) if asked.size else ROWS[name]
        measure(prepared(name, row, asked.work.absolute()), pythons, asked.repeat)


if __name__ == "__main__":
    main()
