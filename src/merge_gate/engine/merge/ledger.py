"""The account of one adapter: every parameter and persistent buffer of the merged model, and how it was checked.

In: merged tensors, one after another, and PEFT's result. Out: a `TensorMerge` for each tensor that differs from the
base, and two counts that must be equal. `total` is counted in PEFT's result; `checked` is counted by names, from the
measurements of the base and of the merges. Judges nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate.engine.base.loaded_base import Base, named_tensors
from merge_gate.engine.merge import tensor_result
from merge_gate.engine.merge.sink import TensorSink
from merge_gate.engine.tensors.quantized import dequantized, elements, is_quantized
from merge_gate.records.measured import TensorMerge, TensorStats
from merge_gate.records.refusals import Refused


@dataclass(slots=True)
class Ledger:
    """`merges` by the base's names, and the `layers` that changed each. `total` and `checked` count elements.

    `left` names the tensors of the base that are not finite in the merged model. `passed_on` names the tensors that the
    `sink` got.
    """

    base: Base
    merges: dict[str, TensorMerge] = field(default_factory=dict)
    layers: dict[str, list[Any]] = field(default_factory=dict)
    checked: int = 0
    total: int = 0
    left: set[str] = field(default_factory=set)
    sink: TensorSink | None = None
    passed_on: set[str] = field(default_factory=set)

    def book(self, merge: TensorMerge, layer: Any | None = None) -> None:
        """Enter a merged tensor. `layer` is the layer that changed it; None if the merge changed nothing."""
        self.merges[merge.stats.name] = merge
        if layer is not None:
            self.layers.setdefault(merge.stats.name, []).append(layer)

    def close(self, merged: nn.Module) -> None:
        """Account for PEFT's result, and measure what has no measurement yet (replaced modules, overwritten tensors).

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
            own = known is not None and tensor_result.shares_storage(known, tensor)
            if not own and not tensor_result.is_the_bases(self.base, name, tensor):
                self._book_anew(tensor_result.of_tensor(self.base, module, name, tensor))
                self.pass_on(module, name, tensor)
            stats = self._measured(name)
            self.checked += stats.numel if stats is not None else 0
            if stats is None or not stats.finite:
                self.left.add(self.base.first_name(name))
        if self.sink is not None:
            self.sink.settle(frozenset(self.passed_on), tuple(self._untied(named)))

    def pass_on(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Hand a merged tensor to the sink. A quantized one is dequantized."""
        if self.sink is not None:
            self.sink.put(name, dequantized(module, tensor) if is_quantized(tensor) else tensor.data)
            self.passed_on.add(name)

    def _untied(self, named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        for name, first in self.base.aliases.items():
            if name in named and not tensor_result.shares_storage(named[first], named[name]):
                yield name, first

    def _book_anew(self, merge: TensorMerge) -> None:
        """Enter a tensor of the result, unless it is as its layer left it: that entry knows the loss by rounding."""
        booked = self.merges.get(merge.stats.name)
        if booked is None or booked.stats != merge.stats:
            self.book(merge)

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
        held = {attribute for attribute, one in module._parameters.items() if one is tensor}
        is_outer = any(other.startswith(f"{path}.") for other in sharers)
        named = _names_in_forward(type(module)) or held  # a forward without code may read anything
        return is_outer and bool(held) and held.isdisjoint(named)


def _names_in_forward(module_class: type[nn.Module]) -> set[str]:
    """Attributes and globals that the class's forward names, or that a method named there names, inherited or not."""
    names: set[str] = set()
    waiting: list[Any] = [module_class.forward]
    while waiting:
        found = waiting.pop()
        code = found if inspect.iscode(found) else getattr(inspect.unwrap(found), "__code__", None)
        if code is not None:
            fresh = set(code.co_names) - names
            names |= fresh
            waiting += filter(inspect.iscode, code.co_consts)  # functions inside of it
            waiting += (vars(one)[name] for one in module_class.__mro__ for name in fresh & vars(one).keys())
    return names


def _agree(tokens: Mapping[str, int], modules: tuple[str, ...]) -> bool:
    """Whether all modules that count carry the same tokens."""
    return len({tokens[path] for path in modules if path in tokens}) == 1
