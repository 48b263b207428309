"""Whether every stored tensor of a base, and every parameter of its class, is accounted for.

In: a base's directory and a `ModelClass`. Out: an `Account`, or an error with the check of bases that it is. Runs on
headers alone, before a weight is read. Knows no PEFT.

1. A stored tensor that belongs to a loaded weight is loaded with it: a scale, packed codes, a wrapped layer.
2. All tensors that a quantizer takes together are there, if they are there for other layers.
3. Numbers are stored for a parameter of numbers, not codes.
4. Each parameter of the base's own class has a source. A head of another task need not have one.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.base.loaded_base import (
    Base,
    ModelClass,
    head_options,
    loads_as_usual,
    refuse_foreign_weights,
)
from merge_gate.engine.base.tensor_map import DTYPES, RENAMED, NoMapError, TensorMap, tensor_map
from merge_gate.records.files import AdapterFiles, StoredTensor
from merge_gate.records.refusals import CannotJudge, Refusal

_PART = re.compile(
    r"(?P<stem>.+?)(?:\.weight)?[._](?P<part>"
    r"weight_scale(?:_inv|_2)?|scale_inv|qscale_weight|weight_packed|weight_shape|weight_zero_point|zero_point|scales?"
    r"|qweight|qzeros|g_idx|q_weight|q_scale|q_scale_max|q_groups|q_group_map|q_perm|q_invperm"
    r"|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.\w+|SCB|weight_format|weight_qdata|blocks|W_q"
    r"|_data|_scale|_shift|base_layer\.weight|original_module\.weight)"
)
"""Suffixes of tensors that belong to a module's weight: scales and codes of quantizers, PEFT's wrapped layers."""

_WRAPPED = ("base_layer.weight", "original_module.weight")

_STALE = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked|attn\.bias|attention\.bias)$")
"""Buffers that earlier releases stored and that the model computes: transformers expects to find them."""

_MASKS = ("attn.bias", "attention.bias")
"""The causal masks among these buffers. They have at least two dimensions, and a bias has one."""

NEED_NOT_BE_STORED = frozenset({"pooler", "masked_spec_embed", "mask_token"})
"""Parts of names of weights that may be missing: an untrained pooler, and mask embeddings of training."""

_CODES = ("F8", "I", "U", "BOOL")
"""Prefixes of safetensors' dtypes in which codes are stored."""

MOST_FILES = 200
"""No more files than this are searched for tensors that a base lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What the headers show about a base before it is loaded.

    Attributes:
        incomplete: parameters of the base's own class that its files lack.
        unloaded: stored tensors that are not part of the model and not of a loaded weight.
        map: None if the headers allow none: then the load itself says what its files lack.
    """

    incomplete: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    map: TensorMap | None = None


def account_for(directory: str, model_class: ModelClass, label: str, stored: Sequence[StoredTensor]) -> Account:
    """Account for a base on the headers of its weight files.

    Raises:
        CannotJudge: its files contradict each other or config.json.
    """
    transformers_class = getattr(transformers, model_class.class_name, None)
    if transformers_class is None or not loads_as_usual(transformers_class):
        return Account()
    try:
        mapping = tensor_map(transformers_class, directory, stored, **head_options(model_class))
    except NoMapError:
        return Account()
    refuse_left_out(label, mapping.model, mapping.unloaded, mapping.stored)
    refuse_torn_groups(mapping, label)
    refuse_codes(mapping, label)
    if type(mapping.model).__name__ not in _architectures(mapping.model):
        refuse_foreign_weights(mapping.model, mapping.missing, label)
    return Account(
        incomplete=own_missing(mapping.missing | _partly_stacked(mapping), mapping.model, directory),
        unloaded=tuple(
            name for name in sorted(mapping.unloaded) if name in mapping.unexpected or not _STALE.search(name)
        ),
        map=mapping,
    )


def add_file_facts(base: Base, account: Account, directory: str) -> None:
    """Add what is known of a base's files to the loaded base.

    Raises:
        CannotJudge: the load has shown what the headers could not: its files contradict each other.
    """
    incomplete, unloaded = account.incomplete, account.unloaded
    if account.map is None:
        refuse_left_out(base.source.label, base.model, {name: name for name in base.unexpected}, {})
        unloaded = tuple(name for name in sorted(base.unexpected) if not _STALE.search(name))
    missing = base.newly_initialized - set(base.facts.replaced)
    incomplete = tuple(sorted({*incomplete, *own_missing(missing, base.model, directory)}))
    base.map, base.facts = account.map, replace(base.facts, incomplete=incomplete, unloaded=unloaded)


def _partly_stacked(mapping: TensorMap) -> frozenset[str]:
    """Tensors that lack some of the stored tensors that they are stacked from, for example one expert's weights."""
    stacked = {target for group in mapping.groups if "MergeModulelist" in group.conversion for target in group.targets}
    failed = {target for group in mapping.groups if group.failed for target in group.targets}
    mismatched = {name for name, *_ in mapping.mismatched}
    return frozenset((failed | mismatched) & stacked)


def stale_buffers(mapping: TensorMap) -> tuple[str, ...]:
    """Stored tensors that are buffers of the model's own modules, and that transformers computes instead of loading.

    Buffers of parts that transformers never loads, such as an MTP head, do not count.
    """
    modules = {name for name, _ in mapping.model.named_modules()}
    prefix = getattr(mapping.model, "base_model_prefix", "")
    return tuple(
        name
        for name, renamed in mapping.unloaded.items()
        if name not in mapping.unexpected
        and (match := _STALE.search(renamed))
        and _is_owned(renamed, modules, f"{prefix}." if prefix else "")
        and (match[2] not in _MASKS or len(mapping.stored[name].shape) > 1)
    )


def _is_owned(name: str, modules: Collection[str], prefix: str) -> bool:
    """Whether the model has the module of a buffer. Rotary embeddings have moved out of the layers that had them."""
    owner, _, last = name.rpartition(".")
    if last == "inv_freq" and owner not in modules:
        owner = owner.rpartition(".")[0] or owner
    others = (f"{prefix}{owner}.", f"{owner}.".removeprefix(prefix))
    return owner in modules or any(other.strip(".") in modules for other in others)


# --- 1. ------------------------------------------------------------------------------------------------------------


def refuse_left_out(label: str, model: Any, unloaded: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> None:
    """Raise `CannotJudge` if a stored tensor is not loaded although it belongs to a weight of the model."""
    names = set(model.state_dict())
    left = tuple(name for name, renamed in sorted(unloaded.items()) if belongs_to(renamed, names))
    if left:
        raise CannotJudge(
            "stored_tensors_left_out",
            base=label,
            file=stored[left[0]].file if stored else None,
            names=left,
            wrapped=tuple(name for name in left if name.endswith(_WRAPPED)),
            class_name=type(model).__name__,
        )


def belongs_to(name: str, names: Collection[str]) -> bool:
    """Whether a stored tensor is a part of a weight that the model has; `names` are those of its tensors."""
    match = _PART.fullmatch(name)
    return match is not None and (match["stem"] in names or f"{match['stem']}.weight" in names)


# --- 2. ------------------------------------------------------------------------------------------------------------


def refuse_torn_groups(mapping: TensorMap, label: str) -> None:
    """Raise `CannotJudge` if a weight lacks a tensor that all other weights of its dtype have for the quantizer."""
    kinds: dict[tuple[str, str], list[tuple[str, str, frozenset[str]]]] = defaultdict(list)
    for group in mapping.groups:
        if _is_quantizer(group.conversion):
            sources = {_part(source, group.targets[0]): source for source in group.sources}
            first = sources[min(sources)]
            kinds[group.conversion, mapping.stored[first].dtype].append((first, group.targets[0], frozenset(sources)))
    for (_, dtype), groups in kinds.items():
        whole: frozenset[str] = frozenset().union(*(parts for *_, parts in groups))
        for first, target, parts in groups:
            if parts < whole and dtype.startswith(_CODES):
                _refuse_torn(mapping, first, [_named_part(target, part) for part in sorted(whole - parts)], label)
        if dtype.startswith("F8") and whole == {""}:
            first, target, _ = groups[0]
            _refuse_torn(mapping, first, [_named_part(target, "_scale_inv")], label)


def _refuse_torn(mapping: TensorMap, first: str, lacking: list[str], label: str) -> None:
    tensor = mapping.stored[first]
    dtype = DTYPES[tensor.dtype]
    raise CannotJudge(
        "quantized_weight_torn", base=label, file=tensor.file, tensor=first, dtype=dtype, missing=tuple(lacking)
    )


def _part(source: str, target: str) -> str:
    """The suffix of a stored name after its parameter's: `.absmax`, `_scale_inv`, `_blocks`; `/SCB` for a sibling."""
    last = target.rpartition(".")[2]
    at = source.rfind(last)
    return source[at + len(last) :] if at >= 0 else f"/{source.rpartition('.')[2]}"


def _named_part(target: str, part: str) -> str:
    return f"{target.rpartition('.')[0]}.{part[1:]}" if part.startswith("/") else f"{target}{part}"


# --- 3. ------------------------------------------------------------------------------------------------------------


def refuse_codes(mapping: TensorMap, label: str) -> None:
    """Raise `CannotJudge` if integers are stored for a parameter of floating point that no quantizer makes."""
    model = mapping.model
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for group in mapping.groups:
        expected = tensors.get(group.targets[0])
        if group.failed or expected is None or not expected.is_floating_point() or _is_quantizer(group.conversion):
            continue
        for source in group.sources:
            tensor = mapping.stored[source]
            dtype: torch.dtype = getattr(torch, DTYPES[tensor.dtype])
            if not dtype.is_floating_point and not dtype.is_complex:
                raise CannotJudge(
                    "codes_for_numbers",
                    base=label,
                    file=tensor.file,
                    tensor=source,
                    dtype=DTYPES[tensor.dtype],
                    class_name=type(model).__name__,
                )


def _is_quantizer(conversion: str) -> bool:
    return conversion != RENAMED and ("equantize" in conversion or "eserialize" in conversion)


# --- 4. ------------------------------------------------------------------------------------------------------------


def own_missing(missing: Iterable[str], model: Any, directory: str) -> tuple[str, ...]:
    """The missing parameters that belong to the class that config.json names, sorted.

    For a base without a named class, only the body counts: other parameters may be the head of another task.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lacking = [name for name in sorted(set(missing) & parameters) if NEED_NOT_BE_STORED.isdisjoint(name.split("."))]
    if not lacking:
        return ()
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    own = _own_names(model, directory)
    if own is None:
        is_body = not prefix or not hasattr(model, model.base_model_prefix)
        return tuple(name for name in lacking if is_body or name.startswith(prefix))
    return tuple(name for name in lacking if not own.isdisjoint((name, f"{prefix}{name}", name.removeprefix(prefix))))


def _own_names(model: Any, directory: str) -> set[str] | None:
    """Names of the parameters of the class that config.json names; None if it names none that transformers has."""
    named = next((name for name in _architectures(model) if hasattr(transformers, name)), None)
    if named is None:
        return None
    if named == type(model).__name__:
        return {name for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        own_class = getattr(transformers, named)
        config = own_class.config_class.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            return {name for name, _ in own_class(config).named_parameters(remove_duplicate=False)}
    except Exception:  # a class that cannot be built here names nothing
        return None


def _architectures(model: Any) -> tuple[str, ...]:
    """The classes that config.json names."""
    return tuple(name for name in model.config.architectures or () if isinstance(name, str))


def brings_all(files: Iterable[AdapterFiles], names: Iterable[str]) -> bool:
    """Whether adapters' files have a tensor of each of these names, which then replaces the base's."""
    held = {tensor.name.removeprefix(ADAPTER_PREFIX) for each in files for tensor in each.tensors}
    return all(name in held or name.replace(".weight", ".modules_to_save.weight") in held for name in names)


def not_stored(label: str, names: tuple[str, ...], mapping: TensorMap, directory: str) -> Refusal:
    """The fact that a base's files lack parameters of its own class, with other files that hold some of them."""
    read = tuple(sorted({tensor.file for tensor in mapping.stored.values()}))
    return CannotJudge(
        "parameters_not_stored",
        base=label,
        class_name=type(mapping.model).__name__,
        names=names,
        read=read,
        elsewhere=tuple(sorted(_holders(directory, set(read), set(names)))),
    ).refusal


def _holders(directory: str, read: set[str], names: set[str]) -> Iterator[str]:
    """Other files of the base that hold one of these tensors."""
    for path in sorted(Path(directory).glob("*.safetensors"))[:MOST_FILES]:
        if path.name not in read:
            with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:
                if not names.isdisjoint(file.keys()):
                    yield path.name
