"""What PEFT's merge may write to, and what each place of the final model has to hold.

In: an adapter on its scratch copy, before PEFT merges. Out: `Refused` before a write into memory of the base or of the
loaded adapter happens, and the names of places that hold a wrong tensor afterwards. The right one was there before,
and the load has compared it with the file, or a layer's merge has left it.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.blocks.delta import HALVES
from merge_gate.engine.merge.private_copies import MergeTarget
from merge_gate.engine.tensors.measure import same_bits, shares_storage
from merge_gate.engine.tensors.quantized import is_quantized, scales
from merge_gate.records.refusals import Refused

_EXACT = ("_to_copy", "abs", "clone", "copy_", "neg", "zeros_like")
"""Operations whose results on 16-bit values are not rounded."""


class Places:
    """The places of the unloaded model before the merge, and the memory that must not change.

    That is the memory of the base, and of the tensors that the load and merged layers have left in these places.
    `layers` are PEFT's layers on the way to these places, by path.
    """

    def __init__(self, base: Base, model: nn.Module) -> None:
        self._base = base
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spans: list[tuple[int, str, torch.Tensor]] = []
        self.layers: list[tuple[str, Any]] = []
        self._visit(model, "")
        self._held = {id(parameter): data for parameter, data in self._before.values()}
        for name, tensor in base.tensors.items():
            self._protect(name, tensor)

    def _visit(self, module: Any, path: str) -> None:
        if isinstance(module, ModulesToSaveWrapper):
            inner = module.modules_to_save[module.active_adapter] if module.active_adapters else module.original_module
            self._visit(inner, path)
        elif isinstance(module, TrainableTokensWrapper):
            self._visit(module.token_adapter, path)
        elif isinstance(module, BaseTunerLayer):
            self.layers.append((path.removesuffix("."), module))
            self._visit(module.base_layer, path)
        else:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._before[path + name] = tensor, tensor.data
                    self._protect(path + name, tensor.data, *_scales(module, tensor))
            for name, child in module._modules.items():
                if child is not None:
                    self._visit(child, f"{path}{name}.")

    def _protect(self, name: str, *tensors: torch.Tensor) -> None:
        """Protect the memory of these tensors against writes. It stays in use."""
        for tensor in tensors:
            bisect.insort(self._spans, (tensor.data_ptr(), name, tensor), key=lambda span: span[0])

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name of the tensor in whose memory this one lies."""
        place = bisect.bisect(self._spans, tensor.data_ptr(), key=lambda span: span[0]) - 1
        if place < 0:
            return None
        start, name, known = self._spans[place]
        return name if tensor.data_ptr() < start + known.nbytes else None

    def is_moved(self, target: MergeTarget) -> bool:
        """Whether the place holds another tensor than before the merge, or than an earlier layer has left there."""
        known = self._held.get(self._key(target))
        return known is None or not shares_storage(known, target.data)

    def leave(self, target: MergeTarget, tensor: torch.Tensor) -> None:
        """Note that a layer's merge has left this tensor in its place, and in all places that share the tensor."""
        self._held[self._key(target)] = tensor.data
        self._protect(target.name, tensor.data, *_scales(target.module, tensor))

    def _key(self, target: MergeTarget) -> int:
        """PEFT's attention makes new parameters over the same memory, so they are identified by name."""
        known, _ = self._before.get(target.name, (target.parameter, None))
        return id(target.parameter) if id(target.parameter) in self._held else id(known)

    def wrong(self, merged: nn.Module, named: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """The names in PEFT's result that hold a wrong tensor or wrong scales."""
        for name, tensor in named.items():
            parameter, _ = self._before.get(name, (tensor, None))
            known = self._held.get(id(parameter))
            held_scales = _scales(merged.get_submodule(name.rpartition(".")[0]), tensor)
            is_left = known is not None and (shares_storage(known, tensor) or self._is_copy(name, known, tensor))
            if not is_left or any(self.name_of(scale) != name for scale in held_scales):
                yield name

    def _is_copy(self, name: str, known: torch.Tensor, tensor: torch.Tensor) -> bool:
        if is_quantized(known) or is_quantized(tensor):
            return False
        first = self._base.first_name(name)
        with self._base.filled([first] if first in self._base.tensors else []):
            return same_bits(known, tensor.to(known.device))


def _scales(module: nn.Module, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [scale for _, scale in scales(module, tensor)] if is_quantized(tensor) else []


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside of the `with` block, refuse what this thread writes into the memory of `places`.

    `is_on` can be set to False for a while. `is_sum`: values in 16 bits were converted, and added once for each shape,
    and nothing else has rounded them.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places, self._refused, self.is_on = places, list[Refused](), True
        self.is_sum, self._added = True, set[torch.Size]()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and self._refused:  # PEFT has caught it
            raise self._refused[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.is_on:
            for place, name in _written(func):
                given = args[place] if place < len(args) else named.get(name)
                for tensor in given if isinstance(given, list | tuple) else (given,):
                    self._refuse(func, tensor)
        made = func(*args, **named)
        if isinstance(made, torch.Tensor) and made.dtype in HALVES:
            self._count(func, made, args)
        return made

    def _refuse(self, func: Any, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
            name = self._places.name_of(tensor)
            if name is not None:
                self._refused.append(Refused("base_written", tensor=name, operation=func.overloadpacket.__name__))
                raise self._refused[-1]

    def _count(self, func: Any, made: torch.Tensor, args: Any) -> None:
        name = func.overloadpacket.__name__
        halves = [value for value in args if getattr(value, "dtype", None) in HALVES]
        if halves and not func.is_view and name not in _EXACT:
            self.is_sum = self.is_sum and name in ("add", "add_") and made.shape not in self._added
            self._added.add(made.shape)


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes to, by position and name."""
    arguments = enumerate(func._schema.arguments)
    return tuple(
        (place, arg.name) for place, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write
    )
