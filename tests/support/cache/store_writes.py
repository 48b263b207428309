"""A process that writes to a store until it is killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from merge_gate.features.cache.store import Seal, Store

NAME, OTHER = "a" * 64, "b" * 64


def store(place: Path, secret: str = "") -> Store:
    return Store(str(place / "cache"), Seal(secret), notify=lambda _: pytest.fail("it could not write"))


WRITER = """
import sys
from merge_gate.features.cache.store import Seal
from merge_gate.features.cache.store import Store
store = Store(sys.argv[1], Seal(), print)
print("ready", flush=True)
for turn in range(10**9):
    store.put("verdicts", "a" * 64, {"turn": turn, "same": turn, "much": "x" * 200_000})
"""


def kill_while_writing(place: Path, after_s: float) -> object:
    """What is there after a writer was killed."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(place / "cache")], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        time.sleep(after_s)
        writer.kill()
    return store(place).get("verdicts", NAME)
