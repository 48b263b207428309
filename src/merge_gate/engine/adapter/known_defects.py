"""What PEFT merges wrongly, or cannot merge, although it may not report an error.

In: a loaded `PeftModel` and its config. Out: nothing, or `Refused` with a known defect. An exception of PEFT itself
needs no row. tests/engine/adapter/test_known_defects.py shows each row with plain PEFT, and fails if a release fixes
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from peft.tuners.beft import BeftLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.tensors.quantized import BNB_4BIT, has_layers_in, is_quantized
from merge_gate.records.refusals import Refused

Places = Callable[[Any, Any], Iterator[str]]
"""Gets the model and the config. Yields the module of each case of a defect, or an empty name for the whole adapter."""


def refuse_by_config(config: Any) -> None:
    """Check a config against the rules that need no model, before PEFT acts on it (X-LoRA loads what it names).

    Raises:
        Refused: with the first rule that matches.
    """
    _refuse(OF_CONFIG, None, config)


def refuse_wrong_merges(model: Any, config: Any) -> None:
    """Check a loaded adapter against the other rules.

    Raises:
        Refused: with the first rule that matches.
    """
    _refuse(OF_MODEL, model, config)


def _refuse(defects: Mapping[str, Places], model: Any, config: Any) -> None:
    for defect, where in defects.items():
        places = list(where(model, config))
        if places:
            modules = tuple(places) if places[0] else ()
            raise Refused("known_defect", defect=defect, method=str(config.peft_type.value), modules=modules)


def _layers(model: Any) -> Iterator[tuple[str, Any, nn.Module]]:
    """(base's name, tuner layer, its base layer)."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path.removeprefix(ADAPTER_PREFIX), module, module.get_base_layer()


def _quantized(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and is_quantized(weight)


def _no_merge(model: Any, config: Any) -> Iterator[str]:
    if config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        yield ""


def _of_kind(kind: str) -> Places:
    def where(_model: Any, config: Any) -> Iterator[str]:
        if config.peft_type == kind:
            yield ""

    return where


def _replicated(_model: Any, config: Any) -> Iterator[str]:
    if getattr(config, "layer_replication", None):
        yield ""


def _arrow(_model: Any, config: Any) -> Iterator[str]:
    if getattr(config, "arrow_config", None):
        yield ""


def _quantized_kinds(model: Any, config: Any) -> Iterator[str]:
    kind = config.peft_type
    for name, _, base_layer in _layers(model):
        packed = type(getattr(base_layer, "weight", None)).__name__
        if _quantized(base_layer) and (kind == "RANDLORA" or (kind == "PVERA" and packed == BNB_4BIT)):
            yield name


def _quantized_unknown(model: Any, _config: Any) -> Iterator[str]:
    """A tuner layer for plain weights on packed weights, which it does not support. BEFT only adds to the bias."""
    for name, layer, base_layer in _layers(model):
        knows = getattr(layer, "quantization_backend", None) is not None or isinstance(layer, BeftLayer)
        if _quantized(base_layer) and not knows and not has_layers_in(type(layer).__module__, base_layer.weight):
            yield name


def _quantized_bias(model: Any, _config: Any) -> Iterator[str]:
    for name, layer, base_layer in _layers(model):
        if _quantized(base_layer) and any(dict(getattr(layer, "lora_bias", None) or {}).values()):
            yield name


def _merged_twice(model: Any, _config: Any) -> Iterator[str]:
    """Tied weights that carry an adapter each (trainable tokens excepted: both write the same rows)."""
    seen: set[int] = set()
    for name, layer, base_layer in _layers(model):
        weight = base_layer._parameters.get("weight")  # a parametrised weight is another object each time
        if weight is None or isinstance(layer, TrainableTokensLayer):
            continue
        if id(weight) in seen:
            yield name
        seen.add(id(weight))


OF_CONFIG: Mapping[str, Places] = MappingProxyType(
    {"x-lora": _of_kind("XLORA"), "arrow": _arrow, "layer-replication": _replicated}
)
"""Defects that show before anything is loaded."""

OF_MODEL: Mapping[str, Places] = MappingProxyType(
    {
        "no-weights": _no_merge,
        "merged-twice": _merged_twice,
        "quantized-unknown": _quantized_unknown,
        "quantized-random-projection": _quantized_kinds,
        "quantized-lora-bias": _quantized_bias,
    }
)
