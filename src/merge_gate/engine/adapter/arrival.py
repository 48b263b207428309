"""Which tensors of an adapter's file arrived in the model, by name and by value, after PEFT loaded the file.

In: a `PeftModel` that PEFT has loaded, the tensors that PEFT copied into it, and the tensors of the file. Out:
`Arrival`. The model is not changed. This module imports nothing of bases and merges.

PEFT and transformers rename, split, fuse, and drop tensors while they load, and do not report what they lose. So it is
not enough that a name is in the file and expected by the config:

1. PEFT would save a tensor of the model under a name of the file: the model's tensor must have the file's values. If
   several names of the file belong to one tensor of the model, one of them must match.
2. PEFT would not save a tensor of the file (a tensor of the base, a trained bias): the model must have the file's
   values under the same name.
3. A tensor under any other name was renamed: one tensor that PEFT copied must have the same values.
4. A tensor without a match was fused or split. PEFT loads the file again into another model, with a tag in place of
   each such tensor's values. The tags show which tensors of the model it went into.
5. A tensor that is still without a match is unexpected. It is a duplicate if it repeats, bit for bit, one that arrived.
   PEFT itself writes such duplicates: `modules_to_save` with `save_embedding_layers`, `bias="all"` with a trained head,
   and trained tokens of tied embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer

from merge_gate.engine.tensors.measure import same_values

MOST_TAGS = 1 << 24
"""Tags are whole numbers that float32 represents exactly."""

_TOKENS = "trainable_tokens_delta"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """How the names in the file and the names that the config expects fit together.

    `missing` are expected names that did not arrive. Some of them are in the file: `dropped`. `unexpected` are names
    in the file that nothing uses. `duplicates` repeat another tensor of the file. `model_key` maps a name in the file
    to the model's key, if the tensor arrived as one piece. `expected` maps every name that PEFT would save to the
    model's key, which is empty if PEFT computes the tensor when it saves.
    """

    missing: tuple[str, ...]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]
    duplicates: tuple[str, ...]
    model_key: Mapping[str, str]
    expected: Mapping[str, str]


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
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    if expected_keys is None:
        expected = expected_tensors(model, adapter_name)
    else:
        expected = {name: (key, own[key]) for name, key in expected_keys.items()}
    loaded_keys = {key for key in copied if key in own}
    matching = _Matching(file=file, own=own, loaded_keys=loaded_keys, tied_tokens=_tied_tokens(model))
    matching.match_names(expected)
    matching.match_values()
    matching.match_tags(load_tagged)
    missing = matching.missing(expected)
    unmatched = [name for name in matching.unmatched_names() if name not in missing]
    duplicates = tuple(sorted(name for name in unmatched if matching.is_duplicate(name)))
    return Arrival(
        missing=missing,
        dropped=tuple(name for name in missing if name in file),
        unexpected=tuple(sorted(set(unmatched) - set(duplicates))),
        duplicates=duplicates,
        model_key=matching.model_key,
        expected={name: key for name, (key, _) in expected.items()},
    )


@dataclass(slots=True, kw_only=True)
class _Matching:
    """Matches tensors of the file with tensors of the model.

    `own` are the model's tensors by key, and `loaded_keys` the keys that PEFT copied into. `tied_tokens` maps the names
    of a tied module's trained tokens to those of the module that owns them. `arrived_names` are names in the file, and
    `matched_keys` keys of the model, that have a match.
    """

    file: Tensors
    own: Tensors
    loaded_keys: set[str]
    tied_tokens: Mapping[str, str]
    model_key: dict[str, str] = field(default_factory=dict)
    arrived_names: set[str] = field(default_factory=set)
    matched_keys: set[str] = field(default_factory=set)

    def unmatched_names(self) -> list[str]:
        return [name for name in self.file if name not in self.arrived_names]

    def match_names(self, expected: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        """Steps 1 and 2."""
        for name, value in self.file.items():
            if name in expected:  # 1.
                key, tensor = expected[name]
                if _has_values(tensor, value) or _is_computed_on_save(name, key):
                    self._add_match(name, key)
            elif name in self.loaded_keys and _has_values(self.own[name], value):  # 2.
                self._add_match(name, name)
        # 1. A tensor of the model can have several names in the file. PEFT loads only one of them.
        matched_storage = {self.own[key].data_ptr() for key in self.matched_keys}
        for name in self.unmatched_names():
            key, _ = expected.get(name, ("", None))
            if key in self.own and self.own[key].data_ptr() in matched_storage:
                self._add_match(name, key)

    def match_values(self) -> None:
        """Step 3. Each tensor of the model matches one name, even if several tensors have the same values."""
        unmatched_keys = sorted(self.loaded_keys - self.matched_keys)
        for name in self.unmatched_names():
            key = next((key for key in unmatched_keys if _has_values(self.own[key], self.file[name])), None)
            if key is not None:
                unmatched_keys.remove(key)
                self._add_match(name, key)

    def match_tags(self, load_tagged: Callable[[Tensors], Tensors]) -> None:
        """Step 4."""
        names, unmatched_keys = self.unmatched_names()[:MOST_TAGS], self.loaded_keys - self.matched_keys
        if not names or not unmatched_keys:
            return
        name_of_tag = {float(position): name for position, name in enumerate(names, 1)}  # 0 is left for padding
        tagged = {name: torch.full_like(self.file[name], tag, dtype=torch.float32) for tag, name in name_of_tag.items()}
        loaded = load_tagged({**self.file, **tagged})
        for key in unmatched_keys:
            sources = [name_of_tag[tag] for tag in _distinct_values(loaded.get(key)) & name_of_tag.keys()]
            if sources and _consists_of(self.own[key], [self.file[name] for name in sources]):
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
        """Step 5. Whether a tensor of the file repeats one that arrived, under another name of the same module."""
        other_name = (
            name.replace(".modules_to_save.", ".").replace(".original_module.", ".").replace(".base_layer.", ".")
        )
        other_name = self.tied_tokens.get(name, other_name)
        other, tensor = self.file.get(other_name), self.file[name]
        return (
            other_name in self.arrived_names
            and other is not None
            and other.dtype == tensor.dtype
            and _has_values(other, tensor)
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


def _has_values(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor of the model has the file's values, in the model's dtype."""
    return tensor.shape == value.shape and same_values(tensor.detach(), value.to(tensor.device, tensor.dtype))


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
