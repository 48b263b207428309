"""The merged tensors that the gate measures, kept as they pass: the gate itself drops each after its measurement.

In: a `with` block around a merge. Out: the tensors by the base's names. Nothing of torch, PEFT or the engine is
replaced: two of the engine's own functions are listened to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from merge_gate.engine.merge import adapter_merge, merged_tensors, plan
from merge_gate.engine.tensors.quantized import dequantized, is_quantized


@contextmanager
def kept() -> Iterator[dict[str, torch.Tensor]]:
    """Yield what will be measured; of a quantised weight, the values it stands for."""
    seen: dict[str, torch.Tensor] = {}
    of_tensor, merge_of = merged_tensors.of_tensor, plan._merge

    def measured(base: Any, module: Any, name: str, tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        seen[name] = (dequantized(module, tensor) if is_quantized(tensor) else tensor.detach()).clone()
        return of_tensor(base, module, name, tensor, *more, **named)

    def merge(base: Any, one: Any, weight: torch.Tensor) -> Any:
        made = merge_of(base, one, weight)
        blocks = [(block.rows, block.merged.clone()) for block in made.blocks()]
        whole = torch.empty(one.update.shape, dtype=blocks[0][1].dtype)
        for rows, values in blocks:
            whole[rows] = values
        seen[one.target.name] = whole
        return made

    merged_tensors.of_tensor = adapter_merge.of_tensor = measured
    plan._merge = merge
    try:
        yield seen
    finally:
        merged_tensors.of_tensor = adapter_merge.of_tensor = of_tensor
        plan._merge = merge_of
