"""A kind of module that was merged at another strength shows next to others with a larger delta."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from merge_gate.features.quantized.gguf_release import GgufRelease
from merge_gate.features.quantized.strength_findings import strength_findings
from merge_gate.files.preflight import preflight
from tests.support.models import ADAPTER_WEIGHTS, Tensors
from tests.support.quantized.gguf_files import write_llama
from tests.support.quantized.quantizers import MemoryRelease
from tests.support.quantized.releases import ADAPTER, Bench

LARGE, SMALL = 0.1, 0.025
"""The share of the delta in the weights of the attention, and that of the MLP's delta in this."""


def two_deltas(bench: Bench, path: Path) -> Path:
    """An adapter whose delta in the MLP is small."""
    shutil.copytree(bench.adapter("lora", LARGE), path)
    stored = load_file(path / ADAPTER_WEIGHTS)
    for name, values in stored.items():
        stored[name] = values * SMALL if "mlp" in name and "lora_B" in name else values
    save_file(stored, path / ADAPTER_WEIGHTS)
    return path


def tensors_of(bench: Bench, times: float) -> Tensors:
    """Their merge, with so much of the MLP's delta."""
    base, merged = bench.tensors(), bench.merged("lora", LARGE)
    return {name: base[name] + (times * SMALL if "mlp" in name else 1) * (merged[name] - base[name]) for name in base}


@pytest.mark.parametrize("kind", ["Q4_0", "rounded"])
@pytest.mark.parametrize(
    ("times", "expected"),
    [(1.0, "applied"), (0.7, "other-strength"), (1.3, "other-strength"), (0.0, "applied-in-part")],
)
def test_a_small_delta_at_another_strength_is_named(
    bench: Bench, kind: str, times: float, expected: str, tmp_path: Path
) -> None:
    adapter, tensors = two_deltas(bench, tmp_path / "adapter"), tensors_of(bench, times)
    if kind == "rounded":
        measurement = bench.measured(MemoryRelease(tensors, kind), adapter)
    else:
        write_llama(tmp_path / "model.gguf", tensors, bench.model().config, Type[kind], Type.Q8_0)
        with (tmp_path / "model.gguf").open("rb") as file:
            measurement = bench.measured(GgufRelease(file, bench.model()), adapter)
    config = preflight(str(adapter), allow_pickle=False).config
    findings = strength_findings(measurement, {}, adapter=ADAPTER, config=config)
    first = next(one for one in findings if one.check != "strength")
    assert first.check == expected, first.message
    assert times != 0.7 or 'tensors of the kind "mlp" 0.' in first.message, first.message
