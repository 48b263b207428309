"""Loads an adapter onto a scratch copy of its base, and accounts for every tensor of the file and of the config.

In: what the preflight read, the tensors of the file, and a `Base`. Out: `Loaded`, or `Refused` with the fact that
explains it. This module imports nothing of merging.

1. Read the config by PEFT's class for its type, and refuse what PEFT would silently ignore (peft_config.py).
2. Make a scratch copy, and resize its vocabulary to that of the file (inject.py).
3. Inject. PEFT chooses the target modules (inject.py).
4. Before PEFT writes anything, compare shapes. Give a private copy to every tensor of the base that the file
   overwrites (trained biases, saved embeddings), because PEFT copies into the shared parameter.
5. Load, and compare the model with the file, both ways.

PEFT and transformers rename, split, fuse, and drop tensors while they load, and do not report what they lose. So for
step 5 it is not enough that a name is in the file and expected by the config:

a. PEFT would save a tensor of the model under a name of the file: the model's tensor must have the file's values. If
   several names of the file belong to one tensor of the model, one of them must match.
b. PEFT would not save a tensor of the file (a tensor of the base, a trained bias): the model must have the file's
   values under the same name.
c. A tensor under any other name was renamed: one tensor that PEFT copied must have the same values.
d. A tensor without a match was fused or split. PEFT loads the file again into another model, with a tag in place of
   each such tensor's values. The tags show which tensors of the model it went into, and conversions.py where there.
e. A tensor that is still without a match is unexpected. It is a duplicate if it repeats, bit for bit, one that arrived.
   PEFT itself writes such duplicates: `modules_to_save` with `save_embedding_layers`, `bias="all"` with a trained head,
   and trained tokens of tied embeddings.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from merge_gate._internal.tensor_names import module_of
from merge_gate.engine.adapter.conversions import unplaced_layers
from merge_gate.engine.adapter.inject import (
    Template,
    base_slots,
    fill_blanks,
    fit_vocabulary,
    inject,
    kind_of,
    leave_out_replaced,
    snapshot,
    targeted_modules,
)
from merge_gate.engine.adapter.peft_config import can_start_blank, initialization_writes_to_base, read_config
from merge_gate.engine.adapter.places import Injected, accounted
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.engine.tensors.measure import same_values
from merge_gate.engine.tensors.placement import raise_if_of_the_run
from merge_gate.engine.tensors.watch import Memory, Watch
from merge_gate.records.files import WEIGHTS_NAME, AdapterFiles
from merge_gate.records.refusals import Refused

MOST_TAGS = 1 << 24
"""Tags are whole numbers that float32 represents exactly."""

_TOKENS = "trainable_tokens_delta"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """How the names in the file match the names that the config expects.

    `missing` are expected names that were not loaded. `dropped` are those of them that are in the file. `unexpected`
    are unused names in the file. `duplicates` repeat another tensor of the file. `model_key` maps a name in the file to
    the model's key, if the tensor arrived as one piece. `expected` maps every name that PEFT would save to the model's
    key, which is empty if PEFT computes the tensor when it saves.
    """

    missing: tuple[str, ...]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]
    duplicates: tuple[str, ...]
    matched: frozenset[str]
    joined: frozenset[str]
    model_key: Mapping[str, str]
    expected: Mapping[str, str]


def own_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a model, by each of its keys."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def compare(
    model: Any,
    file: Tensors,
    copied: Tensors,
    adapter_name: str,
    load_tagged: Callable[[Tensors], Tensors],
    *,
    expected_keys: Mapping[str, str] | None = None,
) -> Arrival:
    """Compare the model with the file.

    Args:
        model: the PEFT model, loaded.
        file: the file's tensors by their names.
        copied: what PEFT passed to `load_state_dict`, by the model's keys.
        adapter_name: PEFT's name of the adapter.
        load_tagged: loads other values under the file's names into a new model, and returns its tensors by key.
        expected_keys: `Arrival.expected` of an earlier adapter of the same config and names; no key is empty.

    Raises:
        Refused: a tensor has the file's values in another order.
    """
    own = own_tensors(model)
    if expected_keys is None:
        expected = expected_tensors(model, adapter_name)
    else:
        expected = {name: (key, own[key]) for name, key in expected_keys.items()}
    loaded_keys = {key for key in copied if key in own}
    named = {name for name, (key, _) in expected.items() if key in loaded_keys}
    matching = _Matching(file=file, own=own, loaded_keys=loaded_keys, named=named, tied_tokens=_tied_tokens(model))
    matching.match_names(expected)
    matching.match_values()
    matching.match_tags(load_tagged)
    missing = matching.missing(expected)
    dropped = tuple(name for name in missing if name in file)
    for name in dropped:
        if _are_displaced(expected[name][1], file[name]):
            raise Refused("factors_displaced", module=module_of(name), joined=0)
    unmatched = [name for name in matching.unmatched_names() if name not in missing]
    duplicates = tuple(sorted(name for name in unmatched if matching.is_duplicate(name)))
    return Arrival(
        missing=missing,
        dropped=dropped,
        unexpected=tuple(sorted(set(unmatched) - set(duplicates))),
        duplicates=duplicates,
        matched=frozenset(matching.matched_keys),
        joined=frozenset(matching.joined_names),
        model_key=matching.model_key,
        expected={name: key for name, (key, _) in expected.items()},
    )


@dataclass(slots=True, kw_only=True)
class _Matching:
    """Matches tensors of the file with tensors of the model.

    `own` are the model's tensors by key, and `loaded_keys` the keys that PEFT copied into. `named` are names of the
    file that PEFT would save for one of these keys: if their values are elsewhere, they are in a wrong place.
    `tied_tokens` maps the names of a tied module's trained tokens to those of the module that owns them.
    `arrived_names` are names in the file, and `matched_keys` keys of the model, that have a match.
    """

    file: Tensors
    own: Tensors
    loaded_keys: set[str]
    named: Collection[str]
    tied_tokens: Mapping[str, str]
    model_key: dict[str, str] = field(default_factory=dict)
    arrived_names: set[str] = field(default_factory=set)
    joined_names: set[str] = field(default_factory=set)
    matched_keys: set[str] = field(default_factory=set)

    def unmatched_names(self) -> list[str]:
        return [name for name in self.file if name not in self.arrived_names]

    def renamed_names(self) -> list[str]:
        """Unmatched names that PEFT does not load under their own names."""
        return [name for name in self.unmatched_names() if name not in self.named]

    def match_names(self, expected: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        """Steps a and b."""
        for name, value in self.file.items():
            if name in expected:  # a.
                key, tensor = expected[name]
                if has_values(tensor, value) or _is_computed_on_save(name, key):
                    self._add_match(name, key)
            elif name in self.loaded_keys and has_values(self.own[name], value):  # b.
                self._add_match(name, name)
        # a. A tensor of the model can have several names in the file. PEFT loads only one of them.
        matched_storage = {self.own[key].data_ptr() for key in self.matched_keys}
        for name in self.unmatched_names():
            key, _ = expected.get(name, ("", None))
            if key in self.own and self.own[key].data_ptr() in matched_storage:
                self._add_match(name, key)

    def match_values(self) -> None:
        """Step c. Each tensor of the model matches one name, even if several tensors have the same values."""
        unmatched_keys = sorted(self.loaded_keys - self.matched_keys)
        for name in self.renamed_names():
            key = next((key for key in unmatched_keys if has_values(self.own[key], self.file[name])), None)
            if key is not None:
                unmatched_keys.remove(key)
                self._add_match(name, key)

    def match_tags(self, load_tagged: Callable[[Tensors], Tensors]) -> None:
        """Step d."""
        names, unmatched_keys = self.renamed_names()[:MOST_TAGS], self.loaded_keys - self.matched_keys
        if not names or not unmatched_keys:
            return
        name_of_tag = {float(position): name for position, name in enumerate(names, 1)}  # 0 is left for padding
        tagged = {name: torch.full_like(self.file[name], tag, dtype=torch.float32) for tag, name in name_of_tag.items()}
        loaded = load_tagged({**self.file, **tagged})
        for key in unmatched_keys:
            sources = [name_of_tag[tag] for tag in _distinct_values(loaded.get(key)) & name_of_tag.keys()]
            if sources and _consists_of(self.own[key], [self.file[name] for name in sources]):
                self.joined_names.update(sources)
                for name in sources:
                    self._add_match(name, key if len(sources) == 1 else "")
                self.matched_keys.add(key)

    def missing(self, expected: Mapping[str, tuple[str, torch.Tensor]]) -> tuple[str, ...]:
        """Names that PEFT would save and that no tensor of the file provides."""
        # A tensor of the model that has several keys is loaded if PEFT copied into one of them.
        loaded_storage = {self.own[key].data_ptr() for key in self.loaded_keys if self.own[key].numel()}

        def is_loaded(name: str, key: str) -> bool:
            if name in self.file or key not in self.own:
                return False
            return key in self.loaded_keys or self.own[key].data_ptr() in loaded_storage

        return tuple(
            sorted(
                name
                for name, (key, _) in expected.items()
                if name not in self.arrived_names and not is_loaded(name, key)
            )
        )

    def is_duplicate(self, name: str) -> bool:
        """Step e. Whether a tensor of the file repeats a loaded tensor under another name of the same module."""
        other_name = (
            name.replace(".modules_to_save.", ".").replace(".original_module.", ".").replace(".base_layer.", ".")
        )
        other_name = self.tied_tokens.get(name, other_name)
        other, tensor = self.file.get(other_name), self.file[name]
        return (
            other_name in self.arrived_names
            and other is not None
            and other.dtype == tensor.dtype
            and has_values(other, tensor)
        )

    def _add_match(self, name: str, key: str) -> None:
        self.arrived_names.add(name)
        if key:
            self.model_key[name] = key
            self.matched_keys.add(key)


def _tied_tokens(model: Any) -> dict[str, str]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, TrainableTokensLayer)}
    paths = {id(layer): path for path, layer in layers.items()}
    owners = ((path, layer.tied_adapter) for path, layer in layers.items())
    return {f"{path}.{_TOKENS}": f"{paths[id(owner)]}.{_TOKENS}" for path, owner in owners if owner is not None}


def expected_tensors(model: Any, adapter_name: str) -> dict[str, tuple[str, torch.Tensor]]:
    """Names that PEFT would save → (the model's key, the tensor). The key is empty if PEFT computes the tensor."""
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            saved = peft.get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False
            )
        except Exception:  # PEFT cannot save this method in this way, so no name is expected
            return {}
    key_of_object = {id(tensor): key for key, tensor in state.items()}
    return {name: (key_of_object.get(id(tensor), ""), tensor) for name, tensor in saved.items()}


def file_name(key: str, adapter_name: str) -> str:
    """The name in the file for a key of the model: PEFT saves without the adapter's name."""
    return (
        key.replace(f".modules_to_save.{adapter_name}.", ".")
        .replace(f".{adapter_name}.", ".")
        .removesuffix(f".{adapter_name}")
    )


def has_values(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor of the model has the file's values, in the model's dtype."""
    return tensor.shape == value.shape and same_values(tensor.detach(), value.to(tensor.device, tensor.dtype))


def _are_displaced(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor of the model has the file's values at other places: rows or halves are exchanged."""
    flat = (each.detach().to(tensor.device, tensor.dtype).flatten().sort().values for each in (tensor, value))
    return tensor.shape == value.shape and not tensor.is_complex() and same_values(*flat)


def _is_computed_on_save(name: str, key: str) -> bool:
    """Whether PEFT computes this tensor from others when it saves, so that the file's values are only close (VB-LoRA).

    LoRA's tensors do not count: transformers' conversions compute them, and may lose values that must be found here.
    """
    return not key and ".lora_" not in name


def _distinct_values(tensor: torch.Tensor | None) -> set[float]:
    return set() if tensor is None else set(torch.unique(tensor.detach().float()).tolist())


def _consists_of(tensor: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether a tensor has the values of these parts and otherwise only zeros (blocks on a diagonal)."""
    own = torch.unique(torch.nan_to_num(tensor.detach().flatten(), nan=0.0))
    of_parts = torch.unique(torch.cat([torch.nan_to_num(part.flatten().to(tensor.dtype), nan=0.0) for part in parts]))
    return torch.equal(own[own != 0], of_parts[of_parts != 0])


# This module calls PEFT as a user does: the config by PEFT's own class, the model class by the task type, and
# `load_adapter` with PEFT's defaults. Other options change bits and fail good adapters: `low_cpu_mem_usage=True` rounds
# float32 factors to the base's dtype.

ADAPTER_NAME = "default"
"""PEFT's own default. A name that is part of a tuner's prefix (`lora`) makes PEFT lose keys (peft#2252)."""


@dataclass(slots=True, kw_only=True)
class Loaded:
    """An adapter on its scratch copy.

    `state` has what PEFT loaded, by the model's keys. `arrivals` has one `Arrival` for each member. `targeted` are the
    modules that carry the adapter. `base_names` gives the base's name of each parameter of the scratch copy, by (id of
    module, parameter name). `tied_modules` lists the modules that share a tied tensor, by the tensor's name. `is_first`
    is false if an adapter of the same config and names was merged on this scratch copy before. `initial_factors` has
    what PEFT subtracts from the base before it loads, by the id of a layer: the first factors of PiSSA and OLoRA, or
    FRoD's `frod_lambda_l`. `mapped` has the ids of the factors that are views of the file (private_copies.py).
    `injected` is what the injection has left. `is_probed`: PEFT has merged a layer on trial since the load (probes.py).
    `unproved` are layers whose factors nothing shows to be right, and why.
    """

    model: Any
    config: Any
    state: dict[str, torch.Tensor]
    arrivals: tuple[Arrival, ...]
    targeted: tuple[str, ...]
    base_names: dict[tuple[int, str], str]
    tied_modules: dict[str, tuple[str, ...]]
    injected: Injected
    seed: int | None = None
    is_first: bool = True
    template: Template | None = None
    initial_factors: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    mapped: frozenset[int] = frozenset()
    is_probed: bool = False
    unproved: Mapping[str, str] = field(default_factory=dict)

    def memory(self, base: Base) -> Memory:
        """What PEFT may not write to: the base, and what the injection has put in the place of a tensor of the base."""
        return Memory(self.injected.own.items(), base.memory)

    def values(self) -> dict[int, torch.Tensor]:
        """What PEFT loaded, by the id of the tensor of the model."""
        own = own_tensors(self.model)
        return {id(own[key]): value for key, value in self.state.items() if key in own}

    def of_file(self) -> set[int]:
        """The ids of the model's tensors that have values of the file."""
        own = own_tensors(self.model)
        return {id(own[key]) for arrival in self.arrivals for key in arrival.matched if key in own}


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
        template.reset()
    elif base.pattern is not None and base.pattern.kind == kind:
        template = base.pattern.duplicate()
    loaded = _load_onto(template or _make_template(base, files, blank=True), base, files, weights)
    if loaded.arrivals[0].missing:  # a missing tensor keeps PEFT's initial values, which a blank template lacks
        return _load_onto(_make_template(base, files), base, files, weights)
    return loaded


def _load_onto(template: Template, base: Base, files: AdapterFiles, weights: Tensors) -> Loaded:
    """Steps 4 and 5."""
    is_first = template.keys is None
    if is_first:
        refuse_lost_wrappers(template.model, template.config, files)
    initial_factors = _initial_factors(template.model, template.config)
    state, arrival = load_weights(
        template.model,
        base,
        files,
        weights,
        adapter_name=ADAPTER_NAME,
        inject_again=lambda: _make_template(base, files).model,
        own=template.injected.own,
        expected_keys=template.keys,
    )
    unproved = unplaced_layers(template.model, base, weights, arrival.joined, ADAPTER_NAME)
    is_reusable = not is_first or (template.holds(set(state)) and all(arrival.expected.values()))
    if is_first:
        template.keys, template.targeted = arrival.expected, targeted_modules(template.model)
    return Loaded(
        model=template.model,
        config=template.config,
        state=state,
        arrivals=(arrival,),
        targeted=template.targeted,
        base_names=template.base_names,
        tied_modules=template.tied_modules,
        is_first=is_first,
        template=template if is_reusable else None,
        initial_factors=initial_factors,
        injected=template.injected,
        unproved=unproved,
    )


def factors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and B of a LoRA layer. None for other methods, and for grouped convolutions, where they have no product."""
    is_embedding = bool(getattr(layer, "lora_embedding_A", None))
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    all_a, all_b = (getattr(layer, name, {}) for name in names)  # by the adapter's name
    is_modules = is_embedding or isinstance(all_a, nn.ModuleDict)  # AdaLoRA has parameters of the same names
    if not is_modules or ADAPTER_NAME not in all_a or ADAPTER_NAME not in all_b:
        return None
    a, b = (
        factors[ADAPTER_NAME] if is_embedding else factors[ADAPTER_NAME].weight  # an embedding has no modules for them
        for factors in (all_a, all_b)
    )
    return (a.data, b.data) if len(a) == b.shape[1] else None


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
    PEFT has computed them from lazy weights, the next template has these weights `filled` meanwhile.
    """
    # 1.
    config = read_config(files)
    blank = blank and can_start_blank(config)
    filled = filled or base.feed is None or initialization_writes_to_base(config)
    # 2. An initialization that writes to the base gets its own copy of the tensors; of lazy ones, in step 3.
    scratch = base.scratch(private=initialization_writes_to_base(config) and base.lazy is None)
    fit_vocabulary(scratch, files, base)
    base_names, tied_modules = base_slots(scratch)
    paths = {id(module): path for path, module in scratch.named_modules()} if tied_modules else {}
    # 3.
    try:
        with Watch(base.memory, "injection"):
            model = inject(scratch, config, base, ADAPTER_NAME, blank=blank, filled=filled)
        is_complete = not blank or fill_blanks(model)
    except Exception:
        if not blank and filled:
            raise
        is_complete = False  # if the adapter is at fault, PEFT raises again in the injection with values
    if not filled and base.lazy is not None and base.lazy.forget_touched():
        return _make_template(base, files, filled=True)
    if not is_complete:
        return _make_template(base, files, filled=not blank)
    leave_out_replaced(model, paths, base_names, tied_modules)
    return Template(
        kind=kind_of(files),
        model=model,
        config=config,
        base_names=base_names,
        tied_modules=tied_modules,
        children=snapshot(model),
        injected=accounted(model, base, config, ADAPTER_NAME, blank=blank),
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
    own: Mapping[str, torch.Tensor],
    expected_keys: Mapping[str, str] | None = None,
) -> tuple[dict[str, torch.Tensor], Arrival]:
    """Load the file by PEFT, and compare the model with the file. Only what the file has is written.

    Args:
        model: with the adapter's layers in place.
        base: the base that the model is a scratch copy of.
        files: names the directory.
        weights: the file's tensors.
        adapter_name: PEFT's name of the adapter.
        inject_again: makes another such model, into which tagged tensors are loaded (step d).
        own: `Injected.own` of the model.
        expected_keys: what PEFT would save of the model, if an earlier adapter has shown it (`compare`).
    """
    with _before_load(model, base, own, adapter_name) as state:
        try:
            _load(model, files.directory, adapter_name)
        except Refused:
            raise
        except Exception as error:  # PEFT, safetensors, or pickle: the file did not load
            raise_if_of_the_run(error)
            raise _load_failed(error) from error

    def load_tagged(tagged: Tensors) -> Tensors:
        other = inject_again()
        with tempfile.TemporaryDirectory() as directory:
            save_file({name: tensor.contiguous() for name, tensor in tagged.items()}, Path(directory, WEIGHTS_NAME))
            with _before_load(other, base, {}, adapter_name):
                _load(other, directory, adapter_name)
        return own_tensors(other)

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
def _before_load(
    model: Any, base: Base, own: Mapping[str, torch.Tensor], adapter_name: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Step 4. torch runs it just before it copies: PEFT has renamed everything by then, and has written nothing.

    Yields what PEFT passes to `load_state_dict`, once it has done so. Nothing is written into other memory of the base,
    and of its `own` places.
    """
    memory, state = Memory(own.items(), base.memory), dict[str, torch.Tensor]()

    def check_and_copy(_module: nn.Module, incoming: Mapping[str, torch.Tensor], *_: Any) -> None:
        own = own_tensors(model)
        _refuse_shapes(incoming, own, adapter_name)
        _refuse_integers(incoming, own, adapter_name)
        for key in incoming:
            tensor = own.get(key)
            if tensor is not None and memory.name_of(tensor) is not None:
                tensor.data = _overwritten(base, tensor)
        state.update(incoming)

    hook = model.register_load_state_dict_pre_hook(check_and_copy)
    try:
        with Watch(memory, "load"):
            yield state
    finally:
        hook.remove()


def _overwritten(base: Base, tensor: torch.Tensor) -> torch.Tensor:
    """New memory for a tensor that the load is about to overwrite. Values of a lazy tensor are not read for that."""
    if base.lazy is None or not base.lazy.holds(tensor) or not tensor.is_floating_point():
        return tensor.data.clone()
    return torch.full_like(tensor.data, torch.nan)


def _refuse_integers(incoming: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Refuse integers and booleans for a tensor that is floating in PEFT's own model. Its indices are not."""
    for key, tensor in incoming.items():
        is_whole = not (tensor.is_floating_point() or tensor.is_complex())
        if is_whole and key in own and own[key].is_floating_point():
            got, expected = (str(each.dtype).removeprefix("torch.") for each in (tensor, own[key]))
            raise Refused("dtype_clash", name=file_name(key, adapter_name), got=got, expected=expected)


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
