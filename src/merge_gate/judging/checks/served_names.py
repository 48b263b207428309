"""The class in the base's config.json has the adapter's modules under other names.

**Fires when** the adapter was trained on the text class of a base that is more than a text model, and merges rightly.
Its names then lack a part that the whole model's names have. A Qwen3.5, for example, has
`model.language_model.layers.3.self_attn.q_proj`, and its text class has `model.layers.3.self_attn.q_proj`.
`AutoModelForCausalLM` chooses the text class for some of these bases, and the whole model for others.

- The check compares the class that the gate loaded with the one in `architectures` of config.json, which servers load.
- Names that transformers itself renames do not count.
- The finding is a `note`. If you serve adapters unmerged, make it an error: `checks: {served-names: error}`.

```text
the adapter's names of 2 modules are those of Qwen3_5ForCausalLM: model.layers.1.self_attn.q_proj, for example, is
model.language_model.layers.1.self_attn.q_proj in Qwen3_5ForConditionalGeneration, which config.json of the base
names; the merge is right, but a server that loads the adapter unmerged may apply nothing of it
```

**Why it matters.** PEFT merges such an adapter into the text class, so the merged model is right. A server that loads
the adapter unmerged looks for its names in the whole model. It may find none, and then answers like the base without
an error.

**What to do.** Serve the merged model (`--publish DIR`), or export the adapter with the names of the whole model:
`merge-gate export ADAPTER --base BASE --output DIR`. Before you train the next adapter, load the base by the class in
`architectures`.

**It happened.**

- [vllm-project/vllm#48019](https://github.com/vllm-project/vllm/issues/48019): models that contain a text model
  accepted adapters of the text model, and did not change.
- [vllm-project/vllm#39369](https://github.com/vllm-project/vllm/pull/39369): an adapter that was trained on a Qwen3.5
  by `AutoModelForCausalLM` was loaded, and no module was activated.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import counted
from merge_gate.judging.checks.check import NOTE, Check, MergeCase, Symptom
from merge_gate.records.terms import Finding, Origin


@Check("served-names", NOTE, Origin.ADAPTER, Symptom.TENSORS_LOST, blame=280, page=__doc__).on_merge
def served_names(case: MergeCase) -> Iterator[Finding]:
    evidence, served = case.evidence, case.evidence.served
    if served is not None and served.lacking and evidence.refusal is None and not evidence.missing:
        module, count = served.lacking[0], len(served.lacking)
        yield served_names.finding(
            f"the adapter's names of {counted(count, 'module')} are those of {served.loaded}: {module}, for "
            f"example, is {served.names[module]} in {served.name}, which config.json of the base names; the merge is "
            "right, but a server that loads the adapter unmerged may apply nothing of it",
            "to serve it unmerged, write it with the names of that class: `merge-gate export ADAPTER --base BASE "
            "--output DIR`; or serve the merged model (`--publish DIR`)",
            module=module,
            modules_renamed=count,
        )
