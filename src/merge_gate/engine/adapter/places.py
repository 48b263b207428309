"""What an adapted model holds: the tensors of the adapter, and the places of the model without its layers.

In: a scratch copy with an adapter's layers. Out: `ModelPlace`s and tensors, and `Refused` for a place that PEFT's
injection has changed and that it must not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper, get_pattern_key
from torch import nn

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.adapter.peft_config import initialization_writes_to_base
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.tensors.measure import same_bits, shares_storage
from merge_gate.engine.tensors.quantized import is_quantized, with_scales
from merge_gate.records.refusals import Refused

FLOAT32 = 2.0**-20
"""The error of a few steps in float32, as a share of the values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlace:
    """A place of the model that PEFT's unloading returns, by its name there, and the tensor that it has now.

    `layers` are PEFT's layers around it, with their paths. `is_copy`: the tensor belongs to a copy that was trained
    whole (`modules_to_save`). `is_saved` is false for a buffer that no file of a model has.
    """

    name: str
    module: nn.Module
    tensor: torch.Tensor
    layers: tuple[tuple[str, Any], ...] = ()
    is_copy: bool = False
    is_saved: bool = True


def places_of(
    module: Any, path: str = "", layers: tuple[tuple[str, Any], ...] = (), *, is_copy: bool = False
) -> Iterator[ModelPlace]:
    """The places below a module of a model with an adapter's layers."""
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        inner = module.modules_to_save[module.active_adapter] if active else module.original_module
        yield from places_of(inner, path, layers, is_copy=bool(active))
    elif isinstance(module, TrainableTokensWrapper):
        yield from places_of(module.token_adapter, path, layers, is_copy=is_copy)
    elif isinstance(module, BaseTunerLayer):
        yield from places_of(module.base_layer, path, (*layers, (path.removesuffix("."), module)), is_copy=is_copy)
    else:
        of_run = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                saved = name not in of_run
                yield ModelPlace(
                    name=path + name, module=module, tensor=tensor, layers=layers, is_copy=is_copy, is_saved=saved
                )
        for name, child in module._modules.items():
            if child is not None:
                yield from places_of(child, f"{path}{name}.", layers, is_copy=is_copy)


def is_of_base(base: Base, place: ModelPlace) -> bool:
    """Whether a place holds the base's own memory for it, and the base's own scales."""
    known = base.tensors.get(base.first_name(place.name))
    if known is None or not shares_storage(known, place.tensor):
        return False
    if not is_quantized(place.tensor):
        return True
    name = base.first_name(place.name)
    return all(base.memory.name_of(part) == name for part in with_scales(place.module, place.tensor))


def has_bits_of_base(base: Base, place: ModelPlace) -> bool:
    """Whether a place has the base's values for it. Of a longer vocabulary, the common rows count.

    Its biases may be a row of one matrix, and become float32 (BART's `final_logits_bias`).
    """
    name = base.first_name(place.name)
    known, tensor = base.tensors.get(name), place.tensor.data
    if known is None or is_quantized(known) or is_quantized(tensor) or known.dim() != tensor.dim():
        return False
    with base.filled([name]):
        was, now = known.data, tensor.to(known.device)
        if was.shape != now.shape and set(was.shape[:-1]) == set(now.shape[:-1]) == {1}:
            was, now = was.flatten(), now.flatten().to(was.dtype)
        rows = slice(min(len(was), len(now))) if was.dim() and was.shape[1:] == now.shape[1:] else ...
        return same_bits(was[rows], now[rows])


# --- the adapter's own tensors ---------------------------------------------------------------------------------------

Holder = tuple[int, str]
"""The id of the dictionary that holds a tensor, and its key there."""


def adapter_tensors(layer: Any) -> Iterator[tuple[Holder, torch.Tensor]]:
    """Every tensor of the adapter in a tuner layer and in those inside of it: parameters, buffers, and plain tensors.

    Spectrum indices and permutations are plain tensors in a dictionary.
    """
    for inner in layer.modules():
        if isinstance(inner, BaseTunerLayer):
            for module in _own_modules(inner):
                held = [value for value in vars(module).values() if isinstance(value, dict)]
                for holder in (vars(module), *held):
                    for name, tensor in holder.items():
                        if isinstance(tensor, torch.Tensor):
                            yield (id(holder), name), tensor


def _own_modules(module: Any) -> Iterator[nn.Module]:
    yield module
    for name, child in module._modules.items():
        if child is not None and name != "base_layer":
            yield from _own_modules(child)


def settings_of(layer: Any) -> dict[tuple[str, object], object]:
    """What a tuner layer holds for each adapter besides tensors: strengths, trained tokens, the class of a variant.

    Its key for the active adapters is `("active", None)`.
    """
    settings: dict[tuple[str, object], object] = {
        ("active", None): [] if layer.disable_adapters else list(layer.active_adapters)
    }
    for attribute, held in vars(layer).items():
        if isinstance(held, dict) and not attribute.startswith("_") and attribute != "r":  # AdaLoRA's load prunes it
            for name, value in held.items():
                if isinstance(value, bool | int | float | str | list):
                    settings[attribute, name] = list(value) if isinstance(value, list) else value
                elif attribute == "lora_variant":
                    settings[attribute, name] = type(value)
    return settings


def all_settings(model: Any) -> dict[str, Mapping[tuple[str, object], object]]:
    """`settings_of` each layer of a model, by path."""
    named = model.named_modules()
    return {path: settings_of(module) for path, module in named if isinstance(module, BaseTunerLayer)}


def named_settings(model: Any, config: Any, adapter_name: str) -> dict[str, Mapping[tuple[str, object], object]]:
    """`all_settings`, except for what the configuration says: the strength, the trained tokens, and that it is DoRA."""
    settings, named = all_settings(model), dict(model.named_modules())
    for path, of_layer in settings.items():
        expected: dict[tuple[str, object], object] = {("active", None): [adapter_name]}
        strength, tokens = strength_of(named, path, config), of_layer.get(("token_indices", adapter_name))
        if strength is not None:
            expected["scaling", adapter_name] = strength
        if tokens is not None and tokens not in _token_lists(config):
            expected["token_indices", adapter_name] = None  # the layer has others, so it differs
        if isinstance(named[path], LoraLayer) and getattr(config, "use_dora", False):
            expected["lora_variant", adapter_name] = of_layer.get(("lora_variant", adapter_name))
        settings[path] = {**of_layer, **expected}
    return settings


def strength_of(named: Mapping[str, Any], path: str, config: Any) -> float | None:
    """The factor of a layer's delta by the configuration. None for other methods than LoRA, LoHa, and LoKr.

    PEFT's patterns (tuners/lora/model.py) match the module's path without PEFT's layers, or the path of its parameter.
    """
    layer = named[path]
    if isinstance(layer, AdaLoraLayer) or not isinstance(layer, LoraLayer | LycorisLayer):
        return None
    outer = path.removesuffix(".base_layer.out_proj")
    key = outer if isinstance(named.get(outer), MultiheadAttention) else path  # its inner layer has its strength
    key = key.removeprefix(ADAPTER_PREFIX).replace(".base_layer", "")
    if parameter := getattr(layer, "parameter_name", None):
        key = f"{key}.{parameter}"
    alpha = config.alpha if isinstance(layer, LycorisLayer) else config.lora_alpha
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), alpha)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r)
    return float(alpha / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank))


def _token_lists(config: Any) -> list[list[int]]:
    given = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return [list(tokens) for tokens in given.values()] if isinstance(given, dict) else [list(given)]


def snapshot_of(model: Any) -> dict[Holder, torch.Tensor]:
    """Copies of the adapter's tensors in a model."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return {holder: tensor.detach().clone() for layer in layers for holder, tensor in adapter_tensors(layer)}


# --- after the injection ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """What PEFT's injection has left: places with other memory than the base's, and the adapter's first tensors.

    `own` are a longer vocabulary, and weights that the method changes by definition. `unaccounted` names those of them
    of which nothing says what they have to be. `first` has copies of the adapter's tensors; None if they are blank.
    `settings` has what the layers have to hold besides (`named_settings`).
    """

    own: Mapping[str, torch.Tensor]
    unaccounted: frozenset[str] = frozenset()
    first: Mapping[Holder, torch.Tensor] | None = None
    settings: Mapping[str, Mapping[tuple[str, object], object]] = field(default_factory=dict)


def accounted(model: Any, base: Base, config: Any, adapter_name: str, *, blank: bool) -> Injected:
    """Compare each place of a model with the base, right after the injection.

    PiSSA, OLoRA, and CorDA leave the weight less the product of their first factors. LoftQ, KaSA, and a weight that was
    packed again leave no such identity.

    Raises:
        Refused: a place holds anything else.
    """
    own, unaccounted = dict[str, torch.Tensor](), set[str]()
    rewrites = initialization_writes_to_base(config) or bool(getattr(config, "kasa_config", None))
    places = list(places_of(model.get_base_model()))
    layers = dict[int, list[Any]]()  # a tied weight is rewritten in all of its places
    for place in places if rewrites else ():
        layer = next((layer for _, layer in place.layers if isinstance(layer, LoraLayer)), None)
        layers.setdefault(id(place.tensor), []).extend([] if layer is None else [layer])
    for place in places:
        if base.first_name(place.name) not in base.tensors or place.is_copy or is_of_base(base, place):
            continue
        own[place.name] = place.tensor.data
        rewriting = layers.get(id(place.tensor), []) if place.name.endswith(".weight") else []
        if rewriting and (is_quantized(place.tensor) or not _leaves_residual(config)):
            unaccounted.add(place.name)
        elif not has_bits_of_base(base, place) and not any(_is_residual(base, place, layer) for layer in rewriting):
            if len(rewriting) < 2:  # noqa: PLR2004 - two of them leave the weight less two products
                raise Refused("place_changed", tensor=place.name, step="injection")
            unaccounted.add(place.name)
    first = None if blank else snapshot_of(model)
    settings = named_settings(model, config, adapter_name)
    return Injected(own=own, unaccounted=frozenset(unaccounted), first=first, settings=settings)


def _leaves_residual(config: Any) -> bool:
    return str(config.init_lora_weights).lower() != "loftq" and not config.kasa_config


def _is_residual(base: Base, place: ModelPlace, layer: Any) -> bool:
    """Whether a weight is the base's, less the product of the layer's first factors, within rounding."""
    name, left = base.first_name(place.name), place.tensor.data
    known = base.tensors.get(name)
    if known is None or known.shape != left.shape or len(layer.lora_A) != 1:
        return False
    (key,), eps = layer.lora_A, torch.finfo(left.dtype).eps
    a, b = (factors[key].weight.data.flatten(1).float() for factors in (layer.lora_A, layer.lora_B))
    product, sizes = layer.scaling[key] * (b @ a), abs(layer.scaling[key]) * (b.abs() @ a.abs())
    with base.filled([name]):
        was = known.data.to(left.device).float()
    for change, size in ((product, sizes), (product.T, sizes.T)):  # PiSSA of a Conv1D has the transposed product
        if change.numel() == was.numel():
            exact, room = was - change.reshape(was.shape), size.reshape(was.shape)
            room = exact.abs() * (eps / 2) + room * eps + (was.abs().amax() + room) * FLOAT32
            if bool(((left.float() - exact).abs() <= room).all()):
                return True
    return False
