"""Checks of the merge's effect on the weights: too small, too large, or different from the training.

In: the evidence of one merge, or an adapter's files. Out: findings; it imports no torch and opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from merge_gate.judging.checks.check import ERROR, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.judging.checks.phrases import above, are, figure, tensors
from merge_gate.judging.peft_releases import changes
from merge_gate.records.measured import Evidence, TensorMerge
from merge_gate.records.terms import Finding, Origin, Quantization, Severity
from merge_gate.tensor_names import module_of
from merge_gate.text import counted, listing

ESTIMATED = (("estimated", 1.0),)
"""Added to a finding's measured figures if they come from a sample."""


_UNTRAINED = (
    "the adapter was saved before training, or without gathering its tensors (ZeRO-3, FSDP): train it, or save it again"
)

_SEE_MISSING = "the missing tensors are the reason: see keys-missing"

WIPED_SHARE = 2.0**-20
"""A merged tensor whose norm is at most this share of the base's is zero: float32 leaves this much of W - W."""


@Check(
    id="no-effect",
    severity=ERROR,
    origin=Origin.ADAPTER,
    summary="The merge changes nothing.",
    symptom=Symptom.NO_EFFECT,
).on_merge
def no_effect(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.refusal is not None:
        return
    # keys-missing has reported these, and they explain why modules do not change
    missing = {module_of(name) for name in evidence.missing}
    zeros = {file.stats.name for file in evidence.file_tensors if file.stats.minimum == file.stats.maximum == 0.0}
    lora_b = {file.stats.name for file in evidence.file_tensors if "lora_B" in file.stats.name}
    is_untrained = bool(lora_b) and lora_b <= zeros
    changed_by_kasa = _changed_by_kasa(case, lora_b) if is_untrained else set()
    altered = {
        merge.module
        for merge in evidence.merges
        if (merge.changed or not merge.stats.finite)  # NaN of the base stays NaN
        and merge.stats.name not in changed_by_kasa
    }
    changed = _with_sharers(evidence, altered)
    pruned = _pruned(evidence)
    unchanged = tuple(name for name in evidence.targeted if not _any_inside(name, changed) and name not in pruned)
    if not changed:
        reason = "the delta is zero, or smaller than the dtype can add"
        if missing:
            reason = "its tensors are missing"
        elif is_untrained:
            reason = "every lora_B is zero, as before training"
        elif case.files.config.lora_alpha == 0:
            reason = "lora_alpha is 0"
        yield no_effect.finding(
            f"the adapter adds nothing to {counted(len(evidence.targeted), 'targeted module')} ({reason}); the merge "
            "only removes the base's smallest singular values, as KaSA does before training"
            if changed_by_kasa
            else f"the merge changes nothing: {_modules(evidence.targeted)} of the base ({reason})",
            _SEE_MISSING
            if missing
            else "with these weights the members cancel each other, or each was saved before training"
            if case.spec.combine is not None
            else "restore lora_alpha in adapter_config.json, which scales the delta"
            if case.files.config.lora_alpha == 0
            else _UNTRAINED
            if zeros or evidence.base.dtype == "float32"
            else f"{_UNTRAINED}; if its values are small, merge into a float32 base",
            module=evidence.targeted[0] if evidence.targeted else None,
            measured=(("modules_unchanged", float(len(evidence.targeted))),),
        )
    elif unchanged:
        by = "adapter (KaSA's change before training does not count)" if changed_by_kasa else "merge"
        yield no_effect.finding(
            f"{len(unchanged):,} of {counted(len(evidence.targeted), 'targeted module')} {are(unchanged)} not changed "
            f"by the {by}: {listing(unchanged)}",
            _SEE_MISSING
            if missing.issuperset(unchanged)
            else "if you meant to train these modules, their tensors were never updated, or were not saved: train "
            "them, or save again. If not, there is nothing to do",
            severity=Severity.WARNING,
            module=unchanged[0],
            measured=(("modules_unchanged", float(len(unchanged))),),
        )


def _changed_by_kasa(case: FileCase, factors: set[str]) -> set[str]:
    """Weights that KaSA reduces before training, whatever the factors are."""
    is_kasa = any(key == "kasa_config" for key, _ in case.files.config.values)
    return {f"{module_of(name)}.weight" for name in factors} if is_kasa else set()


def _pruned(evidence: Evidence) -> set[str]:
    """Modules whose rank AdaLoRA pruned to 0 because they matter least. They are healthy."""
    if evidence.peft_type != "ADALORA":
        return set()
    return {module_of(file.stats.name) for file in evidence.file_tensors if 0 in file.stats.shape}


def _with_sharers(evidence: Evidence, modules: set[str]) -> set[str]:
    """These modules, and those that share a tensor with one of them."""
    return modules | {other for other, first in evidence.shared if first in modules}


def _modules(targeted: tuple[str, ...]) -> str:
    return (
        "the only targeted module keeps the values"
        if len(targeted) == 1
        else f"all {len(targeted):,} targeted modules keep the values"
    )


def _any_inside(module: str, changed: set[str]) -> bool:
    return module in changed or any(inner.startswith(f"{module}.") for inner in changed) or not module


_IN_FLOAT32 = (
    "merge into a float32 base and serve that model, or serve the adapter unmerged: in this dtype the merged model is "
    "close to the base"
)
_UNQUANTIZED = (
    "merge into the unquantized base (quantization: none) and serve that model, quantized afterwards if necessary, or "
    "serve the adapter unmerged"
)


@Check(
    id="rounding-loss",
    severity=WARNING,
    origin=Origin.MERGE,
    summary=(
        "More than this share of the delta's norm is lost in the base's dtype, over all tensors or in most of them."
    ),
    symptom=Symptom.NO_EFFECT,
    limit=0.5,
    limit_is_share=True,
    has_error_limit=True,
).on_merge
def rounding_loss(case: MergeCase) -> Iterator[Finding]:
    share = case.evidence.lost_share
    if share is None:
        return
    merges, limit, error_limit = case.evidence.rounded, case.limit(rounding_loss), case.error_limit(rounding_loss)
    allowed = f"error-limit {error_limit:.0%}" if share > error_limit else f"limit {limit:.0%}"
    compared = [merge for merge in merges if merge.unchanged_fraction is not None]
    size = sum(merge.stats.numel for merge in compared)
    unchanged = sum((merge.unchanged_fraction or 0.0) * merge.stats.numel for merge in compared)
    unchanged_share = unchanged / size if size else math.nan
    losing = [merge for merge in merges if (merge.lost_share or 0.0) > limit]
    if share <= limit and len(losing) <= len(merges) / 2:
        return
    worst = max(merges, key=lambda merge: merge.lost_share or 0.0)
    quantization = case.evidence.base.quantization
    how_lost, instead = f"in {worst.stats.dtype}", _IN_FLOAT32
    if quantization != Quantization.NONE:
        how_lost, instead = f"by quantizing the merged weights to {quantization} again", _UNQUANTIZED
    of_most = (
        f"{len(losing):,} of {counted(len(merges), 'merged tensor')} lose more than {limit:.0%} of their delta's norm "
        f"{how_lost}; the worst is {worst.stats.name} ({worst.lost_share or 0.0:.1%}), and all of them lose {share:.1%}"
    )
    same = f"; {unchanged_share:.1%} of the targeted weights are exactly those of the base" if size else ""
    estimated = any(merge.estimated for merge in merges)
    sampled = "; estimated from a sample" if estimated else ""
    yield rounding_loss.finding(
        f"{share:.1%} of the delta's norm is lost {how_lost} ({allowed}){same}{sampled}"
        if share > limit
        else f"{of_most}{sampled}",
        instead,
        severity=ERROR if share > error_limit else None,
        module=worst.module,
        tensor=worst.stats.name,
        measured=(
            ("lost_share", share),
            ("limit", limit),
            *((("error_limit", error_limit),) if share > error_limit else ()),
            *((("unchanged_share", unchanged_share),) if size else ()),
            *(ESTIMATED if estimated else ()),
        ),
    )


@Check(
    id="headroom",
    severity=WARNING,
    origin=Origin.MERGE,
    summary="A merged value is above this share of the largest finite value of its dtype.",
    symptom=Symptom.EXTREME_VALUES,
    limit=0.5,
    limit_is_share=True,
).on_merge
def headroom(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    limit = case.limit(headroom)
    near = [
        merge
        for merge in evidence.merges
        if merge.changed
        and merge.stats.finite
        and math.isfinite(merge.dtype_max)
        and merge.stats.max_abs > limit * merge.dtype_max
    ]
    if near:
        worst = max(near, key=lambda merge: merge.stats.max_abs / merge.dtype_max)
        yield headroom.finding(
            f"{worst.stats.name} reaches {figure(worst.stats.max_abs)}; the largest finite value of "
            f"{worst.stats.dtype} is {figure(worst.dtype_max)} "
            f"({worst.stats.max_abs / worst.dtype_max:.0%}, limit {limit:.0%}){above(near)}",
            "weights of this size make activations overflow easily: serve in bfloat16 or float32, or lower the "
            "adapter's scale",
            module=worst.module,
            tensor=worst.stats.name,
            measured=(("max_abs", worst.stats.max_abs), ("dtype_max", worst.dtype_max), ("limit", limit)),
        )
    nonfinite_modules = _with_sharers(evidence, {merge.module for merge in evidence.merges if not merge.stats.finite})
    refused_but_finite = tuple(
        name
        for name in evidence.refused_by_safe_merge
        if not _any_inside(name, nonfinite_modules)
        and not any(name.startswith(f"{module}.") for module in nonfinite_modules)
    )
    if refused_but_finite and not evidence.base.nonfinite:
        yield headroom.finding(
            f"the delta of {listing(refused_but_finite)} overflows {evidence.base.dtype} although the merged "
            "weight does not: PEFT's safe_merge=True refuses this adapter",
            "merge with safe_merge=False, or in float32",
            module=refused_but_finite[0],
        )


@Check(
    id="delta-norm",
    severity=WARNING,
    origin=Origin.MERGE,
    summary="‖ΔW‖/‖W‖ of a module is above this.",
    symptom=Symptom.EXTREME_VALUES,
    limit=10.0,
    has_error_limit=True,
    error_limit=1000.0,
).on_merge
def delta_norm(case: MergeCase) -> Iterator[Finding]:
    limit, error_limit, merges = case.limit(delta_norm), case.error_limit(delta_norm), case.evidence.merges
    ratios = [(_ratio(merge, case.evidence.typical_rms), merge) for merge in merges if len(merge.stats.shape) > 1]
    errors = [(ratio, merge) for ratio, merge in ratios if ratio > error_limit]
    large = errors or [(ratio, merge) for merge in merges if (ratio := _ratio(merge)) > limit]
    if large:
        ratio, worst = max(large, key=lambda pair: pair[0])
        weight = "the weight it is added to" if ratio == _ratio(worst) else "a typical weight of the model"
        allowed = f"error-limit {figure(error_limit)}" if errors else f"limit {figure(limit)}"
        estimated = any(merge.estimated for _, merge in large)
        yield delta_norm.finding(
            f"the delta of {worst.stats.name} is {figure(float(f'{ratio:.3g}'))} times as large as {weight} "
            f"({allowed}){above(large)}{'; estimated from a sample' if estimated else ''}",
            "check lora_alpha, use_rslora and the learning rate: such a merge replaces the base instead of adapting it",
            severity=ERROR if errors else None,
            module=worst.module,
            tensor=worst.stats.name,
            measured=(
                ("ratio", ratio),
                ("limit", limit),
                *((("error_limit", error_limit),) if errors else ()),
                *(ESTIMATED if estimated else ()),
            ),
        )
    wiped = tuple(merge.stats.name for merge in case.evidence.merges if _is_wiped(merge))
    if wiped:
        yield delta_norm.finding(
            f"the merge wipes out {tensors(wiped)} of the base: {listing(wiped)} {are(wiped)} zero in the merged model",
            "check the adapter's tensors of these modules (magnitudes, scales, a new head): if they are zero, they "
            "were not gathered before saving, or not saved",
            module=wiped[0].rpartition(".")[0],
            tensor=wiped[0],
            measured=(("tensors", float(len(wiped))),),
        )
    elif _is_blank(case.evidence):
        zeros = case.evidence.file_tensors
        yield delta_norm.finding(
            f"every value of the {tensors(zeros)} in the file is zero, and the merge still changes the base",
            "training does not leave only zeros: the values were lost, or not gathered before saving. Save the adapter "
            "again",
            origin=Origin.ADAPTER,
            tensor=zeros[0].stats.name,
            measured=(("tensors", float(len(zeros))),),
        )


def _ratio(merge: TensorMerge, least_rms: float = 0.0) -> float:
    """The RMS of the delta divided by the weight's, or by `least_rms` if that is larger; 0.0 if that has no value.

    A matrix may be close to zero in a good base, and training may multiply it.
    """
    norm = max(merge.base_norm or 0.0, least_rms * math.sqrt(merge.stats.numel))
    return merge.delta_norm / norm if norm and merge.delta_norm and math.isfinite(merge.delta_norm) else 0.0


def _is_blank(evidence: Evidence) -> bool:
    """Whether a file of zeros changes the base: its tensors replace rows of tokens, or factors of a weight."""
    measured = [file.stats for file in evidence.file_tensors if file.stats.numel]
    is_zero = bool(measured) and all(stats.finite and stats.minimum == stats.maximum == 0.0 for stats in measured)
    return is_zero and any(merge.changed and merge.stats.finite for merge in evidence.merges)


def _is_wiped(merge: TensorMerge) -> bool:
    """Whether ‖merged‖ is below the rounding of ‖W‖."""
    largest_norm = merge.stats.max_abs * math.sqrt(merge.stats.numel)
    return merge.stats.finite and bool(merge.base_norm) and largest_norm <= WIPED_SHARE * (merge.base_norm or 0.0)


@Check(
    id="untrained-tensors",
    severity=WARNING,
    origin=Origin.ADAPTER,
    summary="Tensors of the merged model are absent from the base's files and from the adapter's.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_merge
def untrained_tensors(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    names = tuple(name for name in evidence.initialized if name not in evidence.base.incomplete)
    if not names:
        return
    yield untrained_tensors.finding(
        f"{tensors(names)} of {evidence.base.loaded_as} {are(names)} absent from the base's files and the adapter's: "
        f"{listing(names)}; every load fills {'it' if len(names) == 1 else 'them'} with new values",
        "name a base that has them, or train them and save them with the adapter (modules_to_save). If the model does "
        "not read them (an unused pooler), turn this check off",
        module=names[0].rpartition(".")[0],
        tensor=names[0],
        measured=(("tensors", float(len(names))),),
    )


@Check(
    id="not-reproducible",
    severity=WARNING,
    origin=Origin.CONFIG,
    summary="The merge depends on a random seed.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_files
def not_reproducible(case: FileCase) -> Iterator[Finding]:
    scheme = case.files.config.init_lora_weights
    if scheme is not None and scheme.startswith("pissa_niter"):
        yield not_reproducible.finding(
            f"init_lora_weights is {scheme!r}: PEFT repeats a randomized decomposition of the base on every load, so "
            "each merge gives other weights",
            "convert the adapter to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained)",
        )
    if case.files.config.peft_type == "ADAMSS":
        yield not_reproducible.finding(
            "the file does not say which rows of the base its tensors belong to: PEFT clusters the rows again on every "
            "load, and another dtype of the base, or another scikit-learn, may give other clusters",
            "merge on the machine that trained the adapter, into a base in the same dtype, and compare outputs before "
            "release",
        )
    if case.files.config.peft_type == "FROD":
        yield not_reproducible.finding(
            "the file has only a part of FRoD's decomposition of the base: PEFT decomposes the base again on every "
            "load, and in another dtype the decomposition no longer fits the file's values",
            "merge into a base in the dtype of the training, and compare outputs before release",
        )


@Check(
    id="meaning-changed",
    severity=WARNING,
    origin=Origin.CONFIG,
    summary="Today's PEFT merges the adapter differently from the release that saved it.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_files
def meaning_changed(case: FileCase) -> Iterator[Finding]:
    for change, effect, span in changes(case.files.config, case.files.tensors):
        yield meaning_changed.finding(
            f"adapter_config.json was written by {span}, and {effect}",
            change.hint
            or f"compare the merged model with a merge by PEFT before 0.{change.release}; if the adapter was evaluated "
            "with that release, merge with it",
        )


@Check(
    id="tied-weights",
    severity=ERROR,
    origin=Origin.CONFIG,
    summary="A tied tensor is merged on one side only.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_merge
def tied_weights(case: MergeCase) -> Iterator[Finding]:
    for name, other in case.evidence.tied:
        yield tied_weights.finding(
            f"{name} is tied to {other}, and the adapter was trained on one side only: the merge changes both",
            "untie the base before training and merging (tie_word_embeddings=False), or train the whole embedding "
            "(modules_to_save) with ensure_weight_tying",
            module=name.rpartition(".")[0],
            tensor=name,
        )
