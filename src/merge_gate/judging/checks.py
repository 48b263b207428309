"""Evidence → findings: one small pure function per check, one table that lists them in the order of blame.

In: what was measured of an adapter, what its files say, and the settings of the checks. Out: `Finding`s. Plain Python
over numbers and names: no torch, no files.

The order of the table is the order of causes: what stands nearer to the root comes first, so that the first error in
it is the cause (a NaN of the base before one of the adapter before one that the merge made).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from merge_gate.judging.table import CHECK_DEFAULTS
from merge_gate.records import (
    AdapterFiles,
    AdapterSpec,
    CheckSetting,
    Evidence,
    FileTensor,
    Finding,
    Origin,
    Severity,
    TensorMerge,
    TensorStats,
    Thresholds,
    record,
)

NOT_JUDGED = "not-judged"
"""Id of the finding that says why an adapter has no verdict; not a check, so it has no setting."""

MEASURE_ABOVE = 0.5
"""Values that may be above this share of their dtype's largest are merged one by one, whatever `headroom` says."""

_ADAPTER_PREFIX = "base_model.model."


@record
class Case:
    """What a check looks at. `base_model` is the base as the config names it, None where the adapter named it."""

    spec: AdapterSpec
    files: AdapterFiles
    evidence: Evidence | None
    settings: Mapping[str, CheckSetting]

    @property
    def adapter_config(self) -> dict[str, Any]:
        loaded = json.loads(self.files.config_json or "{}")
        return loaded if isinstance(loaded, dict) else {}

    def limit(self, check: str) -> float:
        return _limit(self.settings, check)


def _limit(settings: Mapping[str, CheckSetting], check: str) -> float:
    setting = settings.get(check)
    default = CHECK_DEFAULTS[check].limit
    limit = setting.limit if setting is not None and setting.limit is not None else default
    return math.inf if limit is None else limit


def thresholds(spec: AdapterSpec) -> Thresholds:
    """How exactly the checks of this adapter have to know the figures that they compare with their limits."""
    settings = {setting.check: setting for setting in spec.checks}
    return Thresholds(
        headroom=min(_limit(settings, "headroom"), MEASURE_ABOVE),
        delta_norm=_limit(settings, "delta-norm"),
        rounding_loss=_limit(settings, "rounding-loss"),
    )


Check = Callable[[Case], Iterator[Finding]]


def judge(spec: AdapterSpec, files: AdapterFiles, evidence: Evidence | None) -> tuple[Finding, ...]:
    """All findings about one adapter on one base, causes first, with the severities that the config asks for.

    `evidence` is None where the files alone decided and nothing was merged.
    """
    case = Case(
        spec=spec,
        files=files,
        evidence=evidence,
        settings=MappingProxyType({setting.check: setting for setting in spec.checks}),
    )
    found = list(files.findings)
    for name, check in CHECKS.items():
        try:
            found.extend(check(case))
        except Exception as error:  # noqa: BLE001 - it costs this check's answer; the others stand
            found.append(accident(f"the check {name} failed", error))
    found.extend(_refusal(case))
    order = {name: position for position, name in enumerate((NOT_JUDGED, *CHECK_DEFAULTS))}
    settled = [one for one in (_settle(finding, case.settings) for finding in found) if one is not None]
    return tuple(sorted(settled, key=lambda one: (one.severity is not Severity.ERROR, order.get(one.check, 0))))


def _settle(finding: Finding, settings: Mapping[str, CheckSetting]) -> Finding | None:
    """Apply the configured severity. A check's own warning stays one: it marks the lesser case of that check."""
    default = CHECK_DEFAULTS.get(finding.check)
    setting = settings.get(finding.check)
    if default is None or setting is None or not default.can_be_off:
        return finding
    if setting.severity is Severity.OFF:
        return None
    if setting.severity is Severity.ERROR and finding.severity is Severity.WARNING is not default.severity:
        return finding
    return replace(finding, severity=setting.severity)


def undecided(message: str, hint: str = "", *, origin: Origin = Origin.RUNTIME) -> Finding:
    """The finding of an adapter that could not be judged: neither passed nor failed."""
    return Finding(check=NOT_JUDGED, severity=Severity.ERROR, message=message, hint=hint, origin=origin)


def accident(what: str, error: Exception) -> Finding:
    """`undecided` by an exception that nobody expected."""
    if isinstance(error, MemoryError):
        return undecided(f"{what}: out of memory", "use a larger runner, or gate this adapter alone")
    return undecided(
        f"{what}: unexpected {type(error).__name__}: {str(error)[:200]}",
        "this is a bug of merge-gate: please report it, with the adapter's config if you can",
    )


# --- words ---------------------------------------------------------------------------------------------------------


def _make(check: str, message: str, hint: str, origin: Origin, **places: Any) -> Finding:
    severity = places.pop("severity", CHECK_DEFAULTS[check].severity)
    return Finding(check=check, severity=severity, message=message, hint=hint, origin=origin, **places)


def _counts(stats: TensorStats) -> dict[str, Any]:
    return {
        "tensor": stats.name,
        "nan": stats.nan,
        "posinf": stats.posinf,
        "neginf": stats.neginf,
        "numel": stats.numel,
        "first_index": stats.first_index,
    }


def describe_nonfinite(stats: TensorStats) -> str:
    """`1 NaN and 2 -Inf among 16,384 values, the first at [0, 7]`."""
    kinds = ((stats.nan, "NaN"), (stats.posinf, "+Inf"), (stats.neginf, "-Inf"))
    counts = " and ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    every = stats.nan + stats.posinf + stats.neginf == stats.numel
    where = "" if every or stats.first_index is None else f", the first at {list(stats.first_index)}"
    return f"{counts} among {stats.numel:,} values{where}"


def _names(names: tuple[str, ...] | list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def _tensors(found: Sized) -> str:
    return f"{len(found):,} tensor{'s' if len(found) != 1 else ''}"


def _modules(targeted: tuple[str, ...]) -> str:
    return (
        "the 1 targeted module keeps the bits"
        if len(targeted) == 1
        else f"all {len(targeted):,} targeted modules keep the bits"
    )


def _are(found: Sized) -> str:
    return "are" if len(found) != 1 else "is"


def _module_of(name: str) -> str:
    """The base's module in an adapter tensor's name: what stands before PEFT's own parts."""
    parts = name.removeprefix(_ADAPTER_PREFIX).split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(("lora_", "base_layer"))), len(parts) - 1)
    return ".".join(parts[:cut])


# --- the checks ----------------------------------------------------------------------------------------------------


def _from_files(_case: Case) -> Iterator[Finding]:
    """The preflight has already found it: nothing to add."""
    return iter(())


def _keys_missing(case: Case) -> Iterator[Finding]:
    missing = case.evidence.missing if case.evidence else ()
    if missing:
        yield _make(
            "keys-missing",
            f"{_tensors(missing)} that adapter_config.json promises {_are(missing)} not in the file: "
            f"{_names(missing)}; PEFT would merge freshly initialised values in their place",
            "save the adapter again with save_pretrained and upload all of it; if names carry a foreign prefix "
            "(_orig_mod., module.), unwrap the model before saving",
            Origin.ADAPTER,
            module=_module_of(missing[0]),
            tensor=missing[0],
            measured=(("missing", float(len(missing))),),
        )


def _keys_unexpected(case: Case) -> Iterator[Finding]:
    stray = case.evidence.unexpected if case.evidence else ()
    if stray:
        yield _make(
            "keys-unexpected",
            f"{_tensors(stray)} in the file would land on nothing in the base and be dropped: {_names(stray)}",
            "check that adapter_config.json belongs to this file (target_modules, use_dora, modules_to_save), that "
            "this is the adapter's base, and that the model was unwrapped before saving",
            Origin.ADAPTER,
            module=_module_of(stray[0]),
            tensor=stray[0],
            measured=(("unexpected", float(len(stray))),),
        )


def _base_mismatch(case: Case) -> Iterator[Finding]:
    yield from _class_mismatch(case)
    named, used = case.files.base_name, case.spec.base.model
    if not named or used is None:
        return
    label = case.spec.base.label or used
    if _last(named) not in {_last(used), _last(label)}:
        yield _make(
            "base-mismatch",
            f"adapter_config.json names base {named!r}, the gate merged into {label!r}",
            "if both are the same weights, set base-mismatch: off for the adapter; else name the right base",
            Origin.CONFIG,
        )
    revision = case.files.base_revision
    got = case.evidence.base.revision if case.evidence else case.spec.base.revision
    if revision and got and revision not in {got, case.spec.base.revision}:
        yield _make(
            "base-mismatch",
            f"adapter_config.json names revision {revision!r} of the base, the gate merged into {got!r}",
            f"set base.revision to {revision!r}, or release with the revision that the gate used",
            Origin.CONFIG,
        )


def _class_mismatch(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence is not None and evidence.instead_of is not None:
        yield _make(
            "base-mismatch",
            f"task_type {case.files.task_type} in adapter_config.json stands for {evidence.instead_of}, but the "
            f"adapter's tensors have the names of {evidence.base.loaded_as}: it was merged into that",
            f"load the base as {evidence.base.loaded_as} to serve it: as {evidence.instead_of} nothing of the adapter "
            "arrives; save it with the task_type of the model that it was trained on",
            Origin.CONFIG,
        )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _expectation_failed(case: Case) -> Iterator[Finding]:
    expect = case.spec.expect
    if expect is None:
        return
    raw = case.adapter_config
    stated: list[tuple[str, Any, Any]] = [
        ("peft_type", expect.peft_type, raw.get("peft_type")),
        ("r", expect.r, raw.get("r")),
        ("lora_alpha", expect.lora_alpha, raw.get("lora_alpha")),
        ("base", expect.base, raw.get("base_model_name_or_path")),
    ]
    for key, wanted, got in stated:
        if wanted is not None and wanted != got:
            yield _expected(f"expect.{key} is {wanted!r}, but adapter_config.json has {got!r}")
    digests = {file.path: file.sha256 for file in case.files.files}
    for path, wanted in expect.sha256:
        got = digests.get(path)
        if got is None:
            yield _expected(f"expect.sha256 names {path}, but the adapter has no such file")
        elif got != wanted.lower():
            yield _expected(f"expect.sha256 of {path} is {wanted}, but the file's is {got}")


def _expected(message: str) -> Finding:
    return _make(
        "expectation-failed",
        message,
        "this may be the wrong adapter, or an edited one: find out which before you change what is expected",
        Origin.CONFIG,
    )


def base_nonfinite(nonfinite: tuple[TensorStats, ...], label: str) -> Iterator[Finding]:
    """Findings about the base alone, before any merge; also used for the report's list of bases."""
    for stats in nonfinite:
        yield _make(
            "base-nonfinite",
            f"base {label}: {stats.name} ({stats.dtype}) holds {describe_nonfinite(stats)}, before any merge",
            "the adapter is not the cause: repair or download the base again, or choose a dtype that holds its values",
            Origin.BASE,
            module=stats.name.rpartition(".")[0],
            **_counts(stats),
        )


def _base_nonfinite(case: Case) -> Iterator[Finding]:
    if case.evidence is not None:
        yield from base_nonfinite(case.evidence.base.nonfinite, case.evidence.base.model)


def _adapter_nonfinite(case: Case) -> Iterator[Finding]:
    for one in case.evidence.file_tensors if case.evidence else ():
        if not one.stats.finite:
            yield _broken_file_tensor(one)


def _broken_file_tensor(one: FileTensor) -> Finding:
    stats = one.stats
    every = stats.nan + stats.posinf + stats.neginf == stats.numel
    if one.used:
        hint = (
            "the training run diverged: look at its loss, lower the learning rate or train in bfloat16, and release an "
            "earlier checkpoint"
            if every
            else "training (overflow, divergence) or a conversion damaged this tensor: release an earlier checkpoint"
        )
    else:
        hint = "the merge does not read this tensor, so the merged model is sound; training from it would not be"
    return _make(
        "adapter-nonfinite",
        f"{stats.name} in the adapter's file holds {describe_nonfinite(stats)}"
        + ("" if one.used else "; the merge does not use this tensor"),
        hint,
        Origin.ADAPTER,
        severity=Severity.ERROR if one.used else Severity.WARNING,
        module=_module_of(stats.name),
        **_counts(stats),
    )


def _merged_nonfinite(case: Case) -> Iterator[Finding]:
    if case.evidence is None:
        return
    of_base = {stats.name for stats in case.evidence.base.nonfinite}
    sick = [_module_of(one.stats.name) for one in case.evidence.file_tensors if not one.stats.finite and one.used]
    for merge in case.evidence.merges:
        if not merge.stats.finite and merge.stats.name not in of_base:
            follows = any(_same_place(module, merge) for module in sick)
            yield _broken_merge(merge, follows=follows)


def _same_place(module: str, merge: TensorMerge) -> bool:
    return merge.module == module or merge.stats.name.startswith(f"{module}.") or module.startswith(f"{merge.module}.")


def _broken_merge(merge: TensorMerge, *, follows: bool) -> Finding:
    stats = merge.stats
    if follows:
        hint = "this follows from the adapter's own tensors of this module: see adapter-nonfinite"
    elif stats.nan:
        hint = "look at the adapter's tensors of this module: the merge of finite values gave no number"
    elif stats.dtype == "float16":
        hint = (
            f"the merged values exceed {merge.dtype_max:g}, the largest that float16 holds: serve in bfloat16 or "
            "float32, or lower lora_alpha"
        )
    else:
        hint = (
            f"the merged values exceed {merge.dtype_max:g}, the largest that {stats.dtype} holds: lower lora_alpha, or "
            "look for values in the adapter that grew without bound"
        )
    return _make(
        "merged-nonfinite",
        f"{stats.name} of the merged model ({stats.dtype}) holds {describe_nonfinite(stats)}",
        hint,
        Origin.MERGE,
        module=merge.module,
        **_counts(stats),
    )


def _no_effect(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence is None or evidence.refusal is not None:
        return
    lost = bool(evidence.missing)  # then that is why nothing changes, and it has been said
    changed = {merge.module for merge in evidence.merges if merge.changed}
    idle = tuple(name for name in evidence.targeted if not _any_inside(name, changed))
    zero = [one.stats.name for one in evidence.file_tensors if one.stats.minimum == one.stats.maximum == 0.0]
    if not changed:
        reason = "the delta is zero, or smaller than the dtype can add"
        if lost:
            reason = "its tensors are missing"
        elif any("lora_B" in name for name in zero):
            reason = "every lora_B is zero, as before training"
        yield _make(
            "no-effect",
            f"the merge changes nothing: {_modules(evidence.targeted)} of the base ({reason})",
            "this follows from the missing tensors: see keys-missing"
            if lost
            else "it was saved before it was trained, or without gathering its tensors: train it, or save it again",
            Origin.ADAPTER,
            module=idle[0] if idle else None,
            measured=(("modules_unchanged", float(len(evidence.targeted))),),
        )
    elif idle:
        yield _make(
            "no-effect",
            f"{len(idle)} of {len(evidence.targeted)} targeted modules are not changed by the merge: {_names(idle)}",
            "if these modules were meant to be trained, their tensors were not saved or never updated",
            Origin.ADAPTER,
            severity=Severity.WARNING,
            module=idle[0],
            measured=(("modules_unchanged", float(len(idle))),),
        )


def _any_inside(module: str, changed: set[str]) -> bool:
    return module in changed or any(one.startswith(f"{module}.") for one in changed) or not module


def _rounding_loss(case: Case) -> Iterator[Finding]:
    share = case.evidence.lost_share if case.evidence else None
    if case.evidence is None or share is None:
        return
    merges, limit = case.evidence.rounded, case.limit("rounding-loss")
    counted = [one for one in merges if one.unchanged_fraction is not None]
    size = sum(one.stats.numel for one in counted)
    kept = sum((one.unchanged_fraction or 0.0) * one.stats.numel for one in counted) / size if size else math.nan
    if share <= limit:
        return
    worst = max(merges, key=lambda one: (one.lost_norm or 0.0) / (one.delta_norm or 1.0))
    same = f"; {kept:.1%} of the targeted elements keep the base's bits" if size else ""
    yield _make(
        "rounding-loss",
        f"{share:.1%} of the delta's norm is lost in {worst.stats.dtype} (limit {limit:.0%}){same}",
        "merge into a float32 base and serve that, or serve the adapter unmerged: in this dtype the merged model is "
        "close to the base",
        Origin.MERGE,
        module=worst.module,
        tensor=worst.stats.name,
        measured=(("lost_share", share), ("limit", limit), *((("unchanged_share", kept),) if size else ())),
    )


def _headroom(case: Case) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence is None:
        return
    limit = case.limit("headroom")
    near = [
        one
        for one in evidence.merges
        if one.changed
        and one.stats.finite
        and math.isfinite(one.dtype_max)
        and one.stats.max_abs > limit * one.dtype_max
    ]
    if near:
        worst = max(near, key=lambda one: one.stats.max_abs / one.dtype_max)
        yield _make(
            "headroom",
            f"{worst.stats.name} reaches {worst.stats.max_abs:g} of the {worst.dtype_max:g} that {worst.stats.dtype} "
            f"holds ({worst.stats.max_abs / worst.dtype_max:.0%}, limit {limit:.0%}); "
            f"{_tensors(near)} {_are(near)} above it",
            "activations of this size overflow easily: serve in bfloat16 or float32, or lower the adapter's scale",
            Origin.MERGE,
            module=worst.module,
            tensor=worst.stats.name,
            measured=(("max_abs", worst.stats.max_abs), ("dtype_max", worst.dtype_max), ("limit", limit)),
        )
    broken = {merge.module for merge in evidence.merges if not merge.stats.finite}
    shy = tuple(
        name
        for name in evidence.refused_by_safe_merge
        if not _any_inside(name, broken) and not any(name.startswith(f"{module}.") for module in broken)
    )
    if shy and not evidence.base.nonfinite:
        yield _make(
            "headroom",
            f"the delta of {_names(shy)} overflows {evidence.base.dtype} although the merged weight does not: "
            "PEFT's safe_merge=True refuses this adapter",
            "merge with safe_merge=False, or in float32",
            Origin.MERGE,
            module=shy[0],
        )


def _delta_norm(case: Case) -> Iterator[Finding]:
    limit = case.limit("delta-norm")
    ratios = [
        (one.delta_norm / one.base_norm, one)
        for one in (case.evidence.merges if case.evidence else ())
        if one.delta_norm is not None and one.base_norm and math.isfinite(one.delta_norm)
    ]
    above = [(ratio, one) for ratio, one in ratios if ratio > limit]
    if above:
        ratio, worst = max(above, key=lambda pair: pair[0])
        yield _make(
            "delta-norm",
            f"the delta of {worst.stats.name} is {ratio:.3g} times as large as the weight it is added to (limit "
            f"{limit:g}); {_tensors(above)} {_are(above)} above it",
            "check lora_alpha, use_rslora and the learning rate: such a merge replaces the base rather than adapts it",
            Origin.MERGE,
            module=worst.module,
            tensor=worst.stats.name,
            measured=(("ratio", ratio), ("limit", limit)),
        )


def _not_reproducible(case: Case) -> Iterator[Finding]:
    scheme = case.adapter_config.get("init_lora_weights")
    if isinstance(scheme, str) and scheme.startswith("pissa_niter"):
        yield _make(
            "not-reproducible",
            f"init_lora_weights is {scheme!r}: PEFT repeats a randomised decomposition of the base on every load, so "
            "each merge gives other weights",
            "convert the adapter to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained)",
            Origin.CONFIG,
        )


def _tied_weights(case: Case) -> Iterator[Finding]:
    for name, other in case.evidence.tied if case.evidence else ():
        yield _make(
            "tied-weights",
            f"{name} is tied to {other}, and the adapter is trained on one side only: the merge changes both",
            "untie the base before training and merging (tie_word_embeddings=False), or set ensure_weight_tying in the "
            "adapter's config and train again",
            Origin.CONFIG,
            module=name.rpartition(".")[0],
            tensor=name,
        )


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        **dict.fromkeys(
            ("file-missing", "file-lfs-pointer", "file-corrupt", "pickle-refused", "config-invalid", "config-unsafe"),
            _from_files,
        ),
        "keys-missing": _keys_missing,
        "keys-unexpected": _keys_unexpected,
        "shape-mismatch": _from_files,
        "targets-not-found": _from_files,
        "not-mergeable": _from_files,
        "base-mismatch": _base_mismatch,
        "expectation-failed": _expectation_failed,
        "base-nonfinite": _base_nonfinite,
        "adapter-nonfinite": _adapter_nonfinite,
        "merged-nonfinite": _merged_nonfinite,
        "no-effect": _no_effect,
        "rounding-loss": _rounding_loss,
        "headroom": _headroom,
        "delta-norm": _delta_norm,
        "not-reproducible": _not_reproducible,
        "tied-weights": _tied_weights,
    }
)
"""Every check of the table, in its order. The preflight and a refusal bring their own findings for the first ones."""


def _refusal(case: Case) -> Iterator[Finding]:
    refusal = case.evidence.refusal if case.evidence else None
    if refusal is None:
        return
    if refusal.check is None:
        yield undecided(refusal.message, refusal.hint, origin=refusal.origin)
        return
    yield _make(
        refusal.check,
        refusal.message,
        refusal.hint,
        refusal.origin,
        module=refusal.module,
        tensor=refusal.tensor,
    )
