"""Adapter files + scratch → a loaded `PeftModel`, with every tensor of the file and of the config accounted for.

In: what the preflight read, and a scratch of the base. Out: `Loaded`, or `Refused` with the check that says why.
PEFT is driven as a user drives it: the config by PEFT's own class, the model class by its task type, `load_adapter`
with PEFT's defaults, since other options change bits and fail good adapters (`low_cpu_mem_usage=True` rounds float32
factors to the base's dtype).

1. Read the config by PEFT's class for its type; refuse what PEFT would silently ignore.
2. Fit the scratch to the file: a resized vocabulary (inject.py).
3. Inject. PEFT chooses the targets (inject.py).
4. Before the load writes anything: compare shapes, and give a private copy to every tensor of the base that the file
   overwrites (trained biases, saved embeddings), because PEFT copies into the shared parameter.
5. Load, then see what arrived, both ways (arrival.py).
"""

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
    initialisation_writes_to_base,
    read_config,
)
from merge_gate.engine.adapter.template import Layout, Template, fill_blanks, kind_of, snapshot
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.errors import Refused
from merge_gate.records.files import WEIGHTS_NAME, AdapterFiles
from merge_gate.records.refusals import PeftRaised, Refusal, ShapeClash, Step, TensorsMissing
from merge_gate.tensor_names import ADAPTER_PREFIX

ADAPTER_NAME = "default"
"""PEFT's own default. A name that is part of a tuner's prefix (`lora`) makes PEFT lose keys (peft#2252)."""


@dataclass(slots=True, kw_only=True)
class Loaded:
    """An adapter on its scratch. `state` is what PEFT loaded, by the model's keys; `arrivals`, by member, what came.

    `slots` names each parameter of the scratch as the base names it: (id of module, parameter name) → name.
    `is_first` is false where one of the same config and names was merged on this scratch before.
    `starts` has, by the id of a layer, what PEFT takes off the base before it loads: factors (PiSSA, OLoRA), or FRoD's
    lengths.
    """

    model: Any
    config: Any
    state: dict[str, torch.Tensor]
    arrivals: tuple[Arrival, ...]
    targeted: tuple[str, ...]
    slots: dict[tuple[int, str], str]
    sharers: dict[str, tuple[str, ...]]
    seed: int | None = None
    is_first: bool = True
    template: Template | None = None
    starts: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)


def load_adapter(base: Base, files: AdapterFiles, weights: Tensors) -> Loaded:
    """Load one adapter onto a new scratch of the base.

    Args:
        base: the loaded base.
        files: what the preflight read of the adapter.
        weights: the tensors of its file, by their names there.

    Raises:
        Refused: it cannot be loaded, or not all of it would be.
    """
    template = base.template if base.template is not None and base.template.kind == kind_of(files) else None
    base.template = None  # it is given back by whoever finds that it can be used again
    if template is not None:
        template.renew()
    loaded = _loaded(base, files, weights, template or _make_template(base, files, blank=True))
    if loaded.arrivals[0].missing:  # what is missing has the values of PEFT's initialisation
        return _loaded(base, files, weights, _make_template(base, files))
    return loaded


def _loaded(base: Base, files: AdapterFiles, weights: Tensors, made: Template) -> Loaded:
    layout = made.layout
    if layout is None:
        refuse_lost_wrappers(made.model, made.config, files)
    starts = _starts(made.model, made.config)
    state, arrival = load_weights(
        made.model,
        base,
        files,
        weights,
        adapter_name=ADAPTER_NAME,
        injected_anew=lambda: _make_template(base, files).model,
        known=None if layout is None else layout.keys,
    )
    can_serve = layout is not None or (made.holds(set(state)) and all(arrival.promised.values()))
    made.layout = layout or Layout(keys=arrival.promised, targeted=targeted_modules(made.model))
    return Loaded(
        model=made.model,
        config=made.config,
        state=state,
        arrivals=(arrival,),
        targeted=made.layout.targeted,
        slots=made.slots,
        sharers=made.sharers,
        is_first=layout is None,
        template=made if can_serve else None,
        starts=starts,
    )


def factors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and B of a LoRA's layer; None of another's."""
    embeds = bool(getattr(layer, "lora_embedding_A", None))
    names = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    side_a, side_b = (getattr(layer, name, {}) for name in names)
    if ADAPTER_NAME not in side_a or ADAPTER_NAME not in side_b:
        return None
    a, b = (side[ADAPTER_NAME] if embeds else side[ADAPTER_NAME].weight for side in (side_a, side_b))
    return a.data, b.data


def _starts(model: Any, config: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if config.peft_type == PeftType.FROD:
        lengths = ((id(layer), layer.frod_lambda_l) for layer in layers if hasattr(layer, "frod_lambda_l"))
        return {key: (held[ADAPTER_NAME].detach().clone(),) for key, held in lengths if ADAPTER_NAME in held}
    if not initialisation_writes_to_base(config):
        return {}
    found = ((id(layer), factors_of(layer)) for layer in layers if isinstance(layer, LoraLayer))
    return {key: tuple(one.clone() for one in factors) for key, factors in found if factors is not None}


def _make_template(base: Base, files: AdapterFiles, *, blank: bool = False) -> Template:
    """Steps 1 to 3. A `blank` one has NaN in place of PEFT's initial values, where that is sure to be all it lacks."""
    config = read_config(files)
    blank = blank and can_start_blank(config)
    scratch = base.scratch(private=initialisation_writes_to_base(config))
    fit_vocabulary(scratch, files)
    slots, sharers = base_slots(scratch)
    paths = {id(module): path for path, module in scratch.named_modules()} if sharers else {}
    try:
        model = inject(scratch, config, base, ADAPTER_NAME, blank=blank)
        stands = not blank or fill_blanks(model)
    except Exception:
        if not blank:
            raise
        stands = False  # what is wrong with the adapter, PEFT says again of one with values
    if not stands:
        return _make_template(base, files)
    leave_out_replaced(model, paths, slots, sharers)
    return Template(
        kind=kind_of(files), model=model, config=config, slots=slots, sharers=sharers, children=snapshot(model)
    )


# --- 4. and 5. the weights -----------------------------------------------------------------------------------------


def refuse_lost_wrappers(model: Any, config: Any, files: AdapterFiles) -> None:
    """Fully trained modules whose tensors are not in the file: PEFT fails on them with a bare KeyError."""
    if not files.tensors:
        return
    present = {header.name for header in files.tensors}
    lost = [
        f"{path}.{key}"
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(ADAPTER_NAME)
        if f"{path}.{key}" not in present
    ]
    if lost and not _converted_names(model):
        saved = getattr(config, "modules_to_save", None)
        raise Refused(TensorsMissing(names=tuple(lost), trained_whole=repr(saved) if saved else None))


def _converted_names(model: Any) -> bool:
    """Whether transformers or PEFT may rename tensors on load for this model type, so that names need not be equal."""
    return bool(getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None))


def load_weights(
    model: Any,
    base: Base,
    files: AdapterFiles,
    weights: Tensors,
    *,
    adapter_name: str,
    injected_anew: Callable[[], Any],
    known: Mapping[str, str] | None = None,
) -> tuple[dict[str, torch.Tensor], Arrival]:
    """Load the file by PEFT and see what arrived.

    Args:
        model: with the adapter's layers in place.
        base: of which it is a scratch.
        files: names the directory.
        weights: the file's tensors.
        adapter_name: PEFT's name for it.
        injected_anew: makes another such model, to see where marked tensors go (arrival.py).
        known: what PEFT would save of it (arrival.py), if that has been asked before.
    """
    with _before_load(model, base, adapter_name) as state:
        try:
            _load(model, files.directory, adapter_name)
        except Refused:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever PEFT, safetensors or pickle raise: the file did not load
            raise Refused(_load_failed(error)) from error

    def load_marked(marked: Tensors) -> Tensors:
        other = injected_anew()
        with tempfile.TemporaryDirectory() as directory:
            save_file({name: tensor.contiguous() for name, tensor in marked.items()}, Path(directory, WEIGHTS_NAME))
            _load(other, directory, adapter_name)
        return dict(other.named_parameters(remove_duplicate=False)) | dict(other.named_buffers(remove_duplicate=False))

    return state, compare(model, weights, state, adapter_name, load_marked, known=known)


def _load(model: Any, directory: str, adapter_name: str) -> None:
    """As `PeftModel.from_pretrained` does, with its defaults."""
    model.load_adapter(
        directory,
        adapter_name,
        is_trainable=False,
        torch_device="cpu",
        key_mapping=getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {}),
    )


def _load_failed(error: Exception) -> Refusal:
    if isinstance(error, KeyError):
        name = str(error.args[0]) if error.args else "?"
        return TensorsMissing(names=(name.strip("'"),))
    return PeftRaised(step=Step.LOAD, error=caught(error))


@contextmanager
def _before_load(model: Any, base: Base, adapter_name: str) -> Iterator[dict[str, torch.Tensor]]:
    """Step 4, run by torch just before it copies: PEFT has renamed everything, and nothing is written yet."""
    shared = {tensor.data_ptr() for tensor in base.tensors.values() if tensor.numel()}
    state: dict[str, torch.Tensor] = {}

    def check_and_privatise(_module: nn.Module, incoming: Mapping[str, torch.Tensor], *_: Any) -> None:
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        _refuse_shapes(incoming, own, adapter_name)
        for key in incoming:
            tensor = own.get(key)
            if tensor is not None and tensor.data_ptr() in shared:
                tensor.data = tensor.data.clone()
        state.update(incoming)

    hook = model.register_load_state_dict_pre_hook(check_and_privatise)
    try:
        yield state
    finally:
        hook.remove()


_SAVED = ".modules_to_save."


def _refuse_shapes(incoming: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    wrong = [
        (key, tuple(tensor.shape), tuple(own[key].shape))
        for key, tensor in incoming.items()
        if key in own and isinstance(tensor, torch.Tensor) and tensor.shape != own[key].shape
    ]
    if not wrong:
        return
    key, got, expected = wrong[0]
    name = file_name(key, adapter_name)
    raise Refused(
        ShapeClash(
            name=name,
            got=got,
            expected=expected,
            others=len(wrong) - 1,
            trained_whole=adapter_name not in key.split(".")[-2:] or _SAVED in key,
            of_tokens="trainable_tokens_delta" in key,
        )
    )


def targeted_modules(model: Any) -> tuple[str, ...]:
    """The base's names of the modules that carry the adapter: tuner layers and fully trained modules.

    A head that is tied to an embedding with trained tokens has none of its own: the embedding carries them. Nor has one
    whose trained copy is the embedding's (`ensure_weight_tying`).
    """
    found: dict[str, None] = {}
    copies: set[int] = set()
    outer = None
    for path, module in model.named_modules():
        if outer is not None and path.startswith(f"{outer}."):
            continue  # what is inside a module follows it
        own = (
            {id(tensor) for tensor in module.modules_to_save.parameters()}
            if isinstance(module, ModulesToSaveWrapper)
            else set()
        )
        if getattr(getattr(module, "token_adapter", None), "tied_adapter", None) is not None or (own and own <= copies):
            outer = path
        elif isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper, AuxiliaryTrainingWrapper)):
            found[path.removeprefix(ADAPTER_PREFIX)] = None
            outer = path
        copies |= own
    return tuple(found)
