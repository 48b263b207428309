"""More than this share of the delta's norm is lost in the base's dtype, over all tensors or in most of them.

**Fires when** rounding to the dtype of the merged weights loses more than this share of the delta's norm: ‖merged −
(W + ΔW)‖ / ‖ΔW‖. The check fires if the share is above the limit over all merged tensors together, or in more than half
of them. So a large delta in a few tensors, such as rows of new tokens, cannot hide the loss in the others.

The exact sum is the same merge into float32 copies. For quantized weights, it is the sum before quantizing again. For
LoRA and DoRA on large weights, the gate estimates the share from a sample of rows, and the finding says so. It measures
all rows if this check or `delta-norm` is an error, or if the sample holds too little of the delta's norm.

Tensors that are trained whole (`modules_to_save`, biases, LN tuning) do not count. PEFT rounds them to the base's dtype
when it loads them, so the merge loses nothing that the unmerged adapter had.

```text
98.1% of the delta's norm is lost in bfloat16 (limit 50%); 98.0% of the targeted weights are exactly those of the base
```

**Why it matters.** bfloat16 has 8 bits of precision. A delta smaller than about 1/256 of a weight does not change it.
The merged model is then the base, although the unmerged adapter works.

**What to do.** Merge into a float32 base and serve that, or serve the adapter unmerged. If the base is quantized, merge
into the unquantized base and quantize the result.

To fail adapters that lose nearly everything, set an `error-limit`, such as `rounding-loss: {error-limit: 0.95}`. There
is no default. It should fail only adapters that no team would ship, and too few real adapters have been measured to
choose it.

**It happened.**

- [OpenBMB/MiniCPM-V#502](https://github.com/OpenBMB/MiniCPM-V/issues/502): answers were right with the adapter loaded,
  wrong with the merge saved in bfloat16, and right with float16.
- [peft#1388](https://github.com/huggingface/peft/issues/1388): the loss after a merge in bfloat16 differed from the
  loss before it.
- [axolotl-ai-cloud/axolotl#3497](https://github.com/axolotl-ai-cloud/axolotl/pull/3497): a merged model "lost" what it
  had learned. A merge in float32 was tried as a fix.

[The page on public adapters](../evidence/public-adapters.md) has a real adapter with this warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from merge_gate._internal.text import counted
from merge_gate.judging.checks.check import ERROR, WARNING, Check, MergeCase, Symptom
from merge_gate.records.terms import Finding, Origin, Quantization

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
    limit=0.5,
    limit_is_share=True,
    error_limit=math.inf,
).on_merge
def rounding_loss(case: MergeCase) -> Iterator[Finding]:
    share = case.evidence.lost_share
    if share is None:
        return
    merges, (limit, error_limit) = case.evidence.rounded, rounding_loss.limits(case.settings)
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
        lost_share=share,
        limit=limit,
        error_limit=error_limit if share > error_limit else None,
        unchanged_share=unchanged_share if size else None,
        estimated=1 if estimated else None,
    )
