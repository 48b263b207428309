"""A parameter or persistent buffer of the merged model is NaN or Inf in its final dtype.

**Fires when** a parameter or persistent buffer of the merged model is NaN or Inf **in its final dtype**, and it was
finite in the base. For a quantized weight, the gate checks the dequantized values and their scales.

The gate merges and checks every element. If a bound proves that PEFT's roundings cannot matter, the gate leaves them
out. It then merges in float32, or in bfloat16 if weight and processor have it.
[The decisions](../project/decisions.md#merging) explain why.

```text
model.layers.1.self_attn.v_proj.weight of the merged model (float16) holds 247 +Inf and 251 -Inf among 512 values, the
first at [0, 0]
```

**Why it matters.** If this check is the cause, base and adapter are finite, and only their sum is not. Nearly always,
the dtype is float16, whose largest value is 65,504. If the cause is `adapter-nonfinite`, this finding names the weights
that the adapter's NaN reaches.

**What to do.** Serve in bfloat16 or float32. Or lower the scale (`lora_alpha`, `use_rslora`) and train again. To see
which dtypes can hold the merge, list them: `dtype: [bfloat16, float16]`.

**It happened.**

- [diffusers#5313](https://github.com/huggingface/diffusers/issues/5313): one broken LoRA was fused and unfused again.
  It left the base broken for every later adapter.
- [peft#1001](https://github.com/huggingface/peft/pull/1001): the change that added `safe_merge` after this. Its review
  notes that the sum can be the cause if both parts are finite.
- [peft#3682](https://github.com/huggingface/peft/issues/3682),
  [peft#3710](https://github.com/huggingface/peft/issues/3710): layers whose `safe_merge` checked nothing, or checked
  too late.

[A table](../evidence/truth.md#compared-with-pefts-own-check) compares this check with PEFT's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.tensor_names import module_of
from merge_gate.judging.checks.check import ERROR, FOLLOWS, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import describe_nonfinite, figure
from merge_gate.records.measured import TensorMerge
from merge_gate.records.terms import Finding, Origin


@Check("merged-nonfinite", ERROR, Origin.MERGE, Symptom.NONFINITE, blame=190, page=__doc__, can_be_off=False).on_merge
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
