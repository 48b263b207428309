"""Looks at what the modules of a model return while it runs: the largest values, and values that are not finite.

In: a model that is about to run, and the dtype that it is served in. Out: `Activations`. Knows no adapter.

Only tensors that a module returns are seen, because every device stores these. Attention scores, and what a fused
kernel keeps inside, are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree


@dataclass(slots=True)
class Activation:
    """All values that a module returned. `largest` is the largest finite absolute value.

    A value that is exactly the largest of the dtype is left out: masks are made of it, and clamping leaves it.
    """

    largest: float = 0.0
    finite: bool = True

    def add(self, tensor: torch.Tensor) -> None:
        """Count the values of a tensor."""
        ceiling = torch.finfo(tensor.dtype).max
        low, high = (float(value) for value in torch.aminmax(tensor))
        if not -ceiling < low <= high < ceiling:  # NaN, too
            self.finite &= bool(torch.isfinite(tensor).all())
            inside = tensor[tensor.abs() < ceiling]
            low, high = (float(value) for value in torch.aminmax(inside)) if inside.numel() else (0.0, 0.0)
        self.largest = max(self.largest, -low, high)


@dataclass(slots=True)
class Activations:
    """What the modules returned in the served dtype, by their paths, in the order in which they returned first.

    `ran` are the paths of all modules that returned something.
    """

    by_module: dict[str, Activation] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)


@contextlib.contextmanager
def watched(model: nn.Module, dtype: torch.dtype) -> Iterator[Activations]:
    """The activations of the modules that run inside of the `with` block."""
    activations = Activations()

    def watch(path: str, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            activations.ran.add(path)
            for tensor in tensors_of(output):
                if tensor.dtype == dtype:
                    activations.by_module.setdefault(path, Activation()).add(tensor)

        return module.register_forward_hook(look)

    hooks = [watch(path, module) for path, module in model.named_modules()]
    try:
        yield activations
    finally:
        for hook in hooks:
            hook.remove()


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors that a module returned, except those of a cache."""
    for value in _pytree.tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            yield value
