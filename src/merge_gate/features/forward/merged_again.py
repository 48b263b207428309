"""Merges an adapter once more, and keeps the merged tensors, so that the merged model can run.

In: a base, and an adapter loaded on a scratch copy. Out: `MergedModel`. The base is not changed.
"""

from __future__ import annotations

import torch

from merge_gate.engine.adapter.load_adapter import Loaded
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.consumer import WholeTensors
from merge_gate.engine.merge.one_pass import merge_planned
from merge_gate.engine.merge.walk import Walk
from merge_gate.engine.tensors.measure import shares_storage
from merge_gate.features.forward.rounding import MergedModel
from merge_gate.records.measured import Evidence, MeasureOptions

MEMORY_SHARE = 0.5
"""The merged tensors may take this share of the free memory."""


def fits(base: Base, evidence: Evidence, free_bytes: int | None) -> bool:
    """Whether the merged tensors may be kept in memory, with two tensors of float32."""
    sizes = (one.stats.numel * getattr(torch, one.stats.dtype).itemsize for one in evidence.merges)
    largest = max((tensor.numel() for tensor in base.tensors.values()), default=0)
    return free_bytes is None or sum(sizes) + 2 * largest * torch.float32.itemsize <= free_bytes * MEMORY_SHARE


def merged_again(base: Base, loaded: Loaded, *, safe_merge: bool) -> MergedModel | None:
    """The merge. None if PEFT has to repeat it without blocks."""
    received: dict[str, torch.Tensor] = {}
    walk = Walk(
        base=base,
        loaded=loaded,
        measure_options=MeasureOptions(estimates=True),
        consumers=(WholeTensors(received.__setitem__),),
        safe_merge=safe_merge,
    )
    walk.plan()
    merge_planned((walk,), (base,))
    if walk.differing:
        return None
    walk.finish()
    model = loaded.model.get_base_model()
    places = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    in_place = {  # any other merged tensor is in the model
        name: values
        for name, values in received.items()
        if name in base.tensors and shares_storage(base.tensors[name], places[name])
    }
    return MergedModel(model=model, values=in_place)
