"""What of an adapter's file arrived in the model, after PEFT loaded it: by place and by value, both ways.

In: a `PeftModel` into which PEFT has just loaded, what it copied, and the tensors of the file. Out: `Arrival`. Changes
nothing in the model. Knows neither bases nor merges.

PEFT and transformers rename, split, fuse and drop tensors on their way from the file into the model, and say nothing
of what they lose. So a name that is in the file and promised by the config is not taken for loaded:

1. A tensor that PEFT would save under the name that the file uses must hold the file's values now; of several names of
   one tensor, one.
2. A tensor of the file that PEFT would not save (one of the base's that rides along, a trained bias) must be in the
   model under its own name, with its values.
3. A tensor under any other name was renamed: the values of one tensor that PEFT copied are its own.
4. What is still unexplained was fused or split: it is loaded again with marks in its place, by PEFT, into another
   model, and the marks show which tensors it went into.
5. What has not been found is unexpected, unless it repeats, bit for bit, a tensor that has been: PEFT itself writes
   such duplicates (`modules_to_save` beside `save_embedding_layers`; `bias="all"` beside a trained head; trained tokens
   of tied embeddings).
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

MOST_MARKS = 1 << 24
"""Marks are whole numbers that float32 holds."""

_TOKENS = "trainable_tokens_delta"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """`missing` are names that the config promises and that did not arrive; of these, `dropped` are in the file.

    `unexpected` are names in the file that nothing uses. `model_key` maps the file's names to the model's keys, where a
    tensor arrived whole; `duplicates` repeat another tensor of the file. `promised` are all names that PEFT would save,
    with the model's key; an empty one where PEFT makes the tensor on saving.
    """

    missing: tuple[str, ...]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]
    duplicates: tuple[str, ...]
    model_key: Mapping[str, str]
    promised: Mapping[str, str]


def compare(
    model: Any,
    file: Tensors,
    copied: Tensors,
    adapter_name: str,
    load_marked: Callable[[Tensors], Tensors],
    *,
    known: Mapping[str, str] | None = None,
) -> Arrival:
    """Hold the model against the file.

    Args:
        model: the PEFT model, loaded.
        file: the file's tensors by their names.
        copied: what PEFT handed to `load_state_dict`, by the model's keys.
        adapter_name: PEFT's name of the adapter.
        load_marked: loads other values under the file's names into a fresh model, and returns its tensors by key.
        known: what was `promised` of this model's adapter before, under the same config; each with a key.
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    if known is None:
        promised = promised_tensors(model, adapter_name)
    else:
        promised = {name: (key, own[key]) for name, key in known.items()}
    loaded = {key for key in copied if key in own}
    search = _Search(file=file, own=own, loaded=loaded, twins=_tied_tokens(model))
    search.by_name(promised)
    search.by_value()
    search.by_mark(load_marked)
    absent = search.absent(promised)
    strays = [name for name in search.open_names() if name not in absent]
    duplicates = tuple(sorted(name for name in strays if search.repeats(name)))
    return Arrival(
        missing=absent,
        dropped=tuple(name for name in absent if name in file),
        unexpected=tuple(sorted(set(strays) - set(duplicates))),
        duplicates=duplicates,
        model_key=search.model_key,
        promised={name: key for name, (key, _) in promised.items()},
    )


@dataclass(slots=True, kw_only=True)
class _Search:
    """What has been found so far. `own` are the model's tensors by key, `loaded` the keys that PEFT copied into.

    `twins` are names of trained tokens of a tied module → those of the module that holds them. `found` are names of the
    file that have arrived, `taken` keys of the model whose content is explained.
    """

    file: Tensors
    own: Tensors
    loaded: set[str]
    twins: Mapping[str, str]
    model_key: dict[str, str] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)

    def open_names(self) -> list[str]:
        return [name for name in self.file if name not in self.found]

    def by_name(self, promised: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        """Steps 1 and 2."""
        for name, value in self.file.items():
            if name in promised:
                key, tensor = promised[name]
                if _holds(tensor, value) or _is_remade(name, key):
                    self._book(name, key)
            elif name in self.loaded and _holds(self.own[name], value):
                self._book(name, name)
        taken = {self.own[key].data_ptr() for key in self.taken}
        for name in self.open_names():  # one tensor may go by several names, of which PEFT loads one
            key, _ = promised.get(name, ("", None))
            if key in self.own and self.own[key].data_ptr() in taken:
                self._book(name, key)

    def by_value(self) -> None:
        """Step 3. Of several tensors of one content each stands for one."""
        waiting = sorted(self.loaded - self.taken)
        for name in self.open_names():
            key = next((key for key in waiting if _holds(self.own[key], self.file[name])), None)
            if key is not None:
                waiting.remove(key)
                self._book(name, key)

    def by_mark(self, load_marked: Callable[[Tensors], Tensors]) -> None:
        """Step 4."""
        names, waiting = self.open_names()[:MOST_MARKS], self.loaded - self.taken
        if not names or not waiting:
            return
        marks = {float(position): name for position, name in enumerate(names, 1)}
        marked = {name: torch.full_like(self.file[name], mark, dtype=torch.float32) for mark, name in marks.items()}
        shown = load_marked({**self.file, **marked})
        for key in waiting:
            sources = [marks[mark] for mark in _unique(shown.get(key)) & marks.keys()]
            if sources and _made_of(self.own[key], [self.file[name] for name in sources]):
                for name in sources:
                    self._book(name, key if len(sources) == 1 else "")
                self.taken.add(key)

    def absent(self, promised: Mapping[str, tuple[str, torch.Tensor]]) -> tuple[str, ...]:
        """Names that PEFT would save and that nothing in the file has filled."""
        filled = {self.own[key].data_ptr() for key in self.loaded if self.own[key].numel()}  # it may go by more names

        def is_filled(name: str, key: str) -> bool:
            if name in self.file or key not in self.own:
                return False
            return key in self.loaded or self.own[key].data_ptr() in filled

        return tuple(
            sorted(name for name, (key, _) in promised.items() if name not in self.found and not is_filled(name, key))
        )

    def repeats(self, name: str) -> bool:
        """Step 5. Whether a stray says what another name of the same tensor has said."""
        plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".").replace(".base_layer.", ".")
        plain = self.twins.get(name, plain)
        other = self.file.get(plain)
        mine = self.file[name]
        return plain in self.found and other is not None and other.dtype == mine.dtype and _holds(other, mine)

    def _book(self, name: str, key: str) -> None:
        self.found.add(name)
        if key:
            self.model_key[name] = key
            self.taken.add(key)


def _tied_tokens(model: Any) -> dict[str, str]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, TrainableTokensLayer)}
    paths = {id(layer): path for path, layer in layers.items()}
    tied = ((path, layer.tied_adapter) for path, layer in layers.items())
    return {f"{path}.{_TOKENS}": f"{paths[id(other)]}.{_TOKENS}" for path, other in tied if other is not None}


def promised_tensors(model: Any, adapter_name: str) -> dict[str, tuple[str, torch.Tensor]]:
    """Names that PEFT would save → (the model's key, the tensor); no key for tensors that PEFT makes on saving."""
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            saved = peft.get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False
            )
        except Exception:  # a method that cannot be saved this way promises nothing
            return {}
    by_object = {id(tensor): key for key, tensor in state.items()}
    return {name: (by_object.get(id(tensor), ""), tensor) for name, tensor in saved.items()}


def file_name(key: str, adapter_name: str) -> str:
    """The name in the file of a key of the model: PEFT leaves the adapter's name out on saving."""
    return (
        key.replace(f".modules_to_save.{adapter_name}.", ".")
        .replace(f".{adapter_name}.", ".")
        .removesuffix(f".{adapter_name}")
    )


def _holds(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor of the model holds the file's values, in its own dtype."""
    return tensor.shape == value.shape and same_values(tensor.detach(), value.to(tensor.device, tensor.dtype))


def _is_remade(name: str, key: str) -> bool:
    """Whether PEFT makes this tensor on saving, from others, so that its values come back by arithmetic only (VB-LoRA).

    Not LoRA's: there transformers' conversions make tensors, and what they lose is what is looked for.
    """
    return not key and ".lora_" not in name


def _unique(tensor: torch.Tensor | None) -> set[float]:
    return set() if tensor is None else set(torch.unique(tensor.detach().float()).tolist())


def _made_of(tensor: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether a tensor holds the values of its parts and nothing else but zeros (blocks of a diagonal)."""
    whole = torch.unique(torch.nan_to_num(tensor.detach().flatten(), nan=0.0))
    given = torch.unique(torch.cat([torch.nan_to_num(part.flatten().to(tensor.dtype), nan=0.0) for part in parts]))
    return torch.equal(whole[whole != 0], given[given != 0])
