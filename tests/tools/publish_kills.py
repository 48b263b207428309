"""kill -9 at random moments while models are published: is everything that has a name whole, and the base unchanged?

    python -m tests.tools.publish_kills --kills 200 [--seed 1] [--real 10] [--rounds 50]

Each run publishes two models. `--real` of the kills are of runs with a real worker; in the others, the worker is
played, and the parent is real. After each kill, every file of every published directory must have its digest, and
after all kills an undisturbed run must publish every model and leave nothing else. In each of the rounds, two or three
runs publish the same names at once; in every second round, one of them is killed.
"""

import argparse
import datetime as dt
import random
import tempfile
from collections import Counter
from pathlib import Path

from tests.support.played_merges import lay
from tests.support.publish_kills import KilledRuns, lay_real

ROWS = 100_000


def main() -> None:
    words = argparse.ArgumentParser(description="kill -9 while models are published, and look at what is left")
    words.add_argument("--kills", type=int, default=200)
    words.add_argument("--real", type=int, default=10)
    words.add_argument("--rounds", type=int, default=50)
    words.add_argument("--seed", type=int, default=1)
    asked = words.parse_args()
    dice = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="publish-kills-") as directory:
        played, real = Path(directory, "played"), Path(directory, "real")
        played.mkdir()
        lay(played, rows=ROWS)
        counts = {"played": kill(KilledRuns(played, dice), asked.kills - asked.real)}
        for publishers in (2, 3):
            counts[f"{publishers} publishers"] = race(KilledRuns(played, dice), publishers, asked.rounds)
        if asked.real:
            adapters = lay_real(real)
            counts["real"] = kill(KilledRuns(real, dice, adapters), asked.real)
    today = dt.datetime.now(dt.UTC).date()
    print(f"{today}: {asked.kills} kills, {asked.rounds} rounds of two and of three publishers: {dict(counts)}")
    print("every model that has a name was whole, and no base changed")


def race(runs: KilledRuns, publishers: int, rounds: int) -> Counter[str]:
    counts = sum((runs.race(publishers, kills=bool(number % 2)) for number in range(rounds)), Counter[str]())
    runs.finish()
    return counts


def kill(runs: KilledRuns, kills: int) -> Counter[str]:
    counts = Counter(runs.kill_once() for _ in range(kills))
    runs.finish()
    return counts


if __name__ == "__main__":
    main()
