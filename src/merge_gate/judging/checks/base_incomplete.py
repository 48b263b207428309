"""A parameter of the base's own class has no stored tensor.

**Fires when** a parameter of the base's own class has no stored tensor, so transformers would fill it with random
values. The verdict is `error` and not `failed`, because the adapter is not to blame.

- If the adapter brings every such tensor whole, such as a trained head, the finding is a `note`. The adapter is then
  checked.
- The files alone can show the fault: a missing shard of the index, a Git LFS pointer, a truncated file, or a broken
  link.
- A head, a pooler, or a layer of labels of another task does not count. See [untrained-tensors](untrained-tensors.md).

```text
base ./models/llama-incomplete is incomplete: its files hold no tensor for 6 parameters of LlamaForCausalLM:
model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight and 3
more (looked at: model-00001-of-00005.safetensors, model-00002-of-00005.safetensors, model-00003-of-00005.safetensors
and 1 more); transformers does not read model-00004-of-00005.safetensors, which would have some of them; transformers
would fill them with random values
```

**Why it matters.** transformers only warns. The adapter is then merged into noise, and the merged model is finite.

**What to do.** Download the base again, with its index and all of its shards. If the message names quantized tensors,
config.json has lost its `quantization_config`.

**It happened.**

- [transformers#30381](https://github.com/huggingface/transformers/issues/30381): a whole Llama body was initialized at
  random, because the names in the files did not match the class.
- [QwenLM/Qwen3#930](https://github.com/QwenLM/Qwen3/issues/930): a GPTQ base had parameters that its files do not
  contain.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import counted, listing
from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.records.measured import BaseFacts
from merge_gate.records.terms import Finding, Origin, Severity

_FETCH_ALL_FILES = (
    "fetch the base again, with its index and all of its shards, and check that config.json belongs to these files"
)


@Check(
    "base-incomplete", ERROR, Origin.BASE, Symptom.BAD_BASE, blame=10, page=__doc__, can_be_off=False, is_of_base=True
).on_merge
def base_incomplete(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.base.incomplete:
        made_up = tuple(name for name in evidence.base.incomplete if name in evidence.initialized)
        yield incomplete(evidence.base.model, made_up, evidence.base.loaded_as) if made_up else brought(evidence.base)


def of_base(base: BaseFacts) -> Iterator[Finding]:
    """What the report's list of bases has: whatever an adapter brings, the base lacks it."""
    if base.incomplete:
        yield incomplete(base.model, base.incomplete, base.loaded_as)


def incomplete(base: str, names: tuple[str, ...], class_name: str, where: str = "") -> Finding:
    """The finding of parameters that would be random. `where` names the places that were read for them."""
    return base_incomplete.finding(
        f"base {base} is incomplete: its files hold no tensor for {counted(len(names), 'parameter')} of {class_name}: "
        f"{listing(names, 3)}{where}; transformers would fill {'it' if len(names) == 1 else 'them'} with random values",
        _FETCH_ALL_FILES,
        module=names[0].rpartition(".")[0],
        tensor=names[0],
    )


def brought(base: BaseFacts) -> Finding:
    """The note that the adapter replaces all that the base lacks."""
    return base_incomplete.finding(
        f"base {base.model} holds no tensor for {counted(len(base.incomplete), 'parameter')} of {base.loaded_as}: "
        f"{listing(base.incomplete, 3)}; the adapter has {'it' if len(base.incomplete) == 1 else 'them'}",
        "nothing to do for this adapter; an adapter without these tensors cannot be judged on this base",
        severity=Severity.NOTE,
        module=base.incomplete[0].rpartition(".")[0],
        tensor=base.incomplete[0],
    )


def parameters_not_stored(
    base: str, class_name: str, names: tuple[str, ...], read: tuple[str, ...], elsewhere: tuple[str, ...] = ()
) -> Finding:
    """`read` are the base's files; `elsewhere` are others that have some of the parameters."""
    where = f" (looked at: {listing(read, 3)})"
    if elsewhere:
        where += f"; transformers does not read {listing(elsewhere, 3)}, which would have some of them"
    return incomplete(base, names, class_name, where)


REFUSALS = (parameters_not_stored,)
