"""Bases that do not fit in memory, or are on no disk: time, memory, and bytes of whole runs of the gate.

    python benchmarks/one_pass.py [ROW …] [--work DIR] [--repeat N]

Rows on local bases run with a cold page cache. Rows `stream-…` read the base from hub_server.py by ranges; `touched-…`
repeats a run with the base record that a first run left in the cache. Needs root (cgroups, the page cache). Bases and
adapters are made in DIR, 16 GB for `local-7b-…`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from limited import Limited, drop_caches, run
from make_adapters import make_adapters
from make_base import make_base
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`adapters` LoRA on a base of `size` within `limit_bytes`, in the stored dtype or in several.

    `targets` are all linear layers if it is empty.
    """

    size: str
    adapters: int
    limit_bytes: int | None
    streams: bool = False
    rate: float = 0.0
    targets: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    warm: bool = False


ROWS = {
    "local-1.1b-8": Row(size="1.1b", adapters=8, limit_bytes=3 * GIB // 2),
    "local-1.1b-4-dtypes": Row(size="1.1b", adapters=4, limit_bytes=3 * GIB // 2, dtypes=("bfloat16", "float16")),
    "local-7b-4": Row(size="7b", adapters=4, limit_bytes=8 * GIB),
    "local-7b-4-small": Row(size="7b", adapters=4, limit_bytes=4 * GIB),
    "stream-1.1b-1": Row(size="1.1b", adapters=1, limit_bytes=6 * GIB, streams=True, rate=200),
    "stream-1.1b-8": Row(size="1.1b", adapters=8, limit_bytes=6 * GIB, streams=True, rate=200),
    "stream-8b-1": Row(size="8b", adapters=1, limit_bytes=6 * GIB, streams=True, rate=200),
    "stream-8b-8": Row(size="8b", adapters=8, limit_bytes=6 * GIB, streams=True, rate=200),
    "touched-8b": Row(
        size="8b", adapters=2, limit_bytes=6 * GIB, streams=True, rate=200, targets=("q_proj", "v_proj"), warm=True
    ),
    "stream-70b-2": Row(size="70b", adapters=2, limit_bytes=None, streams=True),
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
    settings: dict[str, object] = {"model": base} | ({"access": "stream"} if row.streams else {})
    settings |= {"dtype": list(row.dtypes)} if row.dtypes else {}
    return json.dumps({"version": 1, "base": settings, "adapters": [str(one) for one in adapters]})


def targeted(paths: list[Path], targets: tuple[str, ...], directory: Path) -> list[Path]:
    """The adapters, cut down to some of their modules."""
    for path in paths if targets else []:
        kept = directory / path.name
        kept.mkdir(parents=True, exist_ok=True)
        settings = json.loads((path / "adapter_config.json").read_text())
        (kept / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(targets)}))
        tensors = load_file(path / "adapter_model.safetensors")
        named = {name: one for name, one in tensors.items() if any(f".{target}." in name for target in targets)}
        save_file(named, kept / "adapter_model.safetensors", metadata={"format": "pt"})
    return [directory / path.name for path in paths] if targets else paths


def once(row: Row, work: Path, name: str) -> Limited:
    adapters = make_adapters(row.size, Path(f"bench/{row.size}"), work / f"adapters-{row.size}", row.adapters)
    adapters = targeted(adapters, row.targets, work / f"adapters-{name}")
    home = work / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    base = f"bench/{row.size}" if row.streams else str(work / f"base-{row.size}")
    if not row.streams and not Path(base, "config.json").exists():
        make_base(row.size, Path(base))
    (work / "merge-gate.yml").write_text(config(row, base, adapters))
    command = [sys.executable, "-P", "-m", "merge_gate", "run", "merge-gate.yml"]
    first, second = [*command], [*command]
    if row.warm:  # another adapter than in the run before, whose verdict is not in the cache
        cache = ["--cache", str(home / "cache")]
        first += [*cache, "--only", adapters[0].name, "--read", "whole"]
        second += [*cache, "--only", adapters[1].name, "--read", "touched"]
    with hub(row.size, row.rate) if row.streams else contextlib.nullcontext("") as address:
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"} if row.streams else {"HF_HUB_OFFLINE": "1"}
        environment = os.environ | {"HF_HOME": str(home / "hf"), "TMPDIR": str(home)} | online
        with (work / f"{name}.log").open("wb") as log:
            options = {"cwd": work, "env": environment, "stdout": log, "stderr": log}
            if row.warm:
                run(first, limit_bytes=row.limit_bytes, **options)
            drop_caches()
            measured = run(second, limit_bytes=row.limit_bytes, **options)
    if measured.exit_code:
        raise SystemExit(f"{name}: exit code {measured.exit_code}\n{(work / f'{name}.log').read_text()[-2000:]}")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=list(ROWS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "merge-gate-one-pass"))
    parser.add_argument("--repeat", type=int, default=1)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    for name in asked.rows:
        for _ in range(asked.repeat):
            found = once(ROWS[name], asked.work, name)
            print(json.dumps({"row": name} | asdict(found) | {"load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
