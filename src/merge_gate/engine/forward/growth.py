"""Decides whether a merge can make activations leave bfloat16 or float32. If it cannot, the model is not run.

In: the figures of a merge, and its base. Out: why the model need not run, or nothing. It need not run if this is so:

1. The dtypes of the base are bfloat16 and float32. Their largest value is 3.4e38.
2. Each tensor that the merge changes is the weight of a linear layer, a convolution, or an embedding (`has_rows` in
   measure.py). A model only multiplies with it, or looks its rows up. It may take an exponential, a logarithm, or a
   root of other tensors: of biases, norms, buffers, and parameters such as `logit_scale`. A copy that the adapter has
   trained is no merge.
3. No row changes by more than `SMALL` times its norm (`is_small`). A row gives one output, or is one token's embedding.
   No value is more than 4 times as large as the largest of the base's tensor.
4. Rounding takes so little of the delta that `rounding-loss` does not need the model.

Why this is enough. An output is w·x, and |w·x| <= ‖w‖ ‖x‖. So a merge raises the bound of each output at most 1.7
times. Norms between the layers undo it. Without them, 167 merged layers in a row would have to reach the bound to leave
the dtype. A row keeps 0.3 times its norm, and its direction within 45 degrees, so it is not erased, and not reversed.

Each norm is measured, or follows from the factors. Those of the base are measured once for all adapters. LoRA adds
s·b·A to a row, with b in B, and ‖b A‖² is b (A Aᵀ) bᵀ. DoRA makes m / ‖v‖ · v of v = w + s·b·A, which differs from w by
at most |m - ‖w‖| + 2 ‖s·b·A‖. PEFT's roundings are 2⁻⁸ of a value.

It is no proof for models that raise activations to a power, take an exponential of them, or divide by a few of them,
with no norm in between. It does not see a base whose own values are NaN, or near the limit of the dtype.
"""

from __future__ import annotations

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.forward.run import why_not_run
from merge_gate.engine.tensors.measure import SMALL
from merge_gate.records.measured import Evidence, TensorMerge

MOST = 4.0
"""How many times the largest value may grow."""

WIDE = {"bfloat16", "float32"}


def may_stay(base: Base) -> bool:
    """Step 1, if the base can be run at all."""
    dtypes = {base.facts.dtype, *(dtype for dtype, _ in base.facts.dtypes)}
    return dtypes <= WIDE and not why_not_run(base)


def why_left_out(base: Base, evidence: Evidence, norm_limit: float) -> str:
    """Steps 2 to 4, in a sentence. Empty if the model has to be run."""

    def is_kept(merge: TensorMerge) -> bool:
        figures = base.figures(base.first_name(merge.stats.name))
        return merge.keeps_rows and merge.stats.max_abs <= MOST * figures.max_abs

    loses = (evidence.lost_share or 0.0) > norm_limit
    if loses or evidence.wrong or evidence.different or not all(map(is_kept, evidence.merges)):
        return ""
    change = f"the adapter changes no row of a weight by more than {SMALL:g} times its norm"
    return f"{base.facts.dtype} holds values up to 3.4e38, and {change}"
