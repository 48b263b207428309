"""Fuzzes the parsers of what strangers write, guided by coverage where atheris is installed.

    python tests/tools/fuzz.py [TARGET...] [--runs N] [--seconds S] [--keep DIR] [--plain]

Starts from the corpus in tests/fuzz, one process a target. An input that brings a parser down, or takes more than its
second or its 200 MiB, is written into the directory `--keep` (by default the current one), and the exit code is 1. With
its fix it moves into `tests/fuzz/corpus/TARGET/`, which `make test` reads. `--plain` draws the changes without looking
at coverage; so it is done where there is no atheris (it has wheels for Linux on x86-64, Python 3.11 to 3.14).
"""

import argparse
import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
sys.path.insert(0, str(ROOT))

NAMES = ("headers", "adapter-config", "config", "report", "message")
INSTRUMENTED = ["merge_gate", "yaml"]
MOST_BYTES = 1 << 16
_WITHOUT_END = 2**31 - 1  # as libFuzzer reads it


def main() -> int:
    words = argparse.ArgumentParser(description="fuzz the parsers")
    words.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all by default")
    words.add_argument("--runs", type=int, default=_WITHOUT_END, help="inputs for each target")
    words.add_argument("--seconds", type=int, default=3600, help="at most, for each target")
    words.add_argument("--keep", type=Path, default=Path(), help="where what is found is written")
    words.add_argument("--seed", type=int, default=0, help="0: another one each time")
    words.add_argument("--plain", action="store_true", help="without atheris")
    words.add_argument("--alone", choices=NAMES, help=argparse.SUPPRESS)
    asked = words.parse_args()
    asked.seed = asked.seed or int.from_bytes(os.urandom(3), "little") + 1
    if unknown := set(asked.targets) - set(NAMES):
        words.error(f"no target {', '.join(sorted(unknown))}, expected {', '.join(NAMES)}")
    asked.plain = asked.plain or importlib.util.find_spec("atheris") is None
    if asked.alone:
        return plainly(asked) if asked.plain else guided(asked)
    ends = [in_a_process(name, asked) for name in asked.targets or NAMES]
    return int(any(ends))


def in_a_process(name: str, asked: argparse.Namespace) -> int:
    """One target, and a line on it. Its output is shown where it found something."""
    words = [f"--{key}={getattr(asked, key)}" for key in ("runs", "seconds", "keep", "seed")]
    command = [sys.executable, __file__, f"--alone={name}", *words, *(["--plain"] if asked.plain else [])]
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:  # atheris ends its process without tidying up
        environ = os.environ | {"TMPDIR": place}
        ended = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", env=environ)
    said = ended.stdout + ended.stderr
    if ended.returncode:
        print(said[-8000:])
    runs = re.search(r"stat::number_of_executed_units: (\d+)", said)
    slowest = re.search(r"stat::slowest_unit_time_sec: +(\d+)", said)
    peak = re.search(r"stat::peak_rss_mb: +(\d+)", said)
    figures = [f"{int(runs[1]):,} inputs" if runs else "an unknown number of inputs"]
    figures += [f"slowest {slowest[1]} s"] if slowest else []
    figures += [f"peak {peak[1]} MB"] if peak else []
    found = "something was found, see above" if ended.returncode else "nothing found"
    print(f"{name}: {', '.join(figures)} in {time.monotonic() - start_s:.0f} s, {found}", flush=True)
    return ended.returncode


def guided(asked: argparse.Namespace) -> int:
    """By atheris. It ends the process."""
    import atheris  # noqa: PLC0415

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.support.fuzz.mutations import changed  # noqa: PLC0415
        from tests.support.fuzz.targets import TARGETS, bounded  # noqa: PLC0415

    def other(data: bytes, most_bytes: int, seed: int) -> bytes:
        return changed(data, random.Random(seed), most_bytes, lambda one: atheris.Mutate(one, most_bytes))

    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as grown:
        words = [
            f"-runs={asked.runs}", f"-max_total_time={asked.seconds}", f"-max_len={MOST_BYTES}", f"-seed={asked.seed}",
            "-timeout=30", "-rss_limit_mb=2048", "-print_final_stats=1",
            f"-artifact_prefix={asked.keep}/{asked.alone}-",
        ]  # fmt: skip
        atheris.Setup(
            [sys.argv[0], *words, os.environ.get("FUZZ_CORPUS", grown), str(CORPUS / asked.alone)],
            bounded(TARGETS[asked.alone]),
            custom_mutator=other,
        )
        atheris.Fuzz()
    return 0


def plainly(asked: argparse.Namespace) -> int:
    """By the changes of mutations.py alone."""
    from tests.support.fuzz.mutations import changed  # noqa: PLC0415
    from tests.support.fuzz.targets import TARGETS, bounded  # noqa: PLC0415

    target, dice = bounded(TARGETS[asked.alone]), random.Random(asked.seed)
    seeds = [path.read_bytes() for path in sorted((CORPUS / asked.alone).iterdir())]
    end_s, runs, slowest_s = time.monotonic() + asked.seconds, 0, 0.0
    while runs < asked.runs and time.monotonic() < end_s:
        data = seeds[runs] if runs < len(seeds) else changed(dice.choice(seeds), dice, MOST_BYTES)
        start_s = time.process_time()
        try:
            target(data)
        except Exception:  # noqa: BLE001 - this is what is looked for
            traceback.print_exc()
            path = asked.keep / f"{asked.alone}-crash-{runs}"
            path.write_bytes(data)
            print(f"written to {path}")
            return 1
        slowest_s = max(slowest_s, time.process_time() - start_s)
        runs += 1
    print(f"stat::number_of_executed_units: {runs}\nstat::slowest_unit_time_sec: {slowest_s:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
