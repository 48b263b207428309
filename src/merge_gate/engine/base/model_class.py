"""Chooses the class that an adapter's base is loaded with, and the size of its head if only the adapter's file has it.

In: a base's directory, and what the preflight read of an adapter. Out: `ModelClass`. This module loads no weights and
imports no PEFT: models on torch's meta device have names and shapes only.

1. The class for the adapter's task type.
2. If it has no known task type: the class of transformers that its `auto_mapping` names.
3. If it has neither: the base's own architecture.
4. If the class does not support the base's configuration: the architecture too.
5. If the class has none of the names in the adapter's file: another class of the base that has all of them, and that
   the base's files have tensors of. This rule is for files without an `auto_mapping`. It is also for classes into which
   transformers loads no names of earlier releases.
6. If the class is that of a part of the base (the text model of a multimodal one), and the names are not its own but
   those that the base stores: the architecture.
7. If the class has an encoder and more, and the task type does not name the class: the encoder's own class, such as
   T5EncoderModel, if the names are in it and the adapter would target modules outside of it too.
8. The head has as many labels as the head in the adapter's file.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.base.loaded_base import ModelClass, caught
from merge_gate.records.files import AdapterFiles, StoredTensor
from merge_gate.records.refusals import CannotJudge

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types, and the Auto class that its `AutoPeftModel…` classes use for each (peft/auto.py)."""

MOST_LABELS = 1 << 20
"""A config lists all of its labels, so the shape in a hostile file must not set their number freely."""


def model_class_for(
    directory: str,
    files: AdapterFiles,
    stored: Collection[StoredTensor],
    *,
    trust_remote_code: bool = False,
    config: Any = None,
) -> ModelClass:
    """Choose by the rules at the top of this file.

    Args:
        directory: that of the base.
        files: those of the adapter.
        stored: the headers of the base's weight files.
        trust_remote_code: whether code of the base may choose.
        config: the base's config, if it was read before. It stays as it is.

    Raises:
        CannotJudge: the base's config.json cannot be read.
    """
    config = copy.deepcopy(config) if config else read_config(directory, trust_remote_code=trust_remote_code)
    requested = _requested_class(config, files, trust_remote_code=trust_remote_code)
    has_task_class = files.config.task_type in TASK_CLASSES
    is_from_mapping = not has_task_class and requested == files.config.base_class
    class_name = requested if is_from_mapping else _class_that_fits(config, requested, files, stored)
    encoder = None if is_from_mapping else _encoder_alone(config, class_name, files)
    class_name = encoder or class_name
    is_other = encoder != _architecture(config) if encoder else has_task_class and class_name != requested
    return ModelClass(
        class_name=class_name,
        num_labels=_num_labels(config, class_name, files),
        instead_of=requested if is_other else None,
    )


def read_config(directory: str, *, trust_remote_code: bool) -> Any:
    """The config of a base.

    Raises:
        CannotJudge: it cannot be read.
    """
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, KeyError, and others, depending on the damage
        if "trust_remote_code" in str(error):
            raise CannotJudge("remote_code_needed") from error
        raise CannotJudge("config_unreadable", error=caught(error)) from error


# --- the class -----------------------------------------------------------------------------------------------------


def _requested_class(config: Any, files: AdapterFiles, *, trust_remote_code: bool) -> str:
    """Rules 1 to 4."""
    architecture = _architecture(config)
    remote_map = getattr(config, "auto_map", None) or {} if trust_remote_code else {}
    task_class = TASK_CLASSES.get(files.config.task_type or "")
    if task_class is not None:  # 1. and 4.
        return task_class if task_class in remote_map else _concrete(config, task_class) or architecture
    mapped = files.config.base_class
    if mapped is not None and _is_model_class(mapped):  # 2.
        return mapped
    if not _is_model_class(architecture):  # 3.
        return next((name for name in remote_map if name.startswith("AutoModel")), architecture)
    return architecture


def users_class(directory: str, loaded: type, files: AdapterFiles, *, trust_remote_code: bool) -> tuple[str, bool]:
    """The class that an adapter's users load, and whether `loaded` is that of a part of the base.

    Servers load the whole base, by the class in config.json. Otherwise, rules 1 to 4 give the class: PEFT loads none of
    the adapter's tensors into a class with other names.
    """
    config = read_config(directory, trust_remote_code=trust_remote_code)
    is_part = _part(config, loaded) is not config
    name = _named(config) if is_part else _requested_class(config, files, trust_remote_code=trust_remote_code)
    return name if name and _is_model_class(name) else loaded.__name__, is_part


def _named(config: Any) -> str | None:
    return next((name for name in config.architectures or () if hasattr(transformers, name)), None)


def _architecture(config: Any) -> str:
    return _named(config) or _concrete(config, "AutoModel") or "AutoModel"


def _concrete(config: Any, auto_class: str) -> str | None:
    """The class that an Auto class selects for this configuration, so that both names share a load.

    None if it selects none.
    """
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        return None
    name = getattr(mapping[type(config)], "__name__", "")  # a tuple of classes has no name: the Auto class chooses
    return name if _is_model_class(name) else auto_class


def _is_model_class(name: str) -> bool:
    transformers_class = getattr(transformers, name, None)
    return isinstance(transformers_class, type) and issubclass(transformers_class, PreTrainedModel)


def _class_that_fits(config: Any, requested: str, files: AdapterFiles, stored: Collection[StoredTensor]) -> str:
    """Rules 5 and 6. Names of one architecture's classes differ in their first part (`bert.encoder`, `encoder`)."""
    names = _names_in_base(files)
    first_parts = _first_parts(names)
    if not first_parts or not _is_model_class(requested):
        return requested
    if _part(config, getattr(transformers, requested)) is not config:
        return _architecture(config) if _are_of_whole(config, requested, names, stored) else requested
    if _has_usual_prefix(config, requested, first_parts):
        return requested
    skeleton = _skeleton(config, requested)
    if (first_parts | _first_parts(current_names(skeleton, names))) & _children(skeleton):
        return requested
    others = (_architecture(config), *(_concrete(config, auto_class) for auto_class in TASK_CLASSES.values()))
    fitting = (
        name for name in others if name and _is_model_class(name) and first_parts <= _children(_skeleton(config, name))
    )
    return next((name for name in fitting if _is_stored(config, name, [tensor.name for tensor in stored])), requested)


def _names_in_base(files: AdapterFiles) -> list[str]:
    headers = (header for header in files.tensors if header.name.startswith(ADAPTER_PREFIX))
    return [header.name.removeprefix(ADAPTER_PREFIX) for header in headers]


def _encoder_alone(config: Any, class_name: str, files: AdapterFiles) -> str | None:
    """Rule 7. Neither the names of an encoder's tensors nor adapter_config.json say which of both classes is meant.

    Targets have the last parts of the names in the file. They are in the encoder alone if an expression names it, or if
    modules are excluded.
    """
    encoder = f"{type(config).__name__.removesuffix('Config')}EncoderModel"
    chosen = any(key == "exclude_modules" for key, _ in files.config.values) or any(
        pattern.place == "target_modules" and "encoder" in pattern.text for pattern in files.config.patterns
    )
    if chosen or files.config.task_type not in {None, "FEATURE_EXTRACTION"} or class_name == encoder:
        return None
    if not _is_model_class(encoder) or getattr(transformers, encoder).config_class is not type(config):
        return None
    alone, whole = _skeleton(config, encoder), _skeleton(config, class_name)
    if alone is None:
        return None
    own = {name for name, _ in alone.named_modules()} - {""}
    adapted = [next((path for path in reversed([*_paths(name)]) if path in own), "") for name in _names_in_base(files)]
    targets = {name.rpartition(".")[2] for name in adapted}
    others = {name for name, _ in whole.named_modules()} - own if whole is not None else targets  # it has no decoder
    return encoder if all(targets) and any(name.rpartition(".")[2] in targets for name in others) else None


def _paths(name: str) -> Iterable[str]:
    return accumulate(name.split("."), "{}.{}".format)


def _are_of_whole(config: Any, class_name: str, names: Iterable[str], stored: Collection[StoredTensor]) -> bool:
    """Whether names of modules are stored names, and none is a name of this class of a part."""
    modules = {tensor.name.rpartition(".")[0] for tensor in stored}
    matches = {path for name in names for path in _paths(name) if path in modules}
    skeleton = _skeleton(config, class_name) if matches else None
    return skeleton is not None and matches.isdisjoint(name for name, _ in skeleton.named_modules())


def _is_stored(config: Any, class_name: str, stored: Sequence[str]) -> bool:
    """Whether the base's files have tensors of a class. True if their names are not known."""
    skeleton = _skeleton(config, class_name) if stored else None
    if skeleton is None:
        return True
    class_names, prefix = {name for name, _ in skeleton.named_parameters()}, f"{skeleton.base_model_prefix}."
    file_names = {*stored, *current_names(skeleton, stored)}
    return any({name, prefix + name, name.removeprefix(prefix)} & class_names for name in file_names)


def _has_usual_prefix(config: Any, class_name: str, first_parts: set[str]) -> bool:
    """Whether the names have the prefix of a model with a head, or lack it for a bare model.

    This decides for most names, so that no model has to be built.
    """
    prefix = getattr(transformers, class_name).base_model_prefix
    return (prefix in first_parts) != (class_name == _concrete(config, "AutoModel"))


def _first_parts(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _children(skeleton: Any) -> set[str]:
    return {name for name, _ in skeleton.named_children()} if skeleton is not None else set()


def current_names(skeleton: Any, names: Iterable[str]) -> list[str]:
    """The names in this release of transformers for names of earlier releases. PEFT loads LoRA by the same list."""
    if skeleton is None:
        return []
    renamings = [rule for rule in get_model_conversion_mapping(skeleton) if isinstance(rule, WeightRenaming)]
    return [rename_source_key(name, renamings, [])[0] for name in names]


def _part(config: Any, model_class: Any) -> Any:
    """The part of a configuration that is for this class; the whole configuration if no part is."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return next((part for part in parts if type(part) is getattr(model_class, "config_class", None)), config)


def _skeleton(config: Any, class_name: str) -> Any:
    """A model of the class on the meta device. None if the class needs more than names and shapes."""
    with torch.device("meta"):
        try:
            transformers_class = getattr(transformers, class_name)
            if not _is_model_class(class_name):
                return transformers_class.from_config(config)
            return transformers_class(_part(config, transformers_class))
        except Exception:  # a class may raise anything without values
            return None


# --- its head ------------------------------------------------------------------------------------------------------


def _num_labels(config: Any, class_name: str, files: AdapterFiles) -> int | None:
    """Rule 8: the number of labels of the head in the adapter's file. None if it is the base's own number."""
    shapes_in_file = {
        header.name.removeprefix(ADAPTER_PREFIX): header.shape
        for header in files.tensors
        if header.shape and header.name.endswith((".weight", ".bias")) and ".lora_" not in header.name
    }
    own = _shapes(config, class_name) if shapes_in_file else {}
    rows_in_file = {
        name: shapes_in_file[name][0]
        for name, shape in own.items()
        if name in shapes_in_file and _has_other_rows(shapes_in_file[name], shape)
    }
    if not rows_in_file:
        return None
    # The tensors of a head are those that get more rows with one label more. A detector's head has more rows than
    # labels, so rows are compared with rows.
    one_label_more = copy.deepcopy(config)
    one_label_more.num_labels = config.num_labels + 1
    larger = _shapes(one_label_more, class_name)
    for name, rows in rows_in_file.items():
        rows_per_label = larger.get(name, own[name])[0] - own[name][0]
        added_labels, rest = divmod(rows - own[name][0], rows_per_label) if rows_per_label > 0 else (0, 1)
        if not rest and 0 < config.num_labels + added_labels <= MOST_LABELS:
            return int(config.num_labels + added_labels)
    return None


def _shapes(config: Any, class_name: str) -> dict[str, tuple[int, ...]]:
    skeleton = _skeleton(config, class_name)
    named = skeleton.named_parameters() if skeleton is not None else ()
    return {name: tuple(map(int, parameter.shape)) for name, parameter in named}


def _has_other_rows(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    return shape[1:] == own[1:] and shape[:1] != own[:1]
