"""Compares PEFT's own check with the gate's in every trial of the method matrix, and prints the document's tables.

    python benchmarks/peft_side_by_side.py [CASE ...]

In: the cases of tests/support/methods.py and tests/support/engine/quantized_cases.py (all, or those named). Out:
Markdown. Each trial is merged by `merge_and_unload(safe_merge=True)`, judged by the gate, and both are held against the
truth: the merged tensors themselves. A trial is PEFT's mistake when

- silent: the merged model holds NaN or Inf, and nothing is raised;
- alarm: neither the merged model nor what the merge reads of the file does, and PEFT raises.

Not counted against PEFT, which does not claim to find them: a merge without any effect, and NaN or Inf that the merge
reads and that leave no trace in its result. Left out: indices that point nowhere, which can end the process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes
import peft
import torch
import transformers

from merge_gate.records.terms import Quantization
from tests.support import faults_methods, methods
from tests.support.engine import quantized_cases
from tests.support.gating import Bench, mistake, one_thread

Rows = dict[str, Counter[str]]


def main() -> None:
    wanted = set(sys.argv[1:])
    rows: Rows = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as root, one_thread():
        bench = Bench(Path(root))
        for case in methods.CASES:
            if not wanted or case.name in wanted:
                directories = {dtype: bench.base_directory(case.base, dtype) for dtype in methods.DTYPES}
                rows[case.name] = compare(bench, bench.faults(case), directories, Quantization.NONE)
        for case, quantization in quantized_cases.PAIRS:
            name = f"{case.name} on {quantization}"
            if not wanted or name in wanted:
                directory, asked = quantized_cases.stored(bench, quantization)
                bases = {quantization: quantized_cases.quantised(bench, quantization)}
                faults = faults_methods.Bench(
                    case, bases, bench.adapter(case), bench.root / "trial", home=quantization, small=quantization
                )
                rows[name] = compare(bench, faults, {quantization: directory}, asked)
    show(rows, time.perf_counter() - started)


def compare(
    bench: Bench, faults: faults_methods.Bench, directories: dict[str, Path], quantization: Quantization
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for trial in faults.trials():
        if trial.value == "index":
            continue
        truth = faults.prepare(trial)
        judgement = bench.gate.judge(faults.directory, directories[trial.dtype], quantization=quantization)
        counts["trials"] += 1
        counts[f"peft {_peft_mistake(faults, trial, truth)}"] += 1
        counts[f"gate {mistake(truth, judgement)}"] += 1
    return counts


def _peft_mistake(faults: faults_methods.Bench, trial: faults_methods.Trial, truth: faults_methods.Truth) -> str:
    broken = truth.cause in {"adapter-nonfinite", "merged-nonfinite"}
    try:
        methods.merge(faults.bases[trial.dtype], faults.directory, safe=True)
    except faults_methods.PEFT_RAISES:
        return "right" if broken else "alarm"
    return "silent" if truth.nonfinite or truth.raised else "right"


def show(rows: Rows, seconds: float) -> None:
    total = sum(rows.values(), Counter())
    versions = (peft, torch, transformers, bitsandbytes)
    print(
        f"{total['trials']:,} trials over {len(rows)} cases in {seconds:.0f} s on one core; "
        + ", ".join(f"{module.__name__} {module.__version__}" for module in versions)
        + ".\n"
    )
    print("| | wrong in all | broken, no error | good, but refused | wrong cause |")
    print("|---|---|---|---|---|")
    silent, alarm = total["peft silent"], total["peft alarm"]
    print(f"| `merge_and_unload(safe_merge=True)` | {silent + alarm} | {silent} | {alarm} | none named |")
    gate = [total[f"gate {word}"] for word in ("false pass", "false failure", "wrong cause", "no warning")]
    print(f"| merge-gate | {sum(gate)} | {gate[0]} | {gate[1]} | {gate[2] + gate[3]} |\n")
    print("| cases | trials | PEFT wrong | gate wrong |")
    print("|---|---:|---:|---:|")
    families: Rows = {}
    for name, counts in rows.items():
        wrong = Counter(peft=counts["peft silent"] + counts["peft alarm"], gate=counts["trials"] - counts["gate None"])
        if wrong.total():
            case, _, base = name.partition(" on ")
            family = families.setdefault(case.partition("-")[0] + (" on bitsandbytes" if base else ""), Counter())
            family.update(wrong, cases=1, trials=counts["trials"])
    for name, counts in families.items():
        print(f"| {name}, {counts['cases']} | {counts['trials']} | {counts['peft']} | {counts['gate']} |")


if __name__ == "__main__":
    main()
