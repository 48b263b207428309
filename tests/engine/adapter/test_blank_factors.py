"""Factors have no values before a load that overwrites them; what it does not overwrite has PEFT's initial ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from merge_gate.engine.adapter.inject import fill_blanks, inject, parameters_of
from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, load_adapter
from merge_gate.engine.adapter.peft_config import can_start_blank, read_config, read_weights
from merge_gate.engine.base.loaded_base import Base
from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles
from merge_gate.records.refusals import Refused
from merge_gate.records.terms import Quantization
from tests.support import methods
from tests.support.engine.local_bases import base_for

PACKED = (Quantization.BNB_8BIT, Quantization.BNB_4BIT)
CASES = {case.name: case for case in methods.CASES}


def made(name: str, root: Path, dtype: str, quantization: Quantization) -> tuple[Base, AdapterFiles]:
    case = CASES[name]
    base = methods.save_base(case.base, root / "base", dtype)
    with methods.quiet():
        model = methods.load_base(case.base, base)
        methods.save_adapter(case, model, root / "adapter", base_directory=base)
    files = preflight(str(root / "adapter"), allow_pickle=False)
    return base_for(base, root / "adapter", quantization=quantization), files


def injected(base: Base, files: AdapterFiles, *, blank: bool) -> nn.Module | None:
    """As load_adapter.py has it injected; None where it does not stand for one with values."""
    config = read_config(files)
    if blank and not can_start_blank(config):
        return None
    try:
        with methods.quiet():
            model: nn.Module = inject(base.scratch(private=not blank), config, base, ADAPTER_NAME, blank=blank)
    except Refused:
        assert blank
        return None
    return None if blank and not fill_blanks(model) else model


LORA = sorted(name for name in CASES if name.startswith("lora-"))
WITH_VALUES = {
    "lora-bdlora", "lora-eva", "lora-experts", "lora-experts-one", "lora-experts-qwen", "lora-kasa", "lora-mica",
    "lora-monteclora", "lora-olora", "lora-parameter-2d", "lora-pissa", "lora-pissa-niter", "lora-velora",
}  # fmt: skip
"""Cases whose initialisation does more than to give the adapter's own tensors values that a load overwrites."""


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        *(
            pytest.param(
                name, dtype, Quantization.NONE, marks=[] if name in {"lora-linear", "lora-dora"} else pytest.mark.slow
            )
            for name in LORA
            for dtype in ("float32", "bfloat16", "float16")
        ),
        *((name, "bfloat16", packed) for name in ("lora-linear", "lora-dora") for packed in PACKED),
    ],
)
def test_factors_have_pefts_places_shapes_and_dtypes(name, dtype, quantization, tmp_path) -> None:
    base, files = made(name, tmp_path, dtype, quantization)
    theirs, ours = (injected(base, files, blank=one) for one in (False, True))
    assert theirs is not None
    if ours is None:
        assert name in WITH_VALUES or (name, quantization) == ("lora-dora", Quantization.BNB_4BIT)  # PEFT copies those
        return
    assert name not in WITH_VALUES
    layers = [module for module in ours.modules() if isinstance(module, BaseTunerLayer)]
    factors = {id(factor) for layer in layers for _, _, factor in parameters_of(layer)}
    assert factors
    assert places(ours) == places(theirs)
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert described(tensor) == described(expected[key]), key
        if id(tensor) in factors and "trainable_tokens" not in key:
            assert bool(tensor.isnan().all()), key
            assert bool(expected[key].isfinite().all()), "PEFT's own initialisation is as it was"
        else:
            assert torch.equal(tensor, expected[key]), key


def places(model: nn.Module) -> list[tuple[str, type, bool]]:
    return [(path, type(module), module.training) for path, module in model.named_modules()]


def described(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, type(tensor)


def test_a_factor_that_the_file_lacks_has_its_initial_value(tmp_path: Path) -> None:
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
