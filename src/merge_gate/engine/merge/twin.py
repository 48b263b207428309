"""A layer's second merge, into float32 copies, which is the reference for the rounding loss.

In: a tuner layer that PEFT merges twice. Out: the second merge in less time, with the same bits; for a packed weight,
the values that PEFT packs. Knows no method.

1. Most of a merge is its delta, and most methods make it (`get_delta_weight`) without reading the weight.
2. The first layer of each kind shows whether this is so: both merges make the delta, and the bits have to be equal.
3. If they are, the second merge of the other layers of the kind reuses the delta of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME
from merge_gate.engine.merge.private_copies import Slot
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.engine.tensors.quantized import dequantized, elements, is_quantized

_METHOD = "get_delta_weight"


class Deltas:
    """The deltas that a layer's `get_delta_weight` returns inside of the `with` block, by adapter."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._own = layer, getattr(layer, _METHOD, None)
        self._kept: dict[Any, tuple[tuple[torch.Tensor, ...], list[int], Any]] = {}
        self._reuses = False
        self._outcomes: list[bool] | None = None

    def __enter__(self) -> Self:
        if self._own is not None:
            self._layer.__dict__[_METHOD] = self._get
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._layer.__dict__.pop(_METHOD, None)

    @contextlib.contextmanager
    def second_merge(self, *, reuses: bool) -> Iterator[list[bool]]:
        """Step 2 or, with `reuses`, step 3.

        Step 2 yields whether each delta has the bits of the first merge. A delta of zeros proves nothing, and counts as
        different.
        """
        outcomes: list[bool] = []
        self._reuses, self._outcomes = reuses, outcomes
        try:
            yield outcomes
        finally:
            self._reuses, self._outcomes = False, None

    def _get(self, *given: Any, **named: Any) -> Any:
        name = given[0] if len(given) == 1 and isinstance(given[0], str) and not named else None
        parts, versions, delta = self._kept.get(name, ((), [], None))
        if self._reuses and parts and [part._version for part in parts] == versions:  # PEFT has not written to it
            return delta
        delta = self._made(*given, **named)
        made = _parts(delta)
        if self._outcomes is not None:
            self._outcomes.append(_same(parts, made))
        elif made and name is not None:
            self._kept[name] = made, [part._version for part in made], delta
        return delta

    def _made(self, *given: Any, **named: Any) -> Any:
        assert self._own is not None  # noqa: S101 - else `_get` is not in its place
        return self._own(*given, **named)


def _same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    is_same = len(first) == len(second) > 0 and all(map(same_bits, first, second))
    return is_same and all(bool(part.any()) for part in second)


@dataclass(slots=True, kw_only=True)
class Twins:
    """The kinds of layers seen so far. `free`: whether their deltas are free of the weight that they are for."""

    free: dict[object, bool] = field(default_factory=dict)

    @contextlib.contextmanager
    def of(self, layer: Any, deltas: Deltas) -> Iterator[None]:
        """A `with` block for the second merge of a layer."""
        kind = _kind(layer)
        reuses = self.free.get(kind, False)
        with deltas.second_merge(reuses=reuses) as same:
            yield
        if not reuses:
            self.free[kind] = bool(same) and all(same) and self.free.get(kind, True)


def _kind(layer: Any) -> object:
    """The same code merges all layers of one kind, in the same shapes."""
    variant = (getattr(layer, "lora_variant", None) or {}).get(ADAPTER_NAME)
    own = (*layer.named_parameters(), *layer.named_buffers())
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in own if "base_layer." not in name)
    weight = getattr(layer.get_base_layer(), "weight", None)
    return type(layer), type(layer.get_base_layer()), type(variant), getattr(weight, "shape", None), shapes


def _parts(delta: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a delta; none if it holds anything else."""
    parts = delta if isinstance(delta, tuple) else (delta,)
    plain = all(type(part) in {torch.Tensor, nn.Parameter} and part.layout is torch.strided for part in parts)
    return parts if plain else ()


@contextlib.contextmanager
def sums(slots: list[Slot]) -> Iterator[list[torch.Tensor]]:
    """Yields the values that PEFT packs inside of the block, in its order: W + delta before it is quantized again.

    Each method adds in its own way (OFT and RoAd rotate, HiRA multiplies), but all end with a new parameter of the
    packed class. For one layer at a time, because the class is patched for all.
    """
    found: list[torch.Tensor] = []
    packed: set[Any] = {type(slot.parameter) for slot in slots if is_quantized(slot.parameter)}
    kinds = [kind for kind in packed if "__new__" in vars(kind)]
    own = [vars(kind)["__new__"] for kind in kinds]

    def made_by(make: Any) -> Any:
        def make_and_keep(kind: Any, data: Any = None, *given: Any, **named: Any) -> Any:
            if isinstance(data, torch.Tensor) and data.is_floating_point():
                found.append(data)
            return make(kind, data, *given, **named)

        return staticmethod(make_and_keep)

    for kind, one in zip(kinds, own, strict=True):
        kind.__new__ = made_by(one.__func__)
    try:
        yield found
    finally:
        for kind, one in zip(kinds, own, strict=True):
            kind.__new__ = one


def exact_quantized(changed: list[tuple[Slot, torch.Tensor]], found: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + delta before it is quantized again, by the base's name: the last of these sums, if one weight is packed."""
    packed = [(slot, tensor) for slot, tensor in changed if is_quantized(tensor)]
    if len(packed) != 1 or not found or found[-1].numel() != elements(packed[0][1]):
        return {}
    slot, tensor = packed[0]
    return {slot.name: found[-1].float().reshape(dequantized(slot.module, tensor).shape)}
