"""Loads an adapter onto a scratch copy of its base, and accounts for every tensor of the file and of the config.

In: what the preflight read, the tensors of the file, and a `Base`. Out: `Loaded`, or `Refused` with the fact that
explains it. This module imports nothing of merging.

1. Read the config by PEFT's class for its type, and refuse what PEFT would silently ignore (peft_config.py).
2. Make a scratch copy, and resize its vocabulary to that of the file (inject.py).
3. Inject. PEFT chooses the target modules (inject.py).
4. Before PEFT writes anything, compare shapes. Give a private copy to every tensor of the base that the file
   overwrites (trained biases, saved embeddings), because PEFT copies into the shared parameter.
5. Load, and compare the model with the file, both ways (arrival.py).
"""

# This module calls PEFT as a user does: the config by PEFT's own class, the model class by the task type, and
# `load_adapter` with PEFT's defaults. Other options change bits and fail good adapters: `low_cpu_mem_usage=True` rounds
# float32 factors to the base's dtype.

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

from merge_gate.engine.adapter.arrival import Arrival, Tensors, compare, file_name
from merge_gate.engine.adapter.inject import base_slots, fit_vocabulary, inject, leave_out_replaced
from merge_gate.engine.adapter.peft_config import (
    can_start_blank,
    initialization_writes_to_base,
    read_config,
)
from merge_gate.engine.adapter.template import Layout, Template, fill_blanks, kind_of, snapshot
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.records.files import WEIGHTS_NAME, AdapterFiles
from merge_gate.records.refusals import Refused
from merge_gate.tensor_names import ADAPTER_PREFIX

ADAPTER_NAME = "default"
"""PEFT's own default. A name that is part of a tuner's prefix (`lora`) makes PEFT lose keys (peft#2252)."""


@dataclass(slots=True, kw_only=True)
class Loaded:
    """An adapter on its scratch copy.

    `state` has what PEFT loaded, by the model's keys. `arrivals` has one `Arrival` for each member. `targeted` are the
    modules that carry the adapter. `slots` gives the base's name of each parameter of the scratch copy, by (id of
    module, parameter name). `tied_modules` lists the modules that share a tied tensor, by the tensor's name. `is_first`
    is false if an adapter of the same config and names was merged on this scratch copy before. `initial_factors` has
    what PEFT subtracts from the base before it loads, by the id of a layer: the first factors of PiSSA and OLoRA, or
    FRoD's `frod_lambda_l`. `mapped` has the ids of the factors that are views of the file (mapped_factors.py).
    """

    model: Any
    config: Any
    state: dict[str, torch.Tensor]
    arrivals: tuple[Arrival, ...]
    targeted: tuple[str, ...]
    slots: dict[tuple[int, str], str]
    tied_modules: dict[str, tuple[str, ...]]
    seed: int | None = None
    is_first: bool = True
    template: Template | None = None
    initial_factors: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    mapped: frozenset[int] = frozenset()


def load_adapter(base: Base, files: AdapterFiles, weights: Tensors) -> Loaded:
    """Load one adapter onto a scratch copy: the base's template or a copy of its pattern if it fits, or a new one.

    Args:
        base: the loaded base.
        files: what the preflight read of the adapter.
        weights: the tensors of the adapter's file, by their names in the file.

    Raises:
        Refused: PEFT cannot load the adapter, or would lose some of it.
    """
    kind = kind_of(files)
    template = base.template if base.template is not None and base.template.kind == kind else None
    base.template = None  # adapter_evidence.py puts it back after a merge that leaves it unchanged
    if template is not None:
        template.renew()
    elif base.pattern is not None and base.pattern.kind == kind:
        template = base.pattern.duplicate()
    loaded = _load_onto(template or _make_template(base, files, blank=True), base, files, weights)
    if loaded.arrivals[0].missing:  # a missing tensor keeps PEFT's initial values, which a blank template lacks
        return _load_onto(_make_template(base, files), base, files, weights)
    return loaded


def _load_onto(template: Template, base: Base, files: AdapterFiles, weights: Tensors) -> Loaded:
    """Steps 4 and 5."""
    layout = template.layout
    if layout is None:
        refuse_lost_wrappers(template.model, template.config, files)
    initial_factors = _initial_factors(template.model, template.config)
    state, arrival = load_weights(
        template.model,
        base,
        files,
        weights,
        adapter_name=ADAPTER_NAME,
        inject_again=lambda: _make_template(base, files).model,
        expected_keys=None if layout is None else layout.keys,
    )
    is_reusable = layout is not None or (template.holds(set(state)) and all(arrival.expected.values()))
    template.layout = layout or Layout(keys=arrival.expected, targeted=targeted_modules(template.model))
    return Loaded(
        model=template.model,
        config=template.config,
        state=state,
        arrivals=(arrival,),
        targeted=template.layout.targeted,
        slots=template.slots,
        tied_modules=template.tied_modules,
        is_first=layout is None,
        template=template if is_reusable else None,
        initial_factors=initial_factors,
    )


def factors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and B of a LoRA layer. None for a layer of another method."""
    is_embedding = bool(getattr(layer, "lora_embedding_A", None))
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    all_a, all_b = (getattr(layer, name, {}) for name in names)  # by the adapter's name
    if ADAPTER_NAME not in all_a or ADAPTER_NAME not in all_b:
        return None
    a, b = (
        factors[ADAPTER_NAME] if is_embedding else factors[ADAPTER_NAME].weight  # an embedding has no modules for them
        for factors in (all_a, all_b)
    )
    return a.data, b.data


def _initial_factors(model: Any, config: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    """`Loaded.initial_factors`, copied before the load overwrites them."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if config.peft_type == PeftType.FROD:
        lambdas = ((id(layer), layer.frod_lambda_l) for layer in layers if hasattr(layer, "frod_lambda_l"))
        return {key: (values[ADAPTER_NAME].detach().clone(),) for key, values in lambdas if ADAPTER_NAME in values}
    if not initialization_writes_to_base(config):
        return {}
    factors_by_layer = ((id(layer), factors_of(layer)) for layer in layers if isinstance(layer, LoraLayer))
    return {
        key: tuple(factor.clone() for factor in factors) for key, factors in factors_by_layer if factors is not None
    }


def _make_template(base: Base, files: AdapterFiles, *, blank: bool = False, filled: bool = False) -> Template:
    """Steps 1 to 3.

    A `blank` template has NaN for PEFT's initial values, if it lacks nothing else. Otherwise it has these values. If
    PEFT has computed them from hollow weights, the next template has these weights `filled` meanwhile.
    """
    # 1.
    config = read_config(files)
    blank = blank and can_start_blank(config)
    filled = filled or base.feed is None or initialization_writes_to_base(config)
    # 2. An initialization that writes to the base gets its own copy of the tensors; of hollow ones, in step 3.
    scratch = base.scratch(private=initialization_writes_to_base(config) and base.hollow is None)
    fit_vocabulary(scratch, files, base)
    slots, tied_modules = base_slots(scratch)
    paths = {id(module): path for path, module in scratch.named_modules()} if tied_modules else {}
    # 3.
    try:
        model = inject(scratch, config, base, ADAPTER_NAME, blank=blank, filled=filled)
        is_complete = not blank or fill_blanks(model)
    except Exception:
        if not blank and filled:
            raise
        is_complete = False  # if the adapter is at fault, PEFT raises again in the injection with values
    if not filled and base.hollow is not None and base.hollow.forget_touched():
        return _make_template(base, files, filled=True)
    if not is_complete:
        return _make_template(base, files, filled=not blank)
    leave_out_replaced(model, paths, slots, tied_modules)
    return Template(
        kind=kind_of(files),
        model=model,
        config=config,
        slots=slots,
        tied_modules=tied_modules,
        children=snapshot(model),
    )


# --- 4. and 5. the weights -----------------------------------------------------------------------------------------


def refuse_lost_wrappers(model: Any, config: Any, files: AdapterFiles) -> None:
    """Refuse fully trained modules whose tensors are not in the file. PEFT fails on them with a bare KeyError."""
    if not files.tensors:
        return
    names_in_file = {header.name for header in files.tensors}
    missing = [
        f"{path}.{key}"
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(ADAPTER_NAME)
        if f"{path}.{key}" not in names_in_file
    ]
    if missing and not _may_rename(model):
        saved = getattr(config, "modules_to_save", None)
        raise Refused("tensors_missing", names=tuple(missing), trained_whole=repr(saved) if saved else None)


def _may_rename(model: Any) -> bool:
    """Whether transformers or PEFT may rename tensors of this model type on load, so that names may differ."""
    return bool(getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None))


def load_weights(
    model: Any,
    base: Base,
    files: AdapterFiles,
    weights: Tensors,
    *,
    adapter_name: str,
    inject_again: Callable[[], Any],
    expected_keys: Mapping[str, str] | None = None,
) -> tuple[dict[str, torch.Tensor], Arrival]:
    """Load the file by PEFT, and compare the model with the file.

    Args:
        model: with the adapter's layers in place.
        base: the base that the model is a scratch copy of.
        files: names the directory.
        weights: the file's tensors.
        adapter_name: PEFT's name of the adapter.
        inject_again: makes another such model, into which tagged tensors are loaded (arrival.py).
        expected_keys: what PEFT would save of the model, if an earlier adapter has shown it (arrival.py).
    """
    with _before_load(model, base, adapter_name) as state:
        try:
            _load(model, files.directory, adapter_name)
        except Refused:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT, safetensors, or pickle: the file did not load
            raise _load_failed(error) from error

    def load_tagged(tagged: Tensors) -> Tensors:
        other = inject_again()
        with tempfile.TemporaryDirectory() as directory:
            save_file({name: tensor.contiguous() for name, tensor in tagged.items()}, Path(directory, WEIGHTS_NAME))
            _load(other, directory, adapter_name)
        return dict(other.named_parameters(remove_duplicate=False)) | dict(other.named_buffers(remove_duplicate=False))

    return state, compare(model, weights, state, adapter_name, load_tagged, expected_keys=expected_keys)


def _load(model: Any, directory: str, adapter_name: str) -> None:
    """Load as `PeftModel.from_pretrained` does, with its defaults."""
    model.load_adapter(
        directory,
        adapter_name,
        is_trainable=False,
        torch_device="cpu",
        key_mapping=getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {}),
    )


def _load_failed(error: Exception) -> Refused:
    if isinstance(error, KeyError):
        name = str(error.args[0]) if error.args else "?"
        return Refused("tensors_missing", names=(name.strip("'"),))
    return Refused("load_raised", error=caught(error))


@contextmanager
def _before_load(model: Any, base: Base, adapter_name: str) -> Iterator[dict[str, torch.Tensor]]:
    """Step 4. torch runs it just before it copies: PEFT has renamed everything by then, and has written nothing.

    Yields what PEFT passes to `load_state_dict`, once it has done so.
    """
    base_storage = {tensor.data_ptr() for tensor in base.tensors.values() if tensor.numel()}
    state: dict[str, torch.Tensor] = {}

    def check_and_copy(_module: nn.Module, incoming: Mapping[str, torch.Tensor], *_: Any) -> None:
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        _refuse_shapes(incoming, own, adapter_name)
        for key in incoming:
            tensor = own.get(key)
            if tensor is not None and tensor.data_ptr() in base_storage:
                tensor.data = _overwritten(base, tensor)
        state.update(incoming)

    hook = model.register_load_state_dict_pre_hook(check_and_copy)
    try:
        yield state
    finally:
        hook.remove()


def _overwritten(base: Base, tensor: torch.Tensor) -> torch.Tensor:
    """New memory for a tensor that the load is about to overwrite. Values of a hollow tensor are not read for that."""
    if base.hollow is None or not base.hollow.holds(tensor) or not tensor.is_floating_point():
        return tensor.data.clone()
    return torch.full_like(tensor.data, torch.nan)


_MODULES_TO_SAVE = ".modules_to_save."


def _refuse_shapes(incoming: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    mismatched = [
        (key, tuple(tensor.shape), tuple(own[key].shape))
        for key, tensor in incoming.items()
        if key in own and isinstance(tensor, torch.Tensor) and tensor.shape != own[key].shape
    ]
    if not mismatched:
        return
    key, got, expected = mismatched[0]
    name = file_name(key, adapter_name)
    raise Refused(
        "shape_clash",
        name=name,
        got=got,
        expected=expected,
        others=len(mismatched) - 1,
        trained_whole=adapter_name not in key.split(".")[-2:] or _MODULES_TO_SAVE in key,
        of_tokens="trainable_tokens_delta" in key,
    )


def targeted_modules(model: Any) -> tuple[str, ...]:
    """The base's names of the modules that carry the adapter: tuner layers and fully trained modules.

    A head that is tied to an embedding with trained tokens is not one of them, because the embedding has the tokens. A
    head whose trained copy is that of the embedding (`ensure_weight_tying`) is not one either.
    """
    targeted: list[str] = []
    trained_tensors: set[int] = set()  # ids of the tensors of trained copies so far
    outer = None
    for path, module in model.named_modules():
        if outer is not None and path.startswith(f"{outer}."):
            continue  # a module inside another one comes right after it
        trained = (
            {id(tensor) for tensor in module.modules_to_save.parameters()}
            if isinstance(module, ModulesToSaveWrapper)
            else set()
        )
        has_tied_tokens = getattr(getattr(module, "token_adapter", None), "tied_adapter", None) is not None
        if has_tied_tokens or (trained and trained <= trained_tensors):
            outer = path
        elif isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper, AuxiliaryTrainingWrapper)):
            targeted.append(path.removeprefix(ADAPTER_PREFIX))
            outer = path
        trained_tensors |= trained
    return tuple(targeted)
