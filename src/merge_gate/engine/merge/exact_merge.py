"""The merge in float64, and how far a merge in float32 may be from it.

In: the planned `Walk` of an adapter, and names of the base's tensors. Out: `ExactRows`. Measures and judges nothing.

The bounds of a float32 merge, with u = 2⁻²⁴ and γ_n = n·u/(1 − n·u):

1. LoRA adds D = s·BA with r ranks. Each product, sum, and scaling rounds once, so |D̂ − D| ≤ γ_(r+4)·|s|·|B||A| in every
   order. These errors are nearly independent. A partial sum is about √(D² + s²·B²A²), so the standard deviation of
   D̂ − D is at most u·√((r+4)/3)·√(D² + s²·B²A²). The bound is the smaller of γ and `DEVIATIONS` of these. A row or a
   column shares the rounding of a factor that was scaled: at most u·|s|·|B||A|, with a deviation of u/√3·|s|·√(B²A²).
2. Other methods are merged by PEFT in float64. Their bound is `OTHER_METHODS` of the tensor's largest value.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch

from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.merge.private_copies import PrivateCopies, Slot, slots_of
from merge_gate.engine.merge.walk import Walk
from merge_gate.engine.tensors.deviation import FLOAT32, ExactRows

DEVIATIONS = 6.0
"""One in 500 million values is further off than so many standard deviations."""

OTHER_METHODS = 2.0**-18

ELEMENTS = 1 << 16
"""Elements that are compared at a time: they stay in the processor's cache."""


def exact_rows(walk: Walk, names: Collection[str]) -> Iterator[ExactRows]:
    """The exact merges of these tensors. A tensor that PEFT only copies has none.

    A tensor that several layers change comes once for each, and none of these is the whole merge.
    """
    givers: dict[str, set[int]] = {}  # an outer layer may merge the tensors of its inner layers
    planned = {id(block.layer): block for block in walk.planned if block.update.magnitude is None}
    for _, layer in walk.layers:
        slots = slots_of(layer, walk.loaded.slots)
        wanted = [one for one in slots if one.name in names and id(layer) not in givers.get(one.name, ())]
        block = planned.get(id(layer))
        if wanted and block is not None:
            with walk.base.filled([block.slot.name]):
                yield from lora_rows(block.slot.name, block.slot.data, block.update)
        elif wanted:
            for rows in _by_peft(walk, layer, slots, wanted):
                givers[rows.name] = {id(inner) for inner in layer.modules() if inner is not layer}
                yield rows


def lora_rows(name: str, weight: torch.Tensor, update: LowRankUpdate) -> Iterator[ExactRows]:
    """Case 1, for a weight of any dtype."""
    ranks = update.lora_a.shape[0]
    a, b = update.lora_a.double(), update.lora_b.double() * update.scaling
    left, right = (a.T, b.T) if update.transposed else (b, a)
    largest = FLOAT32 * (ranks + 4) / (1 - FLOAT32 * (ranks + 4))
    step = max(1, ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        base, part = weight[start : start + step].double(), left[start : start + step]
        delta, size, square = part @ right, part.abs() @ right.abs(), part.square() @ right.square()
        deviation = FLOAT32 / math.sqrt(3) * square.sqrt()
        bound = DEVIATIONS * FLOAT32 * math.sqrt((ranks + 4) / 3) * (delta.square() + square).sqrt()
        yield ExactRows(
            name=name,
            start=start,
            base=base,
            merged=base + delta,
            bound=torch.minimum(largest * size, bound),
            shared=torch.minimum(FLOAT32 * size, DEVIATIONS * deviation),
            size=size,
        )


def _by_peft(walk: Walk, layer: Any, slots: list[Slot], wanted: list[Slot]) -> Iterator[ExactRows]:
    """Case 2. Nothing if PEFT cannot merge the method in float64."""
    before, bases, merged = layer.get_base_layer(), {}, {}
    with PrivateCopies(layer, slots, walk.base, dtype=torch.float64, mapped=walk.loaded.mapped), _in_float64(layer):
        bases = {slot.name: slot.data.double() for slot in wanted}
        try:
            layer.merge(safe_merge=False)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return
        if layer.get_base_layer() is before:  # else PEFT has put a trained copy in its place
            merged = {slot.name: slot.tensor.data.double() for slot in wanted if slot.tensor is not None}
    for name, exact in merged.items():
        base = bases[name]
        if base.shape == exact.shape and exact.dim() and exact.numel() and not torch.equal(base, exact):
            size = torch.maximum(base.abs().max(), exact.abs().max())
            step = max(1, ELEMENTS * len(exact) // exact.numel()) if exact.dim() > 1 else len(exact)
            for start in range(0, len(exact), step):
                rows = slice(start, start + step)
                yield ExactRows(
                    name=name,
                    start=start,
                    base=base[rows],
                    merged=exact[rows],
                    bound=OTHER_METHODS * size,
                    shared=OTHER_METHODS / 2 * size,
                    size=size,
                )


@contextlib.contextmanager
def _in_float64(layer: Any) -> Iterator[None]:
    """Inside of the `with` block, the adapter's own tensors in a layer are float64."""
    of_base = {id(one) for one in layer.get_base_layer().parameters()}
    own = [one for one in (*layer.parameters(), *layer.buffers()) if id(one) not in of_base and one.is_floating_point()]
    stored = [one.data for one in own]
    for one in own:
        one.data = one.data.double()
    try:
        yield
    finally:
        for one, data in zip(own, stored, strict=True):
            one.data = data
