"""Combines several adapters into one with PEFT's `add_weighted_adapter`.

In: a base, and what the preflight read of each member. Out: `Loaded`, as of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.adapter.inject import base_slots, base_tensors_in_file, fit_vocabulary, inject, targeted_modules
from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Arrival, Loaded, Tensors, load_weights
from merge_gate.engine.adapter.peft_config import initialization_writes_to_base, read_config
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.engine.tensors.measure import same_values
from merge_gate.engine.tensors.placement import raise_if_of_the_run
from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles
from merge_gate.records.refusals import Refused


def combined(base: Base, members: tuple[AdapterFiles, ...], weights: tuple[Tensors, ...], combine: Combine) -> Loaded:
    """Load the members onto one scratch and combine them by PEFT's `add_weighted_adapter` (step 3 to 5 for each).

    Raises:
        Refused: a member does not load, or PEFT cannot combine them (different ranks, methods, fully trained modules).
    """
    scratch = _fitted(base, members)
    base_names, tied_modules = base_slots(scratch)
    names = tuple(f"member_{position}" for position in range(len(members)))
    configs = [read_config(files) for files in members]
    for name, config in zip(combine.adapters, configs, strict=True):
        _refuse_lost_settings(name, config)
    model: Any = None
    brought: list[dict[str, torch.Tensor]] = []
    arrivals: list[Arrival] = []
    for name, files, config, tensors in zip(names, members, configs, weights, strict=True):
        if model is None:
            model = inject(scratch, config, base, name)
        else:
            try:
                model.add_adapter(name, config)
            except Exception as error:  # as below
                raise_if_of_the_run(error)
                raise Refused("add_raised", error=caught(error)) from error
        inject_again = partial(_injected, base, members, config, name)
        loaded, arrival = load_weights(
            model,
            base,
            files,
            tensors,
            adapter_name=name,
            inject_again=inject_again,
        )
        brought.append(loaded)
        arrivals.append(arrival)
    _refuse_unweighted(model, base, base_names, brought, combine)
    torch.manual_seed(combine.seed)
    options = {"density": combine.density, "majority_sign_method": combine.majority_sign_method}
    try:
        model.base_model.add_weighted_adapter(
            list(names),
            list(combine.weights),
            ADAPTER_NAME,
            combination_type=combine.method,
            **{key: value for key, value in options.items() if value is not None},
        )
        model.base_model.set_adapter(ADAPTER_NAME, inference_mode=True)
    except Exception as error:  # PEFT refuses with ValueError, KeyError, AttributeError or NotImplementedError
        raise_if_of_the_run(error)
        raise Refused("combine_raised", error=caught(error), members=combine.adapters, method=combine.method) from error
    _refuse_left_out(model, names, combine)
    return Loaded(
        model=model,
        config=model.peft_config[ADAPTER_NAME],
        state={key: tensor for tensors in brought for key, tensor in tensors.items()},
        arrivals=tuple(arrivals),
        targeted=targeted_modules(model),
        base_names=base_names,
        tied_modules=tied_modules,
        seed=combine.seed if "dare" in combine.method else None,
    )


def _fitted(base: Base, members: tuple[AdapterFiles, ...]) -> Any:
    """A scratch copy with the first member's other vocabulary. PEFT refuses members of different sizes."""
    scratch = base.scratch()
    for files in members:
        if fit_vocabulary(scratch, files, base):
            break
    return scratch


def _injected(base: Base, members: tuple[AdapterFiles, ...], config: Any, name: str) -> Any:
    return inject(_fitted(base, members), config, base, name)


def _refuse_lost_settings(name: str, config: Any) -> None:
    """Settings that PEFT's add_weighted_adapter accepts and loses: the result is not the weighted sum of the deltas.

    Shown with plain PEFT in tests/engine/adapter/test_combine.py.
    """
    settings = {
        "use_rslora": getattr(config, "use_rslora", False),
        "lora_bias": getattr(config, "lora_bias", False),
        "use_dora": getattr(config, "use_dora", False),
        "use_bdlora": getattr(config, "use_bdlora", None),
        "kasa_config": getattr(config, "kasa_config", None),
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
        f"init_lora_weights={getattr(config, 'init_lora_weights', None)}": initialization_writes_to_base(config),
    }
    lost = next((setting for setting, value in settings.items() if value), None)
    if lost is not None:
        raise Refused("setting_lost", adapter=name, setting=lost)


def _refuse_unweighted(
    model: Any, base: Base, base_names: Mapping[tuple[int, str], str], brought: Sequence[Tensors], combine: Combine
) -> None:
    """Refuse base tensors that a member's file holds whole (biases, embeddings): PEFT loads them without a weight.

    The last member that has a tensor wins. That is the weighted sum if no other member changes it and its weight is 1.
    Rows for an enlarged vocabulary, which the base lacks, have no weight: all members must have the same rows.
    """
    for key, name in base_tensors_in_file(model, base_names, {key for tensors in brought for key in tensors}).items():
        holders = [number for number, tensors in enumerate(brought) if key in tensors]
        ours = base.tensors[name]
        held = [_split(brought[number][key], ours) for number in holders]
        with base.filled([name]):
            changed = [number for number, (old, _) in zip(holders, held, strict=True) if not _is_equal(ours, old)]
        added = [new for _, new in held]
        if not all(_is_equal(added[0], rows) for rows in added[1:]):
            raise Refused(
                "two_vocabularies", adapters=tuple(combine.adapters[number] for number in holders), tensor=name
            )
        if changed and (changed != holders[-1:] or combine.weights[changed[0]] != 1):
            raise Refused("tensor_unweighted", adapter=combine.adapters[changed[0]], tensor=name)


def _split(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a member's tensor that the base has, and the rows that it lacks."""
    rows = len(ours) if ours.dim() else 0
    return (theirs[:rows], theirs[rows:]) if 0 < rows < len(theirs) else (theirs, theirs.flatten()[:0])


def _is_equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether a member's tensor is the base's, perhaps in another dtype."""
    theirs = theirs.to(ours.device)
    return same_values(ours, theirs.to(ours.dtype)) or same_values(ours.to(theirs.dtype), theirs)


def _refuse_left_out(model: Any, names: Sequence[str], combine: Combine) -> None:
    """Refuse a combination that lacks modules that a member has trained."""
    for number, name in enumerate(names):
        lost = [path for path, module in model.named_modules() if _has_lost(module, name)]
        if lost:
            modules = tuple(path.removeprefix(ADAPTER_PREFIX) for path in lost)
            raise Refused("modules_left_out", adapter=combine.adapters[number], modules=modules)


def _has_lost(module: Any, name: str) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        return name in module.modules_to_save
    if not isinstance(module, LoraLayer):
        return False
    held = {*module.lora_A, *module.lora_embedding_A}
    return name in held and ADAPTER_NAME not in held
