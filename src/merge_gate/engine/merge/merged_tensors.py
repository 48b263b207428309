"""The account of one adapter: every parameter and persistent buffer of the merged model, and how it was checked.

In: merged tensors, one after another, and PEFT's result. Out: a `TensorMerge` for each tensor that differs from the
base, the final values for `Consumer`s, and two counts that must be equal. `total` is counted in PEFT's result;
`checked` is counted by names, from the measurements of the base and of the merges. Judges nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate.engine.base.loaded_base import Base, measure_in, named_tensors
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.merge.account import Places
from merge_gate.engine.tensors.measure import (
    distance,
    dtype_max,
    has_rows,
    is_small,
    row_norms,
    same_bits,
    same_values,
    shares_storage,
    unchanged_fraction,
)
from merge_gate.engine.tensors.quantized import dequantized, elements, is_quantized
from merge_gate.records.measured import TensorMerge, TensorStats
from merge_gate.records.refusals import Refused

ROUNDED = (torch.bfloat16, torch.float16)
"""Dtypes in which a float32 delta loses bits. The loss is measured for these."""

ROUNDING_SHARE = 2.0**-20
"""A delta below this share of the weight is rounding in float32: 2⁻²⁴ for each of a few steps."""


def of_tensor(
    base: Base,
    module: nn.Module,
    name: str,
    tensor: torch.Tensor,
    exact: torch.Tensor | None = None,
    *,
    rounding_share: float = ROUNDING_SHARE,
    rows: bool = False,
) -> TensorMerge:
    """Measure a merged tensor, and compare it with the base's of that name.

    Args:
        base: the loaded base.
        module: the module of the merged model that holds the tensor.
        name: the tensor's name in the base and in the merged model.
        tensor: the merged tensor in its final form.
        exact: W + delta before it was rounded to the final dtype, float32. The loss is measured against it.
        rounding_share: a delta that is at most this share of the weight is only rounding.
        rows: compare the rows of a weight (engine/forward).
    """
    with base.filled([base.first_name(name)]):
        return _compared(base, module, name, tensor, exact, rounding_share=rounding_share, rows=rows)


def _compared(
    base: Base,
    module: nn.Module,
    name: str,
    tensor: torch.Tensor,
    exact: torch.Tensor | None,
    *,
    rounding_share: float,
    rows: bool,
) -> TensorMerge:
    place = name.rpartition(".")[0]
    if is_the_bases(base, name, tensor):
        stats = replace(base.figures(base.first_name(name)), name=name)
        ceiling = dtype_max(tensor.dtype)
        return TensorMerge(module=place, stats=stats, dtype_max=ceiling, changed=False, keeps_rows=True)
    stats, *scales = measure_in(module, tensor, name)
    broken = next((scale for scale in scales if not scale.finite), None)
    if stats.finite and broken is not None:
        stats = broken
    values = dequantized(module, tensor) if is_quantized(tensor) else tensor.data
    ceiling = dtype_max(values.dtype)
    known = base.tensors.get(base.first_name(name))
    if (
        known is None
        or known.shape != tensor.shape
        or not (stats.finite and base.figures(base.first_name(name)).finite)
    ):
        return TensorMerge(module=place, stats=stats, dtype_max=ceiling, changed=True)
    was = (dequantized(base.model.get_submodule(place), known) if is_quantized(known) else known.data).to(values.device)
    base_norm = distance(was)
    delta_norm = distance(exact if exact is not None else values, was)
    comparable = was.dtype == values.dtype
    return TensorMerge(
        module=place,
        stats=stats,
        dtype_max=ceiling,
        changed=not (comparable and same_values(was, values)) and delta_norm > rounding_share * base_norm,
        base_norm=base_norm,
        delta_norm=delta_norm,
        lost_norm=None if exact is None else distance(values, exact),
        unchanged_fraction=unchanged_fraction(was, values) if comparable else None,
        keeps_rows=rows
        and has_rows(module, values)
        and is_small(row_norms(values, was), base.row_norms(base.first_name(name), was)),
    )


def is_the_bases(base: Base, name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor has the bits of the base's tensor with this name."""
    known = base.tensors.get(base.first_name(name))
    if known is None or type(known) is not type(tensor) or is_quantized(tensor):
        return False
    with base.filled([base.first_name(name)]):
        return same_bits(known, tensor.to(known.device))


@dataclass(slots=True)
class MergedTensors:
    """`merges` by the base's names, and the `layers` that changed each. `total` and `checked` count elements.

    `nonfinite` names the tensors of the base that are not finite in the merged model. `given_to_consumers` names the
    tensors that the `consumers` got.
    """

    base: Base
    merges: dict[str, TensorMerge] = field(default_factory=dict)
    layers: dict[str, list[Any]] = field(default_factory=dict)
    checked: int = 0
    total: int = 0
    nonfinite: set[str] = field(default_factory=set)
    consumers: Sequence[Consumer] = ()
    given_to_consumers: set[str] = field(default_factory=set)

    def enter(self, merge: TensorMerge, layer: Any | None = None) -> None:
        """Enter a merged tensor. `layer` is the layer that changed it; None if the merge changed nothing."""
        self.merges[merge.stats.name] = merge
        if layer is not None:
            self.layers.setdefault(merge.stats.name, []).append(layer)

    def account_for(self, merged: nn.Module, places: Places) -> tuple[str, ...]:
        """Account for PEFT's result, and measure what has no measurement yet (replaced modules, overwritten tensors).

        Returns the names of wrong tensors in the result.

        Raises:
            Refused: PEFT left a tuner layer in the model, or tensors of the base out of it.
        """
        left = next((path for path, module in merged.named_modules() if isinstance(module, BaseTunerLayer)), None)
        if left is not None:
            raise Refused("layer_left_unmerged", module=left)
        named = dict((*merged.named_parameters(remove_duplicate=False), *merged.named_buffers(remove_duplicate=False)))
        gone = sorted(self.base.tensors.keys() - named.keys())
        if gone:
            wrapped = any(isinstance(module, ModulesToSaveWrapper) for module in merged.modules())
            raise Refused("result_lacks_tensors", names=tuple(gone), in_wrapper=wrapped)
        for name, module, tensor in named_tensors(merged):
            self.total += elements(tensor)
            known = self.base.tensors.get(self.base.first_name(name))
            own = known is not None and shares_storage(known, tensor)
            if not own and not is_the_bases(self.base, name, tensor):
                self._enter_if_new(of_tensor(self.base, module, name, tensor))
                self.pass_on(module, name, tensor)
            stats = self._measured(name)
            self.checked += stats.numel if stats is not None else 0
            if stats is None or not stats.finite:
                self.nonfinite.add(self.base.first_name(name))
        untied = tuple(self._untied(named)) if self.consumers else ()
        for consumer in self.consumers:
            consumer.complete(frozenset(self.given_to_consumers), untied)
        return tuple(places.wrong(merged, named))

    def pass_on(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Hand a merged tensor to the consumers. A quantized one is dequantized."""
        if not self.consumers:
            return
        values = dequantized(module, tensor) if is_quantized(tensor) else tensor.data
        for consumer in self.consumers:
            consumer.put(name, values)
        self.given_to_consumers.add(name)

    def _untied(self, named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        for name, first in self.base.aliases.items():
            if name in named and not shares_storage(named[first], named[name]):
                yield name, first

    def _enter_if_new(self, merge: TensorMerge) -> None:
        """Enter a tensor of the result, unless its layer's entry still fits: that entry has the loss by rounding."""
        entered = self.merges.get(merge.stats.name)
        if entered is None or entered.stats != merge.stats:
            self.enter(merge)

    def _measured(self, name: str) -> TensorStats | None:
        """The measurement under this name, from the merge or else from the base."""
        merge, first = self.merges.get(name), self.base.first_name(name)
        if merge is not None:
            return merge.stats
        return self.base.figures(first) if first in self.base.tensors else None

    def tied(self, sharers: Mapping[str, tuple[str, ...]], tokens: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
        """Tensors that a layer changed for one module, while another module shares them without that adapter.

        `tokens` says whose trained tokens each module carries. A module that is not in it does not count
        (adapter_evidence.py). A module that only holds a tensor for a module inside of it, and never reads the tensor,
        does not count either (BERT's head and the bias of its decoder).
        """
        pairs = []
        for name, layers in self.layers.items():
            shared = sharers.get(name, ())
            modules = tuple(path for path in shared if not self._only_holds(path, shared, name))
            whole = all(isinstance(layer, TrainableTokensLayer) for layer in layers) and _agree(tokens, modules)
            if len(modules) > 1 and not whole and self.merges[name].changed:
                own = name.rpartition(".")[0]
                pairs.append((name, next((path for path in modules if path != own), modules[-1])))
        return tuple(pairs)

    def _only_holds(self, path: str, sharers: tuple[str, ...], name: str) -> bool:
        module, tensor = self.base.model.get_submodule(path), self.base.tensors.get(self.base.first_name(name))
        held = {attribute for attribute, parameter in module._parameters.items() if parameter is tensor}
        is_outer = any(other.startswith(f"{path}.") for other in sharers)
        named = _names_in_forward(type(module)) or held  # a forward without code may read anything
        return is_outer and bool(held) and held.isdisjoint(named)


def _names_in_forward(module_class: type[nn.Module]) -> set[str]:
    """Attributes and globals that the class's forward names, or that a method named there names, inherited or not."""
    names: set[str] = set()
    waiting: list[Any] = [module_class.forward]
    while waiting:
        function = waiting.pop()
        code = function if inspect.iscode(function) else getattr(inspect.unwrap(function), "__code__", None)
        if code is not None:
            fresh = set(code.co_names) - names
            names |= fresh
            waiting += filter(inspect.iscode, code.co_consts)  # functions inside of it
            waiting += (vars(parent)[name] for parent in module_class.__mro__ for name in fresh & vars(parent).keys())
    return names


def _agree(tokens: Mapping[str, int], modules: tuple[str, ...]) -> bool:
    """Whether all modules that count carry the same tokens."""
    return len({tokens[path] for path in modules if path in tokens}) == 1
