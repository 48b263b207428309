"""Private copies of the base's tensors, while PEFT merges into them.

In: a tuner layer on a scratch copy, and the names of its tensors. Out: the same layer over copies, inside of a `with`
block. A tensor that another layer still has to merge into keeps the result of the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine.adapter.inject import parameters_of
from merge_gate.engine.adapter.load_adapter import Arrival, Tensors
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.engine.tensors.module_copies import wrap
from merge_gate.engine.tensors.placement import device_of, placed
from merge_gate.engine.tensors.quantized import is_quantized

Names = Mapping[tuple[int, str], str]
"""(id of a module of the scratch copy, parameter's name there) → the base's name."""


@dataclass(slots=True)
class MergeTarget:
    """One tensor of the base under a tuner layer: its place, its name, and its values before the layer."""

    module: nn.Module
    attribute: str
    name: str
    parameter: torch.Tensor
    data: torch.Tensor

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor in this place now: the parameter, another one, or a plain tensor (PEFT's MultiheadAttention)."""
        tensor: torch.Tensor | None = getattr(self.module, self.attribute, None)
        return tensor

    def put(self, tensor: torch.Tensor | None, data: torch.Tensor | None = None) -> None:
        """Put a tensor in this place, as a parameter if it is one. `data` sets the values of the first parameter."""
        self.module.__dict__.pop(self.attribute, None)
        if tensor is None or isinstance(tensor, nn.Parameter):
            self.module._parameters[self.attribute] = tensor
        else:
            self.module._parameters.pop(self.attribute, None)
            self.module.__dict__[self.attribute] = tensor
        if data is not None:
            self.parameter.data = data


def targets_of(layer: Any, names: Names) -> list[MergeTarget]:
    """The merge targets below a tuner layer, each once."""
    targets: dict[int, MergeTarget] = {}
    for module in layer.get_base_layer().modules():
        for attribute, parameter in module._parameters.items():
            name = names.get((id(module), attribute))
            if parameter is not None and name is not None:
                targets.setdefault(id(parameter), MergeTarget(module, attribute, name, parameter, parameter.data))
    return list(targets.values())


class PendingMerges:
    """The number of layers that still have to merge into each tensor, and its values before the first merge."""

    def __init__(self, targets: Iterable[MergeTarget]) -> None:
        self._waiting: dict[int, int] = {}
        self._first: dict[int, torch.Tensor] = {}
        for target in targets:
            self._waiting[id(target.parameter)] = self._waiting.get(id(target.parameter), 0) + 1

    def is_alone(self, target: MergeTarget) -> bool:
        """Whether only one layer merges into the tensor, and has not done so yet."""
        return self._waiting.get(id(target.parameter)) == 1

    def begin(self, target: MergeTarget) -> None:
        self._first.setdefault(id(target.parameter), target.data)

    def end(self, target: MergeTarget) -> torch.Tensor | None:
        """The values before the first layer, which must be restored; None while another layer waits."""
        left = self._waiting.get(id(target.parameter), 1) - 1
        self._waiting[id(target.parameter)] = left
        return None if left > 0 else self._first.pop(id(target.parameter), target.data)


@contextlib.contextmanager
def private_copies(
    layer: Any,
    targets: list[MergeTarget],
    base: Base,
    *,
    dtype: torch.dtype | None = None,
    keep_marks: bool = False,
    mapped: Collection[int] = (),
) -> Iterator[Callable[[], None]]:
    """A tuner layer over copies of the base's tensors, on the device that merges it. Yields a function for new copies.

    Inside of the block, lazy tensors of the base have values (lazy_tensors.py). A quantized weight needs only a
    wrapper, because PEFT puts a new parameter in its place. It marks the old one, though.

    Args:
        layer: PEFT's layer.
        targets: the tensors of the layer.
        base: the base that they belong to.
        dtype: the dtype of the copies. None keeps each tensor's own.
        keep_marks: keep PEFT's marks of what it has merged. True for a merge that counts.
        mapped: the ids of factors that are views of the adapter's file. Inside of the block, they are copies.
    """
    before = [(target.tensor, target.parameter.data) for target in targets]
    marks = {id(inner): list(inner.merged_adapters) for inner in _tuners(layer)}
    device, of_base = device_of(layer, base.device), {id(target.parameter) for target in targets}

    def reset() -> None:
        """Make fresh copies and clear PEFT's marks, as before the merge."""
        for target in targets:
            if is_quantized(target.parameter):
                target.put(wrap(target.parameter))
            else:
                target.put(target.parameter, target.data.to(device, dtype, copy=True))
        for inner in _tuners(layer):
            inner.merged_adapters.clear()

    in_memory = factors_in_memory(layer, mapped)
    with base.filled(target.name for target in targets), in_memory, placed(layer, device, apart=of_base):
        try:
            reset()
            yield reset
        finally:
            for target, (tensor, data) in zip(targets, before, strict=True):
                target.put(tensor, data)
            for inner in () if keep_marks else _tuners(layer):
                inner.merged_adapters[:] = marks.get(id(inner), [])


def _tuners(layer: Any) -> list[Any]:
    return [inner for inner in layer.modules() if isinstance(inner, BaseTunerLayer)]


# --- factors that share the memory of the adapter's file -----------------------------------------------------------
#
# Adapters that wait for a pass over the base take no memory then. PEFT loads as for any user, and load_adapter.py
# compares the model with the file. Then a factor of the same dtype and bits is replaced by the tensor of the file,
# which is mapped. It is not aligned as torch aligns, and bits of products may depend on that (delta.py). So every merge
# gets copies of the factors (`factors_in_memory`, `LowRankUpdate.aligned`).


def map_factors(model: Any, arrival: Arrival, weights: Tensors) -> frozenset[int]:
    """Replace the factors that are in the file as they are. Returns the ids of their parameters."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    factors = {id(factor) for layer in layers for _, _, factor in parameters_of(layer)}
    own = dict(model.named_parameters(remove_duplicate=False))
    mapped: set[int] = set()
    for name, key in arrival.model_key.items():
        factor, stored = own.get(key), weights[name]
        if factor is None or id(factor) not in factors or factor.device.type != "cpu":
            continue
        if factor.stride() == stored.stride() and same_bits(factor.data, stored):
            factor.data = stored
            mapped.add(id(factor))
    return frozenset(mapped)


@contextlib.contextmanager
def factors_in_memory(layer: Any, mapped: Collection[int]) -> Iterator[None]:
    """Inside of the `with` block, the `mapped` factors of a layer are copies in memory."""
    of_file: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    for _, _, factor in parameters_of(layer) if mapped else ():
        if id(factor) in mapped:
            of_file.append((factor, factor.data))
            factor.data = factor.data.clone()
    try:
        yield
    finally:
        for factor, stored in of_file:
            factor.data = stored
