"""Checks that the names and shapes of the adapter's tensors and targets fit the base.

In: names and shapes, or the facts of a refusal. Out: findings. Plain Python: no torch, no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from merge_gate.judging import key_hints
from merge_gate.judging.checks.check import ERROR, FOLLOWS, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.judging.checks.phrases import RESTORE_CONFIG, are, tensors
from merge_gate.records.measured import Evidence
from merge_gate.records.terms import Finding, Origin
from merge_gate.tensor_names import module_of
from merge_gate.text import counted, listing, quoted

_NAMES = 3
"""Names of an adapter's tensors are long, and the first ones say what kind it is."""


@Check(
    id="keys-missing",
    severity=ERROR,
    origin=Origin.ADAPTER,
    summary="Tensors that the adapter's configuration promises are not in its file.",
    symptom=Symptom.TENSORS_LOST,
    allows_loading=True,  # what is not in the file can do nothing; the load compares names again
).on_merge
def keys_missing(case: MergeCase) -> Iterator[Finding]:
    evidence, missing = case.evidence, case.evidence.missing
    words = _lost_on_loading(evidence) if evidence.dropped else _not_in_the_file(case, missing)
    if missing and words is not None:
        yield keys_missing.finding(
            *words,
            module=module_of(missing[0]),
            tensor=missing[0],
            measured=(("missing", float(len(missing))),),
        )


def _not_in_the_file(case: MergeCase, missing: tuple[str, ...]) -> tuple[str, str] | None:
    """None if nothing was lost."""
    follows, hint = key_hints.missing_words(case.files.config, missing)
    if not follows:
        return None
    what = f"{tensors(missing)} that adapter_config.json promises {are(missing)} not in the file"
    return (
        f"{what}, so {follows}: {listing(missing, _NAMES)}"
        if follows == key_hints.FRESH
        else f"{what}: {listing(missing, _NAMES)}; {follows}",
        key_hints.names_of_another_kind(case.files.tensors)
        or key_hints.of_another_model(missing, case.evidence.unexpected)
        or hint,
    )


def _lost_on_loading(evidence: Evidence) -> tuple[str, str]:
    missing, dropped = evidence.missing, evidence.dropped
    which_are = "it is" if len(missing) == 1 else f"{len(dropped):,} of them {are(dropped)}"
    return (
        (
            f"{tensors(missing)} that adapter_config.json promises did not arrive in the model: "
            f"{listing(missing, _NAMES)}; {which_are} in the file, and PEFT loses "
            f"{'it' if len(missing) == 1 else 'them'} on loading"
        ),
        (
            "this release of PEFT renames the tensors of this architecture so that they match nothing: gate and serve "
            "the adapter with releases of PEFT and transformers that load it"
        ),
    )


def _complex_tensors(case: FileCase, stray: tuple[str, ...]) -> Iterator[Finding]:
    names = tuple(header.name for header in case.files.tensors if header.dtype == "C64" and header.name not in stray)
    if names:
        yield keys_unexpected.finding(
            f"{tensors(names)} in the file {are(names)} complex: {listing(names)}; PEFT loads the real part and "
            "drops the imaginary one",
            "find the program that wrote complex numbers: no method of PEFT trains them",
            severity=WARNING,
            module=module_of(names[0]),
            tensor=names[0],
            measured=(("complex", float(len(names))),),
        )


@Check(
    id="keys-unexpected",
    severity=ERROR,
    origin=Origin.ADAPTER,
    summary="The adapter's file holds tensors that nothing in the merge uses.",
    symptom=Symptom.TENSORS_LOST,
    of_files=lambda case: _complex_tensors(case, stray=()),
).on_merge
def keys_unexpected(case: MergeCase) -> Iterator[Finding]:
    stray, missing, unnamed = case.evidence.unexpected, case.evidence.missing, case.evidence.unnamed
    named = key_hints.names_of_another_kind(case.files.tensors) or key_hints.of_another_model(missing, stray)
    if named and missing and not case.evidence.dropped:
        named = f"{FOLLOWS} the same names: see keys-missing"
    if stray:
        yield keys_unexpected.finding(
            f"{tensors(stray)} in the file {'matches' if len(stray) == 1 else 'match'} nothing in the base, so PEFT "
            f"would drop {'it' if len(stray) == 1 else 'them'}: {listing(stray, _NAMES)}",
            named
            or key_hints.saved_twice(stray)
            or "check that adapter_config.json belongs to this file (target_modules, use_dora, modules_to_save), that "
            "this is the adapter's base, and that the model was unwrapped before saving",
            module=module_of(stray[0]),
            tensor=stray[0],
            measured=(("unexpected", float(len(stray))),),
        )
    if unnamed:
        yield keys_unexpected.finding(
            f"{tensors(unnamed)} of the base {are(unnamed)} in the file, although adapter_config.json does not name "
            f"{'it' if len(unnamed) == 1 else 'them'}: {listing(unnamed)}; the merged model has the file's values",
            "if they were trained, name their modules in modules_to_save (or set bias) and save the adapter again; if "
            "not, remove them from the file: PEFT replaces the base's tensors without a warning, other programs drop "
            "them",
            severity=WARNING,
            module=unnamed[0].rpartition(".")[0],
            tensor=unnamed[0],
            measured=(("unnamed", float(len(unnamed))),),
        )
    yield from _complex_tensors(case, stray)


SHAPE_MISMATCH = Check(
    id="shape-mismatch",
    severity=ERROR,
    origin=Origin.ADAPTER,
    summary="A tensor does not fit the base.",
    symptom=Symptom.WRONG_PAIR,
    allows_loading=True,  # the load compares shapes again, before it writes anything
)
TARGETS_NOT_FOUND = Check(
    id="targets-not-found",
    severity=ERROR,
    origin=Origin.CONFIG,
    summary="The adapter targets modules that the base does not have.",
    symptom=Symptom.WRONG_PAIR,
)


# --- what the adapter targets ----------------------------------------------------------------------------------------

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


# --- its tensors -----------------------------------------------------------------------------------------------------


def tensors_missing(names: tuple[str, ...], trained_whole: str | None = None) -> Finding:
    """The file lacks tensors that PEFT loads; `trained_whole` is modules_to_save, if these tensors are its modules."""
    return keys_missing.finding(
        f"adapter_config.json promises fully trained modules (modules_to_save {trained_whole} or trainable tokens), "
        f"but the file lacks {listing(names, 6)}"
        if trained_whole
        else f"the file lacks {listing(names, 6)}, which adapter_config.json promises",
        "save the adapter again with save_pretrained, and check that the upload was complete",
        tensor=names[0],
    )


def shape_clash(
    *,
    name: str,
    got: tuple[int, ...],
    expected: tuple[int, ...],
    others: int = 0,
    trained_whole: bool = False,
    of_tokens: bool = False,
) -> Finding:
    """A tensor has another shape than config and base need; `others` more tensors do not fit either.

    `trained_whole`: it replaces a tensor of the base. `of_tokens`: it has a row for each trained token.
    """
    if of_tokens:
        hint = (
            "one row for each token: trainable_token_indices in adapter_config.json is not that of the training, or "
            "this is not the adapter's base"
        )
    elif 0 in got or len(got) < len(expected):
        hint = "the tensor was saved unsharded-empty by ZeRO-3 or FSDP: gather the parameters before save_pretrained"
    elif trained_whole:
        hint = "this is not the adapter's base, or one with another vocabulary or number of labels than in training"
    elif len(got) == len(expected) == 2 and (got[0] != expected[0]) != (got[1] != expected[1]):  # noqa: PLR2004 - factors
        hint = (
            "either r or rank_pattern in adapter_config.json is not the rank it was trained with, or this is not the "
            "adapter's base"
        )
    else:
        hint = "this is not the base that the adapter was trained on"
    does = "does" if others == 1 else "do"
    more = f"; {counted(others, 'more tensor')} {does} not fit either" if others else ""
    return SHAPE_MISMATCH.finding(
        f"{name} has shape {list(got)}, but config and base need {list(expected)}{more}",
        hint,
        module=module_of(name),
        tensor=name,
    )


REFUSALS: tuple[Callable[..., Finding], ...] = (targets_not_found, parameters_not_found, tensors_missing, shape_clash)
