"""‖ΔW‖/‖W‖ of a module is above this.

**Fires when** ‖ΔW‖ / ‖W‖ of a merged tensor is above the limit (Frobenius norms). For the `error-limit`, the RMS of the
delta is compared with the larger of two figures: this weight's RMS, and the median RMS of the model's matrices. No
training makes a delta a thousand times as large as the weights. The merged model is then the delta alone.

- A good adapter on weights that are nearly zero in the base only gets a warning, even if it changes no others.
- If a matrix of zeros gets a delta that is too large for a typical weight of the model, the adapter fails.
- Biases and norms are never errors.
- At any limit, an adapter fails if its merge turns a weight matrix into zeros that was not zero in the base: what is
  left of its norm is at most one millionth (2⁻²⁰). Biases and norms that become zeros are a warning.
- The check also warns if a file of zeros changes rows or factors of the base (trained tokens, OSF).

```text
the delta of model.layers.1.self_attn.v_proj.weight is 76,800,000 times as large as the weight it is added to
(error-limit 1,000)
```

**Why it matters.** Adapters usually change a weight by a few percent. A delta that replaces the weight is rarely
intended: `lora_alpha` is wrong, or the training diverged and has not reached Inf yet. A weight of zeros breaks its
layer: DoRA's magnitudes, IA3's scales, or a trained head were saved as zeros.

**What to do.** Check `lora_alpha`, `use_rslora`, and the last gradient norms of the training. Biases and norms that
start near zero can have high ratios without a fault: raise the limit for that adapter. To allow a larger delta, raise
its `error-limit`: `checks: {delta-norm: {error-limit: 1e6}}`. If the zeros are meant, allow them for that adapter:
`checks: {delta-norm: {wiped: warning}}`.

**It happened.**

- [Blaizzy/mlx-vlm#841](https://github.com/Blaizzy/mlx-vlm/issues/841): `lora_alpha` was not divided by the rank, so the
  delta was 8 times too large by default.
- [cloneofsimo/lora#240](https://github.com/cloneofsimo/lora/issues/240): a merge with a scale of 8 gave noise instead
  of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from merge_gate._internal.text import listing
from merge_gate.judging.checks.check import ERROR, WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import above, are, figure, tensors
from merge_gate.records.measured import Evidence, TensorMerge
from merge_gate.records.terms import Finding, Origin, Severity

WIPED_SHARE = 2.0**-20
"""A merged tensor whose norm is at most this share of the base's is zero: float32 leaves this much of W - W."""

ESTIMATE_SHARE = 2.0**-6
"""A norm is at least this share of its estimate, which has at least 64 rows of at most 262,144."""


@Check(
    "delta-norm",
    WARNING,
    Origin.MERGE,
    Symptom.EXTREME_VALUES,
    blame=230,
    page=__doc__,
    limit=10.0,
    error_limit=1000.0,
    wiped=ERROR,
).on_merge
def delta_norm(case: MergeCase) -> Iterator[Finding]:
    (limit, error_limit), merges = delta_norm.limits(case.settings), case.evidence.merges
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
            ratio=ratio,
            limit=limit,
            error_limit=error_limit if errors else None,
            estimated=1 if estimated else None,
        )
    setting = case.settings.get(delta_norm.id)
    wiped = [merge for merge in case.evidence.merges if _is_wiped(merge)]
    for is_broken, severity in ((True, (setting and setting.wiped) or delta_norm.wiped), (False, None)):
        yield from _wiped([merge for merge in wiped if _is_broken(merge) is is_broken], severity)
    if not wiped and _is_blank(case.evidence):
        zeros = case.evidence.file_tensors
        yield delta_norm.finding(
            f"every value of the {tensors(zeros)} in the file is zero, and the merge still changes the base",
            "training does not leave only zeros: the values were lost, or not gathered before saving. Save the adapter "
            "again",
            origin=Origin.ADAPTER,
            tensor=zeros[0].stats.name,
            tensors=len(zeros),
        )


def _wiped(merges: list[TensorMerge], severity: Severity | None = None) -> Iterator[Finding]:
    if merges:
        wiped = tuple(merge.stats.name for merge in merges)
        allowed = "; if zeros are meant, allow them: `checks: {delta-norm: {wiped: warning}}`"
        yield delta_norm.finding(
            f"the merge wipes out {tensors(wiped)} of the base: {listing(wiped)} {are(wiped)} zero in the merged model",
            "check the adapter's tensors of these modules (magnitudes, scales, a new head): if they are zero, they "
            f"were not gathered before saving, or not saved{allowed if severity is ERROR else ''}",
            severity=severity,
            module=wiped[0].rpartition(".")[0],
            tensor=wiped[0],
            tensors=len(wiped),
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


def _is_wiped(merge: TensorMerge, share: float = 1.0) -> bool:
    """Whether ‖merged‖ is below the rounding of this share of ‖W‖."""
    largest_norm = merge.stats.max_abs * math.sqrt(merge.stats.numel)
    norm = (merge.base_norm or 0.0) * share
    return merge.stats.finite and norm > 0 and largest_norm <= WIPED_SHARE * norm


def _is_broken(merge: TensorMerge) -> bool:
    """Whether a wiped tensor is a weight matrix, and wiped for certain."""
    is_matrix = sum(size > 1 for size in merge.stats.shape) > 1
    return is_matrix and _is_wiped(merge, ESTIMATE_SHARE if merge.estimated else 1.0)
