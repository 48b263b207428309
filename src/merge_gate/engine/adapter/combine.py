"""Combines several adapters into one with PEFT's `add_weighted_adapter`.

In: a base, and what the preflight read of each member. Out: `Loaded`, as of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.adapter.inject import base_slots, base_tensors_in_file, fit_vocabulary, inject, targeted_modules
from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Arrival, Loaded, Tensors, factors_of, load_weights
from merge_gate.engine.adapter.peft_config import initialization_writes_to_base, read_config
from merge_gate.engine.adapter.places import Injected, accounted, all_settings, snapshot_of, strength_of
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.engine.tensors.measure import same_values
from merge_gate.engine.tensors.placement import raise_if_of_the_run
from merge_gate.engine.tensors.watch import Memory, Watch
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
    injected = Injected(own={})
    brought: list[dict[str, torch.Tensor]] = []
    arrivals: list[Arrival] = []
    for name, files, config, tensors in zip(names, members, configs, weights, strict=True):
        if model is None:
            with Watch(base.memory, "injection"):
                model = inject(scratch, config, base, name)
            injected = accounted(model, base, config, name, blank=True)
        else:
            try:
                with Watch(base.memory, "injection"):
                    model.add_adapter(name, config)
            except Refused:
                raise
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
            own=injected.own,
        )
        brought.append(loaded)
        arrivals.append(arrival)
    _refuse_unweighted(model, base, base_names, brought, combine)
    torch.manual_seed(combine.seed)
    options = {"density": combine.density, "majority_sign_method": combine.majority_sign_method}
    try:
        with Watch(Memory(injected.own.items(), base.memory), "combination"):
            model.base_model.add_weighted_adapter(
                list(names),
                list(combine.weights),
                ADAPTER_NAME,
                combination_type=combine.method,
                **{key: value for key, value in options.items() if value is not None},
            )
            model.base_model.set_adapter(ADAPTER_NAME, inference_mode=True)
    except Refused:
        raise
    except Exception as error:  # PEFT refuses with ValueError, KeyError, AttributeError or NotImplementedError
        raise_if_of_the_run(error)
        raise Refused("combine_raised", error=caught(error), members=combine.adapters, method=combine.method) from error
    _refuse_left_out(model, names, combine)
    unproved = _unproved(model, names, arrivals, weights, combine)
    return Loaded(
        model=model,
        config=model.peft_config[ADAPTER_NAME],
        state={key: tensor for tensors in brought for key, tensor in tensors.items()},
        arrivals=tuple(arrivals),
        targeted=targeted_modules(model),
        base_names=base_names,
        tied_modules=tied_modules,
        injected=replace(
            injected, first=snapshot_of(model), settings=all_settings(model)
        ),  # with the factors that were compared
        unproved=unproved,
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


# --- the factors of the combination -----------------------------------------------------------------------------------

PROBES = 4
"""Random vectors that both sides are multiplied with, in float64. Two matrices that differ agree on none of them."""

FLOAT32 = 1e-5
"""The error of PEFT's combination in float32, as a share of the sum of all products' sizes. It is 3e-7 at most."""


Member = tuple[float, torch.Tensor, torch.Tensor]
"""wᵢ sᵢ, Aᵢ (rank, in), and Bᵢ (out, rank), in float64."""


def _unproved(
    model: Any, names: Sequence[str], arrivals: Sequence[Arrival], weights: Sequence[Tensors], combine: Combine
) -> dict[str, str]:
    """Compare the factors of the combination with the members' files. Returns layers that are not compared, and why.

    With the weight wᵢ, and sᵢ, Aᵢ, and Bᵢ of the configuration and the file of each member that has the module,

    - `cat` is Σ wᵢ sᵢ Bᵢ Aᵢ,
    - `linear` is (Σ √|wᵢ sᵢ| Bᵢ) (Σ sign(wᵢ sᵢ) √|wᵢ sᵢ| Aᵢ), as PEFT defines it (tuners/lora/model.py).

    Raises:
        Refused: a layer has another product.
    """
    files = [
        {arrival.model_key[name]: tensor for name, tensor in file.items() if name in arrival.model_key}
        for arrival, file in zip(arrivals, weights, strict=True)
    ]
    unproved: dict[str, str] = {}
    named = dict(model.get_base_model().named_modules())
    for path, layer in named.items():
        if not isinstance(layer, LoraLayer) or ADAPTER_NAME not in layer.scaling:
            continue
        combined, is_exact = factors_of(layer), combine.method in ("cat", "linear")
        if combined is None or not is_exact:
            unproved[path] = (
                "a grouped convolution has no product of its factors"
                if is_exact
                else f"PEFT alone vouches for a combination by {combine.method}"
            )
            continue
        strengths = [strength_of(named, path, model.peft_config[name]) or 0.0 for name in names]
        products = [weight * strength for weight, strength in zip(combine.weights, strengths, strict=True)]
        members = list(_members(f"{ADAPTER_PREFIX}{path}", names, files, products))
        a, b = (factor.flatten(1).double() for factor in combined)
        probes = torch.randn(a.shape[1], PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        got = float(layer.scaling[ADAPTER_NAME]) * (b @ (a @ probes))
        expected, sizes = (_cat if combine.method == "cat" else _linear)(members, probes)
        error, info = (got - expected).norm(dim=1), torch.finfo(combined[0].dtype)
        least, scaling = info.tiny * info.eps, abs(float(layer.scaling[ADAPTER_NAME]))  # float16 rounds small ones more
        lost = (b.abs() + least).sum(1, keepdim=True) * probes.abs().sum(0) + (a @ probes).abs().sum(0)
        room = ((FLOAT32 + info.eps) * sizes + scaling * least * lost).norm(dim=1)
        if bool(((error > room) & got.isfinite().all(dim=1)).any()):
            share = float(error.norm() / expected.norm().clamp(min=1e-300))
            raise Refused("combined_wrongly", module=path, method=combine.method, share=share)
    return unproved


def _cat(members: Sequence[Member], probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product with the probes, and the size of what is summed up for each of its values."""
    products = [(weight, b, a @ probes) for weight, a, b in members]
    sizes = [abs(weight) * (b.abs() @ product.abs()) for weight, b, product in products]
    return torch.stack([weight * (b @ product) for weight, b, product in products]).sum(0), torch.stack(sizes).sum(0)


def _linear(members: Sequence[Member], probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_cat`."""
    of_a = [math.copysign(math.sqrt(abs(weight)), weight) * a for weight, a, _ in members]
    of_b = [math.sqrt(abs(weight)) * b for weight, _, b in members]
    sum_a, sum_b, size_a, size_b = (
        torch.stack(parts).sum(0)
        for parts in (of_a, of_b, [part.abs() for part in of_a], [part.abs() for part in of_b])
    )
    return sum_b @ (sum_a @ probes), size_b @ (size_a @ probes.abs())


def _members(
    path: str, names: Sequence[str], files: Sequence[Mapping[str, torch.Tensor]], products: Sequence[float]
) -> Iterator[Member]:
    """Each member that has this layer, from its file. `products` are the wᵢ sᵢ."""
    for name, file, product in zip(names, files, products, strict=True):
        for ends in (("lora_A.{}.weight", "lora_B.{}.weight"), ("lora_embedding_A.{}", "lora_embedding_B.{}")):
            a, b = (file.get(f"{path}.{end.format(name)}") for end in ends)
            if a is not None and b is not None:
                yield product, a.flatten(1).double(), b.flatten(1).double()
