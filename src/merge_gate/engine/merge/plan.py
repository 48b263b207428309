"""The path of each layer: in blocks of rows, or through PEFT's own merge. Only this module decides.

In: an adapter on its scratch copy. Out: `BlockLayer`s, and the measured merge of one. These are layers of LoRA or DoRA
that block_merge.py merges with PEFT's bits, on a weight of the base that no other layer merges into. PEFT merges the
rest: other methods, other layers, and whatever is not finite or at the limit of its dtype.

Blocks need a cross-check: in every run PEFT also merges at least one layer of each `kind`, and the bits have to be the
same (one_pass.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners import lora

from merge_gate.engine.adapter.inject import DORA
from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, factors_of
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.blocks.block_merge import BlockMerge, Figures, Measured, MergedRows, measure_merge, merged_blocks
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.merge.merged_tensors import ROUNDED
from merge_gate.engine.merge.private_copies import MergeTarget, Names, PendingMerges, targets_of
from merge_gate.engine.merge.rounding_floor import DENSE, PACKED, is_start, rounding_share
from merge_gate.engine.tensors.measure import (
    dtype_max,
    dtype_name,
    has_rows,
    is_small,
    measure,
    same_bits,
    shares_storage,
)
from merge_gate.engine.tensors.quantized import dequantized, is_quantized, row_scales, scales
from merge_gate.records.measured import MeasureOptions, TensorMerge, TensorStats

FAIR_FACTOR = 1.25
"""A sample represents the whole if its share of ‖delta‖ is within this factor of its share of the elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayer:
    """One layer that is merged in blocks. The same code merges all layers of one `kind`, in the same shapes.

    They compute by the same code too, with the same settings: what proof.py shows for one of them holds for all.
    """

    path: str
    layer: Any
    target: MergeTarget
    update: LowRankUpdate
    row_scales: torch.Tensor | None
    kind: tuple[object, ...]


def plan_blocks(
    base: Base, layers: Iterable[tuple[str, Any]], names: Names, pending: PendingMerges
) -> list[BlockLayer]:
    """The layers that are merged in blocks, in the model's order."""
    planned = (_planned(base, path, layer, names, pending) for path, layer in layers)
    return [layer for layer in planned if layer is not None]


def _planned(base: Base, path: str, layer: Any, names: Names, pending: PendingMerges) -> BlockLayer | None:
    update = _update_of(layer)
    target = next((target for target in targets_of(layer, names) if target.attribute == "weight"), None)
    if update is None or target is None or not pending.is_alone(target):
        return None
    known = base.tensors.get(target.name)
    if known is None or not shares_storage(known, target.data):
        return None
    stats = base.stats.get(target.name)
    if stats is not None and not stats.finite:  # if it is not measured yet, the pass will see (one_pass.py)
        return None
    weight = target.parameter if is_quantized(target.parameter) else target.data
    scales_of_rows = row_scales(target.module, weight)
    if merged_blocks(weight, update, base.buffers(), row_scales=scales_of_rows) is None:
        return None
    variant = type(layer.lora_variant.get(ADAPTER_NAME))
    base_layer = layer.get_base_layer()
    settings = [value for value in vars(base_layer).values() if isinstance(value, bool | int | float | str)]
    only_itself = id(base_layer) if base_layer._buffers or base_layer._modules else None  # its forward may use them
    shapes = (target.data.shape, target.data.dtype, update.lora_a.shape, update.lora_a.dtype, update.transposed)
    return BlockLayer(
        path=path,
        layer=layer,
        target=target,
        update=update,
        row_scales=scales_of_rows,
        kind=(type(layer), type(base_layer), variant, *shapes, *settings, only_itself),
    )


def _update_of(layer: Any) -> LowRankUpdate | None:
    """PEFT's update of this layer, if it is LoRA's or DoRA's and nothing more; else None."""
    if type(layer) not in (*DENSE, *PACKED) or layer.merged_adapters or layer.disable_adapters:
        return None
    variant = layer.lora_variant.get(ADAPTER_NAME)
    if layer.active_adapters != [ADAPTER_NAME] or (variant is not None and type(variant) not in DORA):
        return None
    if dict(layer.lora_bias).get(ADAPTER_NAME):
        return None
    factors = factors_of(layer)
    if factors is None:
        return None
    return LowRankUpdate(
        lora_a=factors[0],
        lora_b=factors[1],
        scaling=float(layer.scaling[ADAPTER_NAME]),
        transposed=True if isinstance(layer, lora.layer.Embedding) else layer.fan_in_fan_out,
        magnitude=None if variant is None else layer.lora_magnitude_vector[ADAPTER_NAME].weight.data,
    )


# --- the merges ----------------------------------------------------------------------------------------------------


def agrees(base: Base, planned: BlockLayer, measured: TensorMerge) -> bool:
    """The cross-check: whether PEFT's merge has the bits, the extremes, and the scales of the blocks."""
    theirs = planned.target.tensor
    if theirs is None:
        return False
    planned = replace(planned, update=planned.update.aligned())
    merge = _merge(base, planned, planned.target.data.to(base.device))
    quantized = is_quantized(theirs)
    values = dequantized(planned.target.module, theirs) if quantized else theirs.data
    if not all(same_bits(block.merged.to(values.dtype), values[block.rows]) for block in merge.blocks()):
        return False
    if not quantized:
        stats = measure(values, planned.target.name)
        if (stats.minimum, stats.maximum) != (measured.stats.minimum, measured.stats.maximum):
            return False
    given = dict(scales(planned.target.module, theirs)) if quantized else {}
    ours = {name: scale for name, scale in merge.scales.items() if name in given}
    return all(same_bits(given[name].flatten(), scale.flatten()) for name, scale in ours.items())


def _merge(base: Base, planned: BlockLayer, weight: torch.Tensor) -> BlockMerge:
    held = planned.target.parameter if is_quantized(planned.target.parameter) else weight
    merge = merged_blocks(held, planned.update.to(held.device), base.buffers(), row_scales=planned.row_scales)
    assert merge is not None  # noqa: S101 - `_planned` has looked
    return merge


def merge_in_blocks(
    base: Base,
    planned: BlockLayer,
    weight: torch.Tensor,
    measure_options: MeasureOptions,
    consumers: Sequence[Consumer] = (),
    *,
    once: bool = False,
) -> TensorMerge | None:
    """Merge and measure one layer. None if a value is not finite or at the limit of its dtype: PEFT merges it then.

    `weight` is the base's, on the device that computes. With `consumers`, every element is merged as PEFT merges it,
    and the extremes are those of the values that they get. With `once`, they get what PEFT gives without safe_merge:
    W + delta is rounded once.
    """
    planned = replace(planned, update=planned.update.aligned())  # the factors may be the file's (private_copies.py)
    merge = _merge(base, planned, weight)
    with_rows = measure_options.rows and has_rows(planned.target.module, weight)
    is_plain_sum = planned.update.magnitude is None
    norm = of_rows = None
    if is_plain_sum or with_rows:
        norm, of_rows = planned.update.delta_norms()  # one pass, for all uses below
    norm = norm if is_plain_sum else None
    sample = _sample(merge, norm, measure_options.estimated_ratio) if measure_options.estimates else None
    ceiling = dtype_max(merge.dtype)
    receive = None
    if consumers:
        receive = functools.partial(_pass_on, consumers, planned, merge if once else None)
    measured = measure_merge(merge, figures=sample is None, receive=receive, with_change=once)
    if not measured.finite or measured.max_abs >= ceiling:
        return None
    extremes = measured.minimum, measured.maximum
    result = _tensor_merge(planned, extremes, sample or measured, norm=norm, changed=measured.changed, merge=merge)
    if not with_rows or of_rows is None:
        return result
    return replace(result, keeps_rows=_keeps_rows(base, planned, weight, of_rows.cpu()))


def _keeps_rows(base: Base, planned: BlockLayer, weight: torch.Tensor, of_rows: torch.Tensor) -> bool:
    """Whether no row changes much (`is_small`). `of_rows` are the norms of the delta's rows."""
    was, magnitude = base.row_norms(planned.target.name, weight), planned.update.magnitude
    if magnitude is None:
        return is_small(of_rows, was)
    is_of_rows = not planned.update.transposed  # an embedding's magnitude belongs to columns
    return is_of_rows and is_small((magnitude.cpu().double() - was).abs() + 2 * of_rows, was)


def _pass_on(consumers: Sequence[Consumer], planned: BlockLayer, once: BlockMerge | None, block: MergedRows) -> None:
    """Hand out rows. `once` makes the base's rows, to which the delta is added with one rounding."""
    rows = block.merged
    if once is not None and block.change is not None and not once.quantized and planned.update.magnitude is None:
        rows = (once.base(block.rows).to(block.change.dtype) + block.change).to(rows.dtype)
    for consumer in consumers:
        consumer.put_rows(planned.target.name, rows, start=block.rows.start, shape=planned.update.shape)


def _sample(merge: BlockMerge, delta_norm: float | None, largest_ratio: float) -> Measured | None:
    """Figures of some rows; None if they do not represent the others (a delta in few rows), or must be exact."""
    rows = merge.sampled()
    if rows is None:
        return None
    measured = measure_merge(rows, figures=True)
    if measured.figures is None:
        return measured
    if measured.figures.delta_sq > largest_ratio**2 * measured.figures.base_sq:
        return None
    if delta_norm is None:
        return measured
    held, expected = math.sqrt(measured.figures.delta_sq), delta_norm * math.sqrt(measured.numel / measured.of)
    return measured if expected / FAIR_FACTOR <= held <= expected * FAIR_FACTOR else None


def _tensor_merge(
    planned: BlockLayer,
    extremes: tuple[float, float],
    sample: Measured,
    *,
    norm: float | None,
    changed: bool,
    merge: BlockMerge,
) -> TensorMerge:
    """The figures as a record. `norm` is ‖delta‖ if it is known exactly; else it follows from the sample."""
    figures = sample.figures or Figures(unchanged=0, delta_sq=0.0, lost_sq=0.0, base_sq=0.0)
    part = sample.numel / sample.of
    delta_norm = math.sqrt(figures.delta_sq / part) if norm is None else norm
    lossy = (merge.dtype in ROUNDED or merge.quantized) and figures.delta_sq > 0
    return TensorMerge(
        module=planned.target.name.rpartition(".")[0],
        stats=TensorStats(
            name=planned.target.name,
            dtype=dtype_name(merge.dtype),
            shape=planned.update.shape,
            numel=merge.of,
            minimum=extremes[0],
            maximum=extremes[1],
        ),
        dtype_max=dtype_max(merge.dtype),
        changed=changed and _adds(planned, figures, delta_norm),
        base_norm=math.sqrt(figures.base_sq / part),
        delta_norm=delta_norm,
        lost_norm=math.sqrt(figures.lost_sq / figures.delta_sq) * delta_norm if lossy else None,
        unchanged_fraction=figures.unchanged / sample.numel,
        estimated=sample.estimated,
    )


def _adds(planned: BlockLayer, figures: Figures, delta_norm: float) -> bool:
    """Whether the change is more than the rounding of a product that cancels, of DoRA, or of quantizing again."""
    if planned.update.magnitude is None:
        return delta_norm > 0 and not is_start(planned.update.lora_a, planned.update.lora_b)
    return figures.delta_sq > rounding_share(planned.layer) ** 2 * figures.base_sq
