"""A scratch copy with an adapter's layers, reused for the next adapter of the same config and tensor names.

In: a scratch copy into which PEFT has just injected. Out: the same scratch copy as it was then, with new factors. Knows
no method other than LoRA and DoRA.
"""

# If adapters differ only in their values, PEFT's injection is most of the cost of a load. Half of that cost is first
# values (for DoRA also norms of the base's rows), which the load overwrites. So PEFT makes the factors on the meta
# device, without values.
#
# A template serves only adapters that leave it unchanged: every layer is merged in blocks, and nothing of the base is
# overwritten. Its factors are NaN before each load, so that no value of an earlier adapter can stay. What follows only
# from names and places is computed for the first adapter of a kind (`Layout`).
#
# Adapters that are merged in one pass are loaded at the same time, so each needs a template. Those after the first of a
# kind get a copy of it, which costs less than a fifth of an injection.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine.tensors.module_copies import copied, tensors_of
from merge_gate.records.files import AdapterFiles

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DORA = (
    variants.DoraLinearVariant,
    variants.DoraEmbeddingVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
)
"""PEFT's variants for the layers of a DoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The properties that all adapters of one kind share after the load.

    `keys` maps each tensor that PEFT would save, by its name in the file, to its key in the model. `targeted` is that
    of `Loaded`.
    """

    keys: Mapping[str, str]
    targeted: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Template:
    """A reusable injection for adapters of one `kind`.

    `children` has the children of each module, which PEFT's unloading replaces. `slots` and `tied_modules` are those of
    `Loaded`. `layout` is None until the first adapter is loaded.
    """

    kind: object
    model: Any
    config: Any
    slots: dict[tuple[int, str], str]
    tied_modules: dict[str, tuple[str, ...]]
    children: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    layout: Layout | None = None

    def renew(self) -> None:
        """Restore the state after the injection, with NaN for the factors."""
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
        self.model.base_model.model.peft_config = self.model.peft_config
        for layer in self._layers():
            layer.merged_adapters.clear()
            for _, _, factor in parameters_of(layer):
                factor.data = torch.full_like(factor.data, torch.nan)  # its memory may be a file's (mapped_factors.py)

    def duplicate(self) -> Template:
        """Another template for the same base, for an adapter that is loaded while this one is in use."""
        memo = tensors_of(self.model)
        model = copied(self.model, memo)
        made = replace(
            self,
            model=model,
            config=copied(self.config, memo),
            slots={(id(memo[module]), attribute): name for (module, attribute), name in self.slots.items()},
            children=tuple(
                (copied(module, memo), {name: copied(child, memo) for name, child in children.items()})
                for module, children in self.children
            ),
        )
        made.renew()
        return made

    def holds(self, keys: set[str]) -> bool:
        """Whether all of these keys of the model are factors of the adapter, and none is a tensor of the base."""
        own = {id(factor) for layer in self._layers() for _, _, factor in parameters_of(layer)}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return all(id(named.get(key)) in own for key in keys)

    def _layers(self) -> list[Any]:
        return [module for module, _ in self.children if isinstance(module, BaseTunerLayer)]


def kind_of(files: AdapterFiles) -> object:
    """Adapters of one kind have the same config, and tensors of the same names, dtypes, and shapes."""
    return files.config.digest, files.tensors


def snapshot(model: nn.Module) -> tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]:
    """Every module of a model with its current children."""
    return tuple((module, dict(module._modules)) for module in model.modules())


def fill_blanks(model: nn.Module) -> bool:
    """Give NaN to the factors that PEFT has made without values, in PEFT's dtype and on its device.

    False if this injection cannot replace one with values: another tensor has no values either, or a variant of LoRA
    may have postponed its use of them.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}  # two layers may share a factor
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        held = next(layer.get_base_layer().parameters(), None)
        is_usual = all(type(one) in DORA for one in dict(getattr(layer, "lora_variant", {})).values())
        if held is None or (held.is_floating_point() and held.dtype not in _DTYPES) or not is_usual:
            return False
        for module, name, factor in parameters_of(layer):
            if factor.is_meta and factor not in filled:
                values = torch.full_like(factor, torch.nan, device=held.device)
                filled[factor] = nn.Parameter(values, requires_grad=factor.requires_grad)
            module._parameters[name] = filled.get(factor, factor)
    return not any(one.is_meta for one in (*model.parameters(), *model.buffers()))


def parameters_of(layer: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter of the adapter in a tuner layer, with the module that holds it and its name there."""
    held = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    modules = (module for one in held if isinstance(one, nn.Module) for module in one.modules())
    for module in modules:
        yield from ((module, name, one) for name, one in list(module._parameters.items()) if one is not None)
