"""A merged layer does not compute what the unmerged one computes, on the same input in float32.

**Fires when** PEFT's merge of a layer gives weights that compute something else than the layer with its adapter. The
gate merges the layer into a float32 copy and runs it on two made-up inputs, before and after. It fires if the outputs
differ by more than 1 % of what the adapter changes, and by more than 1e-5 of the output, on both inputs.

Every layer that PEFT merges is compared, and one of each kind of the layers that the gate merges in blocks. Modules
that are trained whole (`modules_to_save`) have to be in PEFT's result with their values. [The page on
methods](../reference/methods.md#layers-that-are-compared) says what is not compared. `forward.layers_compared` in the
report counts the compared layers.

```text
encoder.embed_positions (a MvpLearnedPositionalEmbedding) does not compute the same after the merge: in float32, it
differs from the unmerged layer by 128% of the adapter's change; so does decoder.embed_positions
```

**Why it matters.** The merged model is another model than the one that was trained and evaluated. All of its values are
finite, so nothing else shows it.

**What to do.** Serve the adapter unmerged, as it was trained. Or exclude the layer (`exclude_modules`) and train again.

**It happened.**

- [peft#1707](https://github.com/huggingface/peft/issues/1707): `layer_replication` merges without an error, into a
  different model.
- [peft#3779](https://github.com/huggingface/peft/issues/3779): a bias was added without its scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from merge_gate._internal.text import listing
from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.records.terms import FailureKind, Finding, Origin


@Check(
    "merge-differs",
    ERROR,
    Origin.MERGE,
    Symptom.UNTRAINED_MERGE,
    blame=185,
    page=__doc__,
    failure=FailureKind.NOT_MERGEABLE,
).on_merge
def merge_differs(case: MergeCase) -> Iterator[Finding]:
    different = sorted(case.evidence.different, key=lambda layer: -layer.change_share)
    if not different:
        return
    worst, *others = different
    runs = worst.change_share < math.inf
    wrong = f"it differs from the unmerged layer by {worst.change_share:.0%} of the adapter's change"
    also = (
        f"; so {'do' if len(others) > 1 else 'does'} {listing(tuple(one.module for one in others))}" if others else ""
    )
    yield merge_differs.finding(
        f"{worst.module} (a {worst.class_name}) does not compute the same after the merge: in float32, "
        f"{wrong if runs else 'it does not run on inputs of the unmerged layer'}{also}",
        "serve the adapter unmerged, as it was trained; or exclude that layer (exclude_modules) and train again",
        module=worst.module,
        layers=len(different),
        share=float(f"{worst.change_share:.2g}") if runs else None,  # rounded, so that all dtypes have the same
    )
