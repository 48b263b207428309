"""The fast way of the most common adapter: vanilla LoRA on plain linear layers, whole files, finite values.

In: a `Base` and what the preflight read. Out: the `Evidence` that PEFT's own merge gives, as exactly as the thresholds
ask for (tests/engine/test_bits.py and test_plain.py hold one against the other), or None: then PEFT's own merge
does it.
Anything out of the ordinary ends here in None and is never judged here: another method, a name too many or too few, a
shape, a non-finite value.

1. A weight whose merge cannot hold large values, and whose sample changes, is settled by that.   `merge_bounded`
2. Any other is merged whole, in blocks.                                                          `merge_blocks`

PEFT still decides what is merged where: its injection is run once per distinct adapter_config.json on a scratch with
empty factors (`low_cpu_mem_usage`: no values are made, none are loaded), and the targets, the names in the file, the
scaling and the orientation are read off its layers. What is left out is only work without a result: initialising
factors that the file overwrites, and copying weights that are only read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open

from merge_gate.engine import lowrank
from merge_gate.engine.base import Base
from merge_gate.engine.defects import refuse_wrong_merges
from merge_gate.engine.load import ADAPTER_NAME, base_slots, promised_names, targeted_modules
from merge_gate.engine.measure import dtype_max, dtype_name, measure
from merge_gate.engine.peft_config import initialisation_writes_to_base, read_config
from merge_gate.engine.threads import spread
from merge_gate.errors import EngineError, Refused
from merge_gate.records import EVERYTHING, AdapterFiles, Evidence, FileTensor, TensorMerge, TensorStats, Thresholds

OnTensor = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int, str], None]

ROUNDED = (torch.bfloat16, torch.float16)
"""Dtypes in which a float32 delta loses bits, so that the loss is measured."""

SUPPORTED = (torch.float32, *ROUNDED)
"""Dtypes of a weight for which PEFT holds the factors in float32 after loading (autocast_adapter_dtype)."""


FAIR = 1.5
"""A sample speaks for the whole if it holds its share of ‖delta‖², give or take this factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLayer:
    """One linear layer and the two factors of its delta. `weight` is the base's name, the factors' are the file's."""

    path: str
    weight: str
    lora_a: str
    lora_b: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    scaling: float
    swapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What PEFT would do for one adapter_config.json on one base."""

    layers: tuple[PlainLayer, ...]
    targeted: tuple[str, ...]


def merge_plain(
    base: Base,
    files: AdapterFiles,
    *,
    thresholds: Thresholds = EVERYTHING,
    on_tensor: OnTensor | None = None,
    progress: Progress | None = None,
) -> Evidence | None:
    """Measure the merge of a plain adapter, or None where it is not plain through and through.

    The arguments are those of `merge_adapter`.
    """
    started = time.perf_counter()
    plan = _plan(base, files)
    if plan is None or not _fits(plan, files):
        return None
    with safe_open(Path(files.directory) / str(files.weights), framework="pt") as opened:
        tensors = {header.name: opened.get_tensor(header.name) for header in files.tensors}
    file_tensors = tuple(FileTensor(stats=measure(tensor, name)) for name, tensor in tensors.items())
    if not all(one.stats.finite for one in file_tensors):
        return None
    merges: list[TensorMerge] = []
    for merge in _merges(base, plan, tensors, thresholds, on_tensor):
        if merge is None:
            return None
        merges.append(merge)
        if progress is not None:
            progress(len(merges), len(plan.layers), merge.module)
    order = {layer.weight: position for position, layer in enumerate(plan.layers)}
    merges.sort(key=lambda merge: order[merge.stats.name])
    checked = [*(one.stats for one in merges), *(stats for name, stats in base.stats.items() if name not in order)]
    return Evidence(
        base=base.facts,
        peft_type=files.peft_type,
        file_tensors=file_tensors,
        targeted=plan.targeted,
        merges=tuple(merges),
        parameters_checked=sum(stats.numel for stats in checked),
        parameters_bounded=sum(one.bounded for one in merges),
        parameters_total=base.facts.parameters,
        seconds=time.perf_counter() - started,
    )


def _merges(
    base: Base, plan: Plan, tensors: dict[str, torch.Tensor], thresholds: Thresholds, on_tensor: OnTensor | None
) -> Iterator[TensorMerge | None]:
    """The merge of each layer: of those that a bound settles, then of the others; None where PEFT has to do it."""

    def delta(layer: PlainLayer) -> Delta:  # made when it is needed: in float32 it can be twice the file
        lora_a, lora_b = (tensors[name].to(base.device, torch.float32) for name in (layer.lora_a, layer.lora_b))
        return Delta(name=layer.weight, lora_a=lora_a, lora_b=lora_b, scaling=layer.scaling, swapped=layer.swapped)

    def settle(layer: PlainLayer) -> TensorMerge | None:
        return merge_bounded(base, delta(layer), thresholds)

    def whole(layer: PlainLayer, weight: torch.Tensor) -> TensorMerge | None:
        return merge_blocks(base, delta(layer), weight, thresholds=thresholds, on_tensor=on_tensor)

    left = []
    for layer, merge in zip(plan.layers, spread(settle, plan.layers), strict=True):
        if merge is None:
            left.append(layer)
        else:
            yield merge
    weights = base.weights.stream(layer.weight for layer in left)
    if base.device.type == "cpu":
        yield from spread(lambda pair: whole(*pair), zip(left, weights, strict=True))
    else:  # one card: the next weight travels while it computes
        yield from map(whole, left, weights)


def _plan(base: Base, files: AdapterFiles) -> Plan | None:
    """The plan for this config; two adapters with the same adapter_config.json share it."""
    if files.config_json not in base.plans:
        base.plans[files.config_json] = _make_plan(base, files)
    found: Plan | None = base.plans[files.config_json]
    return found


def _make_plan(base: Base, files: AdapterFiles) -> Plan | None:
    try:
        config = read_config(files)
        if base.quantized or not _is_vanilla_config(config):
            return None
        scratch = base.scratch()
        slots, sharers = base_slots(scratch)
        model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
        model = model_class(scratch, config, ADAPTER_NAME, low_cpu_mem_usage=True)
        refuse_wrong_merges(model, config)
    except (Refused, ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, AttributeError, ImportError):
        return None  # PEFT's own way finds the same and says it
    names = {key: name for name, key in promised_names(model, ADAPTER_NAME).items()}
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if isinstance(module, BaseTunerLayer):
            layer = _layer(path, module, names, slots, sharers)
            if layer is None:
                return None
            layers.append(layer)
    if not layers or len(names) != 2 * len(layers):
        return None
    return Plan(layers=tuple(layers), targeted=targeted_modules(model))


def _is_vanilla_config(config: Any) -> bool:
    return (
        isinstance(config, peft.LoraConfig)
        and type(config) is peft.LoraConfig
        and config.bias == "none"
        and not config.modules_to_save
        and not initialisation_writes_to_base(config)
    )


def is_vanilla(layer: Any) -> bool:
    """Whether PEFT merges this layer by W + scaling · B @ A and nothing else."""
    return (
        type(layer) is LoraLinear
        and layer.active_adapters == [ADAPTER_NAME]
        and ADAPTER_NAME in layer.lora_A
        and ADAPTER_NAME not in layer.lora_variant
        and not layer.lora_bias[ADAPTER_NAME]
        and not layer.merged_adapters
        and not layer.disable_adapters
    )


def _layer(
    path: str,
    layer: Any,
    names: dict[str, str],
    slots: dict[tuple[int, str], str],
    sharers: dict[str, tuple[str, ...]],
) -> PlainLayer | None:
    weight = slots.get((id(layer.get_base_layer()), "weight"))
    if not is_vanilla(layer) or weight is None or weight in sharers:
        return None
    sides = [names.get(f"{path}.{side}.{ADAPTER_NAME}.weight") for side in ("lora_A", "lora_B")]
    parameters = (layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight)
    if sides[0] is None or sides[1] is None or layer.get_base_layer().weight.dtype not in SUPPORTED:
        return None
    return PlainLayer(
        path=path,
        weight=weight,
        lora_a=sides[0],
        lora_b=sides[1],
        shapes=(tuple(parameters[0].shape), tuple(parameters[1].shape)),
        scaling=layer.scaling[ADAPTER_NAME],
        swapped=layer.fan_in_fan_out,
    )


def _fits(plan: Plan, files: AdapterFiles) -> bool:
    """Whether the file holds exactly the factors of the plan, in floats and in the shapes that PEFT expects."""
    if files.weights is None or not files.weights.endswith(".safetensors"):
        return False
    wanted = {layer.lora_a: layer.shapes[0] for layer in plan.layers} | {
        layer.lora_b: layer.shapes[1] for layer in plan.layers
    }
    return {header.name: header.shape for header in files.tensors} == wanted and all(
        header.dtype in {"F32", "F16", "BF16", "F64"} for header in files.tensors
    )


# --- one layer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is added to the weight that the base calls `name`: scaling · lora_b @ lora_a, (r, in) and (out, r).

    The factors are on the device that computes. `swapped`: the weight is stored as (in, out).
    """

    name: str
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    swapped: bool

    def norm(self) -> float:
        return math.sqrt(lowrank.delta_norm_sq(self.lora_a, self.lora_b, self.scaling))


def merge_bounded(base: Base, delta: Delta, thresholds: Thresholds) -> TensorMerge | None:
    """Settle the merge of one weight of the base by a bound and a sample; None where it has to be merged whole.

    That is where a value may be above the threshold, and where the sample does not speak for the rest: it does not
    change, or holds much more or less than its share of the delta (a few rows that were trained, the others not).

    Raises:
        EngineError: a merged value is above its bound: this machine, this torch or this module is wrong.
    """
    weight, stats = base.tensors[delta.name], base.stats[delta.name]
    if not thresholds.headroom or not stats.finite or not _supported(delta, weight):
        return None
    bound = lowrank.merged_bound(stats.max_abs, delta.lora_a, delta.lora_b, delta.scaling, weight.dtype)
    if not bound <= thresholds.headroom * dtype_max(weight.dtype):
        return None
    found = _sample(base, delta, weight)
    if not found.max_abs <= bound:
        raise EngineError(
            f"{delta.name}: a merged value of {found.max_abs:g} is above its bound of {bound:g}",
            hint="check that nothing writes to the base during a run; else please report this as a bug of merge-gate",
        )
    delta_norm, figures = delta.norm(), found.figures
    if figures is None or not found.changed or not _speaks(figures, found.numel, delta_norm):
        return None
    known = delta_norm <= thresholds.delta_norm * math.sqrt(figures.base_sq)  # the whole has no less than its sample
    return _from_blocks(
        delta.name,
        weight,
        found,
        figures,
        extremes=(found.minimum, found.maximum) if found.merged == found.numel else (-bound, bound),
        norms=(None if known else base.norm(delta.name), delta_norm),
    )


def _sample(base: Base, delta: Delta, weight: torch.Tensor) -> lowrank.LowRankMerge:
    return lowrank.merge_sample(
        weight.data,
        delta.lora_a,
        delta.lora_b,
        delta.scaling,
        scratch=base.buffers(),
        fan_in_fan_out=delta.swapped,
    )


def _speaks(figures: lowrank.Figures, numel: int, delta_norm: float) -> bool:
    """Whether a sample holds its share of ‖delta‖², so that its loss by rounding may stand for the whole's."""
    expected = delta_norm**2 * figures.numel / numel
    return expected / FAIR <= figures.delta_sq <= expected * FAIR


def merge_blocks(
    base: Base,
    delta: Delta,
    weight: torch.Tensor,
    *,
    thresholds: Thresholds = EVERYTHING,
    on_tensor: OnTensor | None = None,
) -> TensorMerge | None:
    """Measure all of W + scaling · B @ A for one weight of the base, which is only read; None where lowrank.py cannot.

    `weight` is the tensor that the base calls `delta.name`, on the device that computes. What rounding does is
    estimated by a sample where the thresholds allow it and the sample speaks for the whole.

    None too where the result is not finite, or at the edge of its dtype: PEFT's own merge then says what is broken.
    """
    if not _supported(delta, weight):
        return None
    figures = _sample(base, delta, weight).figures if thresholds.rounding_loss else None
    if figures is not None and not _speaks(figures, weight.numel(), delta.norm()):
        figures = None
    merged = torch.empty_like(weight) if on_tensor is not None else None

    def keep(row: int, block: torch.Tensor) -> None:
        if merged is not None:
            merged[row : row + block.shape[0]] = block

    found = lowrank.merge_measured(
        weight,
        delta.lora_a,
        delta.lora_b,
        delta.scaling,
        scratch=base.buffers(),
        fan_in_fan_out=delta.swapped,
        figures=figures is None,
        emit=None if merged is None else keep,
    )
    if not found.finite or found.max_abs >= dtype_max(weight.dtype):
        return None
    if on_tensor is not None and merged is not None:
        on_tensor(delta.name, merged)
    return _from_blocks(
        delta.name,
        weight,
        found,
        figures or found.figures,
        extremes=(found.minimum, found.maximum),
        norms=(base.norm(delta.name), delta.norm()),
    )


def _supported(delta: Delta, weight: torch.Tensor) -> bool:
    return lowrank.supports(weight, delta.lora_a, delta.lora_b, fan_in_fan_out=delta.swapped)


def _from_blocks(
    name: str,
    weight: torch.Tensor,
    found: lowrank.LowRankMerge,
    figures: lowrank.Figures | None,
    *,
    extremes: tuple[float, float],
    norms: tuple[float | None, float],
) -> TensorMerge:
    """What is known of one weight; `norms` are ‖W‖ and ‖delta‖. What a sample loses, the whole loses as a share."""
    base_norm, delta_norm = norms
    lossy = figures is not None and weight.dtype in ROUNDED and figures.delta_sq > 0
    return TensorMerge(
        module=name.rpartition(".")[0],
        stats=TensorStats(
            name=name,
            dtype=dtype_name(weight.dtype),
            shape=tuple(weight.shape),
            numel=found.numel,
            minimum=extremes[0],
            maximum=extremes[1],
        ),
        dtype_max=dtype_max(weight.dtype),
        changed=found.changed,
        base_norm=base_norm,
        delta_norm=delta_norm,
        lost_norm=math.sqrt(figures.lost_sq / figures.delta_sq) * delta_norm if figures and lossy else None,
        unchanged_fraction=figures.unchanged / figures.numel if figures else None,
        bounded=found.numel - found.merged,
        estimated=figures is not None and figures.numel < found.numel,
    )
