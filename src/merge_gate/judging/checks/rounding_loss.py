"""Rounding to the base's dtype changes more than this share of what the adapter does to the model's outputs.

**Fires when** rounding to the dtype of the merged weights changes more than this share of the adapter's effect:
‖merged − unmerged‖ / ‖unmerged − base‖ of the model's outputs. The check is a warning above its limit and an error
above its `error-limit`.

The effect is measured if rounding loses more than half of the delta's norm over all merged tensors together. Base,
unmerged adapter, and merge run on the same made-up inputs, in float32 arithmetic. Only the merged weights are rounded.
With a mixture of experts, the merged model uses the experts that the unmerged one chooses, and the finding counts the
choices that would change.

```text
rounding to bfloat16 changes 104.7% of the adapter's effect (error-limit 80%); 98.1% of the delta's norm is lost
```

**If the effect is not measured**, the share of the norm decides: ‖merged − (W + ΔW)‖ / ‖ΔW‖. The check is then a
warning above 50 %, over all merged tensors or in most of them. An `error-limit` does not apply, because the norm
overstates the harm: rounding is noise, and a trained delta is not ([measured](../evidence/truth.md#rounding)). If the
configuration makes this check an error, the norm alone is an error, too. The effect is not measured in these cases:

- `forward: off`, quantized bases, and bases that bring their own code.
- The model does not run on the made-up inputs, or does not return the same values twice.
- The merged weights take more than half of the free memory.
- The effect is lost in the rounding of float32.
- It seems to be lost, and is small on the made-up inputs: less than a third of what the same delta has with random
  signs of its input columns (the median of three). Adapters for a trigger word or a language look like that.
- Most tensors lose more than half, but not all of them together. A few large deltas, such as rows of new tokens, then
  make most of the effect, too. They must not hide the loss in the others.

A configured `limit` is a share of the effect. It is also the share of the norm above which the effect is measured. If
the effect cannot be measured, the check fires above that share. An `error-limit` is always a share of the effect.

For LoRA and DoRA on large weights, the gate estimates the norm from a sample of rows, and the finding says so. It
measures all rows if this check or `delta-norm` is an error, or if the sample holds too little of the delta's norm.
Tensors that are trained whole (`modules_to_save`, biases, LN tuning) do not count: PEFT rounds them when it loads them.

**Why it matters.** bfloat16 has 8 bits of precision. A delta smaller than about 1/256 of a weight does not change it.
If that takes most of the effect, the merged model is close to the base, although the unmerged adapter works.

**What to do.** Merge into a float32 base and serve that, or serve the adapter unmerged. If the base is quantized, merge
into the unquantized base and quantize the result.

**It happened.**

- [OpenBMB/MiniCPM-V#502](https://github.com/OpenBMB/MiniCPM-V/issues/502): answers were right with the adapter loaded,
  wrong with the merge saved in bfloat16, and right with float16.
- [peft#1388](https://github.com/huggingface/peft/issues/1388): the loss after a merge in bfloat16 differed from the
  loss before it.
- [axolotl-ai-cloud/axolotl#3497](https://github.com/axolotl-ai-cloud/axolotl/pull/3497): a merged model "lost" what it
  had learned. A merge in float32 was tried as a fix.

[A public adapter](../evidence/truth.md#public-adapters) has this warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from merge_gate._internal.text import counted
from merge_gate.judging.checks.check import ERROR, WARNING, Check, MergeCase, Symptom
from merge_gate.records.config import CheckSetting
from merge_gate.records.measured import NORM_LIMIT, Evidence, TensorMerge
from merge_gate.records.terms import Finding, Origin, Quantization, Severity

_IN_FLOAT32 = (
    "merge into a float32 base and serve that model, or serve the adapter unmerged: in this dtype the merged model is "
    "close to the base"
)

_UNQUANTIZED = (
    "merge into the unquantized base (quantization: none) and serve that model, quantized afterwards if necessary, or "
    "serve the adapter unmerged"
)


@Check(
    "rounding-loss",
    WARNING,
    Origin.MERGE,
    Symptom.NO_EFFECT,
    blame=210,
    page=__doc__,
    limit=0.4,
    limit_is_share=True,
    error_limit=0.8,
).on_merge
def rounding_loss(case: MergeCase) -> Iterator[Finding]:
    evidence, (limit, error_limit) = case.evidence, rounding_loss.limits(case.settings)
    forward, norm_limit = evidence.forward, allowed_norm(case.settings)
    is_small = (forward.effect or 0.0) < (forward.typical_effect or 0.0) / 3
    change = None if is_small else forward.rounding_change
    share = evidence.lost_share
    if share is None:
        return
    losing = [merge for merge in evidence.rounded if (merge.lost_share or 0.0) > norm_limit]
    if change <= limit if change is not None else share <= norm_limit and len(losing) <= len(evidence.rounded) / 2:
        return
    is_error = change is not None and change > error_limit
    worst = max(evidence.rounded, key=lambda merge: merge.lost_share or 0.0)
    sampled = "; estimated from a sample" if any(merge.estimated for merge in evidence.rounded) else ""
    if change is None:
        what = _norm(evidence, worst, len(losing), norm_limit)
        what += "; the adapter does too little on the made-up inputs to measure its effect" if is_small else ""
    else:
        allowed = f"error-limit {error_limit:.0%}" if is_error else f"limit {limit:.0%}"
        what = (
            f"rounding to {worst.stats.dtype} changes {change:.1%} of the adapter's effect ({allowed}); "
            f"{share:.1%} of the delta's norm is lost"
        )
        if choices := forward.choices_changed:
            what += f", and {counted(choices, 'choice')} of experts would change too"
    yield rounding_loss.finding(
        what + sampled,
        _IN_FLOAT32 if evidence.base.quantization == Quantization.NONE else _UNQUANTIZED,
        severity=ERROR if is_error else None,
        module=worst.module,
        tensor=worst.stats.name,
        rounding_change=change,
        lost_share=share,
        limit=norm_limit if change is None else limit,
        error_limit=error_limit if is_error else None,
        unchanged_share=_unchanged_share(evidence),
        estimated=1 if sampled else None,
    )


def allowed_norm(settings: Mapping[str, CheckSetting]) -> float:
    """The share of the norm above which the effect is measured, and above which the check fires if it was not."""
    setting, (limit, _) = settings.get(rounding_loss.id), rounding_loss.limits(settings)
    if setting is not None and setting.severity is Severity.OFF:
        return math.inf
    return NORM_LIMIT if limit == rounding_loss.limit else limit


def _norm(evidence: Evidence, worst: TensorMerge, losing: int, limit: float) -> str:
    """What rounding took of the norm."""
    merges, share = evidence.rounded, evidence.lost_share or 0.0
    how_lost = f"in {worst.stats.dtype}"
    if evidence.base.quantization != Quantization.NONE:
        how_lost = f"by quantizing the merged weights to {evidence.base.quantization} again"
    if share <= limit:
        return (
            f"{losing:,} of {counted(len(merges), 'merged tensor')} lose more than {limit:.0%} of their delta's norm "
            f"{how_lost}; the worst is {worst.stats.name} ({worst.lost_share or 0.0:.1%}), and all of them lose "
            f"{share:.1%}"
        )
    unchanged = _unchanged_share(evidence)
    same = "" if unchanged is None else f"; {unchanged:.1%} of the targeted weights are exactly those of the base"
    return f"{share:.1%} of the delta's norm is lost {how_lost} (limit {limit:.0%}){same}"


def _unchanged_share(evidence: Evidence) -> float | None:
    compared = [merge for merge in evidence.rounded if merge.unchanged_fraction is not None]
    size = sum(merge.stats.numel for merge in compared)
    return sum((merge.unchanged_fraction or 0.0) * merge.stats.numel for merge in compared) / size if size else None
