"""The base itself holds NaN or Inf, before any merge.

**Fires when** the base itself holds NaN or Inf before any merge, in a parameter or a persistent buffer, in the dtype
that you requested. For a quantized base, the gate checks the dequantized values and their scales.

```text
base ./models/llama-nan-far: model.norm.weight (float32) holds 1 NaN among 32 values, the first at [31], before any
merge
```

The finding is only a warning in two cases:

- The adapter replaces the whole tensor with finite values (a trained head, a trained bias, trained tokens), and no
  other module holds the tensor. The merged model is then finite.
- The value is infinity in a persistent buffer. Some models use it to say that there is no limit.

**Why it matters.** Every adapter on this base fails, although no adapter is the cause. The verdict is `failed` and not
`error`, because the gate could judge the merged model: it is not finite, and must not be released. The check also
fires if the base's values do not fit the dtype, such as a bfloat16 base that is cast to float16.

**What to do.** Compare the digest of the base in the report with its source, and download the base again. If the digest
is right, choose the dtype that the base was made for.

**It happened.**

- [transformers#46002](https://github.com/huggingface/transformers/issues/46002): heads that are created again when a
  model is loaded in half precision held NaN before any training.
- [haotian-liu/LLaVA#1278](https://github.com/haotian-liu/LLaVA/issues/1278): a fine-tuned model, itself the base of
  later work, had NaN in its saved weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate.judging.checks.check import ERROR, WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import describe_nonfinite
from merge_gate.records.measured import BaseFacts, TensorStats
from merge_gate.records.terms import Finding, Origin


@Check("base-nonfinite", ERROR, Origin.BASE, Symptom.NONFINITE, blame=170, page=__doc__, can_be_off=False).on_merge
def base_nonfinite(case: MergeCase) -> Iterator[Finding]:
    yield from of_base(case.evidence.base, case.evidence.replaced_nonfinite)


def of_base(base: BaseFacts, replaced_nonfinite: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Findings about the base before any merge; the report's list of bases has them too.

    The adapter brings finite values in place of the tensors in `replaced_nonfinite`.
    """
    for stats in base.nonfinite:
        if stats.name in replaced_nonfinite or stats.name.rpartition(".")[0] in replaced_nonfinite:  # or a scale of one
            yield _replaced_by_adapter(base, stats)
            continue
        no_limit = stats.is_buffer and not stats.nan  # some models mean by an infinite buffer that there is no limit
        yield base_nonfinite.finding(
            f"base {base.model}: {stats.name} ({stats.dtype}) holds {describe_nonfinite(stats)}, before any merge"
            + ("; it is a buffer, where infinity can mean that there is no limit" if no_limit else ""),
            "the adapter is not the cause: repair or download the base again, or choose a dtype that holds its values"
            if not no_limit
            else "if the model uses infinity on purpose, there is nothing to do; else repair or download the base "
            "again",
            severity=WARNING if no_limit else ERROR,
            module=stats.name.rpartition(".")[0],
            stats=stats,
        )


def _replaced_by_adapter(base: BaseFacts, stats: TensorStats) -> Finding:
    return base_nonfinite.finding(
        f"base {base.model}: {stats.name} ({stats.dtype}) holds {describe_nonfinite(stats)}, before any merge; the "
        "adapter replaces it with finite values",
        "nothing to do for this adapter; an adapter without this tensor fails on this base",
        severity=WARNING,
        module=stats.name.rpartition(".")[0],
        stats=stats,
    )
