"""DoRA's norms from a few rows at a time: PEFT's results, at the price of LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora_layer
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.features.forward import lockstep
from merge_gate.features.forward.lockstep import with_norms_in_blocks
from tests.support.engine.blocks_layers import tuner_layer

INPUTS = {
    "linear": torch.linspace(-1, 1, 3 * 40).view(1, 3, 40),
    "conv1d": torch.linspace(-1, 1, 3 * 40).view(1, 3, 40),
    "embedding": torch.tensor([[0, 7, 39]]),
    "conv2d": torch.linspace(-1, 1, 40 * 9).view(1, 40, 3, 3),
}


def layer_of(kind: str, dtype: torch.dtype) -> Any:
    """PEFT's layer of DoRA with 24 outputs and 40 inputs."""
    if kind != "conv2d":
        return tuner_layer(kind, 24, 40, 4, dora=True, dtype=dtype).eval()
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True)
    layer: Any = lora_layer.Conv2d(torch.nn.Conv2d(40, 24, 3).to(dtype), "default", config, r=4, lora_alpha=8)
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        parameter.data = torch.randn(parameter.shape).mul(0.1)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data = torch.rand(magnitude.shape).add(0.5)
    return layer.eval()


class Sizes(TorchDispatchMode):
    """Collects the most elements that one operation returns, views aside."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(one.alias_info is not None for one in function._schema.returns)
        if isinstance(result, torch.Tensor) and not is_view:
            self.most = max(self.most, result.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", INPUTS)
def test_a_layer_returns_pefts_values_without_a_large_product(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "PRODUCT_ELEMENTS", 256)
    layer, inputs = layer_of(kind, dtype), INPUTS[kind]
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    of_peft = layer(inputs)
    with_norms_in_blocks(layer)
    with Sizes() as sizes:
        found = layer(inputs)
    assert found.dtype == of_peft.dtype
    torch.testing.assert_close(found, of_peft, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert sizes.most < layer.get_base_layer().weight.numel()


@torch.no_grad()
def test_a_row_that_the_adapter_nearly_erases_has_its_own_norm() -> None:
    """The norm of the sum is a millionth of both terms'."""
    layer = layer_of("linear", torch.float32)
    weight, a, b = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight[5] = -2.0 * (b[5] @ a)
    weight[5, 3] += 1e-6 * weight[5].norm()
    exact = (weight.double() + 2.0 * (b.double() @ a.double())).norm(dim=1)
    layer.lora_magnitude_vector["default"].weight.data = exact.float()
    with_norms_in_blocks(layer)
    returned, merged = layer(INPUTS["linear"]), weight + 2.0 * (b @ a)
    torch.testing.assert_close(returned[..., 5], INPUTS["linear"] @ merged[5], rtol=0.2, atol=1e-7)
