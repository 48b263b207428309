"""Two reports of one fleet, and two sets of published models: what differs between a CPU and a card.

In: reports as JSON, and directories. Out: `Difference`s. Times are not compared. Everything else has to be equal,
except for the last digits of figures, and for what comes from a convolution: a card computes it by another algorithm.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import methods

SUMS = 1e-7
"""The relative difference that any figure may have: a card adds up larger blocks, and so in another order."""

TOLERANCE = 1e-4
"""The relative difference that a figure of a convolution may have."""

CARD_TOLERANCE, CARD_SHARE = 1e-2, 1e-3
"""The relative and the absolute difference that a real card's figures may have: 16-bit values lie as far apart."""

NOISE = 2e-4
"""The proof's differences below this are rounding in float32: they are compared with this, not with each other. PEFT's
own layers have 1.5e-4 at most on a CPU, and a merge differs above 1e-2."""

LAST_BITS = 4
"""How far two values of a convolution's published tensor may be apart, in steps of the tensor's largest value."""

NOT_COMPARED = {"seconds", "judged", "published"}
"""Times, and the files of a published model, whose manifest names the device: `of_published` compares its tensors."""

CONVOLUTIONS = ("conv", "waveft")
"""In the names of adapters whose merge, or whose layer, computes a convolution. WaveFT's inverse wavelet is one."""


@dataclass(frozen=True)
class Difference:
    """One field of one adapter, or of one base. `kind` is `verdict`, `finding`, `coverage`, `figure`, or `bits`."""

    name: str
    field: str
    cpu: Any
    card: Any

    @property
    def kind(self) -> str:
        kinds = {
            "verdict": "verdict",
            "cause": "verdict",
            "findings": "finding",
            "coverage": "coverage",
            "bits": "bits",
        }
        return kinds.get(re.split(r"[.\[ ]", self.field, maxsplit=1)[0], "figure")

    def __str__(self) -> str:
        return f"{self.kind} of {self.name}, {self.field}: {str(self.cpu)[:160]} -> {str(self.card)[:400]}"


def of_reports(cpu: Mapping[str, Any], card: Mapping[str, Any], *, is_real: bool = False) -> list[Difference]:
    """What differs in what the reports state of each adapter and base. A real card computes all figures otherwise."""
    found = []
    for name, (left, right) in _paired(_entries(cpu), _entries(card)).items():
        simulated = (TOLERANCE if _is_of_convolution(name) else SUMS, 0.0)
        allowed = (CARD_TOLERANCE, CARD_SHARE) if is_real else simulated
        found += [Difference(name, *differing) for differing in _fields(left, right, "", allowed)]
    return found


def _entries(report: Mapping[str, Any]) -> dict[str, Any]:
    bases = {f"base {base['model']} {base['dtype']} {base['quantization']}": base for base in report["bases"]}
    return {f"{entry['name']} {entry['base']['dtype']}": entry for entry in report["adapters"]} | bases


def _paired(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (left.get(name), right.get(name)) for name in (*left, *(right.keys() - left.keys()))}


def _is_of_convolution(name: str) -> bool:
    return any(word in name for word in CONVOLUTIONS)


Allowed = tuple[float, float]
"""The relative and the absolute difference that figures may have."""


def _fields(cpu: Any, card: Any, path: str, allowed: Allowed) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(cpu, dict) and isinstance(card, dict):
        for key, (left, right) in _paired(cpu, card).items():
            if key not in NOT_COMPARED:
                yield from _fields(left, right, f"{path}.{key}".lstrip("."), allowed)
    elif isinstance(cpu, list) and isinstance(card, list) and len(cpu) == len(card):
        for number, (left, right) in enumerate(zip(cpu, card, strict=True)):
            yield from _fields(left, right, f"{path}[{number}]", allowed)
    elif cpu != card and not _is_close(cpu, card, path, allowed):
        yield path, cpu, card


def _is_close(cpu: Any, card: Any, path: str, allowed: Allowed) -> bool:
    if isinstance(cpu, float) and isinstance(card, float):
        if path.endswith("largest_difference"):
            return max(cpu, card) < NOISE
        return math.isclose(cpu, card, rel_tol=allowed[0], abs_tol=allowed[1])
    is_message = isinstance(cpu, str) and isinstance(card, str) and path.endswith("message")
    return is_message and allowed[1] > 0 and NUMBER.sub("#", cpu) == NUMBER.sub("#", card)


NUMBER = re.compile(r"\d[\d.,e+-]*")


# --- published models -------------------------------------------------------------------------------------------------


def of_published(cpu: Path, card: Path) -> list[Difference]:
    """Tensors that differ between models of one name, below two directories."""
    names = sorted({path.name for root in (cpu, card) for path in root.iterdir() if path.is_dir()})
    return [difference for name in names for difference in of_models(name, cpu / name, card / name)]


def of_models(name: str, cpu: Path, card: Path) -> Iterator[Difference]:
    """Tensors that differ between two directories of one model."""
    if not (cpu.is_dir() and card.is_dir()):
        yield Difference(name, "bits", cpu.is_dir(), card.is_dir())
        return
    for tensor, (left, right) in _paired(tensors_in(cpu), tensors_in(card)).items():
        if left is None or right is None or left.dtype is not right.dtype or left.shape != right.shape:
            yield Difference(name, f"bits of {tensor}", left, right)
            continue
        if not methods.same_tensor(left, right) and not (_is_of_convolution(name) and _steps(left, right) <= LAST_BITS):
            share = float((left != right).float().mean())
            yield Difference(
                name, f"bits of {tensor}", "", f"{share:.0%} of the values, by {_steps(left, right):.1f} steps"
            )


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def _steps(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, in units of the last bit of the largest value."""
    step = torch.finfo(left.dtype).eps * float(left.abs().max()) if left.is_floating_point() else 1.0
    return float((left.double() - right.double()).abs().max()) / step
