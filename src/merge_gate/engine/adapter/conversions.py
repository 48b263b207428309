"""Where a load has put the factors that transformers joins: one LoRA for each expert becomes one of all experts.

In: a LoRA that PEFT loaded, and its file. Out: the layers whose factors are in other places than the base's own class
puts stored tensors of the same names. Knows no other method.

1. The names in the file are those of stored tensors, with `lora_A` and `lora_B` in place of the weight. The class's own
   conversion of such stored tensors is recorded from headers (tensor_map.py).
2. It is repeated with deltas of the file in place of weights, which are stacked, concatenated, or interleaved alike.
3. What PEFT's layer adds to the weight has to be that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.tensor_map import NoMapError, TensorMap, tensor_map
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import Refused

FLOAT32 = 2.0**-18
"""The error of a product in float32, as a share of its largest value."""


def unplaced_layers(
    model: Any, base: Base, weights: Mapping[str, torch.Tensor], names: Collection[str], adapter_name: str
) -> dict[str, str]:
    """Compare the layers with joined factors. Returns the modules in the file that are not compared, and why.

    `names` are the tensors of the file that PEFT has joined.

    Raises:
        Refused: a layer has its factors in other places.
    """
    compared: set[str] = set()
    mapping = _mapping(base, weights, names) if names else None
    targets = {} if mapping is None else {target: group for group in mapping.groups for target in group.targets}
    for path, layer in model.get_base_model().named_modules() if names else ():
        parameter = getattr(layer, "parameter_name", None)
        if not isinstance(layer, LoraLayer) or parameter is None or adapter_name not in layer.lora_A:
            continue
        module = path.replace(".base_layer", "")
        group = targets.get(f"{module}.{parameter}")
        if group is None or group.recipe is None:
            continue
        compared.update(source.removesuffix(".weight") for source in group.sources)
        deltas = {
            source: layer.scaling[adapter_name] * _factor(weights, source, "B") @ _factor(weights, source, "A")
            for source in group.sources
        }
        expected, got = next(iter(group.recipe(deltas).values())), layer.get_delta_weight(adapter_name)
        info = torch.finfo(got.dtype)
        room = expected.abs() * info.eps + expected.abs().max() * FLOAT32 + info.tiny * info.eps
        got = got.cpu().float()  # a place that overflows shows no order, and the merge is judged for it
        if got.shape != expected.shape or bool((((got - expected).abs() > room) & got.isfinite()).any()):
            raise Refused("factors_displaced", module=module, joined=len(names))
    modules = {name.removeprefix(ADAPTER_PREFIX).partition(".lora_")[0] for name in names}
    return dict.fromkeys(sorted(modules - compared), "nothing says where PEFT has to put its factors")


def _factor(weights: Mapping[str, torch.Tensor], source: str, factor: str) -> torch.Tensor:
    return weights[f"{ADAPTER_PREFIX}{source.removesuffix('.weight')}.lora_{factor}.weight"].float()


def _mapping(base: Base, weights: Mapping[str, torch.Tensor], names: Collection[str]) -> TensorMap | None:
    """Step 1. None if the names are not those of stored tensors."""
    end = ".lora_A.weight"
    modules = [name.removesuffix(end) for name in sorted(names) if name.endswith(end)]
    headers = [
        StoredTensor(
            name=f"{module.removeprefix(ADAPTER_PREFIX)}.weight",
            dtype="F32",
            shape=(len(weights[f"{module}.lora_B.weight"]), weights[module + end].shape[1]),
        )
        for module in modules
        if f"{module}.lora_B.weight" in weights
    ]
    try:
        model_class = getattr(transformers, type(base.model).__name__)
        return tensor_map(model_class, base.source.directory, headers, dtype=torch.float32)
    except (NoMapError, AttributeError):
        return None
