"""Checks that adapter, base and expectations belong together.

In: names, shapes, and expectations. Out: findings. Plain Python: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from merge_gate.judging import key_hints
from merge_gate.judging.checks.check import ERROR, FOLLOWS, NOTE, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.judging.checks.phrases import are, tensors
from merge_gate.names.hub_names import could_be_hub_id
from merge_gate.records.config import A_FILE, ALL_WEIGHTS, BaseSpec, Expect
from merge_gate.records.measured import Evidence, UnreadLayer
from merge_gate.records.terms import FailureKind, Finding, Origin
from merge_gate.tensor_names import module_of
from merge_gate.text import listing, quoted

_NAMES = 3
"""Names of an adapter's tensors are long, and the first ones say what kind it is."""


@Check(
    id="keys-missing",
    severity=ERROR,
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
            Origin.ADAPTER,
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
            Origin.ADAPTER,
            severity=WARNING,
            module=module_of(names[0]),
            tensor=names[0],
            measured=(("complex", float(len(names))),),
        )


@Check(
    id="keys-unexpected",
    severity=ERROR,
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
            Origin.ADAPTER,
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
            Origin.ADAPTER,
            severity=WARNING,
            module=unnamed[0].rpartition(".")[0],
            tensor=unnamed[0],
            measured=(("unnamed", float(len(unnamed))),),
        )
    yield from _complex_tensors(case, stray)


SHAPE_MISMATCH = Check(
    id="shape-mismatch",
    severity=ERROR,
    summary="A tensor does not fit the base.",
    symptom=Symptom.WRONG_PAIR,
    allows_loading=True,  # the load compares shapes again, before it writes anything
)
TARGETS_NOT_FOUND = Check(
    id="targets-not-found",
    severity=ERROR,
    summary="The adapter targets modules that the base does not have.",
    symptom=Symptom.WRONG_PAIR,
)


UNREAD_SHARE = 2.0**-8
"""A delta of this share of a weight is more than bfloat16 rounds away."""

EXTRACTED = frozenset({"LORA", "ADALORA", "LOHA", "LOKR"})
"""Methods whose factors may be taken from a model that was trained whole: what is meant is then the merged one."""


WITHOUT_WEIGHTS = frozenset((
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING",
))  # fmt: skip
"""PEFT's methods that cannot be merged whatever the base is."""

NO_WEIGHTS = (
    "{method} adds inputs or layers to the model at run time and has no weights to merge",
    "serve the adapter unmerged, and leave it out of this gate",
)
"""Message and hint for them."""


def _has_no_weights(case: FileCase) -> Iterator[Finding]:
    method = case.files.config.peft_type
    if method in WITHOUT_WEIGHTS:
        message, hint = NO_WEIGHTS
        yield not_mergeable.finding(message.format(method=method), hint, Origin.CONFIG)


@Check(
    id="not-mergeable",
    severity=ERROR,
    summary="The method cannot be merged into weights, or its merge is known to be wrong.",
    symptom=Symptom.UNTRAINED_MERGE,
    failure=FailureKind.NOT_MERGEABLE,
    of_files=_has_no_weights,
).on_merge
def not_mergeable(case: MergeCase) -> Iterator[Finding]:
    """Besides, the engine's refusals are findings of it."""
    unread = case.evidence.unread
    if not unread:
        return
    is_single = len(unread) == 1
    worst = max(unread, key=lambda layer: layer.share)
    share = f"{worst.share:.2g}"
    layers, them, those = (
        ("a layer", "it", "that layer") if is_single else (f"{len(unread):,} layers", "them", "those layers")
    )
    yield not_mergeable.finding(
        f"the model reads the weight of {layers} without calling {them}: "
        f"{listing(tuple(layer.module for layer in unread))}; the adapter has no effect there until it is merged, "
        f"not even in training, and the merge changes {'that weight by' if is_single else 'those weights by up to'} "
        f"{share} times its norm",
        f"serve the adapter unmerged, as it was trained; or exclude {those} (exclude_modules) and train again",
        Origin.CONFIG,
        severity=None if any(_is_proved(case, layer) for layer in unread) else WARNING,
        module=worst.module,
        measured=(("layers", float(len(unread))), ("share", float(share))),  # rounded, so that all dtypes have the same
    )


def _is_proved(case: FileCase, layer: UnreadLayer) -> bool:
    """Whether no release has called the layer, what the model is for depends on it, and no training made its delta."""
    config = case.files.config
    made_elsewhere = config.peft_type in EXTRACTED and config.init_lora_weights is None  # init_lora_weights: false
    return layer.never_called and layer.in_logits and layer.share > UNREAD_SHARE and not made_elsewhere


@Check(
    id="base-mismatch",
    severity=WARNING,
    summary="adapter_config.json names another base or revision than the one used.",
    symptom=Symptom.WRONG_PAIR,
    failure=FailureKind.UNEXPECTED,
    of_files=lambda case: _names_another_base(case, case.spec.base.revision),
).on_merge
def base_mismatch(case: MergeCase) -> Iterator[Finding]:
    yield from _class_mismatch(case)
    yield from _names_another_base(case, case.evidence.base.revision)


def _names_another_base(case: FileCase, got: str | None) -> Iterator[Finding]:
    """`got` is the revision of the base, as far as it is known."""
    named, used = case.files.config.base_name, case.spec.base.model
    if not named or used is None:
        return
    yield from _other_name(case, named, case.spec.base.label or used)
    revision = case.files.config.base_revision
    if revision and got and revision not in {got, case.spec.base.revision}:
        yield base_mismatch.finding(
            f"adapter_config.json names revision {revision!r} of the base, but the base of this run is at {got!r}",
            f"set base.revision to {revision!r}, or release with the revision that the gate used",
            Origin.CONFIG,
        )


def _other_name(case: FileCase, named: str, label: str) -> Iterator[Finding]:
    """Names are compared by their last parts. A met `expect.base` settles the question."""
    base, expect = case.spec.base, case.spec.expect
    known = {_last(name) for name in (label, base.model or label, *base.names)}
    if _last(named) in known or (expect is not None and expect.base == named):
        return
    names = f"adapter_config.json names base {named!r}"
    if not could_be_hub_id(named, is_base=True):
        yield base_mismatch.finding(
            f"{names}, a path on the machine that trained the adapter; the base of this run is {label!r}",
            "a path does not say which weights it held: make sure that these are the same",
            Origin.CONFIG,
            severity=NOTE,
        )
    elif any(_last(named) == f"{name}{suffix}" for name in known for suffix in _QUANTIZED_COPIES):
        yield base_mismatch.finding(
            f"{names}, a copy in 4 bits of {label!r}, the base of this run",
            "the adapter was trained on the 4-bit copy: to gate that merge as well, set quantization: bnb-4bit "
            "(--quantization bnb-4bit)",
            Origin.CONFIG,
            severity=NOTE,
        )
    else:
        yield base_mismatch.finding(
            f"{names}, but the base of this run is {label!r}",
            f"if both are the same weights, list {named!r} under `base.names` in {A_FILE}; else name the right base",
            Origin.CONFIG,
        )


def _class_mismatch(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.instead_of is not None:
        yield base_mismatch.finding(
            f"task_type {case.files.config.task_type} in adapter_config.json stands for {evidence.instead_of}, but the "
            f"adapter's tensors have the names of {evidence.base.loaded_as}: the gate merged it into that class",
            f"load the base as {evidence.base.loaded_as} to serve it: {evidence.instead_of} would load none of its "
            "tensors; save it with the task_type of the model that it was trained on",
            Origin.CONFIG,
        )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


_QUANTIZED_COPIES = ("-bnb-4bit", "-unsloth-bnb-4bit")
"""The ends of the names that unsloth gives to its copies of a base."""

_IN_CONFIG = {"base": "base_name"}
"""What is expected under another name than its field of `AdapterConfig`."""


@Check(
    id="expectation-failed",
    severity=ERROR,
    summary="A fact stated under expect does not match the adapter, or base.sha256 does not match the base.",
    symptom=Symptom.WRONG_PAIR,
    failure=FailureKind.UNEXPECTED,
    allows_merging=True,  # whether the wrong adapter is broken as well is worth knowing
    allows_loading=True,  # it is about the base's bytes, or about facts that PEFT reads safely
).on_files
def expectation_failed(case: FileCase) -> Iterator[Finding]:
    expect = case.spec.expect
    if expect is None:
        return
    for key in (field.name for field in fields(Expect) if field.name != "sha256"):
        wanted, got = getattr(expect, key), getattr(case.files.config, _IN_CONFIG.get(key, key))
        if wanted is not None and wanted != got:
            stated = "has no value" if got is None else f"has {_plain(got)}"
            yield _not_so(f"expect.{key} is {_plain(wanted)}, but adapter_config.json {stated}")
    digests = {file.path: file.sha256 for file in case.files.files}
    for path, wanted in expect.sha256:
        got = digests.get(path)
        if got is None:
            yield _not_so(f"expect.sha256 names {path}, but the adapter has no such file")
        elif got != wanted.lower():
            yield _not_so(f"expect.sha256 of {path} is {wanted}, but the file's is {got}")


def other_base(spec: BaseSpec, got: Mapping[str, str]) -> Iterator[Finding]:
    """The findings of a base that is not the pinned one. `got` has the digests of its files, and of all its weights."""
    name = quoted(spec.label or spec.model or "", 200)
    for path, wanted in spec.sha256:
        what = "its weights" if path == ALL_WEIGHTS else quoted(path, 200)
        stated = f"has the digest {got[path]}" if path in got else "is no file of it"
        if got.get(path) != wanted:
            yield expectation_failed.finding(
                f"the base {name} is not the pinned one: base.sha256 of {what} is {wanted}, but {what} {stated}",
                "restore the base that was reviewed, or review this one and pin its digest",
                Origin.BASE,
            )


def _plain(value: str | float) -> str:
    short = f"{value:g}" if isinstance(value, int | float) else ""
    return short if short and float(short) == value else repr(value)


def _not_so(message: str) -> Finding:
    return expectation_failed.finding(
        message,
        "this may be the wrong adapter, or an edited one: find out which before you change the expectation",
        Origin.CONFIG,
    )
