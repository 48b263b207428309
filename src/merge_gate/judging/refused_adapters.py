"""Why an adapter's files could not be loaded, as findings.

In: facts of the engine about the config and the tensors of an adapter (records/refusals.py). Out: `Finding`s. Imports
no torch and opens no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from merge_gate.judging.checks.file_checks import CONFIG_INVALID, FILE_CORRUPT
from merge_gate.judging.checks.fit import SHAPE_MISMATCH, TARGETS_NOT_FOUND, keys_missing
from merge_gate.judging.checks.phrases import RESTORE_CONFIG, describe_pattern
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.refusals import (
    IgnoredSettings,
    ParametersNotFound,
    PatternRefused,
    PickleUnreadable,
    ShapeClash,
    TargetsNotFound,
    TensorsMissing,
    TensorUnreadable,
    UnknownMethod,
)
from merge_gate.records.terms import Finding, Origin
from merge_gate.tensor_names import module_of
from merge_gate.text import counted, listing, quoted

_OTHER_RELEASE = "gate the adapter with the version that it was trained with"
_SETTINGS = 6
"""Ignored settings that one message lists."""

_MOST_DIGITS = 10

# Heads that PEFT's classes for these tasks put into modules_to_save (peft/peft_model.py).
_SAVED_BY_TASK = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = ("classifier", "score", "qa_outputs")


# --- adapter_config.json ---------------------------------------------------------------------------------------------


def pattern_refused(fact: PatternRefused) -> Finding:
    if fact.problem is not None:
        what = describe_pattern(fact.pattern) if fact.pattern else "adapter_config.json holds an expression"
        message = f"{what}, which is not a valid regular expression: {fact.problem}"
        return CONFIG_INVALID.finding(message, "use plain names", Origin.CONFIG)
    what = f"{describe_pattern(fact.pattern)}, a" if fact.pattern else "adapter_config.json holds a"
    return CONFIG_INVALID.finding(
        f"{what} regular expression that was not matched against the {fact.names:,} module names of the base within "
        f"{fact.seconds:g} s of computing; PEFT would not finish",
        "write it without a repetition inside of a repetition, or use a list of names",
        Origin.CONFIG,
    )


def unknown_method(fact: UnknownMethod) -> Finding:
    return not_judged(
        f"PEFT {fact.peft} does not know the adapter type {fact.name!r}, so it cannot be merged here",
        f"PEFT writes it {fact.known_as!r}: correct peft_type in adapter_config.json"
        if fact.known_as
        else "upgrade PEFT in the environment that runs the gate, or correct peft_type in adapter_config.json",
        origin=Origin.CONFIG,
    )


def ignored_settings(fact: IgnoredSettings) -> Finding:
    """PEFT drops keys that it does not know with a warning; one that is set may change what the adapter computes."""
    listed = ", ".join(fact.settings[:_SETTINGS])
    message = f"adapter_config.json sets {listed}, which PEFT {fact.peft} does not know and would ignore"
    if _release(fact.saved_by) > _release(fact.peft):
        hint = f"the adapter was saved by PEFT {fact.saved_by}: run the gate with that version or newer"
        return not_judged(message, hint, origin=Origin.CONFIG)
    hints = [f"did you mean {quoted(known)}? then rename {quoted(key)}" for key, known in fact.near[:_SETTINGS]]
    if len(fact.near) < len(fact.settings):
        remove = "for any other key: remove it" if hints else "remove the key"
        hints.append(
            f"{remove} if it is a mistake or another trainer's own; if it changes what is computed, "
            "merge with the program that wrote it: the gate needs PEFT 0.21 or newer"
        )
    return CONFIG_INVALID.finding(message, "; ".join(hints), Origin.CONFIG)


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a release, none for other text. The adapter states it, and `int` raises on "²" or many digits."""
    parts = text.split(".")[:3]
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < _MOST_DIGITS for part in parts) else ()


# --- the targets -----------------------------------------------------------------------------------------------------


def targets_not_found(fact: TargetsNotFound) -> Finding:
    names = () if isinstance(fact.targets, str) else fact.targets
    shown = _quoted((fact.targets,) if isinstance(fact.targets, str) else names)
    heads = sorted(name for name in names if name.rpartition(".")[2] in _HEADS)
    if heads and fact.task_type in _SAVED_BY_TASK:
        return TARGETS_NOT_FOUND.finding(
            f"target_modules {shown} leaves nothing to adapt: for task_type {fact.task_type} PEFT trains "
            f"{listing(heads)} whole (modules_to_save) instead of adapting it",
            "name other layers in target_modules, or save the adapter without a task_type",
            Origin.CONFIG,
        )
    if not fact.targets:
        return TARGETS_NOT_FOUND.finding(
            "target_modules in adapter_config.json is empty, and no target_parameters are named",
            RESTORE_CONFIG,
            Origin.CONFIG,
        )
    but = f" that exclude_modules ({fact.excluded[:100]}) leaves" if fact.excluded else ""
    but += f" in the layers of layers_to_transform ({fact.layers[:100]})" if fact.layers is not None else ""
    return TARGETS_NOT_FOUND.finding(
        f"target_modules {shown} match no module of the base{but}; the base's layers are {listing(fact.of_base, 12)}",
        _misread(fact) or _narrowed(fact) or f"check that this is the adapter's base; {_renamed('the layers')}",
        Origin.CONFIG,
    )


def parameters_not_found(fact: ParametersNotFound) -> Finding:
    return TARGETS_NOT_FOUND.finding(
        f"target_parameters {_quoted(fact.targets)} match no parameter of the base, and no target_modules are named; "
        f"the base's parameters are {listing(fact.of_base, 12)}",
        "check that this is the adapter's base; target_parameters are the ends of names of parameters, such as "
        f"mlp.experts.gate_up_proj; {_renamed('those')}",
        Origin.CONFIG,
    )


def _renamed(what: str) -> str:
    return f"transformers 5 renamed {what} of some architectures: then {_OTHER_RELEASE}"


def _quoted(names: tuple[str, ...]) -> str:
    return listing((quoted(name, 300, "'") for name in names), 12)


def _misread(fact: TargetsNotFound) -> str:
    """The hint if PEFT reads target_modules differently than its author meant; else empty."""
    if isinstance(fact.targets, str):
        parts = re.split(r"[\s,|]+", fact.targets)
        return (
            "a text in target_modules is one regular expression, which has to match a layer's whole name: write a list "
            "of names"
            if any(name in parts for name in fact.of_base)
            else ""
        )
    if any(set("*\\()[]|^$") & set(name) for name in fact.targets):
        return "in a list, target_modules are plain names, no regular expressions: write the expression as a text"
    return ""


def _narrowed(fact: TargetsNotFound) -> str:
    """The hint if the base has these names and other settings exclude them; else empty."""
    are_there = not isinstance(fact.targets, str) and all(
        name.rpartition(".")[2] in fact.of_base for name in fact.targets
    )
    by = ["exclude_modules"] * bool(fact.excluded) + ["layers_to_transform"] * (fact.layers is not None)
    return (
        f"look at {' and '.join(by)} in adapter_config.json: the base has layers of these names"
        if by and are_there
        else ""
    )


# --- the tensors -----------------------------------------------------------------------------------------------------


def tensors_missing(fact: TensorsMissing) -> Finding:
    return keys_missing.finding(
        f"adapter_config.json promises fully trained modules (modules_to_save {fact.trained_whole} "
        f"or trainable tokens), but the file lacks {listing(fact.names, 6)}"
        if fact.trained_whole
        else f"the file lacks {listing(fact.names, 6)}, which adapter_config.json promises",
        "save the adapter again with save_pretrained, and check that the upload was complete",
        Origin.ADAPTER,
        tensor=fact.names[0],
    )


def tensor_unreadable(fact: TensorUnreadable) -> Finding:
    why = (
        "it is without values (meta device)" if fact.is_meta else f"it is of {fact.dtype}" if fact.dtype else fact.text
    )
    return FILE_CORRUPT.finding(
        f"{fact.name or 'a tensor'} in the adapter's file cannot be read as numbers by torch, or loaded by PEFT: {why}",
        "save the adapter with its values, as float32, bfloat16 or float16",
        Origin.FILE,
        tensor=fact.name,
    )


def pickle_unreadable(fact: PickleUnreadable) -> Finding:
    what = f"torch refuses {quoted(fact.names)} in them" if fact.names else fact.error
    return FILE_CORRUPT.finding(
        f"the pickled weights are damaged, or hold something other than tensors ({what})",
        "do not load this file; ask who made it, and have the adapter saved as safetensors",
        Origin.FILE,
    )


def shape_clash(fact: ShapeClash) -> Finding:
    does = "does" if fact.others == 1 else "do"
    more = f"; {counted(fact.others, 'more tensor')} {does} not fit either" if fact.others else ""
    return SHAPE_MISMATCH.finding(
        f"{fact.name} has shape {list(fact.got)}, but config and base need {list(fact.expected)}{more}",
        _shape_hint(fact),
        Origin.ADAPTER,
        module=module_of(fact.name),
        tensor=fact.name,
    )


def _shape_hint(fact: ShapeClash) -> str:
    got, expected = fact.got, fact.expected
    if fact.of_tokens:
        return (
            "one row for each token: trainable_token_indices in adapter_config.json is not that of the training, or "
            "this is not the adapter's base"
        )
    if 0 in got or len(got) < len(expected):
        return "the tensor was saved unsharded-empty by ZeRO-3 or FSDP: gather the parameters before save_pretrained"
    if fact.trained_whole:
        return "this is not the adapter's base, or one with another vocabulary or number of labels than in training"
    if len(got) == len(expected) == 2 and (got[0] != expected[0]) != (got[1] != expected[1]):  # noqa: PLR2004 - factors
        return (
            "either r or rank_pattern in adapter_config.json is not the rank it was trained with, or this is not the "
            "adapter's base"
        )
    return "this is not the base that the adapter was trained on"


WORDS: Mapping[type, Callable[[Any], Finding]] = MappingProxyType(
    {
        PatternRefused: pattern_refused,
        UnknownMethod: unknown_method,
        IgnoredSettings: ignored_settings,
        TargetsNotFound: targets_not_found,
        ParametersNotFound: parameters_not_found,
        TensorsMissing: tensors_missing,
        TensorUnreadable: tensor_unreadable,
        PickleUnreadable: pickle_unreadable,
        ShapeClash: shape_clash,
    }
)
"""The finding of each kind of fact."""
