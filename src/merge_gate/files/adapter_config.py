"""Makes the `AdapterConfig` record from adapter_config.json, and judges the file before PEFT sees it.

In: the object in the file, and the tensors of the weights file. Out: the record, and `Finding`s of `config-invalid` and
`config-unsafe`; it imports no torch and no PEFT.
"""

# A finding here must be right for every PEFT type and every release. The merge judges values whose meaning depends on
# the type.

from __future__ import annotations

import hashlib
import json
import re
import warnings
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from merge_gate.files.headers import shown
from merge_gate.files.json_object import kind
from merge_gate.judging.checks.config_invalid import CONFIG_INVALID
from merge_gate.judging.checks.config_unsafe import CONFIG_UNSAFE
from merge_gate.judging.checks.phrases import describe_pattern
from merge_gate.judging.foreign_formats import by_keys
from merge_gate.records.files import CONFIG_NAME, AdapterConfig, Pattern, StoredTensor
from merge_gate.records.terms import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MAX_BYTES = 10_000_000

KNOWN_LIBRARIES = (
    "accelerate", "diffusers", "lerobot", "megatron-core", "peft", "sentence_transformers", "timm", "torch",
    "torchvision", "transformers", "trl",
)  # fmt: skip
"""Libraries that `auto_mapping` may name: PEFT's own list (peft/auto.py), and others whose models PEFT often wraps."""

_CODE_OF_BASES = "transformers_modules."
"""The package in which transformers keeps code that came with a base. PEFT writes such a name itself, and
PeftModel.from_pretrained does not read it. `trust-remote-code` decides whether that code runs."""

_LORA = "LORA"
_LORA_BIASES = ("none", "all", "lora_only")
_LORA_A = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")
_NAMES_SHOWN = 3
_VALUE_SHOWN = 60
_NOT_SET: tuple[Any, ...] = (None, False, "", [], {})
_MOST_PATTERNS_COMPILED = 2_000  # the worker compiles the others, within a time limit

_WHOLE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""In these keys a string is an expression for whole names; a list holds plain names (peft/tuners/tuners_utils.py)."""

_PLAIN_NAME = re.compile(r"\^?(?:[A-Za-z0-9_-]|\.|\\\.)+\$?")
"""Names that are valid and fast to match. A config may hold a hundred thousand of them."""

MOST_PATTERN_CHARACTERS = 100_000
"""Longer than any expression that people or PEFT write. Python takes seconds to compile one of this length."""


# --- the record ----------------------------------------------------------------------------------------------------


def recorded(config: dict[str, Any]) -> AdapterConfig:
    """The record of the values that later stages read."""
    mapping = config.get("auto_mapping")
    return AdapterConfig(
        digest=hashlib.sha256(json.dumps(config).encode()).hexdigest(),
        keys=frozenset(config),
        values=tuple((key, json.dumps(value)[:_VALUE_SHOWN]) for key, value in config.items() if value not in _NOT_SET),
        patterns=tuple(patterns_of(config)),
        peft_type=_text(config, "peft_type"),
        peft_version=_text(config, "peft_version"),
        task_type=_text(config, "task_type"),
        base_name=_text(config, "base_model_name_or_path"),
        base_revision=_text(config, "revision"),
        base_class=_text(mapping, "base_model_class") if isinstance(mapping, dict) else None,
        r=config["r"] if _is_integer(config.get("r")) else None,
        alpha=_number(config, "alpha"),
        lora_alpha=_number(config, "lora_alpha"),
        projection_prng_key=config["projection_prng_key"] if _is_integer(config.get("projection_prng_key")) else None,
        bias=_text(config, "bias"),
        init_lora_weights=_text(config, "init_lora_weights"),
        lora_bias=bool(config.get("lora_bias")),
        save_projection=config.get("save_projection") is not False,
        use_cayley_neumann=bool(config.get("use_cayley_neumann")),
        use_dora=bool(config.get("use_dora")),
        use_rslora=bool(config.get("use_rslora")),
    )


def _text(config: dict[str, Any], key: str) -> str | None:
    """The string under `key`; None when it is absent, empty or not a string (which `judge` reports)."""
    value = config.get(key)
    return value if isinstance(value, str) and value else None


def _number(config: dict[str, Any], key: str) -> float | None:
    return config[key] if _is_number(config.get(key)) else None


_PARAMETERS = {
    "LORA": re.compile(r"(.+)\.lora_(?:[AB]\.weight|embedding_[AB]|magnitude_vector(?:\.weight)?)$"),
    "IA3": re.compile(r"(.+)\.ia3_l$"),
    "LOHA": re.compile(r"(.+)\.hada_(?:w[12]_[ab]|t[12])$"),
    "LOKR": re.compile(r"(.+)\.lokr_(?:w[12](?:_[ab])?|t2)$"),
}
"""The tensors of methods that each merge uses, by PEFT's names."""


def is_used(config: Mapping[str, Any], tensor: str) -> bool:
    """Whether the config alone shows that a merge uses a tensor: its module is in a list of names.

    Expressions are not matched here, and settings that leave modules out show nothing.
    """
    if config.get("exclude_modules") or config.get("layers_to_transform"):
        return False
    targets, saved = config.get("target_modules"), config.get("modules_to_save")
    pattern = _PARAMETERS.get(str(config.get("peft_type")))
    match = pattern.match(tensor) if pattern else None
    if match and (config.get("use_dora") or "magnitude" not in tensor):
        return isinstance(targets, list) and _is_listed(targets, match[1])
    return isinstance(saved, list) and _is_listed(saved, tensor.rpartition(".")[0])


def _is_listed(names: list[Any], module: str) -> bool:
    return any(isinstance(name, str) and name and f".{module}".endswith(f".{name}") for name in names)


# --- regular expressions ------------------------------------------------------------------------------------------


def patterns_of(config: Mapping[str, Any]) -> Iterator[Pattern]:
    """Every expression of a config that is more than a name, in the order of its keys. Other types are ignored."""
    return (pattern for pattern in _every_pattern(config) if not _PLAIN_NAME.fullmatch(pattern.text))


def _every_pattern(config: Mapping[str, Any]) -> Iterator[Pattern]:
    for key, value in config.items():
        if key in _WHOLE_NAMES and isinstance(value, str):
            yield Pattern(place=key, text=value, expression=value)
        elif key == "layers_pattern":
            for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
                if isinstance(text, str):
                    yield Pattern(place=key, text=text, expression=rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.")
        elif key.endswith("_pattern") and isinstance(value, dict):
            for text in value:
                yield Pattern(place=f"a key of {key}", text=text, expression=rf"(.*\.)?({text})$")


def pattern_problem(pattern: Pattern) -> str | None:
    """Why the expression is refused; None if it is accepted."""
    if len(pattern.text) > MOST_PATTERN_CHARACTERS:
        return f"it has {len(pattern.text):,} characters, expected at most {MOST_PATTERN_CHARACTERS:,}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern.expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


# --- types of values -----------------------------------------------------------------------------------------------


def _is_a(*kinds: type) -> Callable[[Any], bool]:
    """A test for values of these types. In JSON, true and false are no numbers."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _is_list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


_is_text, _is_integer, _is_number = _is_a(str), _is_a(int), _is_a(int, float)
_is_names, _is_integers = _is_list_of(_is_text), _is_list_of(_is_integer)

_TEXT = (_is_text, "a string")
_FLAG = (_is_a(bool), "true or false")
_NUMBER = (_is_number, "a number")
_NAMES = (lambda value: _is_text(value) or _is_names(value), "a string or a list of strings")
_MAPPING = (_is_a(dict), "an object")

_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "bias": _TEXT,
    "megatron_core": _TEXT,
    "r": (_is_integer, "an integer"),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _NAMES,
    "layers_pattern": _NAMES,
    "target_parameters": (_is_names, "a list of strings"),
    "layers_to_transform": (
        lambda value: _is_integer(value) or _is_integers(value),
        "an integer or a list of integers",
    ),
    "rank_pattern": _MAPPING,
    "alpha_pattern": _MAPPING,
    "auto_mapping": _MAPPING,
    "trainable_token_indices": (
        lambda value: all(map(_is_integers, value.values() if isinstance(value, dict) else [value])),
        "a list of integers, or an object with such lists",
    ),
    "fan_in_fan_out": _FLAG,
    "inference_mode": _FLAG,
    "lora_bias": _FLAG,
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
}
"""The type that a key's value has in every PEFT type with that key. null is always allowed."""


# --- judgement -----------------------------------------------------------------------------------------------------


def _judge_numbers(config: dict[str, Any]) -> Iterator[Finding]:
    """PEFT and torch can use no integer of more than 64 bits."""
    for place, value in _walk(config):
        if _is_integer(value) and not -(2**63) <= value < 2**63:
            digits = value.bit_length() * 30_103 // 100_000 + 1
            yield invalid(
                f"{shown(place)} in {CONFIG_NAME} is an integer of {digits:,} digits, expected at most 64 bits"
            )


def judge(config: dict[str, Any], tensors: tuple[StoredTensor, ...]) -> Iterator[Finding]:
    """The findings on the config itself. If there are none, the findings on the config and the tensors together."""
    is_sound = True
    for finding in chain(_judge_numbers(config), _judge_types(config), _judge_lora(config), _judge_unsafe(config)):
        is_sound = False
        yield finding
    if is_sound:
        yield from _judge_rank(config, tensors)


def invalid(message: str, hint: str = "", *, tensor: str | None = None) -> Finding:
    """A `config-invalid` finding on adapter_config.json."""
    hint = hint or "undo your edits of this file, or save the adapter again with save_pretrained"
    return CONFIG_INVALID.finding(message, hint, tensor=tensor)


def _judge_types(config: dict[str, Any]) -> Iterator[Finding]:
    if "peft_type" not in config:
        yield invalid(
            f"{CONFIG_NAME} has no peft_type, so the method of the adapter is unknown",
            by_keys(config)
            or "check that PEFT wrote this file: the model's config.json and other trainers' configs do not fit",
        )
    elif not (isinstance(config["peft_type"], str) and config["peft_type"]):
        yield invalid(
            f"peft_type in {CONFIG_NAME} is {_shown_value(config['peft_type'])}, expected a string such as LORA"
        )
    for key, (is_valid, expected) in _TYPES.items():
        value = config.get(key)
        if value is not None and not is_valid(value):
            yield invalid(f"{key} in {CONFIG_NAME} is {_shown_value(value)}, expected {expected}")
    for pattern in islice(patterns_of(config), _MOST_PATTERNS_COMPILED):
        if problem := pattern_problem(pattern):
            yield invalid(
                f"{describe_pattern(pattern)}, which is not a valid regular expression: {problem}",
                "PEFT reads it as a regular expression: use plain names, in a list for target_modules",
            )


def _shown_value(value: Any) -> str:
    return f"{kind(value)} ({shown(json.dumps(value))})"


def _judge_lora(config: dict[str, Any]) -> Iterator[Finding]:
    """Judges keys that have a fixed meaning in LoRA only (peft/tuners/lora/config.py)."""
    if config.get("peft_type") != _LORA:
        return
    rank, bias = config.get("r"), config.get("bias")
    if "lora_alpha" in config and config["lora_alpha"] is None:
        yield invalid(f"lora_alpha in {CONFIG_NAME} is null, expected a number: PEFT scales the delta by it")
    if isinstance(rank, int) and rank <= 0 and not config.get("rank_pattern"):
        yield invalid(f"r in {CONFIG_NAME} is {rank}, expected a positive rank")
    if isinstance(bias, str) and bias not in _LORA_BIASES:
        yield invalid(f"bias in {CONFIG_NAME} is {shown(bias)}, expected one of {', '.join(_LORA_BIASES)}")
    yield from _judge_patterns(config.get("rank_pattern"), config.get("alpha_pattern"))


def _judge_patterns(ranks: Any, alphas: Any) -> Iterator[Finding]:
    if isinstance(ranks, dict):
        for name, value in ranks.items():
            if not _is_integer(value) or value <= 0:
                yield invalid(f"rank_pattern[{shown(name)}] is {_shown_value(value)}, expected a positive integer")
    if isinstance(alphas, dict):
        for name, value in alphas.items():
            if not _is_number(value):
                yield invalid(f"alpha_pattern[{shown(name)}] is {_shown_value(value)}, expected a number")


# --- code that the config would import -----------------------------------------------------------------------------


def _judge_unsafe(config: dict[str, Any]) -> Iterator[Finding]:
    if config.get("megatron_config"):
        core = config.get("megatron_core", "megatron.core")
        yield CONFIG_UNSAFE.finding(
            f"megatron_config is set in {CONFIG_NAME}: PEFT would import the first module on Python's path that is "
            f"named {shown(str(core))}",
            "set megatron_config to null: only training with Megatron needs it",
        )
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is not None and not _is_known_library(library):
        yield CONFIG_UNSAFE.finding(
            f"auto_mapping in {CONFIG_NAME} imports the base's class from the module {shown(str(library))}, "
            f"expected one of {', '.join(KNOWN_LIBRARIES)}",
            "set task_type (CAUSAL_LM, SEQ_CLS, …) and auto_mapping to null, and name the base in the gate's config",
        )
    # PEFT passes tokenizer_kwargs to transformers
    places = (place for place, value in _walk(config) if value and place.rpartition(".")[2] == "trust_remote_code")
    if place := next(places, None):
        yield CONFIG_UNSAFE.finding(
            f"{shown(place)} in {CONFIG_NAME} asks PEFT to run code from the Hub",
            "remove it: trust-remote-code in the gate's config decides whether remote code may run",
        )


def _is_known_library(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    known = any(name == library or name.startswith(f"{library}.") for library in KNOWN_LIBRARIES)
    return known or name.startswith(_CODE_OF_BASES)


def _walk(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value in the config, with its dotted place."""
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        place, value = pending.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield f"{place}{key}", child
            if isinstance(child, dict | list):
                pending.append((f"{place}{key}.", child))


# --- config against tensors ----------------------------------------------------------------------------------------


def _judge_rank(config: dict[str, Any], tensors: tuple[StoredTensor, ...]) -> Iterator[Finding]:
    """Compare `r` with the first dimension of every lora_A.

    Fused experts (`target_parameters`) stack their ranks, and patterns give modules ranks of their own. Then the merge
    decides.
    """
    rank = config.get("r")
    has_other_ranks = config.get("rank_pattern") or config.get("target_parameters") or config.get("use_bdlora")
    if config.get("peft_type") != _LORA or not _is_integer(rank) or has_other_ranks:
        return
    factors = [tensor for tensor in tensors if _LORA_A.search(tensor.name)]
    if not factors or any(len(tensor.shape) < 2 or tensor.shape[0] in {0, rank} for tensor in factors):  # noqa: PLR2004
        return
    other_ranks = sorted({tensor.shape[0] for tensor in factors})
    ranks = ", ".join(map(str, other_ranks[:_NAMES_SHOWN])) + (", …" if len(other_ranks) > _NAMES_SHOWN else "")
    first = factors[0]
    every_factor = f"each of the {len(factors):,} lora_A tensors" if len(factors) > 1 else "the lora_A tensor"
    yield invalid(
        f"r in {CONFIG_NAME} is {rank}, but {every_factor} has another rank ({ranks}): "
        f"{shown(first.name)} has shape {list(first.shape)}",
        "config and weights come from different runs, or someone edited the config: restore the config of this run",
        tensor=first.name,
    )
