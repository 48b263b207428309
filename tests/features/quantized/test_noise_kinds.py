"""Right and wrong releases are named with the noise of each quantizer, also of calibrated ones."""

from __future__ import annotations

import pytest
import torch

from merge_gate.features.quantized.layouts import Grid
from tests.support.quantized.quantizers import QUANTIZERS, MemoryRelease
from tests.support.quantized.releases import FAULTS, Bench

SHARES = (0.1, 0.03, 0.01, 0.003)
METHODS = ("lora", "dora", "ia3")
SAMPLE = {("gptq", "lora", 0.03, "right"), ("gptq", "lora", 0.03, "codes"), ("clipped", "ia3", 0.1, "right")}
CASES = [
    (name, method, share, fault) for name in QUANTIZERS for method in METHODS for share in SHARES for fault in FAULTS
]


def marks(case: tuple[str, str, float, str]) -> list[pytest.MarkDecorator]:
    """A sample in `make test`, LoRA with the noise of GPTQ in `make sweeps`, and all by night."""
    if case in SAMPLE:
        return []
    return [pytest.mark.slow if case[:3] == ("gptq", "lora", 0.03) else pytest.mark.nightly]


class IntoCodes:
    """Quantizes a weight when it is called first, and rounds the next values to its grid. `grids` is by these."""

    def __init__(self, quantizer: str) -> None:
        self._quantizer, self._grid = quantizer, Grid(*[torch.empty(0)] * 4)
        self._is_first, self.grids = True, dict[int, Grid]()

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self._is_first:
            self._grid = QUANTIZERS[self._quantizer](values)
        made = self._grid.values() if self._is_first else self._grid.nearest(values)
        self._is_first = not self._is_first
        if self._is_first:
            self.grids[id(made)] = self._grid
        return made


@pytest.mark.parametrize(
    ("quantizer", "method", "share", "fault"),
    [pytest.param(*case, marks=marks(case)) for case in CASES],
)
def test_each_release_has_its_kind(bench: Bench, quantizer: str, method: str, share: float, fault: str) -> None:
    into_codes = IntoCodes(quantizer)
    tensors = bench.faulty(fault, method, share, into_codes)
    release = MemoryRelease(tensors, quantizer, into_codes.grids)
    found = bench.findings(release, method, share, has_candidate=fault == "other")
    first = next(one for one in found if one.check != "strength")
    figures = dict(first.measured)
    is_kept = fault == "codes" and figures["factor"] > 0.9  # large deltas survive in many bits
    is_gone = fault == "codes" and abs(figures["factor"]) < 3 * figures["error"] + 0.02 and first.check == "not-applied"
    assert first.check == FAULTS[fault] or is_kept or is_gone, first.message
