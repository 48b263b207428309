"""Changes a published directory at random, and reports every change that `verify` neither names nor expects.

    python tests/tools/verify_changes.py [COUNT] [FIRST SEED]

Each example changes one key of a JSON file, one byte, or adds one file. It exits with 1 if any change passes.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.verify.random_changes import failures, places

BLOCK = 100


def main(count: int, first: int) -> int:
    """Run the examples, and print what passes."""
    started, found, done = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as root:
        made = places(Path(root))
        for number, start in enumerate(range(first, first + count, BLOCK)):
            seeds = range(start, min(start + BLOCK, first + count))
            for one in failures(made[number % len(made)], seeds):
                found.append(one)
                print(one, flush=True)
            done += len(seeds)
            if number % 10 == 0:
                print(f"{done:,} changes, {len(found)} passed, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{done:,} changes, {len(found)} that nothing names, in {time.monotonic() - started:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*(int(one) for one in (sys.argv[1:] + ["10000", "0"][len(sys.argv) - 1 :]))))
