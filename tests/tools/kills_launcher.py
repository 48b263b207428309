r"""Kills and signals of the launcher at random moments, and what they leave: a script, since it takes long.

    python -m tests.tools.kills_launcher --count 500 \
        --engine unix:///run/podman/podman.sock --image localhost/merge-gate-rogue:e2e

The image is that of tests/support/e2e/rogue.py. Each round starts a launcher with a token, sends it SIGKILL, SIGTERM or
SIGINT at a random moment of its life, looks whether the token shows in what the engine tells of the containers, lets a
next launcher run to its end, and counts the containers of this script that are left.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.e2e.engines import described
from tests.support.e2e.launch import LAUNCH, TOKEN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--longest", type=float, default=2.5, help="latest moment of a signal, in seconds")
    parser.add_argument("--seed", type=int, default=12)
    asked = parser.parse_args()
    random.seed(asked.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        for number in range(1, asked.count + 1):
            counts.update(one_round(asked, Path(directory)))
            if number % 25 == 0:
                print(f"{number}: {json.dumps(counts, sort_keys=True)}", flush=True)
    return 1 if counts["left after the next run"] or counts["token shown"] else 0


def one_round(asked: argparse.Namespace, directory: Path) -> list[str]:
    number = random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    process = launch(asked, directory, "sleep 3")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(random.uniform(0, asked.longest))
    process.send_signal(number)
    before = time.monotonic()
    process.wait(60)
    seen = [signal.Signals(number).name, *(["slower than 7.5 s"] if time.monotonic() - before > 7.5 else [])]
    left = described(asked.engine, directory)
    seen += ["left at first"] if left else []
    seen += ["token shown"] if TOKEN in json.dumps(left) else []
    launch(asked, directory, "sleep 0").wait(60)
    seen += ["left after the next run"] * len(described(asked.engine, directory))
    return seen


def launch(asked: argparse.Namespace, directory: Path, does: str) -> subprocess.Popen[bytes]:
    workspace = directory / "workspace"
    workspace.mkdir(exist_ok=True)
    config = workspace / f"{does}.yml"
    config.write_text(does, encoding="utf-8")
    environ = {
        **os.environ, "DOCKER_HOST": asked.engine, "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN,
        "RUNNER_TEMP": str(directory),
    }  # fmt: skip
    words = [sys.executable, "-c", LAUNCH, str(config), str(directory / "report"), asked.image]
    return subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
