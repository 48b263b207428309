"""PEFT's own test configurations: the gate beside PEFT's merge.

    python benchmarks/peft_configurations.py [--tests DIR] [--only TEXT] [--results FILE] [--write]

Downloads the source package of the installed PEFT from the package index (`--tests` names its tests/ directory where it
lies already), and holds every configuration of its tests (tests/support/engine/peft_configurations.py) in every dtype.
One line for each that is not merged to PEFT's bits; `--results` keeps every outcome, and goes on where it was;
`--write` puts them into docs/evidence/truth.md. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from tests.support.engine.peft_configurations import Configuration, Outcome, hold, read
from tests.support.gating import Gate, one_thread
from tests.support.generated import write_block

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "evidence/truth.md"
DTYPES = ("float32", "bfloat16")


def fetch(directory: Path) -> Path:
    """PEFT's tests/ directory, out of its source package."""
    wanted = f"peft=={version('peft')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*pip, "--dest", str(directory), wanted], check=True)
    (archive,) = directory.glob("peft-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz") / "tests"


def run(configurations: list[Configuration], results: Path) -> list[Outcome]:
    """Hold each that has no line in the results yet."""
    done = read_results(results)
    with tempfile.TemporaryDirectory() as work, results.open("a", encoding="utf-8") as file:
        for number, (dtype, one) in enumerate(itertools.product(DTYPES, configurations), start=1):
            if (one.name, dtype) in done:
                continue
            outcome = done[one.name, dtype] = hold(one, dtype, Gate(), Path(work))
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            if outcome.wrong or outcome.gate != "passed":
                print(f"{number} {one.name} {dtype}: {say(outcome)}", flush=True)
            shutil.rmtree(Path(work, "adapter"), ignore_errors=True)
            shutil.rmtree(Path(work, "broken"), ignore_errors=True)
    return list(done.values())


def read_results(results: Path) -> dict[tuple[str, str], Outcome]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else ()
    outcomes = (Outcome(**line | {"wrong": tuple(line["wrong"])}) for line in map(json.loads, lines))
    return {(one.name, one.dtype): one for one in outcomes}


def say(outcome: Outcome) -> str:
    if outcome.reason:
        return f"not made: {outcome.reason}"
    if outcome.wrong:
        return f"WRONG: {'; '.join(outcome.wrong)} ({outcome.said[:200]})"
    return f"{outcome.gate} as PEFT: {outcome.peft[:120]}"


# --- docs/evidence/truth.md -----------------------------------------------------------------------------------------


TEXT = """{date}, {versions}, in {dtypes}. {names:,} configurations. PEFT makes an adapter for {made:,}.

| outcome | trials |
|---|---:|
| passed with PEFT's bits | {passed:,} |
| refused by both | {refused:,} |
| a verdict that differs from PEFT's | {wrong:,} |
| all | {trials:,} |

With one NaN in the file, {failed:,} of {trials:,} fail. The merge does not read the tensor in the others: a warning."""


def document(outcomes: list[Outcome]) -> str:
    made = [one for one in outcomes if not one.reason]
    refused = [one for one in made if one.gate != "passed" and not one.wrong]
    wrong = [one for one in made if one.wrong]
    return TEXT.format(
        date=datetime.now(UTC).date().isoformat(),
        versions=", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")),
        dtypes=" and ".join(dict.fromkeys(one.dtype for one in made)),
        names=len({one.name for one in outcomes}),
        made=len({one.name for one in made}),
        trials=len(made),
        passed=len(made) - len(refused) - len(wrong),
        refused=len(refused),
        wrong=len(wrong),
        failed=sum(one.one_nan.startswith("failed") for one in made),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, one_thread():
        tests = asked.tests or fetch(Path(directory))
        configurations = [one for one in read(tests) if asked.only in one.name]
        outcomes = run(configurations, asked.results or Path(directory, "results.jsonl"))
    text = document(outcomes)
    print(text)
    if asked.write:
        write_block(DOCUMENT, "peft_configurations", text)


if __name__ == "__main__":
    main()
