"""The two files of an adapter: adapter_config.json as PEFT's own class reads it, and the tensors by their names.

In: what the preflight read. Out: PEFT's config object, and tensors, which are memory-mapped if the file is safetensors;
or `Refused`, with the reason why PEFT must not see them.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from merge_gate._internal.text import quoted
from merge_gate.engine.adapter.known_defects import refuse_by_config
from merge_gate.engine.base.loaded_base import Base, caught, first_line
from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.engine.tensors.placement import raise_if_of_the_run
from merge_gate.records.files import AdapterFiles, StoredTensor
from merge_gate.records.refusals import Fact, Refused

_USUAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def read_weights(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Read every tensor of the file. Other values in a pickle are ignored, as PEFT ignores them.

    Raises:
        Refused: the restricted unpickler refuses the file, it has no tensors by name, or PEFT would not load all of a
            tensor.
    """
    if files.weights is None:
        return {}
    tensors = _tensors(Path(files.directory) / files.weights)
    for name, tensor in tensors.items():
        _refuse_unreadable(name, tensor)
    return tensors


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:  # the preflight has read the header: this torch lacks the dtype
            raise Refused("tensor_unreadable", text=first_line(error)) from error
    return _unpickled(path)


def pickled_headers(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a pickled file, in its order. Their values stay on the disk, if torch can map the file.

    Raises:
        Refused: the restricted unpickler refuses the file, it has no tensors by name, or safetensors has no name for
            the dtype of one.
    """
    names = {getattr(torch, own, None): name for name, own in DTYPES.items()}
    state = _unpickled(path, mmap=zipfile.is_zipfile(path))
    for name, tensor in state.items():
        if tensor.dtype not in names:
            raise Refused("tensor_unreadable", name=name, dtype=str(tensor.dtype).removeprefix("torch."))
    return tuple(
        StoredTensor(name=name, dtype=names[tensor.dtype], shape=tuple(tensor.shape)) for name, tensor in state.items()
    )


def _unpickled(path: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler's own errors: not tensors only, or not a pickle
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        names = foreign[1] if foreign else None
        raise Refused("pickle_unreadable", error=type(error).__name__, names=names) from error
    if not isinstance(state, dict):
        raise Refused("pickle_unreadable", error=f"they hold a {type(state).__name__} in place of tensors by name")
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for name, value in state.items():
        kind = type(value).__name__
        if not isinstance(name, str):  # PEFT compares names
            raise Refused("pickle_unreadable", error=f"they hold a name of type {type(name).__name__}")
        if not tensors:
            raise Refused(
                "pickle_unreadable", error=f"they hold a {kind} as {quoted(name)} in place of tensors by name"
            )
        if name in tensors and (value.is_nested or value.is_quantized):
            dtype = "a nested layout" if value.is_nested else str(value.dtype).removeprefix("torch.")
            raise Refused("tensor_unreadable", name=name, dtype=dtype)
    return tensors


def _refuse_unreadable(name: str, tensor: torch.Tensor) -> None:
    """Refuse tensors that PEFT cannot copy to a parameter: no values (meta device), or below a byte each.

    PEFT copies the real part of a complex one, and no other part may have a value.
    """
    if tensor.is_complex() and (count := int(tensor.imag.count_nonzero())):
        raise Refused("imaginary_parts", name=name, dtype=str(tensor.dtype).removeprefix("torch."), count=count)
    if (tensor.dtype in _USUAL and not tensor.is_meta) or tensor.layout is not torch.strided:
        return
    some = tensor.flatten()[:1]
    try:
        torch.zeros(some.shape).copy_(some)
    except (RuntimeError, NotImplementedError) as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise Refused("tensor_unreadable", name=name, is_meta=tensor.is_meta, dtype=dtype) from error


ADAPTER_ONLY_SCHEMES = frozenset({"gaussian", "orthogonal", "mica", "eva", "lora_ga", "true", "false"})
"""Values of init_lora_weights that write no weight of the base on a load (peft/tuners/lora/layer.py, tests/engine/)."""

UNREADING_SCHEMES = frozenset({"gaussian", "orthogonal", "true", "false"})
"""Schemes that do not read the base's weights."""

STARTS = ("init_lora_weights", "init_weights", "init_ia3_weights")
"""Keys that say where training begins."""

NO_DELTA_SCHEMES = frozenset({"true", "gaussian", "eva", "orthogonal", "mica"})
"""LoRA's names of initializations whose product is zero (tests/engine/test_unread_layers.py). C3A's `gaussian` is not
zero."""

_LIKENESS = 0.8
"""How much a misspelled key has in common with the known one, by difflib: a letter or two differ."""

_LONGEST_KEY, _MOST_NEAR = 100, 20
"""Comparing takes quadratic time, and a hostile file may have many keys."""


def read_config(files: AdapterFiles) -> Any:
    """The adapter's config as PEFT's class for its type reads it.

    Raises:
        Refused: PEFT does not know the type, rejects a value, or would ignore a key that is set.
    """
    kind = str(files.config.peft_type)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if kind == "BONE":
        raise Refused("known_defect", defect="bone")
    if config_class is None:
        known_as = kind.upper() if kind.upper() in PEFT_TYPE_TO_CONFIG_MAPPING else None
        raise Refused("unknown_method", name=kind, peft=peft.__version__, known_as=known_as)
    _refuse_ignored_keys(config_class, files)
    try:
        config = config_class.from_pretrained(files.directory)
    except Exception as error:  # PEFT validates in __post_init__ with ValueError, TypeError and KeyError
        raise Refused("config_raised", error=caught(error), method=kind) from error
    refuse_by_config(config)
    config.inference_mode = True
    return config


def raised(error: Exception, config: Any, base: Base) -> dict[str, Fact]:
    """PEFT's exception on a base, with the facts that show who caused it. An error of the run is raised again."""
    raise_if_of_the_run(error)
    return {
        "error": caught(error),
        "method": config.peft_type.value,
        "trains_tokens": bool(getattr(config, "trainable_token_indices", None)),
        "quantization": base.facts.quantization,
        "is_incomplete": bool(base.facts.incomplete),
    }


def _refuse_ignored_keys(config_class: Any, files: AdapterFiles) -> None:
    """PEFT drops unknown keys with a warning. A key that is set may change the result of the adapter."""
    known = {field.name for field in dataclasses.fields(config_class)} | {"runtime_config"}
    values = dict(files.config.values)
    ignored = sorted(key for key in values if key not in known)
    if ignored:
        raise Refused(
            "ignored_settings",
            settings=tuple(f"{key}={values[key]}" for key in ignored),
            peft=peft.__version__,
            saved_by=(files.config.peft_version or "").split("@")[0],
            near=tuple(_near(ignored[:_MOST_NEAR], known - values.keys())),
        )


def _near(keys: Iterable[str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """The keys that are probably misspelled, each with the known one."""
    for key in keys:
        if len(key) <= _LONGEST_KEY:
            yield from ((key, near) for near in get_close_matches(key.lower(), sorted(known), 1, _LIKENESS))


def initialization_writes_to_base(config: Any) -> bool:
    """Whether PEFT's initialization rewrites base weights at injection (PiSSA, OLoRA, CorDA, LoftQ, …).

    OLoRA subtracts in place where the weight is float32 (peft/tuners/lora/layer.py, olora_init), which would reach the
    base through the shared storage. All named schemes that touch more than the adapter get a private scratch.
    """
    scheme = getattr(config, "init_lora_weights", None)
    return isinstance(scheme, str) and scheme.lower() not in ADAPTER_ONLY_SCHEMES


def starts_at_no_delta(config: Any) -> bool:
    """Whether training begins at the base, so that a layer without gradients changes nothing.

    If PEFT has a key for it, True means so; only LoRA also has names. Without such a key, LN tuning begins as a copy of
    the base's norms. Other methods are assumed to begin elsewhere.
    """
    is_copy = config.peft_type == peft.PeftType.LN_TUNING
    is_at_zero = is_copy or any(getattr(config, key, None) is True for key in STARTS)
    return is_at_zero or str(getattr(config, "init_lora_weights", None)).lower() in NO_DELTA_SCHEMES


def initialization_reads_base(config: Any) -> bool:
    """Whether PEFT may read a weight of the base as it makes a layer: for LoRA only if some settings ask for it."""
    return not _starts_by_itself(config) or config.use_dora


def can_start_blank(config: Any) -> bool:
    """Whether a load that overwrites the adapter's initial values leaves nothing of PEFT's initialization."""
    return _starts_by_itself(config) and not config.target_parameters


def _starts_by_itself(config: Any) -> bool:
    scheme = str(getattr(config, "init_lora_weights", None)).lower()
    is_plain = config.peft_type == peft.PeftType.LORA and scheme in UNREADING_SCHEMES
    return is_plain and not getattr(config, "kasa_config", None)
