"""DoRA's magnitudes are not measured before a load that overwrites them; what it does not overwrite is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_gate.engine.base import Base, load_base
from merge_gate.engine.inject import inject
from merge_gate.engine.load import ADAPTER_NAME, load_adapter
from merge_gate.engine.peft_config import read_config
from merge_gate.engine.shape import shape_for
from merge_gate.engine.weights import read_weights
from merge_gate.records.files import AdapterFiles
from merge_gate.records.terms import Quantization
from merge_gate.sources.preflight import preflight
from tests import methods

if TYPE_CHECKING:
    from pathlib import Path

DORA = {case.name: case for case in methods.CASES if case.name.endswith("-dora")}


def made(name: str, root: Path, dtype: str, quantization: Quantization) -> tuple[Base, AdapterFiles]:
    case = DORA[name]
    base = methods.save_base(case.base, root / "base", dtype)
    with methods.quiet():
        model = methods.load_base(case.base, base)
        methods.save_adapter(case, model, root / "adapter", base_directory=base)
    files = preflight(str(root / "adapter"), allow_pickle=False)
    shape = shape_for(str(base), files)
    return load_base(str(base), shape=shape, label="base", dtype="auto", quantization=quantization), files


def injected(base: Base, files: AdapterFiles, *, with_magnitudes: bool) -> dict[str, torch.Tensor]:
    with methods.quiet():
        scratch = base.scratch()
        model = inject(scratch, read_config(files), base, ADAPTER_NAME, with_magnitudes=with_magnitudes)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        *((name, dtype, Quantization.NONE) for name in sorted(DORA) for dtype in ("float32", "bfloat16", "float16")),
        ("lora-dora", "bfloat16", Quantization.BNB_8BIT),
        ("lora-dora", "bfloat16", Quantization.BNB_4BIT),
    ],
)
def test_they_have_pefts_places_shapes_and_dtypes(
    name: str, dtype: str, quantization: Quantization, tmp_path: Path
) -> None:
    base, files = made(name, tmp_path, dtype, quantization)
    measured, unmeasured = (injected(base, files, with_magnitudes=one) for one in (True, False))
    magnitudes = [key for key in measured if "lora_magnitude_vector" in key]
    assert magnitudes
    assert unmeasured.keys() == measured.keys()
    for key, theirs in measured.items():
        ours = unmeasured[key]
        assert (ours.shape, ours.dtype, ours.device, type(ours)) == (
            theirs.shape,
            theirs.dtype,
            theirs.device,
            type(theirs),
        )
        assert bool(ours.isnan().all()) == (key in magnitudes), key
    assert all(bool(measured[key].isfinite().all()) for key in magnitudes), "PEFT's own code is back in its place"


def test_one_that_the_file_lacks_has_the_value_that_training_starts_from(tmp_path: Path) -> None:
    base, files = made("lora-dora", tmp_path, "float32", Quantization.NONE)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = min(key for key in tensors if "magnitude" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, weights)
    files = preflight(str(tmp_path / "adapter"), allow_pickle=False)
    with methods.quiet():
        loaded = load_adapter(base, files, read_weights(files))
    assert loaded.arrivals[0].missing == (lost,)
    own: dict[str, Any] = dict(loaded.model.named_parameters())
    place = next(key for key in own if key.startswith(lost.removesuffix(".weight")))
    name = lost.removeprefix("base_model.model.").partition(".lora_magnitude_vector")[0]
    assert torch.equal(own[place], torch.linalg.norm(base.tensors[f"{name}.weight"], dim=1)), "B is zero at first"
