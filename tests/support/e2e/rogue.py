"""The entrypoint of an image whose code is hostile: what `trust-remote-code` lets a base model be.

The configuration's text says what to leave in place of the report: `KIND NAME SECRET`, such as `link summary.md /path`.
The report that it writes is that of a run in which everything passed. `facts NAME SHELF` prints what the container is
given. `sleep SECONDS` waits with what it was handed; all others print the digest of that, and `digest` does no more.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def report() -> dict:
    entry = {"name": "a", "verdict": "passed", "cause": None, "findings": [], "line": 1, "column": 1}
    counts = {"passed": 1, "failed": 0, "error": 0}
    return {"schema_version": "1.0", "complete": True, "result": "pass", "counts": counts, "adapters": [entry]}


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 << 30)


def facts(shelf: Path) -> None:
    """Print what the container is given."""
    shm = os.statvfs("/dev/shm")
    groups = ("memory.max", "memory/memory.limit_in_bytes"), ("cpu.max", "cpu/cpu.cfs_quota_us")
    memory, cpus = (next(text for name in names if (text := read("/sys/fs/cgroup", name))) for names in groups)
    seen = {
        "shm": shm.f_frsize * shm.f_blocks, "memory": memory, "cpus": cpus.split()[0], "words": sys.argv[1:],
        "shelf": sorted(path.name for path in shelf.glob("*")), "shelf is writable": os.access(shelf, os.W_OK),
        "debug": os.environ.get("MERGE_GATE_DEBUG"), "cache": os.environ["HF_HOME"],
    }  # fmt: skip
    sys.stdout.write(f"facts: {json.dumps(seen)}\n")


def read(*parts: str) -> str:
    try:
        return Path(*parts).read_text(encoding="ascii").strip()
    except OSError:
        return ""


PLANT = {
    "link": lambda path, secret: path.symlink_to(secret),
    "endless": lambda path, _secret: path.symlink_to("/dev/zero"),
    "pipe": lambda path, _secret: os.mkfifo(path),
    "sparse": lambda path, _secret: sparse(path),
    "directory": lambda path, _secret: path.mkdir(),
    "device": lambda path, _secret: os.mknod(path, 0o20666, os.makedev(1, 5)),
    "facts": lambda _path, shelf: facts(Path(shelf)),
    "hardlink": lambda path, _secret: path.hardlink_to(sys.argv[2]),
}


def main() -> int:
    kind, *words = Path(sys.argv[2]).read_text(encoding="utf-8").split()
    handed_over = sys.stdin.buffer.readline() if os.environ.get("MERGE_GATE_HANDOVER") else b""
    if kind == "sleep":
        signal.signal(signal.SIGTERM, lambda *_what: sys.exit(3))  # the first process of a container has no default
        time.sleep(float(words[0]))
        return 3
    sys.stdout.write(f"handed over: {hashlib.sha256(handed_over).hexdigest()}\n")
    if kind == "digest":
        return 3
    name, secret = words
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    for file, text in (("report.json", json.dumps(report())), ("summary.md", "all is well\n")):
        (output / file).write_text(text, encoding="utf-8")
    closed = output.joinpath("deep", *["d"] * 60, "closed")
    closed.mkdir(parents=True)
    closed.chmod(0)
    (output / name).unlink(missing_ok=True)
    try:
        PLANT[kind](output / name, secret)
    except OSError as error:
        sys.stdout.write(f"refused by the engine: {error.strerror}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
