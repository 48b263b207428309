"""Which class an adapter's base is loaded with, and the size of a head that only the adapter's file knows.

In: a base's directory and what the preflight read of an adapter. Out: `ModelClass`. Loads no weights: models are built
on torch's meta device, where they have names and shapes only. Knows nothing of PEFT.

1. The adapter's task type names the class.
2. Else its `auto_mapping` names one of transformers.
3. Else it is the base's own architecture.
4. A class that does not know the base's configuration gives way to the architecture.
5. If none of the names in the adapter's file lies in that class, it is another class of the base: one in which all of
   them lie, and of which the base's files hold tensors. This rule is for files without an `auto_mapping`, and for
   classes into which transformers loads no names of earlier releases.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from merge_gate.engine.base.loaded_base import ModelClass, caught
from merge_gate.engine.base.other_class import stored_names
from merge_gate.errors import Undecidable
from merge_gate.records.files import AdapterFiles
from merge_gate.records.refusals import BaseRaised, RemoteCodeNeeded
from merge_gate.tensor_names import ADAPTER_PREFIX

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types and the Auto class that its `AutoPeftModel…` classes pair with them (peft/auto.py)."""

MOST_LABELS = 1 << 20
"""A config names each of its labels: a file with a hostile shape could have as many as it has bytes."""


def shape_for(directory: str, files: AdapterFiles, *, trust_remote_code: bool = False) -> ModelClass:
    """Choose by the rules above.

    Raises:
        Undecidable: the base's config.json cannot be read.
    """
    config = _read_config(directory, trust_remote_code=trust_remote_code)
    asked = _class_for(config, files, trust_remote_code=trust_remote_code)
    is_known = files.config.task_type not in TASK_CLASSES and asked == files.config.base_class
    class_name = asked if is_known else _class_that_fits(config, asked, files, directory)
    return ModelClass(
        class_name=class_name,
        num_labels=_num_labels(config, class_name, files),
        instead_of=asked if files.config.task_type in TASK_CLASSES and class_name != asked else None,
    )


def _read_config(directory: str, *, trust_remote_code: bool) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, KeyError and more, by the kind of damage
        if "trust_remote_code" in str(error):
            raise Undecidable(RemoteCodeNeeded()) from error
        raise Undecidable(BaseRaised(base="", error=caught(error))) from error


# --- the class -----------------------------------------------------------------------------------------------------


def _class_for(config: Any, files: AdapterFiles, *, trust_remote_code: bool) -> str:
    architecture = _architecture(config)
    remote_map = getattr(config, "auto_map", None) or {} if trust_remote_code else {}
    wanted = TASK_CLASSES.get(files.config.task_type or "")
    if wanted is not None:
        return wanted if wanted in remote_map else _concrete(config, wanted) or architecture
    mapped = files.config.base_class
    if mapped is not None and _is_model_class(mapped):
        return mapped
    if not _is_model_class(architecture):
        return next((name for name in remote_map if name.startswith("AutoModel")), architecture)
    return architecture


def _architecture(config: Any) -> str:
    named = (name for name in config.architectures or () if hasattr(transformers, name))
    return next(named, None) or _concrete(config, "AutoModel") or "AutoModel"


def _concrete(config: Any, auto_class: str) -> str | None:
    """The class that an Auto class stands for, so that two names of one class share a load; None where it has none."""
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    name = getattr(found, "__name__", "")  # some configurations have several classes: the Auto class chooses
    return name if _is_model_class(name) else auto_class


def _is_model_class(name: str) -> bool:
    found = getattr(transformers, name, None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def _class_that_fits(config: Any, asked: str, files: AdapterFiles, directory: str) -> str:
    """Rule 5. The first parts of names tell the classes of an architecture apart (`bert.encoder…` and `encoder…`)."""
    names = [one.name.removeprefix(ADAPTER_PREFIX) for one in files.tensors if one.name.startswith(ADAPTER_PREFIX)]
    parts = _first_parts(names)
    if not parts or not _is_model_class(asked) or _looks_usual(config, asked, parts):
        return asked
    skeleton = _skeleton(config, asked)
    if (parts | _first_parts(_renamed(skeleton, names))) & _children(skeleton):
        return asked
    others = (_architecture(config), *(_concrete(config, auto_class) for auto_class in TASK_CLASSES.values()))
    fitting = (name for name in others if name and _is_model_class(name) and parts <= _parts(config, name))
    return next((name for name in fitting if _is_stored(config, name, directory)), asked)


def _is_stored(config: Any, class_name: str, directory: str) -> bool:
    """Whether the base's files hold tensors of a class; True if they cannot be read here, as pickled ones."""
    try:
        stored = stored_names(Path(directory))
    except Exception:  # the load says what is wrong with the files
        return True
    skeleton = _skeleton(config, class_name)
    if skeleton is None:
        return True
    names, prefix = {name for name, _ in skeleton.named_parameters()}, f"{skeleton.base_model_prefix}."
    held = {*stored, *_renamed(skeleton, stored)}
    return any({name, prefix + name, name.removeprefix(prefix)} & names for name in held)


def _looks_usual(config: Any, class_name: str, parts: set[str]) -> bool:
    """A model with a head holds the bare one under its prefix; so most names need no model to be built."""
    prefix = getattr(transformers, class_name).base_model_prefix
    return (prefix in parts) != (class_name == _concrete(config, "AutoModel"))


def _first_parts(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _parts(config: Any, class_name: str) -> set[str]:
    return _children(_skeleton(config, class_name))


def _children(skeleton: Any) -> set[str]:
    return {name for name, _ in skeleton.named_children()} if skeleton is not None else set()


def _renamed(skeleton: Any, names: Iterable[str]) -> list[str]:
    """The names as transformers has them today, where it knows earlier ones: PEFT loads a LoRA's by the same list."""
    if skeleton is None:
        return []
    renamings = [one for one in get_model_conversion_mapping(skeleton) if isinstance(one, WeightRenaming)]
    return [rename_source_key(name, renamings, [])[0] for name in names]


def _skeleton(config: Any, class_name: str) -> Any:
    with torch.device("meta"):
        try:
            found = getattr(transformers, class_name)
            return found(config) if _is_model_class(class_name) else found.from_config(config)
        except Exception:  # a class that needs more than names and shapes
            return None


# --- its head ------------------------------------------------------------------------------------------------------


def _num_labels(config: Any, class_name: str, files: AdapterFiles) -> int | None:
    """How many labels the head has that the adapter's file brings, where that is not the base's own count.

    Rows of a head are those that a model with one more label has more of: a detector's head has more rows than labels.
    """
    saved = {
        header.name.removeprefix(ADAPTER_PREFIX): header.shape
        for header in files.tensors
        if header.shape and header.name.endswith((".weight", ".bias")) and ".lora_" not in header.name
    }
    own = _shapes(config, class_name) if saved else {}
    resized = {
        name: saved[name][0] for name, shape in own.items() if name in saved and _has_other_rows(saved[name], shape)
    }
    if not resized:
        return None
    with_more = copy.deepcopy(config)
    with_more.num_labels = config.num_labels + 1
    more = _shapes(with_more, class_name)
    for name, rows in resized.items():
        each = more.get(name, own[name])[0] - own[name][0]
        count, rest = divmod(rows - own[name][0], each) if each > 0 else (0, 1)
        if not rest and 0 < config.num_labels + count <= MOST_LABELS:
            return int(config.num_labels + count)
    return None


def _shapes(config: Any, class_name: str) -> dict[str, tuple[int, ...]]:
    skeleton = _skeleton(config, class_name)
    named = skeleton.named_parameters() if skeleton is not None else ()
    return {name: tuple(map(int, parameter.shape)) for name, parameter in named}


def _has_other_rows(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    return shape[1:] == own[1:] and shape[:1] != own[:1]
