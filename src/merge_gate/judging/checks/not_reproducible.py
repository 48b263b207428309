"""The merge depends on a random seed.

**Fires when** the merge depends on a random seed or on the base's dtype. There are three cases:

- `init_lora_weights` is `pissa_niter_*`. PEFT repeats a randomized decomposition of the base on every load.
- The adapter is an AdaMSS. Its file does not say which rows of the base its tensors belong to, and PEFT clusters the
  rows again on every load. [Two test adapters](../evidence/truth.md#pefts-own-test-configurations) show it.
- The adapter is a FRoD. PEFT repeats a part of the base's decomposition on every load. With a base in another dtype,
  the values in the file do not match it. A test adapter that was trained in float32 and merged in bfloat16 is wrong by
  several times its own effect.

If a file has no projections (`save_projection: false` of VeRA), the finding is a note: they follow from
`projection_prng_key`, which no file proves. State that key under `expect`, and the note goes away.

```text
init_lora_weights is 'pissa_niter_4': PEFT repeats a randomized decomposition of the base on every load, so each merge
gives other weights
```

**Why it matters.** The gate's measurements do not apply, bit for bit, to the model that you will release.

**What to do.** Convert a PiSSA adapter to plain LoRA when you save it (`path_initial_model_for_weight_conversion`).
Merge an AdaMSS or a FRoD on the machine that trained it, from a base in the same dtype.

**It happened.**

- We know of no report about PiSSA. [peft#3310](https://github.com/huggingface/peft/pull/3310) fixed the same defect in
  AdaMSS and PSOFT: a random decomposition was repeated on loading, so a saved adapter differed after loading.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import foreign
from merge_gate.judging.checks.check import NOTE, WARNING, Check, FileCase, Symptom
from merge_gate.records.terms import Finding, Origin


@Check("not-reproducible", WARNING, Origin.CONFIG, Symptom.UNTRAINED_MERGE, blame=250, page=__doc__).on_files
def not_reproducible(case: FileCase) -> Iterator[Finding]:
    scheme = case.files.config.init_lora_weights
    if scheme is not None and scheme.startswith("pissa_niter"):
        yield not_reproducible.finding(
            f"init_lora_weights is {foreign(scheme)}: PEFT repeats a randomized decomposition of the base on every "
            "load, so each merge gives other weights",
            "convert the adapter to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained)",
        )
    config, expect = case.files.config, case.spec.expect
    if not config.save_projection and (expect is None or expect.projection_prng_key is None):
        yield not_reproducible.finding(
            f"the file has no projections (save_projection is false): they follow from projection_prng_key "
            f"{config.projection_prng_key}, and no file proves that this is the key of the training",
            "state the key that was reviewed, `expect: {projection_prng_key: …}`, or save the adapter with its "
            "projections (save_projection: true)",
            severity=NOTE,
        )
    if case.files.config.peft_type == "ADAMSS":
        yield not_reproducible.finding(
            "the file does not say which rows of the base its tensors belong to: PEFT clusters the rows again on every "
            "load, and another dtype of the base, or another scikit-learn, may give other clusters",
            "merge on the machine that trained the adapter, into a base in the same dtype, and compare outputs before "
            "release",
        )
    if case.files.config.peft_type == "FROD":
        yield not_reproducible.finding(
            "the file has only a part of FRoD's decomposition of the base: PEFT decomposes the base again on every "
            "load, and in another dtype the decomposition no longer fits the file's values",
            "merge into a base in the dtype of the training, and compare outputs before release",
        )
