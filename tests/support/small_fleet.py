"""A small fleet on disk: tens of adapters on three tiny bases, most of them sound, and reports to compare.

In: a shelf and an empty directory. Out: the configuration's path, and `same`, a report without times and marks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.report import Sandbox
from tests.support.faults import poison

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.report import Report
    from tests.support.models import Shelf

VARIANTS = {"plain": "llama", "rslora": "llama", "float16-base": "llama-float16", "classifier": "bert-classifier"}
"""Variants of adapters, and the base of each."""

BROKEN = {"plain-1": "adapter-nonfinite", "float16-base-0": "file-corrupt"}
"""Those that fail, and their causes."""


def lay_fleet(shelf: Shelf, place: Path, *, each: int = 3) -> Path:
    """`each` adapters of each variant, one base in two dtypes, and a combination; bases and adapters below `place`."""
    entries = []
    for variant, base in VARIANTS.items():
        if not (place / base).exists():
            shutil.copytree(shelf.base(base), place / base)
        for number in range(each):
            name = f"{variant}-{number}"
            shutil.copytree(shelf.adapter(variant), place / "adapters" / name)
            if number:
                _make_unlike(place / "adapters" / name / "adapter_model.safetensors", number)
            dtype = ["float32", "bfloat16"] if variant == "classifier" else "auto"
            entries.append({"path": f"./adapters/{name}", "base": {"model": f"./{base}", "dtype": dtype}})
    poison("lora_B", where="last")(place / "adapters" / "plain-1")
    weights = place / "adapters" / "float16-base-0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    blend = {"method": "linear", "adapters": ["plain-0", "plain-2"], "weights": [0.5, 0.5]}
    entries.append({"name": "blend", "combine": blend, "base": {"model": "./llama"}})
    path = place / "fleet.yml"
    path.write_text(json.dumps({"version": 1, "adapters": entries[::2] + entries[1::2]}, indent=1))
    return path


def _make_unlike(weights: Path, number: int) -> None:
    """The last value of the file, a float32, with other low bits: an adapter of its own, no worse than the rest."""
    data = bytearray(weights.read_bytes())
    data[-4:-2] = number.to_bytes(2, "little")
    weights.write_bytes(data)


def same(report: Report) -> Report:
    """What must be alike however many machines judged, and when: all but times, and the marks of shard and cache."""
    adapters = tuple(replace(one, seconds=0.0, judged=None, cached=False) for one in report.adapters)
    return replace(
        report,
        shard=None,
        adapters=adapters,
        config=replace(report.config, read_at=None),
        environment=replace(report.environment, sandbox=Sandbox()),
    )
