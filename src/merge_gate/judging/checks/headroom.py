"""A merged value is above this share of the largest finite value of its dtype.

**Fires when** the largest merged value is above this share of the largest finite value of its dtype. The check also
fires if the delta alone overflows although the sum does not. PEFT's `safe_merge=True` then refuses the adapter.

```text
model.layers.1.self_attn.v_proj.bias reaches 50,016; the largest finite value of float16 is 65,504 (76%, limit 50%)
```

**Why it matters.** The weights are finite, but activations that are computed with them may not be.

**What to do.** Serve in bfloat16 or float32, or lower the adapter's scale.

**It happened.**

- [transformers#5651](https://github.com/huggingface/transformers/issues/5651): T5's weights are finite in float16, but
  one product of them is 66,246, above 65,504.
- [transformers#10956](https://github.com/huggingface/transformers/pull/10956): hidden states of ±277,000 in a model
  that was trained in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from merge_gate._internal.text import listing
from merge_gate.judging.checks.check import WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import above, figure, is_inside, with_sharers
from merge_gate.records.terms import Finding, Origin


@Check(
    "headroom", WARNING, Origin.MERGE, Symptom.EXTREME_VALUES, blame=220, page=__doc__, limit=0.5, limit_is_share=True
).on_merge
def headroom(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    limit, _ = headroom.limits(case.settings)
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
            max_abs=worst.stats.max_abs,
            dtype_max=worst.dtype_max,
            limit=limit,
        )
    nonfinite_modules = with_sharers(evidence, {merge.module for merge in evidence.merges if not merge.stats.finite})
    refused_but_finite = tuple(
        name
        for name in evidence.refused_by_safe_merge
        if not is_inside(name, nonfinite_modules)
        and not any(name.startswith(f"{module}.") for module in nonfinite_modules)
    )
    if refused_but_finite and not evidence.base.nonfinite:
        yield headroom.finding(
            f"the delta of {listing(refused_but_finite)} overflows {evidence.base.dtype} although the merged "
            "weight does not: PEFT's safe_merge=True refuses this adapter",
            "merge with safe_merge=False, or in float32",
            module=refused_but_finite[0],
        )
