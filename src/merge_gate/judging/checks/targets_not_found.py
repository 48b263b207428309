"""The adapter targets modules that the base does not have.

**Fires when** the base has none of the modules that the config targets.

```text
target_modules 'query_key_value' match no module of the base; the base's layers are down_proj, embed_tokens,
gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj
```

**Why it matters.** The adapter belongs to another base, or the installed transformers gives the base's layers other
names.

**What to do.** Check the base. transformers 5 renamed the layers of some architectures. Check and serve such an adapter
with the version that it was trained with, or convert it.

**It happened.**

- [peft#758](https://github.com/huggingface/peft/issues/758): the config of an adapter for BioGPT targeted `c_attn`, a
  layer that only GPT-2 has.
- [peft#2957](https://github.com/huggingface/peft/issues/2957): a compiled base has other names for all of its layers.
"""

from __future__ import annotations

import re

from merge_gate._internal.text import listing, quoted
from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.judging.checks.phrases import RESTORE_CONFIG
from merge_gate.records.terms import Finding, Origin

TARGETS_NOT_FOUND = Check("targets-not-found", ERROR, Origin.CONFIG, Symptom.WRONG_PAIR, blame=130, page=__doc__)


# Heads that PEFT's classes for these tasks put into modules_to_save (peft/peft_model.py).
_SAVED_BY_TASK = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

_HEADS = ("classifier", "score", "qa_outputs")


def targets_not_found(
    targets: str | tuple[str, ...],
    of_base: tuple[str, ...],
    task_type: str | None = None,
    excluded: str = "",
    layers: str | None = None,
) -> Finding:
    """PEFT found nothing to adapt.

    Args:
        targets: target_modules of adapter_config.json, as a text or as names.
        of_base: the names of the base's layers.
        task_type: of adapter_config.json.
        excluded: exclude_modules, "" if there are none.
        layers: layers_to_transform, None if it is not set.
    """
    names = () if isinstance(targets, str) else targets
    shown = _quoted((targets,) if isinstance(targets, str) else names)
    heads = sorted(name for name in names if name.rpartition(".")[2] in _HEADS)
    if heads and task_type in _SAVED_BY_TASK:
        return TARGETS_NOT_FOUND.finding(
            f"target_modules {shown} leaves nothing to adapt: for task_type {task_type} PEFT trains "
            f"{listing(heads)} whole (modules_to_save) instead of adapting it",
            "name other layers in target_modules, or save the adapter without a task_type",
        )
    if not targets:
        return TARGETS_NOT_FOUND.finding(
            "target_modules in adapter_config.json is empty, and no target_parameters are named", RESTORE_CONFIG
        )
    but = f" that exclude_modules ({excluded[:100]}) leaves" if excluded else ""
    but += f" in the layers of layers_to_transform ({layers[:100]})" if layers is not None else ""
    by = ["exclude_modules"] * bool(excluded) + ["layers_to_transform"] * (layers is not None)
    return TARGETS_NOT_FOUND.finding(
        f"target_modules {shown} match no module of the base{but}; the base's layers are {listing(of_base, 12)}",
        _misread(targets, of_base)
        or _narrowed(names, of_base, by)
        or f"check that this is the adapter's base; {_renamed('the layers')}",
    )


def _misread(targets: str | tuple[str, ...], of_base: tuple[str, ...]) -> str:
    """The hint if PEFT reads target_modules differently than its author meant; else empty."""
    if isinstance(targets, str):
        parts = re.split(r"[\s,|]+", targets)
        return (
            "a text in target_modules is one regular expression, which has to match a layer's whole name: write a list "
            "of names"
            if any(name in parts for name in of_base)
            else ""
        )
    if any(set("*\\()[]|^$") & set(name) for name in targets):
        return "in a list, target_modules are plain names, no regular expressions: write the expression as a text"
    return ""


def _narrowed(names: tuple[str, ...], of_base: tuple[str, ...], by: list[str]) -> str:
    """The hint if the base has these names and the settings `by` exclude them; else empty."""
    are_there = bool(names) and all(name.rpartition(".")[2] in of_base for name in names)
    return (
        f"look at {' and '.join(by)} in adapter_config.json: the base has layers of these names"
        if by and are_there
        else ""
    )


def parameters_not_found(targets: tuple[str, ...], of_base: tuple[str, ...]) -> Finding:
    """target_parameters match no parameter of the base; `of_base` are the ends of the names that it has."""
    return TARGETS_NOT_FOUND.finding(
        f"target_parameters {_quoted(targets)} match no parameter of the base, and no target_modules are named; the "
        f"base's parameters are {listing(of_base, 12)}",
        "check that this is the adapter's base; target_parameters are the ends of names of parameters, such as "
        f"mlp.experts.gate_up_proj; {_renamed('those')}",
    )


def _renamed(what: str) -> str:
    return (
        f"transformers 5 renamed {what} of some architectures: then gate the adapter with the version that it was "
        "trained with"
    )


def _quoted(names: tuple[str, ...]) -> str:
    return listing((quoted(name, 300, "'") for name in names), 12)


REFUSALS = (targets_not_found, parameters_not_found)
