"""kill -9 while a cache is written to: is anything but a whole entry, or none, ever read?

    python tests/tools/kills_cache.py --kills 200 [--seed 1]

A process writes entries of 200 kB over and over, under one name and in the place of each other, and is killed after a
random time between a millisecond and 60. After each kill, what is there must be whole: one that was put, or none before
the first. What is left half-written has another name, and is removed after a day.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.cache.store_writes import NAME, kill_while_writing


def main() -> int:
    words = argparse.ArgumentParser(description="kill -9 while a cache is written to")
    words.add_argument("--kills", type=int, default=200)
    words.add_argument("--seed", type=int, default=1)
    asked = words.parse_args()
    dice, wrong, turns, unfinished = random.Random(asked.seed), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        place = Path(directory)
        for number in range(asked.kills):
            found = kill_while_writing(place, dice.uniform(0.001, 0.06))
            is_whole = isinstance(found, dict) and found["turn"] == found["same"] and len(found["much"]) == 200_000
            if not is_whole and (found is not None or (place / "cache" / "verdicts" / NAME).exists()):
                wrong += 1
                print(f"kill {number}: {str(found)[:80]}")
            turns += found["turn"] if isinstance(found, dict) else 0
        unfinished = len(list((place / "cache" / "verdicts").glob(".*")))
    print(f"{asked.kills} kills, {turns} entries written before them, {unfinished} left half-written: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
