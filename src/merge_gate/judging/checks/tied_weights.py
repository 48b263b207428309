"""A tied tensor is merged on one side only.

**Fires when** two modules of the base share a tensor (input embedding and output head), the adapter was trained on
one of them, and the merge changes both. The adapter has a LoRA on one module, or trained tokens on the head alone. PEFT
links trained tokens of the embedding to the head, so these are fine.

If the other module is trained whole (`modules_to_save`), its copy is a separate tensor, and the check does not fire.

```text
model.embed_tokens.weight is tied to lm_head, and the adapter was trained on one side only: the merge changes both
```

**Why it matters.** The merged model does not compute what base and adapter computed in training.

**What to do.** Untie the tensors before training and merging (`tie_word_embeddings: false`). Or train the embedding
whole (`modules_to_save`) with `ensure_weight_tying`. Do not put a LoRA on both modules: PEFT merges it twice into the
one weight.

**It happened.**

- [peft#2018](https://github.com/huggingface/peft/issues/2018): a LoRA on the `lm_head` of Gemma 2 was also merged into
  the input embedding.
- [transformers#45127](https://github.com/huggingface/transformers/issues/45127): a merged model repeated one token
  forever after loading, because its embedding had replaced its head.
- [unslothai/unsloth#9331](https://github.com/unslothai/unsloth/pull/9331): measurements showed that the trained head
  was missing from the merge.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.records.terms import Finding, Origin


@Check("tied-weights", ERROR, Origin.CONFIG, Symptom.UNTRAINED_MERGE, blame=270, page=__doc__).on_merge
def tied_weights(case: MergeCase) -> Iterator[Finding]:
    for name, other in case.evidence.tied:
        yield tied_weights.finding(
            f"{name} is tied to {other}, and the adapter was trained on one side only: the merge changes both",
            "untie the base before training and merging (tie_word_embeddings=False), or train the whole embedding "
            "(modules_to_save) with ensure_weight_tying",
            module=name.rpartition(".")[0],
            tensor=name,
        )
