"""An adapter that an old release of PEFT made, held against what that release merged.

In: its directory, with the `merged.json` of tests/tools/train_corpus.py, and the bases. Out: `Held`: what the gate
says, and whether the tensors that it merged are those of the release. Run as a program, it does that for a whole corpus
and counts.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_gate.records.terms import Verdict
from tests.support.gating import Gate, Judgement, one_thread
from tests.support.merged import kept

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""Releases add and multiply in different orders; what they mean differs by more than this."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """`differing` names the tensors that the gate merges into other values than the release did."""

    release: str
    kind: str
    judgement: Judgement
    differing: tuple[str, ...]
    truth: str

    @property
    def passes(self) -> bool:
        return self.judgement.verdict is Verdict.PASSED

    @property
    def is_same(self) -> bool:
        """Passed, and merged into what the release merged."""
        return self.passes and not self.differing


def hold(adapter: Path, bases: Path, gate: Gate) -> Held:
    """Gate one adapter and compare."""
    record = json.loads((adapter / "merged.json").read_text())
    truth, which = (record["merged"], "memory") if "error" not in record["merged"] else (record["reloaded"], "file")
    name = record["base"].partition("+")[0]
    with kept() as seen:
        judgement = gate.judge(adapter, bases / name, allow_pickle=True)
    if "error" in truth:
        differing, which = ("nothing to compare with",), "none"
    else:
        differing = tuple(_differing(truth, seen, gate, bases / name))
    return Held(release=record["peft"], kind=record["kind"], judgement=judgement, differing=differing, truth=which)


def _differing(truth: dict[str, Any], seen: dict[str, torch.Tensor], gate: Gate, base: Path) -> Iterator[str]:
    """Tensors with other values; those that only one side merged are compared with the base."""
    originals = next((one.tensors for key, one in gate.loaded.items() if key[0] == str(base)), {})
    for name, told in truth.items():
        tensor = seen.get(name)
        if tensor is None:
            yield f"{name} (not merged)"
        elif list(tensor.shape) != told["shape"] or not _same(tensor, told["values"]):
            yield name
    for name in seen.keys() - truth.keys():
        original = originals.get(name)
        if original is None or original.shape != seen[name].shape or not torch.allclose(original, seen[name]):
            yield f"{name} (merged by the gate only)"


def _same(tensor: torch.Tensor, values: list[list[float]]) -> bool:
    flat = tensor.detach().float().reshape(-1)
    places = torch.tensor([int(place) for place, _ in values])
    return torch.allclose(flat[places], torch.tensor([value for _, value in values]), RELATIVE, ABSOLUTE)


def main() -> None:
    """`python -m tests.support.corpus BASES CORPUS`: one line for each disagreement, and the count."""
    bases, corpus = (Path(argument) for argument in sys.argv[1:3])
    gate, counts = Gate(), Counter[str]()
    with one_thread():
        for record in sorted(corpus.rglob("merged.json")):
            held = hold(record.parent, bases, gate)
            word = "same" if held.is_same else "passed, other values" if held.passes else "not passed"
            counts[word] += 1
            if not held.is_same:
                first = next((f"{f.check}: {f.message}" for f in held.judgement.findings), "")
                print(f"{held.release} {held.kind}: {word} ({held.truth}); {held.differing[:2]}; {first[:300]}")
    print(f"{sum(counts.values())} adapters: {dict(counts)}")


if __name__ == "__main__":
    main()
