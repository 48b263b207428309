"""Factors that share the memory of the adapter's file, so that adapters which wait for a pass over the base take none.

In: an adapter that PEFT has loaded, and the tensors of its file. Out: the same adapter over the file's tensors, if
these have the same bits. This module imports nothing of merging.

1. PEFT loads as for any user, and `arrival.py` compares the model with the file. Then a factor of the same dtype and
   bits is replaced by the tensor of the file, which is mapped.
2. A tensor in a file is not aligned as torch aligns, and the bits of some products depend on that (delta.py). So every
   merge gets copies of the factors (`in_memory`, `LowRankUpdate.aligned`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate.engine.adapter.arrival import Arrival, Tensors
from merge_gate.engine.adapter.template import parameters_of
from merge_gate.engine.tensors.measure import same_bits


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


@contextmanager
def in_memory(layer: Any, mapped: Collection[int]) -> Iterator[None]:
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
