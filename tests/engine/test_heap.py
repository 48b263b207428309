"""Memory that is free, and whose it is: a real allocator in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from merge_gate.engine.heap import REUSE

MIB = 1 << 20

FREED = """
import re
from pathlib import Path
from merge_gate.engine.heap import give_back

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

pieces = [bytearray(b"x") * (20 << 20) for _ in range(10)]
full = held()
last = pieces.pop()
del pieces
kept = held()
give_back()
print(full - kept, full - held())
"""


def test_what_a_tensor_has_left_stays_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], env=os.environ | REUSE, capture_output=True, check=True)
    freed, given_back = map(int, done.stdout.split())
    assert freed < 20 * MIB
    assert given_back > 150 * MIB
