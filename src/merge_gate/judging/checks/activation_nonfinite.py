"""Run in its final dtype, a module of the merged model returns NaN or Inf although every weight is finite.

**Fires when** the gate [runs the model](../concepts/forward.md) on made-up inputs, and a module returns a value that
the dtype of the merged weights cannot hold:

- **error** with origin `adapter`: the base returns finite values there, and the adapter does not, merged and
  unmerged. Origin `merge`: only the merged model does not.
- **warning** with one of these origins, if the model clamps such values, as Whisper and T5 do in float16. Its outputs
  are then finite. Each differs from that of the same weights in float32 by at most three times what the base's does, or
  by at most half of the adapter's effect on it.
- **warning** with origin `base`: the base does it without any adapter.

```text
run in float16, lm_head returns values that are not finite; the base's are finite, up to 27,216
```

Only values that a module returns count, because every device stores these in that dtype. The check says nothing about
attention scores, fused kernels, or other inputs. It is quiet if a weight is not finite, because this then follows.

**Why it matters.** All weights can be small, and their products still exceed 65,504 in float16. Every later layer then
returns NaN.

**What to do.** Serve in bfloat16 or float32, and add that dtype to the entry. Or lower the adapter's scale and train
again. If the base does it by itself, this base cannot be served in this dtype.

**It happened.**

- [peft#3053](https://github.com/huggingface/peft/pull/3053): OPT is fine in float16. With an AdaLoRA adapter, layer 6
  exceeds 65,504, and the output is NaN.
- [transformers#36832](https://github.com/huggingface/transformers/pull/36832): Gemma 3 exceeds it by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate.judging.checks.check import ERROR, WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import figure, named
from merge_gate.records.terms import Finding, Origin

_LOWER = "lower the adapter's scale, and train again"
_WIDER = "serve in bfloat16 or float32, and list that dtype for this adapter, so that the gate checks it, too"


@Check("activation-nonfinite", ERROR, Origin.ADAPTER, Symptom.NONFINITE, blame=192, page=__doc__).on_merge
def activation_nonfinite(case: MergeCase) -> Iterator[Finding]:
    evidence, forward = case.evidence, case.evidence.forward
    weights = (*evidence.base.nonfinite, *(merge.stats for merge in evidence.merges))
    if forward.nonfinite_origin is None or not all(stats.finite for stats in weights):
        return
    dtype, module = evidence.base.dtype, forward.nonfinite_module
    where = f"run in {dtype}, {named(module)} returns values that are not finite"
    if forward.nonfinite_origin is Origin.BASE:
        yield activation_nonfinite.finding(
            f"{where}, in the base without any adapter",
            _WIDER if dtype == "float16" else "name a base whose own outputs are finite",
            origin=Origin.BASE,
            severity=WARNING,
            module=module,
        )
        return
    only = " in the merged model; unmerged, the adapter's are" if forward.nonfinite_origin is Origin.MERGE else ""
    largest, is_clamped = forward.nonfinite_of_base, forward.output_error is not None and forward.output_error <= 1
    clamps = "; the model clamps them, and its outputs are about those of float32" if is_clamped else ""
    yield activation_nonfinite.finding(
        f"{where}{only}; the base's are finite"
        + (f", up to {figure(largest)}" if largest is not None else "")
        + clamps,
        f"{_WIDER}; or {_LOWER}" if dtype == "float16" else _LOWER,
        origin=forward.nonfinite_origin,
        severity=WARNING if is_clamped else None,
        module=module,
        largest_of_base=largest,
    )
