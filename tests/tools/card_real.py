"""The fleets and the benchmarks on a GPU: one command, one table, and exit code 1 if a verdict or a merge is wrong.

    make card-real                                     # on the GPU that torch sees; two hours
    make card-real CARD_REAL="--fleets methods-float32 --no-benchmarks"

1. Each fleet runs on the CPU and on the GPU. Verdicts, findings, and coverage have to be equal, and figures within the
   tolerance of tests/support/card/compare.py.
2. Published tensors have to have the bits of PEFT's own merge on the same GPU.
3. Each benchmark runs on the GPU, by the gate and by the script. The gate may take `SLOWER` times as long.

`--simulated` runs it on the simulated card, to test this program. The table says that no real card was used.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers.utils import logging

from tests.support.card import build
from tests.support.card.fleets import FLEETS, SAMPLES
from tests.support.card.runs import Device, Outcome, run_fleet
from tests.support.command import environment

ROOT = Path(__file__).resolve().parents[2]
SLOWER = 1.25
"""How many times the script's seconds the gate may take on a card."""

NO_CARD = (
    "NO REAL CARD WAS USED: this is the simulated card of tests/support/card. Its figures say nothing about a GPU."
)
_PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


Row = tuple[Sequence[str], bool]
"""One line of the table, and whether it is right."""


def main() -> int:
    arguments = _parser().parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    card = Device(name=arguments.device, environment={}, is_real=True)
    if arguments.simulated:
        card = Device(name=arguments.device, environment=build.environment(build.library()))
        print(NO_CARD)
    name = _name_of(card)
    if not name:
        print("torch sees no CUDA device here: install torch's build for CUDA, and run where the GPU is visible")
        return 2
    print(f"{arguments.device}: {name}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="card-real-") as work:
        _show(("fleet", "adapters", "verdicts", "findings", "coverage", "figures", "bits", "s"))
        for fleet in arguments.fleets:
            rows.append(_fleet(fleet, Path(work), arguments.sample, card))
            _show(rows[-1][0])
        if arguments.benchmarks:
            _show(("benchmark", "gate, s", "script, s", "gate / script"))
            for row in _benchmarks(Path(work), arguments.size, card):
                rows.append(row)
                _show(row[0])
    wrong = sum(not is_right for _, is_right in rows)
    print(f"{wrong} of {len(rows)} rows are wrong" if wrong else f"all {len(rows)} rows are right")
    if arguments.simulated:
        print(NO_CARD)
    return int(wrong > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cuda:N")
    parser.add_argument("--fleets", nargs="*", choices=[*FLEETS], default=[*FLEETS], help="default: all of them")
    parser.add_argument("--sample", choices=[*SAMPLES], default="all", help="all cases (default), or a fifth of them")
    parser.add_argument("--benchmarks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--size", choices=("tiny", "1.1b"), default="1.1b", help="the base of the benchmarks")
    parser.add_argument("--simulated", action="store_true", help=argparse.SUPPRESS)
    return parser


def _name_of(card: Device) -> str:
    env = environment(**card.environment)
    answer = subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def _show(cells: Sequence[str]) -> None:
    print(f"{cells[0]:<28}" + "".join(f"{cell:>14}" for cell in cells[1:]), flush=True)


def _fleet(name: str, work: Path, sample: str, card: Device) -> Row:
    """One fleet. What differs is listed above its line."""
    directory = work / name
    directory.mkdir()
    began_s = time.monotonic()
    outcome: Outcome = run_fleet(FLEETS[name], directory, SAMPLES[sample], card)
    for difference in outcome.differences:
        print(f"  {difference}")
    counts = [str(outcome.count(kind)) for kind in ("verdict", "finding", "coverage", "figure", "bits")]
    seconds = f"{time.monotonic() - began_s:.0f}"
    return (name, str(outcome.adapters), *counts, seconds), not outcome.differences


def _benchmarks(work: Path, size: str, card: Device) -> Iterator[Row]:
    """The benchmarks that compare the gate with a script, on the card."""
    folder = work / "benchmarks"
    words = ["--device", card.name, "--size", size, "--only", "rows", "methods", "--work", str(folder)]
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words]
    subprocess.run(command, cwd=work, env=environment(**card.environment), check=True, stdout=subprocess.DEVNULL)
    for name, figures in json.loads((folder / "results.json").read_text(encoding="utf-8")).items():
        gate_s, script_s = (figures[program]["wall_s"] for program in ("gate", "script"))
        cells = (name, f"{gate_s:.1f}", f"{script_s:.1f}", f"{gate_s / script_s:.2f}")
        yield cells, gate_s <= SLOWER * script_s


if __name__ == "__main__":
    sys.exit(main())
