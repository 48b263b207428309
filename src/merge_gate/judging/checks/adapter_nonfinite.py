"""The adapter's own file holds NaN or Inf.

**Fires when** a tensor in the adapter's own file holds NaN or Inf. If the merge does not read the tensor, such as
training state of some methods, the finding is a warning. To decide this, the gate merges again with other values in the
tensor. `merge-gate check` merges nothing: there the finding is an error if `adapter_config.json` shows that the merge
uses the tensor, and else a warning.

```text
base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight in the adapter's file holds 1 NaN among 64 values, the
first at [15, 3]
```

**Why it matters.** One NaN in a `lora_B` makes a whole row of a merged weight NaN, and the model answers NaN to
everything.

**What to do.** If all values are NaN, the training diverged. Look at the loss and the gradient norms, lower the
learning rate, or train in bfloat16 instead of float16. If only a few values are NaN or Inf, the cause is an overflow or
a damaged conversion. In both cases, release an earlier checkpoint.

You can switch this check off. A broken merge still fails by `merged-nonfinite`, which cannot be switched off.

**It happened.**

- [getainode/ainode#186](https://github.com/getainode/ainode/issues/186): 2,162,688 of 2,162,688 values were NaN, and so
  was the merged model. The job was recorded as a success.
- [kohya-ss/musubi-tuner#26](https://github.com/kohya-ss/musubi-tuner/issues/26): training reported `avr_loss=nan` to
  the end, and the file was saved. float16 instead of bfloat16 was the cause.
- [predibase/lorax#81](https://github.com/predibase/lorax/issues/81): the server refused such an adapter with a message
  about tensors that "do not match".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_gate._internal.tensor_names import module_of
from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import describe_nonfinite, nothing_finite
from merge_gate.records.measured import FileTensor
from merge_gate.records.terms import Finding, Origin, Severity


@Check("adapter-nonfinite", ERROR, Origin.ADAPTER, Symptom.NONFINITE, blame=180, page=__doc__).on_merge
def adapter_nonfinite(case: MergeCase) -> Iterator[Finding]:
    for tensor in case.evidence.file_tensors:
        if not tensor.stats.finite:
            yield of_file(tensor)


def of_file(tensor: FileTensor, *, is_merged: bool = True) -> Finding:
    """A tensor of the file that is not finite. Without a merge, `used` says what the configuration shows."""
    stats = tensor.stats
    unused = (
        "the merge does not use this tensor, so the merged model is sound"
        if is_merged
        else "adapter_config.json does not show whether the merge uses this tensor"
    )
    if tensor.used:
        hint = (
            "the training run diverged: look at its loss, lower the learning rate or train in bfloat16, and release an "
            "earlier checkpoint"
            if nothing_finite(stats)
            else "training (overflow, divergence) or a conversion damaged this tensor: release an earlier checkpoint"
        )
    else:
        hint = (
            "nothing to do for this release; do not continue training from this file"
            if is_merged
            else "`merge-gate run` shows whether the merged model is sound; do not continue training from this file"
        )
    return adapter_nonfinite.finding(
        f"{stats.name} in the adapter's file holds {describe_nonfinite(stats)}"
        + ("" if tensor.used else f"; {unused}"),
        hint,
        severity=Severity.ERROR if tensor.used else Severity.WARNING,
        module=module_of(stats.name),
        stats=stats,
    )


def values_unread(dtypes: Sequence[str]) -> Finding:
    """`merge-gate check` cannot read the values of tensors in these dtypes."""
    return adapter_nonfinite.finding(
        f"the values of tensors in {', '.join(dtypes)} were not read, so they may hold NaN or Inf",
        "`merge-gate run` reads them",
        severity=Severity.NOTE,
    )
