"""Explains names that keys-missing and keys-unexpected find, and says what to do.

In: names of tensors. Out: hints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.judging.foreign_formats import by_tensors
from merge_gate.records.files import StoredTensor


def names_of_another_kind(tensors: tuple[StoredTensor, ...]) -> str:
    """The hint for names of another format, of a wrapped model, or of a full model; empty for other names."""
    names = [tensor.name for tensor in tensors]
    return (
        by_tensors(names) or wrapped_twice(tensors) or _wrapped(names) or _unprefixed(names) or _of_a_full_model(names)
    )


_TOWER = re.compile(r"(?<![^.])(?:language_model|text_model|model)\.")
"""Parts of names that differ between a model for text and images and the text model inside it."""


def of_another_model(missing: Sequence[str], stray: Sequence[str]) -> str:
    """The hint for names that differ by `language_model.` only; empty for other names."""
    names = [name.removeprefix(ADAPTER_PREFIX) for name in stray]
    wanted = [name.removeprefix(ADAPTER_PREFIX) for name in missing]
    has_tower = any("language_model." in name for name in names)
    if has_tower == any("language_model." in name for name in wanted):
        return ""
    if {_TOWER.sub("", name) for name in names} != {_TOWER.sub("", name) for name in wanted}:
        return ""
    own, other = ("text and images", "text alone") if has_tower else ("text alone", "text and images")
    return (
        f"the names in the file differ from the base's by language_model. only. The adapter was trained on a model for "
        f"{own}, and this base is loaded as a model for {other}: name the base that the adapter was trained on"
    )


WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "module.": ("DataParallel, DDP or DeepSpeed", "model.module"),
    "_fsdp_wrapped_module.": ("FSDP", "accelerator.unwrap_model(model)"),
}
"""Prefixes that training adds to every name, with the wrapper that adds it and the expression for the inner model."""

_WRAPPED_LAYER = re.compile(r"\w\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Names of single layers that torch.compile, FSDP, or its activation checkpointing has wrapped."""


def _wrapped(names: Sequence[str]) -> str:
    """The hint for names with a wrapper's prefix, before or after PEFT's own prefix."""
    for prefix, (wrapper, inner) in WRAPPERS.items():
        if names and all(name.startswith(f"{prefix}{ADAPTER_PREFIX}") for name in names):
            return (
                f"every name in the file begins with {prefix}, which {wrapper} adds: save the inner model ({inner}) "
                "with save_pretrained, or remove that prefix from the names"
            )
        if names and all(name.startswith(f"{ADAPTER_PREFIX}{prefix}") for name in names):
            return (
                f"every name in the file has {prefix} after {ADAPTER_PREFIX}, so PEFT wrapped a model that {wrapper} "
                f"had wrapped. Wrap the inner model ({inner}) instead, or remove {prefix} from the names"
            )
    wrapped_layer = next(
        filter(None, (_WRAPPED_LAYER.search(name.removeprefix(ADAPTER_PREFIX)) for name in names)), None
    )
    if wrapped_layer is None:
        return ""
    return (
        f"names in the file contain {wrapped_layer[1]}, which torch.compile, FSDP, or activation checkpointing adds to "
        "single layers. Remove that part from the names, or save from the model without it"
    )


_FACTOR = re.compile(r"\.(lora|ia3|hada|lokr|oft|boft|vera|randlora|fourierft|hra|miss|road)_\w")


def _unprefixed(names: Sequence[str]) -> str:
    """The hint for PEFT's names without PEFT's own prefix."""
    if any(name.startswith(ADAPTER_PREFIX) for name in names) or not any(map(_FACTOR.search, names)):
        return ""
    return (
        f"every name in the file lacks {ADAPTER_PREFIX} at its start, which PEFT expects: put it in front of "
        "each name, or save the adapter with save_pretrained"
    )


_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|shared)\.weight$")


def _of_a_full_model(names: Sequence[str]) -> str:
    """The hint for a file with a base's embedding and without a name that PEFT writes."""
    if any(name.startswith(ADAPTER_PREFIX) for name in names) or not any(map(_EMBEDDING.search, names)):
        return ""
    return (
        "the file has the tensors of a full model, perhaps a merged one, and none of an adapter. Save the PEFT model "
        "with save_pretrained before the merge, and list that directory"
    )


def wrapped_twice(tensors: tuple[StoredTensor, ...]) -> str:
    """The hint for a model that PEFT wrapped more than once before it was saved; empty for other models."""
    deep = max((_count_prefixes(tensor.name) for tensor in tensors), default=0)
    if deep <= 1:
        return ""
    return (
        f"the names in the file begin with {ADAPTER_PREFIX} {deep} times: get_peft_model or from_pretrained wrapped a "
        "PEFT model. Wrap the plain model once, or, if only the prefix is wrong, rename the tensors"
    )


def _count_prefixes(name: str) -> int:
    count = 0
    while name.startswith(ADAPTER_PREFIX):
        name, count = name.removeprefix(ADAPTER_PREFIX), count + 1
    return count
