"""An adapter raises the largest activation above this share of the largest finite value of float16.

**Fires when** the gate [runs the model](../concepts/forward.md) in float16, and the largest value that the adapter
raises is above this share of 65,504. Only modules count that return a smaller value in the base. For bfloat16 and
float32, it never fires: they hold values up to 3.4e38.

```text
run in float16, model.layers.1.self_attn.v_proj reaches 50,016; float16 holds up to 65,504 (76%, limit 50%); the base
reaches 0.396 there
```

**Why it matters.** The gate runs the model on a few fixed tokens. Other inputs, and other kernels, can reach a few
times as much.

**What to do.** Serve in bfloat16, or lower the adapter's scale. If you serve in float16, try your longest inputs.

**It happened.**

- [ggml-org/llama.cpp#27016](https://github.com/ggml-org/llama.cpp/pull/27016): a down projection was finite in float32
  and infinite in float16, only from 64 tokens on.
- [transformers#27179](https://github.com/huggingface/transformers/issues/27179): one left-padded input exceeds float16.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate.judging.checks.check import WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import figure, named
from merge_gate.records.terms import Finding, Origin


@Check(
    "activation-headroom",
    WARNING,
    Origin.ADAPTER,
    Symptom.EXTREME_VALUES,
    blame=222,
    page=__doc__,
    limit=0.5,
    limit_is_share=True,
).on_merge
def activation_headroom(case: MergeCase) -> Iterator[Finding]:
    forward, dtype = case.evidence.forward, case.evidence.base.dtype
    limit, _ = activation_headroom.limits(case.settings)
    largest, of_base, allowed = forward.raised, forward.raised_of_base, forward.largest_allowed
    if dtype != "float16" or largest is None or of_base is None or allowed is None:
        return
    if forward.nonfinite_module == forward.raised_module:  # activation-nonfinite reports it
        return
    if limit * allowed < largest:
        yield activation_headroom.finding(
            f"run in {dtype}, {named(forward.raised_module)} reaches {figure(largest)}; {dtype} holds up to "
            f"{figure(allowed)} ({largest / allowed:.0%}, limit {limit:.0%}); the base reaches {figure(of_base)} there",
            "other inputs can reach a few times as much: serve in bfloat16, or lower the adapter's scale",
            module=forward.raised_module,
            largest=largest,
            largest_of_base=of_base,
            limit=limit,
        )
