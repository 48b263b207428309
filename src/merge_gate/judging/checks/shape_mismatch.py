"""A tensor does not fit the base.

**Fires when** a tensor has another shape than config and base need, or it is clearly a shard (shape `[0]`, or one
dimension).

```text
base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight has shape [15, 4], but config and base need [16, 4]
```

**Why it matters.** The base is wrong (another size, another vocabulary), the rank is wrong, or the tensors were not
gathered when the adapter was saved.

**What to do.** Compare both shapes in the message. If the dimension of the rank differs, look at `r` and
`rank_pattern`. If the other dimension differs, look at the base. If training enlarged the vocabulary and the file has
the embeddings, the gate resizes the base. For shards, gather the parameters before `save_pretrained`.

**It happened.**

- [trl#4416](https://github.com/huggingface/trl/issues/4416),
  [accelerate#3508](https://github.com/huggingface/accelerate/issues/3508),
  [texttron/tevatron#108](https://github.com/texttron/tevatron/issues/108): LoRA under ZeRO-3 was saved without
  gathering, so the tensors had shape [0].
- [hiyouga/LlamaFactory#3125](https://github.com/hiyouga/LlamaFactory/issues/3125): an adapter with an enlarged
  vocabulary was loaded on the original base.
"""

from __future__ import annotations

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import counted
from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import Finding, Origin

# PEFT may load such an adapter: the load compares shapes again, before it writes anything.
SHAPE_MISMATCH = Check(
    "shape-mismatch", ERROR, Origin.ADAPTER, Symptom.WRONG_PAIR, blame=120, page=__doc__, allows_loading=True
)


def shape_clash(
    *,
    name: str,
    got: tuple[int, ...],
    expected: tuple[int, ...],
    others: int = 0,
    trained_whole: bool = False,
    of_tokens: bool = False,
) -> Finding:
    """A tensor has another shape than config and base need; `others` more tensors do not fit either.

    `trained_whole`: it replaces a tensor of the base. `of_tokens`: it has a row for each trained token.
    """
    if of_tokens:
        hint = (
            "one row for each token: trainable_token_indices in adapter_config.json is not that of the training, or "
            "this is not the adapter's base"
        )
    elif 0 in got or len(got) < len(expected):
        hint = "the tensor was saved unsharded-empty by ZeRO-3 or FSDP: gather the parameters before save_pretrained"
    elif trained_whole:
        hint = "this is not the adapter's base, or one with another vocabulary or number of labels than in training"
    elif len(got) == len(expected) == 2 and (got[0] != expected[0]) != (got[1] != expected[1]):  # noqa: PLR2004 - factors
        hint = (
            "either r or rank_pattern in adapter_config.json is not the rank it was trained with, or this is not the "
            "adapter's base"
        )
    else:
        hint = "this is not the base that the adapter was trained on"
    does = "does" if others == 1 else "do"
    more = f"; {counted(others, 'more tensor')} {does} not fit either" if others else ""
    return SHAPE_MISMATCH.finding(
        f"{name} has shape {list(got)}, but config and base need {list(expected)}{more}",
        hint,
        module=module_of(name),
        tensor=name,
    )


REFUSALS = (shape_clash,)
