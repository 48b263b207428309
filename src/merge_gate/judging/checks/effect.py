"""Checks of what the merge does to the weights: nothing, too little, too much, or not what was trained.

In: what was measured. Out: findings. Plain Python: no torch, no files.
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
"""Stands among a finding's figures where they are of a sample."""


_UNTRAINED = (
    "it was saved before it was trained, or without gathering its tensors (ZeRO-3, FSDP): train it, or save it again"
)

WIPED_SHARE = 2.0**-20
"""A merged tensor is wiped out where its norm is no larger a share of the base's: what float32 leaves of W - W."""


@Check(
    id="no-effect",
    severity=ERROR,
    summary="The merge changes nothing.",
    symptom=Symptom.NO_EFFECT,
).on_merge
def no_effect(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.refusal is not None:
        return
    lost = bool(evidence.missing)  # then that is why nothing changes, and it has been said
    zero = {one.stats.name for one in evidence.file_tensors if one.stats.minimum == one.stats.maximum == 0.0}
    factors = {one.stats.name for one in evidence.file_tensors if "lora_B" in one.stats.name}
    as_before = bool(factors) and factors <= zero
    cut = _cut_by_kasa(case, factors) if as_before else set()
    altered = {
        one.module
        for one in evidence.merges
        if (one.changed or not one.stats.finite) and one.stats.name not in cut  # NaN of the base stays NaN
    }
    changed = _with_sharers(evidence, altered)
    pruned = _pruned(evidence)
    idle = tuple(name for name in evidence.targeted if not _any_inside(name, changed) and name not in pruned)
    if not changed:
        reason = "the delta is zero, or smaller than the dtype can add"
        if lost:
            reason = "its tensors are missing"
        elif as_before:
            reason = "every lora_B is zero, as before training"
        elif case.files.config.lora_alpha == 0:
            reason = "lora_alpha is 0"
        yield no_effect.finding(
            f"the adapter adds nothing to {counted(len(evidence.targeted), 'targeted module')} ({reason}); the merge "
            "only takes off the base what KaSA does before training, its smallest singular values"
            if cut
            else f"the merge changes nothing: {_modules(evidence.targeted)} of the base ({reason})",
            "this follows from the missing tensors: see keys-missing"
            if lost
            else "with these weights the members cancel each other, or each was saved before it was trained"
            if case.spec.combine is not None
            else "restore lora_alpha in adapter_config.json: it scales the delta"
            if case.files.config.lora_alpha == 0
            else _UNTRAINED
            if zero or evidence.base.dtype == "float32"
            else f"{_UNTRAINED}; if its values are only small, merge into a float32 base",
            Origin.ADAPTER,
            module=evidence.targeted[0] if evidence.targeted else None,
            measured=(("modules_unchanged", float(len(evidence.targeted))),),
        )
    elif idle:
        yield no_effect.finding(
            f"{len(idle):,} of {counted(len(evidence.targeted), 'targeted module')} {are(idle)} not changed by the "
            f"{'adapter, but for what KaSA takes off before training' if cut else 'merge'}: {listing(idle)}",
            "if these modules were meant to be trained, their tensors were not saved or never updated: train "
            "them, or save again; if not, there is nothing to do",
            Origin.ADAPTER,
            severity=Severity.WARNING,
            module=idle[0],
            measured=(("modules_unchanged", float(len(idle))),),
        )


def _cut_by_kasa(case: FileCase, factors: set[str]) -> set[str]:
    """Weights that KaSA takes a part off before training, whatever the factors are."""
    is_kasa = any(key == "kasa_config" for key, _ in case.files.config.values)
    return {f"{module_of(name)}.weight" for name in factors} if is_kasa else set()


def _pruned(evidence: Evidence) -> set[str]:
    """Modules whose rank AdaLoRA has pruned to 0, as it does with those that matter least: nothing is lost."""
    if evidence.peft_type != "ADALORA":
        return set()
    return {module_of(one.stats.name) for one in evidence.file_tensors if 0 in one.stats.shape}


def _with_sharers(evidence: Evidence, modules: set[str]) -> set[str]:
    """And the modules that share a tensor with one of them, which goes by its first name."""
    return modules | {other for other, first in evidence.shared if first in modules}


def _modules(targeted: tuple[str, ...]) -> str:
    return (
        "the 1 targeted module keeps the values"
        if len(targeted) == 1
        else f"all {len(targeted):,} targeted modules keep the values"
    )


def _any_inside(module: str, changed: set[str]) -> bool:
    return module in changed or any(one.startswith(f"{module}.") for one in changed) or not module


_IN_FLOAT32 = (
    "merge into a float32 base and serve that, or serve the adapter unmerged: in this dtype the merged model is close "
    "to the base"
)
_UNQUANTISED = (
    "merge into the base as it is without quantisation (quantization: none) and serve that, quantised afterwards if "
    "need be, or serve the adapter unmerged"
)


@Check(
    id="rounding-loss",
    severity=WARNING,
    summary=(
        "More than this share of the delta's norm is lost in the base's dtype, over all tensors or in most of them."
    ),
    symptom=Symptom.NO_EFFECT,
    limit=0.5,
).on_merge
def rounding_loss(case: MergeCase) -> Iterator[Finding]:
    share = case.evidence.lost_share
    if share is None:
        return
    merges, limit = case.evidence.rounded, case.limit(rounding_loss)
    known = [one for one in merges if one.unchanged_fraction is not None]
    size = sum(one.stats.numel for one in known)
    kept = sum((one.unchanged_fraction or 0.0) * one.stats.numel for one in known) / size if size else math.nan
    losing = [one for one in merges if (one.lost_share or 0.0) > limit]
    if share <= limit and len(losing) <= len(merges) / 2:
        return
    worst = max(merges, key=lambda one: one.lost_share or 0.0)
    quantization = case.evidence.base.quantization
    where, instead = f"in {worst.stats.dtype}", _IN_FLOAT32
    if quantization != Quantization.NONE:
        where, instead = f"by quantising the merged weights to {quantization} again", _UNQUANTISED
    of_most = (
        f"{len(losing):,} of {counted(len(merges), 'merged tensor')} lose more than {limit:.0%} of their delta's norm "
        f"{where}, the most {worst.stats.name} ({worst.lost_share or 0.0:.1%}); over all of them it is "
        f"{share:.1%}"
    )
    same = f"; {kept:.1%} of the targeted weights stay exactly as in the base" if size else ""
    estimated = any(one.estimated for one in merges)
    how = "; estimated from a sample" if estimated else ""
    yield rounding_loss.finding(
        f"{share:.1%} of the delta's norm is lost {where} (limit {limit:.0%}){same}{how}"
        if share > limit
        else f"{of_most}{how}",
        instead,
        Origin.MERGE,
        module=worst.module,
        tensor=worst.stats.name,
        measured=(
            ("lost_share", share),
            ("limit", limit),
            *((("unchanged_share", kept),) if size else ()),
            *(ESTIMATED if estimated else ()),
        ),
    )


@Check(
    id="headroom",
    severity=WARNING,
    summary="A merged value is above this share of the largest finite value of its dtype.",
    symptom=Symptom.EXTREME_VALUES,
    limit=0.5,
).on_merge
def headroom(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    limit = case.limit(headroom)
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
        yield headroom.finding(
            f"{worst.stats.name} reaches {figure(worst.stats.max_abs)} of the {figure(worst.dtype_max)} that "
            f"{worst.stats.dtype} holds ({worst.stats.max_abs / worst.dtype_max:.0%}, limit {limit:.0%}){above(near)}",
            "weights of this size make activations overflow easily: serve in bfloat16 or float32, or lower the "
            "adapter's scale",
            Origin.MERGE,
            module=worst.module,
            tensor=worst.stats.name,
            measured=(("max_abs", worst.stats.max_abs), ("dtype_max", worst.dtype_max), ("limit", limit)),
        )
    broken = _with_sharers(evidence, {merge.module for merge in evidence.merges if not merge.stats.finite})
    shy = tuple(
        name
        for name in evidence.refused_by_safe_merge
        if not _any_inside(name, broken) and not any(name.startswith(f"{module}.") for module in broken)
    )
    if shy and not evidence.base.nonfinite:
        yield headroom.finding(
            f"the delta of {listing(shy)} overflows {evidence.base.dtype} although the merged weight does not: "
            "PEFT's safe_merge=True refuses this adapter",
            "merge with safe_merge=False, or in float32",
            Origin.MERGE,
            module=shy[0],
        )


@Check(
    id="delta-norm",
    severity=WARNING,
    summary="‖ΔW‖/‖W‖ of a module is above this.",
    symptom=Symptom.EXTREME_VALUES,
    limit=10.0,
).on_merge
def delta_norm(case: MergeCase) -> Iterator[Finding]:
    limit = case.limit(delta_norm)
    ratios = [
        (one.delta_norm / one.base_norm, one)
        for one in case.evidence.merges
        if one.delta_norm is not None and one.base_norm and math.isfinite(one.delta_norm)
    ]
    large = [(ratio, one) for ratio, one in ratios if ratio > limit]
    if large:
        ratio, worst = max(large, key=lambda pair: pair[0])
        estimated = any(one.estimated for _, one in large)
        yield delta_norm.finding(
            f"the delta of {worst.stats.name} is {figure(float(f'{ratio:.3g}'))} times as large as the weight it is "
            f"added to (limit {figure(limit)}){above(large)}{'; estimated from a sample' if estimated else ''}",
            "check lora_alpha, use_rslora and the learning rate: such a merge replaces the base rather than adapts it",
            Origin.MERGE,
            module=worst.module,
            tensor=worst.stats.name,
            measured=(("ratio", ratio), ("limit", limit), *(ESTIMATED if estimated else ())),
        )
    wiped = tuple(one.stats.name for one in case.evidence.merges if _is_wiped(one))
    if wiped:
        yield delta_norm.finding(
            f"the merge wipes out {tensors(wiped)} of the base: {listing(wiped)} {are(wiped)} zero in the merged model",
            "look at the adapter's tensors of these modules (magnitudes, scales, a head that it brings): zeros there "
            "mean that they were not gathered on saving, or not saved",
            Origin.MERGE,
            module=wiped[0].rpartition(".")[0],
            tensor=wiped[0],
            measured=(("tensors", float(len(wiped))),),
        )
    elif _is_blank(case.evidence):
        held = case.evidence.file_tensors
        yield delta_norm.finding(
            f"every value of the {tensors(held)} in the file is zero, and the merge changes the base by them",
            "no training leaves nothing but zeros: the values were not gathered on saving, or were lost: save again",
            Origin.ADAPTER,
            tensor=held[0].stats.name,
            measured=(("tensors", float(len(held))),),
        )


def _is_blank(evidence: Evidence) -> bool:
    """Whether a file of nothing but zeros changes the base: rows of tokens, factors that stand in a weight's place."""
    held = [one.stats for one in evidence.file_tensors if one.stats.numel]
    zero = bool(held) and all(stats.finite and stats.minimum == stats.maximum == 0.0 for stats in held)
    return zero and any(one.changed and one.stats.finite for one in evidence.merges)


def _is_wiped(merge: TensorMerge) -> bool:
    """Whether ‖merged‖ is below the rounding of ‖W‖."""
    most = merge.stats.max_abs * math.sqrt(merge.stats.numel)
    return merge.stats.finite and bool(merge.base_norm) and most <= WIPED_SHARE * (merge.base_norm or 0.0)


@Check(
    id="untrained-tensors",
    severity=WARNING,
    summary="Tensors of the merged model are in neither the base's files nor the adapter's.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_merge
def untrained_tensors(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    names = tuple(name for name in evidence.initialized if name not in evidence.base.incomplete)
    if not names:
        return
    yield untrained_tensors.finding(
        f"{tensors(names)} of {evidence.base.loaded_as} {are(names)} in neither the base's files nor the adapter's: "
        f"{listing(names)}; every load makes {'it' if len(names) == 1 else 'them'} up anew",
        "name a base that has them, or train them and save them with the adapter (modules_to_save); switch the check "
        "off where nothing reads them (a pooler that is not used)",
        Origin.ADAPTER,
        module=names[0].rpartition(".")[0],
        tensor=names[0],
        measured=(("tensors", float(len(names))),),
    )


@Check(
    id="not-reproducible",
    severity=WARNING,
    summary="The merge depends on a random seed.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_files
def not_reproducible(case: FileCase) -> Iterator[Finding]:
    scheme = case.files.config.init_lora_weights
    if scheme is not None and scheme.startswith("pissa_niter"):
        yield not_reproducible.finding(
            f"init_lora_weights is {scheme!r}: PEFT repeats a randomised decomposition of the base on every load, so "
            "each merge gives other weights",
            "convert the adapter to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained)",
            Origin.CONFIG,
        )
    if case.files.config.peft_type == "ADAMSS":
        yield not_reproducible.finding(
            "the file does not say which rows of the base its tensors belong to: PEFT clusters the rows anew on every "
            "load, and another dtype of the base, or another scikit-learn, may give other clusters",
            "merge where it was trained, from a base in the same dtype, and compare outputs before release",
            Origin.CONFIG,
        )
    if case.files.config.peft_type == "FROD":
        yield not_reproducible.finding(
            "the file does not hold all that FRoD decomposes the base into: PEFT does that anew on every load, and "
            "another dtype of the base gives another decomposition, to which the file's values do not belong",
            "merge from a base in the dtype of the training, and compare outputs before release",
            Origin.CONFIG,
        )


@Check(
    id="meaning-changed",
    severity=WARNING,
    summary="Today's PEFT merges the adapter into something else than the release that saved it.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_files
def meaning_changed(case: FileCase) -> Iterator[Finding]:
    for change, words, span in changes(case.files.config, case.files.tensors):
        yield meaning_changed.finding(
            f"adapter_config.json was written by {span}, and {words}",
            change.hint
            or f"compare the merged model with what PEFT before 0.{change.release} merges, and merge with that one if "
            "the adapter was evaluated there",
            Origin.CONFIG,
        )


@Check(
    id="tied-weights",
    severity=ERROR,
    summary="A tied tensor is merged on one side only.",
    symptom=Symptom.UNTRAINED_MERGE,
).on_merge
def tied_weights(case: MergeCase) -> Iterator[Finding]:
    for name, other in case.evidence.tied:
        yield tied_weights.finding(
            f"{name} is tied to {other}, and the adapter is trained on one side only: the merge changes both",
            "untie the base before training and merging (tie_word_embeddings=False), or train the embedding whole "
            "(modules_to_save) with ensure_weight_tying",
            Origin.CONFIG,
            module=name.rpartition(".")[0],
            tensor=name,
        )
