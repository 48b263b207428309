"""Runs a base and its adapters on made-up inputs, in the dtype of the merged weights, and looks at their activations.

In: a base, and adapters that are loaded on scratch copies and not merged yet; later, merged tensors. Out: a `Forward`
for each adapter. Nothing that is passed in is changed. Judges nothing.

1. Base and adapters run together (lockstep.py), so each weight is read once. The base runs only with the first ones.
   The first inputs that it accepts count (made_up_inputs.py).
2. If an adapter's activations leave the dtype, or come close, the merged model is run, too: it is what will be served.
3. A module of the base that is not finite by itself is no fault of an adapter. It counts as a fault of the base only if
   the model's outputs are not finite either: some models return the infinities of a mask.
4. Some models clamp what is not finite. So if the adapter causes it, the outputs are compared with those of the same
   weights in float32 (rounding.py), next to the same difference of the base.
5. A layer of the adapter that did not run counts if a module around it takes an input that was not made.

Code that comes with a base is never run here. Neither is a quantized base: bitsandbytes repacks weights when they run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from merge_gate.engine.base.direct_reads import has_foreign_code
from merge_gate.engine.base.loaded_base import Base, first_line
from merge_gate.engine.base.made_up_inputs import POSITIONS, Inputs, candidates, missing_inputs
from merge_gate.engine.forward.activations import Activations, tensors_of, watched
from merge_gate.engine.forward.lockstep import ModelRun, run_together, with_norms_in_blocks
from merge_gate.engine.forward.rounding import MergedModel, with_output_error
from merge_gate.engine.tensors import module_copies
from merge_gate.engine.tensors.measure import dtype_max
from merge_gate.records.measured import Forward
from merge_gate.records.refusals import Refused
from merge_gate.records.terms import Origin, Quantization

MOST_CANDIDATES = 6
"""So many inputs are tried. A base that is not in memory may be read for each."""

MOST_TEXTS = 16
"""So many inputs are run, each with up to 15 of the tokens that an adapter trains. Further tokens are left out."""

RAISED = 1.05
"""A module whose largest value the adapter changes by less returns the base's own."""

MOST_NAMED = 20
"""So many modules are named that did not run."""

CLOSE = 0.9
"""The merged model is run if an activation is above this share of the dtype's largest value: it may round up."""


def run_adapters(
    base: Base, models: Sequence[Any], tokens: Collection[int] = (), targeted: Sequence[Sequence[str]] = ()
) -> list[Forward | Refused]:
    """Step 1. Run the base, and each of its adapters. Returns why an adapter is refused that writes into the base.

    Args:
        base: the base, which is loaded or a skeleton.
        models: the models of transformers with an adapter's layers in place.
        tokens: ids that should be among the inputs.
        targeted: the modules of each model that carry the adapter.
    """
    why_not = why_not_run(base)
    if why_not:
        return [Forward(why_not=why_not) for _ in models]
    failures = [Forward(why_not="its configuration names no inputs that are known here")]
    for name, inputs in itertools.islice(candidates(base.model), MOST_CANDIDATES):
        of_base, seen = _run_with_base(base, models, name, tokens)
        if of_base.error is not None:
            failures.append(_failed("its forward", of_base.error))
            continue
        missing = ", ".join(missing_inputs(base.model, inputs))
        lacking = f"the model takes {missing} too" + "".join(f"; {failure.why_not}" for failure in failures[1:2])
        known = Forward(inputs=name, why_not=lacking if missing else None)
        return [
            outcome.error
            if isinstance(outcome.error, Refused) and not _is_bias_of_attention(outcome.error, paths)
            else _forward(base, _with_coverage(known, outcome.activations.ran, model, paths, inputs), of_base, outcome)
            for outcome, model, paths in zip(seen, models, targeted or [()] * len(models), strict=True)
        ]
    return [failures[-1] for _ in models]


def _is_bias_of_attention(refused: Refused, targeted: Sequence[str]) -> bool:
    """Whether it is PEFT's LoRA of an attention, which adds a trained bias to the base's in each forward."""
    return refused.refusal.fields["tensor"] in {f"{path}.out_proj.bias" for path in targeted}


def _with_coverage(
    forward: Forward, ran: Collection[str], model: nn.Module, targeted: Sequence[str], inputs: Inputs
) -> Forward:
    """Step 5. `ran` are the modules that ran."""
    lacks = {path: _lacks_input(path, model, ran, inputs) for path in targeted if path not in ran}
    not_run, not_counted = (tuple(path for path in lacks if lacks[path] is kind) for kind in (True, False))
    return replace(
        forward,
        modules=len(targeted) - len(not_counted),
        modules_run=len(targeted) - len(lacks),
        not_run=not_run[:MOST_NAMED],
        not_counted=not_counted[:MOST_NAMED],
    )


def _lacks_input(path: str, model: nn.Module, ran: Collection[str], inputs: Inputs) -> bool:
    """Whether a module around a layer takes an input that was not made, up to the first that ran."""
    while path:
        path = path.rpartition(".")[0]
        if missing_inputs(model.get_submodule(path), inputs):
            return True
        if path in ran:
            return False
    return False


def _run_with_base(base: Base, models: Sequence[Any], name: str, tokens: Collection[int]) -> tuple[_Seen, list[_Seen]]:
    """Run the base, and models with its weights, on the inputs of this name. The base runs once for all adapters."""
    key, inputs = (name, tuple(tokens)), _named(base, name, tokens)
    if (of_base := base.ran.get(key)) is not None:
        return of_base, _run(base, models, inputs) if models else []
    of_base, *others = _run(base, [base.model, *models], inputs)
    if of_base.error is None:
        base.ran[key] = of_base
    return of_base, others


def is_close(forward: Forward) -> bool:
    """Step 2: whether the merged model has to be run."""
    largest, allowed = forward.largest or 0.0, forward.largest_allowed or 0.0
    return forward.ran and (forward.nonfinite_origin is Origin.ADAPTER or largest > CLOSE * allowed)


def run_merged(base: Base, merged: MergedModel, forward: Forward, tokens: Collection[int]) -> Forward:
    """Steps 2 and 4, on the inputs of step 1.

    Raises:
        Refused: the merged model writes into the base.
    """
    inputs = _named(base, forward.inputs or "", tokens)
    of_base, of_merged = _run(base, [base.model, merged.model], inputs, merged.values, keeps=True)
    if isinstance(of_merged.error, Refused):
        raise of_merged.error
    made = _forward(base, forward, of_base, of_merged)
    if not made.ran or (base.lazy is not None and base.lazy.forget_touched()):
        return forward
    if made.nonfinite_origin is Origin.ADAPTER and of_base.finite and of_merged.finite:
        made = with_output_error(base, merged, inputs, (of_base.returned, of_merged.returned), made)
    is_only_merged = made.nonfinite_origin is Origin.ADAPTER and forward.nonfinite_origin is not Origin.ADAPTER
    return replace(made, nonfinite_origin=Origin.MERGE) if is_only_merged else made


def why_not_run(base: Base) -> str:
    """Why no model with this base can be run. Empty if that is not known."""
    if base.facts.quantization != Quantization.NONE:
        return "its base is quantized"
    return "code that comes with a base is not run" if has_foreign_code(base.model) else ""


def _named(base: Base, name: str, tokens: Collection[int]) -> list[Inputs]:
    """The inputs of this name, as many as the tokens need."""
    step, ids = POSITIONS - 1, list(tokens)
    texts = [ids[at : at + step] for at in range(0, len(ids), step)][:MOST_TEXTS] or [[]]
    return [next(inputs for known, inputs in candidates(base.model, text) if known == name) for text in texts]


@dataclass(slots=True)
class _Seen:
    """What a model returned for all inputs, or why it returned nothing. `returned` has it if it is kept."""

    activations: Activations
    finite: bool = True
    error: BaseException | None = None
    returned: list[Any] = field(default_factory=list)


def _run(
    base: Base,
    models: Sequence[Any],
    every: Sequence[Inputs],
    values: Mapping[str, torch.Tensor] = MappingProxyType({}),
    *,
    keeps: bool = False,
) -> list[_Seen]:
    """Run these models on all inputs. The last one has `values` in place of the base's tensors.

    If they read a weight without values, that shows as in a merge (`Base.was_misread`).
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_undone(model))
        seen = [_Seen(stack.enter_context(watched(model, _dtype(base)))) for model in models]
        for inputs in every:
            runs = [ModelRun(model=model, inputs=_clones(inputs), memory=base.memory) for model in models]
            runs[-1].own = values.get
            run_together(runs, base.tensors, base.filled)
            for outcome, run in zip(seen, runs, strict=True):
                outcome.error = outcome.error or run.error
                outcome.finite &= all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(run.returned))
                outcome.returned += [run.returned] if keeps else []
            if all(outcome.error is not None for outcome in seen):
                break
    return seen


def _dtype(base: Base) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, base.facts.dtype)
    return dtype


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """A `with` block in which the model is evaluated. What its forward changes in modules and configs is undone.

    The modules have new parameters in the block, over the same storage: a forward may exchange the storage of one.
    """
    modules = [vars(module) for module in model.modules()]
    every = [value for held in modules for value in (held, *held.values())]
    every += [vars(value) for value in every if isinstance(value, PreTrainedConfig)]
    places = {id(place): place for place in every if isinstance(place, dict | list | set)}.values()
    before = [(place, (dict if isinstance(place, dict) else list)(place)) for place in places if place]
    made = module_copies.tensors_of(model) | {id(buffer): buffer.clone() for buffer in model.buffers()}
    for held in modules:
        for tensors in (held["_parameters"], held["_buffers"]):  # PEFT exchanges an attention's on each `modules()`
            tensors.update({name: made.get(id(value), value) for name, value in tensors.items()})
    try:
        with_norms_in_blocks(model.eval())
        yield
    finally:
        for place in places:
            place.clear()
        for place, contents in before:
            (place.extend if isinstance(place, list) else place.update)(contents)


def _clones(inputs: Inputs) -> Inputs:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _forward(base: Base, forward: Forward, of_base: _Seen, of_adapter: _Seen) -> Forward:
    """Step 3: `forward` with the figures of this run."""
    for outcome in (of_base, of_adapter):
        if outcome.error is not None:
            return _failed("the forward with the adapter", outcome.error)
    own, seen = of_base.activations, of_adapter.activations
    common = [(path, seen.by_module[path], was) for path, was in own.by_module.items() if path in seen.by_module]
    origin, broken = None, next((path for path, now, was in common if was.finite and not now.finite), None)
    if broken is not None:
        origin = Origin.ADAPTER
    elif not of_base.finite:
        broken = next((path for path, activation in own.by_module.items() if not activation.finite), None)
        origin = Origin.BASE if broken is not None else None
    values = [(now.largest, path, was.largest) for path, now, was in common]
    larger = [row for row in values if row[0] > RAISED * row[2]]
    largest, raised = (max(each, key=lambda row: row[0], default=(None, None, None)) for each in (values, larger))
    return replace(
        forward,
        ran=True,
        parameters_run=_share_run(base, own),
        largest=largest[0],
        largest_module=largest[1],
        largest_of_base=largest[2],
        largest_allowed=dtype_max(_dtype(base)),
        raised=raised[0],
        raised_module=raised[1],
        raised_of_base=raised[2],
        nonfinite_module=broken,
        nonfinite_of_base=own.by_module[broken].largest if origin is Origin.ADAPTER and broken is not None else None,
        nonfinite_origin=origin,
    )


def _share_run(base: Base, own: Activations) -> float:
    """The share of the base's parameters whose modules ran. A tied one counts once."""
    sizes = {name: parameter.numel() for name, parameter in base.model.named_parameters()}
    ran = (size for name, size in sizes.items() if name.rpartition(".")[0] in own.ran)
    return sum(ran) / max(1, sum(sizes.values()))


def _failed(what: str, error: BaseException) -> Forward:
    if isinstance(error, Refused):
        return Forward(why_not=f"{what} writes to a weight of the base")
    is_of_memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return Forward(why_not=f"{what} raised {type(error).__name__}: {first_line(error)[:200]}", missing=is_of_memory)
