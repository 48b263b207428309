"""Checks for NaN and infinity: in the base, in the adapter's file, in the merged model.

In: measurements. Out: findings, the root cause first. Plain Python: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate.judging.checks.check import ERROR, FOLLOWS, WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import describe_nonfinite, figure, nothing_finite
from merge_gate.records.measured import BaseFacts, FileTensor, TensorMerge, TensorStats
from merge_gate.records.terms import Finding, Origin, Severity
from merge_gate.tensor_names import module_of


@Check(
    id="base-nonfinite",
    severity=ERROR,
    origin=Origin.BASE,
    summary="The base itself holds NaN or Inf, before any merge.",
    symptom=Symptom.NONFINITE,
    can_be_off=False,
).on_merge
def base_nonfinite(case: MergeCase) -> Iterator[Finding]:
    yield from findings_of_base(case.evidence.base, case.evidence.replaced_nonfinite)


def findings_of_base(base: BaseFacts, replaced_nonfinite: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Findings about the base before any merge; the report's list of bases has them too.

    The adapter brings finite values in place of the tensors in `replaced_nonfinite`.
    """
    for stats in base.nonfinite:
        if stats.name in replaced_nonfinite or stats.name.rpartition(".")[0] in replaced_nonfinite:  # or a scale of one
            yield _replaced_by_adapter(base, stats)
            continue
        no_limit = stats.is_buffer and not stats.nan  # some models mean by an infinite buffer that there is no limit
        yield base_nonfinite.finding(
            f"base {base.model}: {stats.name} ({stats.dtype}) holds {describe_nonfinite(stats)}, before any merge"
            + ("; it is a buffer, where infinity can mean that there is no limit" if no_limit else ""),
            "the adapter is not the cause: repair or download the base again, or choose a dtype that holds its values"
            if not no_limit
            else "if the model uses infinity on purpose, there is nothing to do; else repair or download the base "
            "again",
            severity=WARNING if no_limit else ERROR,
            module=stats.name.rpartition(".")[0],
            stats=stats,
        )


def _replaced_by_adapter(base: BaseFacts, stats: TensorStats) -> Finding:
    return base_nonfinite.finding(
        f"base {base.model}: {stats.name} ({stats.dtype}) holds {describe_nonfinite(stats)}, before any merge; the "
        "adapter replaces it with finite values",
        "nothing to do for this adapter; an adapter without this tensor fails on this base",
        severity=WARNING,
        module=stats.name.rpartition(".")[0],
        stats=stats,
    )


@Check(
    id="adapter-nonfinite",
    severity=ERROR,
    origin=Origin.ADAPTER,
    summary="The adapter's own file holds NaN or Inf.",
    symptom=Symptom.NONFINITE,
).on_merge
def adapter_nonfinite(case: MergeCase) -> Iterator[Finding]:
    for tensor in case.evidence.file_tensors:
        if not tensor.stats.finite:
            yield _broken_file_tensor(tensor)


def _broken_file_tensor(tensor: FileTensor) -> Finding:
    stats = tensor.stats
    if tensor.used:
        hint = (
            "the training run diverged: look at its loss, lower the learning rate or train in bfloat16, and release an "
            "earlier checkpoint"
            if nothing_finite(stats)
            else "training (overflow, divergence) or a conversion damaged this tensor: release an earlier checkpoint"
        )
    else:
        hint = "nothing to do for this release; do not continue training from this file"
    return adapter_nonfinite.finding(
        f"{stats.name} in the adapter's file holds {describe_nonfinite(stats)}"
        + ("" if tensor.used else "; the merge does not use this tensor, so the merged model is sound"),
        hint,
        severity=Severity.ERROR if tensor.used else Severity.WARNING,
        module=module_of(stats.name),
        stats=stats,
    )


@Check(
    id="merged-nonfinite",
    severity=ERROR,
    origin=Origin.MERGE,
    summary="A parameter or persistent buffer of the merged model is NaN or Inf in its final dtype.",
    symptom=Symptom.NONFINITE,
    can_be_off=False,
).on_merge
def merged_nonfinite(case: MergeCase) -> Iterator[Finding]:
    of_base = {stats.name for stats in case.evidence.base.nonfinite}
    used = [tensor.stats for tensor in case.evidence.file_tensors if tensor.used]
    damaged = [module_of(stats.name) for stats in used if not stats.finite]
    for merge in case.evidence.merges:
        if not merge.stats.finite and merge.stats.name not in of_base:
            follows = any(_same_place(module, merge) for module in damaged)
            yield _broken_merge(merge, follows=follows)


def _same_place(module: str, merge: TensorMerge) -> bool:
    return merge.module == module or merge.stats.name.startswith(f"{module}.") or module.startswith(f"{merge.module}.")


def _broken_merge(merge: TensorMerge, *, follows: bool) -> Finding:
    stats = merge.stats
    if follows:
        hint = f"{FOLLOWS} the adapter's own tensors of this module: see adapter-nonfinite"
    elif stats.nan:
        hint = (
            "the merge of finite values gives NaN: look in the adapter's tensors of this module for norms and scales "
            "of zero, and for values near the dtype's limit; release an earlier checkpoint"
        )
    elif stats.dtype == "float16":
        hint = (
            f"the merged values exceed {figure(merge.dtype_max)}, the largest that float16 holds: serve in bfloat16 or "
            "float32, or lower lora_alpha"
        )
    else:
        hint = (
            f"the merged values exceed {figure(merge.dtype_max)}, the largest that {stats.dtype} holds: lower "
            "lora_alpha, or look for values in the adapter that grew without bound"
        )
    return merged_nonfinite.finding(
        f"{stats.name} of the merged model ({stats.dtype}) holds {describe_nonfinite(stats)}",
        hint,
        module=merge.module,
        stats=stats,
    )
