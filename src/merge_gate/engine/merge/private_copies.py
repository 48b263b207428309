"""Private copies of the base's tensors, while PEFT merges into them.

In: a tuner layer on a scratch copy, and the names of its tensors. Out: the same layer over copies, inside of a `with`
block. A tensor that another layer still has to merge into keeps the result of the last one. Knows nothing of measuring.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME
from merge_gate.engine.adapter.mapped_factors import in_memory
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.stored_spans import bytes_of
from merge_gate.engine.tensors.module_copies import wrap
from merge_gate.engine.tensors.quantized import is_quantized

Names = Mapping[tuple[int, str], str]
"""(id of a module of the scratch copy, parameter's name there) → the base's name."""


@dataclass(slots=True)
class Slot:
    """One tensor of the base under a tuner layer: its place, its name, and its values before the layer."""

    module: nn.Module
    attribute: str
    name: str
    parameter: torch.Tensor
    data: torch.Tensor

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor in this place now: the parameter, another one, or a plain tensor (PEFT's MultiheadAttention)."""
        found: torch.Tensor | None = getattr(self.module, self.attribute, None)
        return found

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


def slots_of(layer: Any, names: Names) -> list[Slot]:
    """The tensors of the base below a tuner layer, each once."""
    found: dict[int, Slot] = {}
    for module in layer.get_base_layer().modules():
        for attribute, parameter in module._parameters.items():
            name = names.get((id(module), attribute))
            if parameter is not None and name is not None:
                found.setdefault(id(parameter), Slot(module, attribute, name, parameter, parameter.data))
    return list(found.values())


class Turns:
    """How many layers still have to merge into each tensor, and its values before the first of them."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._waiting: dict[int, int] = {}
        self._first: dict[int, torch.Tensor] = {}
        for slot in slots:
            self._waiting[id(slot.parameter)] = self._waiting.get(id(slot.parameter), 0) + 1

    def is_alone(self, slot: Slot) -> bool:
        """Whether only one layer merges into the tensor, and has not done so yet."""
        return self._waiting.get(id(slot.parameter)) == 1

    def begin(self, slot: Slot) -> None:
        self._first.setdefault(id(slot.parameter), slot.data)

    def end(self, slot: Slot) -> torch.Tensor | None:
        """The values from before the first layer, to be put back; None while another layer waits."""
        left = self._waiting.get(id(slot.parameter), 1) - 1
        self._waiting[id(slot.parameter)] = left
        return None if left > 0 else self._first.pop(id(slot.parameter), slot.data)


class PrivateCopies:
    """A tuner layer over copies of the base's tensors, on the device that computes (`with` block).

    Inside of the block, hollow tensors of the base have values (hollow.py).

    A quantized weight needs only a wrapper, because PEFT puts a new parameter in its place. It marks the old one,
    though.

    Args:
        layer: PEFT's layer.
        slots: the tensors of the layer.
        base: the base that they belong to. The copies are on its device.
        dtype: the dtype of the copies. None keeps each tensor's own.
        keep_marks: keep PEFT's marks of what it has merged. True for a merge that counts.
        mapped: the ids of factors that are views of the adapter's file. Inside of the block, they are copies.
        lends: PEFT gets hollow tensors themselves, because safe_merge copies a weight before it adds to it. A checksum
            shows whether PEFT has written to one. For one merge; `renew` would give no fresh values.

    Attributes:
        was_written: after the block, whether PEFT has written to a tensor that was lent. It has its values again.
    """

    def __init__(
        self,
        layer: Any,
        slots: list[Slot],
        base: Base,
        *,
        dtype: torch.dtype | None = None,
        keep_marks: bool = False,
        mapped: Collection[int] = (),
        lends: bool = False,
    ) -> None:
        self._layer, self._slots, self._device, self._dtype = layer, slots, base.device, dtype
        self._keep_marks = keep_marks
        self._found = [(slot.tensor, slot.parameter.data) for slot in slots]
        self._filled = base.filled(slot.name for slot in slots)
        self._factors = in_memory(layer, mapped)
        self._merged = {id(inner): list(inner.merged_adapters) for inner in self._tuners()}
        self._hollow = base.hollow if lends and dtype is None and base.device.type == "cpu" else None
        self._checksums: dict[int, int] = {}  # of the tensors that are lent, by the position of the slot
        self._stack = contextlib.ExitStack()
        self.was_written = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:  # in the end, or if no copy can be made, all of it is undone
            stack.callback(self._restore_marks)
            stack.enter_context(self._filled)
            stack.enter_context(self._factors)
            stack.callback(self._rewrite_lent)
            stack.callback(self._put_back)
            self.renew()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Put back what hung there before."""
        self._stack.close()

    def renew(self) -> None:
        """Make fresh copies and clear PEFT's marks, as before the merge."""
        for number, slot in enumerate(self._slots):
            if is_quantized(slot.parameter):
                slot.put(wrap(slot.parameter))
            elif self._can_lend(slot.data):
                slot.put(slot.parameter, slot.data)
                self._checksums[number] = _checksum(slot.data)
            else:
                slot.put(slot.parameter, slot.data.to(self._device, self._dtype, copy=True))
        for inner in self._tuners():
            inner.merged_adapters.clear()
        if self._device.type != "cpu":
            self._layer._move_adapter_to_device_of_base_layer(ADAPTER_NAME)

    def _can_lend(self, data: torch.Tensor) -> bool:
        """Whether its values can be written again. The load of the base may have changed values that stay in memory."""
        hollow = self._hollow
        return hollow is not None and hollow.holds(data) and not hollow.is_kept(data) and data.is_contiguous()

    def _put_back(self) -> None:
        for slot, (tensor, data) in zip(self._slots, self._found, strict=True):
            slot.put(tensor, data)

    def _rewrite_lent(self) -> None:
        for number, expected in self._checksums.items():
            data = self._slots[number].data
            if self._hollow is not None and _checksum(data) != expected:
                self.was_written = True
                self._hollow.rewrite(data)

    def _restore_marks(self) -> None:
        if not self._keep_marks:
            for inner in self._tuners():
                inner.merged_adapters[:] = self._merged.get(id(inner), [])

    def _tuners(self) -> list[Any]:
        return [inner for inner in self._layer.modules() if isinstance(inner, BaseTunerLayer)]


def _checksum(tensor: torch.Tensor) -> int:
    """It depends on the order of the values, unlike their sum: a layer may be transposed in its place."""
    return zlib.crc32(bytes_of(tensor))
