"""A scratch with an adapter's layers in place, used again for the next adapter of the same config and tensor names.

In: a scratch into which PEFT has just injected. Out: the same, as it was then, but for its factors. PEFT's injection
initialises every factor (and, for DoRA, measures every row of the base): of adapters that differ in their values only,
that is most of what loading costs.

It serves only adapters that leave it as it was: every layer merged in blocks, nothing of the base overwritten. Its
factors are NaN before each load, so that nothing of the adapter before can be taken for the next one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.records.files import AdapterFiles


@dataclass(slots=True, kw_only=True)
class Template:
    """`kind` says for which adapters it is. `children` are the modules of each module, which PEFT's unloading replaces.

    `slots` and `sharers` are those of `Loaded`.
    """

    kind: object
    model: Any
    config: Any
    slots: dict[tuple[int, str], str]
    sharers: dict[str, tuple[str, ...]]
    children: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]

    def renew(self) -> None:
        """As after the injection, with NaN for its factors."""
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
        self.model.base_model.model.peft_config = self.model.peft_config
        for layer in _layers(self.model):
            layer.merged_adapters.clear()
            for parameter in _factors(layer):
                parameter.data.fill_(torch.nan)

    def holds(self, keys: set[str]) -> bool:
        """Whether these keys of the model are factors of the adapter, and none is a tensor of the base."""
        own = {id(parameter) for layer in _layers(self.model) for parameter in _factors(layer)}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return all(id(named.get(key)) in own for key in keys)


def kind_of(files: AdapterFiles) -> object:
    """Adapters of one kind have the same config, and tensors of the same names, dtypes and shapes."""
    return files.config.digest, files.tensors


def snapshot(model: nn.Module) -> tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]:
    """Every module of a model, and its children now."""
    return tuple((module, dict(module._modules)) for module in model.modules())


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _factors(layer: Any) -> list[nn.Parameter]:
    held = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return [parameter for one in held if isinstance(one, nn.Module) for parameter in one.parameters()]
