"""Copies a tree of modules, over the same tensors or over copies of them.

In: modules. Out: other modules with the same attributes, as `copy.deepcopy` makes them, in less than half of its
time. Most attributes of a module are empty dicts and flags, for which `deepcopy` is slow. Knows no PEFT.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_AS_THEY_ARE = (bool, int, float, str, type(None), torch.device, torch.dtype)

Memo = dict[int, Any]
"""Copies by the id of the original, as `copy.deepcopy` keeps them."""


def tensors_of(model: nn.Module, *, private: bool = False) -> Memo:
    """Parameters and buffers, each a new object over the same storage (with `private`, over a copy)."""
    made: Memo = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in made:
                made[id(parameter)] = wrap(parameter, private=private)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in made:
                made[id(buffer)] = buffer.clone() if private else buffer.detach()
    return made


def wrap(parameter: torch.Tensor, *, private: bool = False) -> torch.Tensor:
    """A new parameter of the same class and attributes over the same storage (a copy of it with `private`)."""
    data = parameter.detach()
    if type(parameter) is nn.Parameter:
        return nn.Parameter(data.clone() if private else data, requires_grad=False)
    wrapped = torch.Tensor._make_subclass(type(parameter), data.clone() if private else data, False)
    wrapped.__dict__.update(parameter.__dict__)
    return wrapped


def copied(value: Any, memo: Memo) -> Any:
    """A copy of a module, or of anything that modules hold. What is in `memo` is not copied, so that ties stay."""
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if kind is dict or kind is OrderedDict:
        made = memo[id(value)] = kind()
        made.update((copied(key, memo), copied(one, memo)) for key, one in value.items())
    elif kind is list:
        made = memo[id(value)] = []
        made.extend(copied(one, memo) for one in value)
    elif kind is set:
        made = memo[id(value)] = {copied(one, memo) for one in value}
    elif issubclass(kind, nn.Module) and _is_copied_by_attributes(kind):
        made = memo[id(value)] = object.__new__(kind)
        made.__setstate__({name: copied(one, memo) for name, one in value.__getstate__().items()})
    else:
        made = copy.deepcopy(value, memo)
    return made


def _is_copied_by_attributes(kind: Any) -> bool:
    """Whether `deepcopy` would do no more: the class has not defined how it is copied."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind.__setstate__ is nn.Module.__setstate__
    )
