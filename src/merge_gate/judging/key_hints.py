"""What to say of tensors that the file lacks, or has too many: why that is, and what to do.

In: names, an adapter's config. Out: words. Knows neither findings nor settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_gate.judging.foreign_formats import by_tensors
from merge_gate.judging.peft_releases import written_by
from merge_gate.records.files import AdapterConfig, TensorHeader
from merge_gate.tensor_names import ADAPTER_PREFIX

_SAVE_ALL = "save the adapter again with save_pretrained and upload all of it"
FRESH = "PEFT would merge freshly initialised values instead"
_BASE_STAYS = "the base's biases would stay in their place"
_LAST_WITHOUT_BASE_LAYER, _FIRST_TRAINED, _FIRST_SAVED = 6, 10, 21
"""Releases of PEFT by their minor number: how they treat biases (docs/methods.md, "Old releases")."""


def missing_words(config: AdapterConfig, missing: Sequence[str]) -> tuple[str, str]:
    """What follows from it, and what to do; both empty where nothing was lost (biases that were never trained)."""
    if not all(name.endswith(".base_layer.bias") for name in missing):
        return FRESH, f"{_SAVE_ALL}; if names carry a foreign prefix (_orig_mod., module.), unwrap the model first"
    span = written_by(config)
    if span.newest <= _LAST_WITHOUT_BASE_LAYER:
        follows = f"{span} wrote these trained biases without base_layer in their names, which PEFT drops since 0.7"
        return follows, "rename them in the file: q_proj.bias becomes q_proj.base_layer.bias, and so on"
    if config.bias != "lora_only" or span.oldest >= _FIRST_SAVED:
        return _BASE_STAYS, _SAVE_ALL
    if span.newest < _FIRST_TRAINED:  # 0.7 to 0.9 never trained them
        return "", ""
    hint = (
        "saving again with that release loses them again: save with PEFT 0.21 or newer while the trained model is in "
        "memory, or train again with bias: none or all"
    )
    return f"{_BASE_STAYS}: PEFT 0.10 to 0.20 train them with bias='lora_only' and lose them on saving", hint


def names_of_another_kind(tensors: tuple[TensorHeader, ...]) -> str:
    """The hint for names that no PEFT model has: another format's, a wrapped or a merged model's; empty for others."""
    names = [tensor.name for tensor in tensors]
    return by_tensors(names) or wrapped_twice(tensors) or _wrapped(names) or _of_a_full_model(names)


_TOWER = re.compile(r"(?<![^.])(?:language_model|text_model|model)\.")
"""Parts of names that tell a model for text and images from the text model inside of it."""


def of_another_model(missing: Sequence[str], stray: Sequence[str]) -> str:
    """The hint for names that differ by `language_model.` only; empty for others."""
    names = [name.removeprefix(ADAPTER_PREFIX) for name in stray]
    wanted = [name.removeprefix(ADAPTER_PREFIX) for name in missing]
    has_tower = any("language_model." in name for name in names)
    if has_tower == any("language_model." in name for name in wanted):
        return ""
    if {_TOWER.sub("", name) for name in names} != {_TOWER.sub("", name) for name in wanted}:
        return ""
    own, other = ("text and images", "text alone") if has_tower else ("text alone", "text and images")
    return (
        f"names in the file differ from the base's by language_model. only: the adapter was trained on a model for "
        f"{own}, and this base is loaded as one for {other}: name the base that it was trained on"
    )


_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "module.": ("DataParallel, DDP or DeepSpeed", "model.module"),
    "_fsdp_wrapped_module.": ("FSDP", "accelerator.unwrap_model(model)"),
}
"""Prefixes that training puts before every name: who does, and what the model inside is called."""

_WRAPPED_LAYER = re.compile(r"\w\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Of layers that are wrapped one by one: by torch.compile, FSDP, or its activation checkpointing."""


def _wrapped(names: Sequence[str]) -> str:
    """The hint for names that begin as a wrapper's do, before or behind PEFT's own prefix."""
    for prefix, (wrapper, inner) in _WRAPPERS.items():
        if names and all(name.startswith(f"{prefix}{ADAPTER_PREFIX}") for name in names):
            return (
                f"every name in the file begins with {prefix}, which {wrapper} puts there: save the model inside "
                f"({inner}) with save_pretrained, or take that prefix off the names"
            )
        if names and all(name.startswith(f"{ADAPTER_PREFIX}{prefix}") for name in names):
            return (
                f"every name in the file has {prefix} behind {ADAPTER_PREFIX}, so PEFT was put on a model that "
                f"{wrapper} had wrapped: put it on the model inside ({inner}), or take {prefix} out of the names"
            )
    within = next(filter(None, (_WRAPPED_LAYER.search(name.removeprefix(ADAPTER_PREFIX)) for name in names)), None)
    if within is None:
        return ""
    return (
        f"names in the file hold {within[1]}, which training puts around single layers (torch.compile, FSDP, its "
        "activation checkpointing): take that part out of the names, or save from the model without it"
    )


_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|shared)\.weight$")


def _of_a_full_model(names: Sequence[str]) -> str:
    """The hint for a file with a base's embedding in it, and no name that PEFT writes."""
    if any(name.startswith(ADAPTER_PREFIX) for name in names) or not any(map(_EMBEDDING.search, names)):
        return ""
    return (
        "the file holds a full model's tensors (a merged one, perhaps), and none of an adapter: save the PEFT model "
        "with save_pretrained before it is merged, and list that directory"
    )


def wrapped_twice(tensors: tuple[TensorHeader, ...]) -> str:
    """The hint for a model that PEFT wrapped more than once before it was saved; empty for others."""
    deep = max((_count_prefixes(tensor.name) for tensor in tensors), default=0)
    if deep <= 1:
        return ""
    return (
        f"the names in the file begin with {ADAPTER_PREFIX} {deep} times: PEFT was put on PEFT's own model "
        "(get_peft_model or from_pretrained); wrap the plain model once; where only the prefix is wrong, rename the "
        "tensors"
    )


def _count_prefixes(name: str) -> int:
    count = 0
    while name.startswith(ADAPTER_PREFIX):
        name, count = name.removeprefix(ADAPTER_PREFIX), count + 1
    return count


def saved_twice(stray: Sequence[str]) -> str:
    """The hint for what PEFT loads under one name and the file holds under two, with other values; empty for others."""
    if not all(".modules_to_save." in name for name in stray):
        return ""
    return (
        "PEFT saves some fully trained modules twice, with and without modules_to_save in the name; these two differ, "
        "and it is open which was meant: save the adapter again, or take the wrong copy out of the file"
    )
