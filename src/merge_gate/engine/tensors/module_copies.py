"""New tensor objects for a copy of a tree of modules, over the same storage or over copies of it.

In: modules. Out: what `copy.deepcopy` gets as its memo, so that it copies no tensor; or a copy on fake tensors. Knows
no PEFT.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn

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


def fake_copy(model: nn.Module) -> Any:
    """A copy on fake tensors, for a `with` block of `FakeTensorMode`."""
    fake_by_id: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) not in fake_by_id:
                    fake: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if tensors is module._parameters:
                        fake = nn.Parameter(fake, requires_grad=fake.is_floating_point())
                    fake_by_id[id(tensor)] = fake
    # deepcopy takes its memo's objects for copies that exist, so it copies no tensor
    copied: Any = copy.deepcopy(model, fake_by_id).eval()
    with contextlib.suppress(Exception):  # the default implementation groups tokens by expert, which depends on values
        copied.set_experts_implementation("batched_mm")
    return copied
