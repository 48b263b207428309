"""The merge changes nothing.

**Fires when** the merge leaves every targeted module with the values of the base, or changes them only by its own
rounding. −0.0 equals 0.0. If only some modules are unchanged, the finding is a warning. It is a note on modules that
`merge-gate export` has filled with zeros.

For most methods, an untrained delta is exactly zero, so every other delta counts as a change. These cases are
different:

- Some merges round although nothing was trained. A DoRA normalizes each row again, and a PiSSA adds what it has
  subtracted from the base. Members of a combination that cancel each other leave rounding of their product.
- BOFT, DEFT, FRoD, HRA, OFT, OSF, PSOFT, RoAd, and KaSA rotate or decompose the weight. For these, a delta below 2⁻²⁰
  of the weight's norm counts as zero.
- PEFT rounds the initial values of DEFT and FRoD on a 16-bit base, and of a LoRA with orthogonal factors. For these, a
  delta counts as zero if it is not larger than that rounding.
- A KaSA adapter has no effect if every `lora_B` is zero, although its merge subtracts a part of the base.

```text
the merge changes nothing: all 4 targeted modules keep the values of the base (every lora_B is zero, as before training)
```

**Why it matters.** The release would be the base under a new name.

**What to do.** The adapter was saved before training, or its tensors were not gathered when it was saved. If the delta
is not zero but too small for the dtype, see [rounding-loss](rounding-loss.md).

**It happened.**

- [tloen/alpaca-lora#357](https://github.com/tloen/alpaca-lora/issues/357): every `lora_B` was zero after training, and
  the model answered like the base.
- [unslothai/unsloth#869](https://github.com/unslothai/unsloth/issues/869): the saved merged model was identical to the
  base.
- [trl#386](https://github.com/huggingface/trl/issues/386): an example script never called the merge.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import counted, listing
from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import are, is_inside, with_sharers
from merge_gate.records.measured import Evidence
from merge_gate.records.terms import Finding, Origin, Severity

_UNTRAINED = (
    "the adapter was saved before training, or without gathering its tensors (ZeRO-3, FSDP): train it, or save it again"
)

_SEE_MISSING = "the missing tensors are the reason: see keys-missing"


@Check("no-effect", ERROR, Origin.ADAPTER, Symptom.NO_EFFECT, blame=200, page=__doc__).on_merge
def no_effect(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.refusal is not None:
        return
    # keys-missing has reported these, and they explain why modules do not change
    missing = {module_of(name) for name in evidence.missing}
    zeros = {file.stats.name for file in evidence.file_tensors if file.stats.minimum == file.stats.maximum == 0.0}
    lora_b = {file.stats.name for file in evidence.file_tensors if "lora_B" in file.stats.name}
    is_untrained = bool(lora_b) and lora_b <= zeros
    # KaSA reduces weights before training, whatever the factors are
    is_kasa = is_untrained and any(key == "kasa_config" for key, _ in case.files.config.values)
    changed_by_kasa = {f"{module_of(name)}.weight" for name in lora_b} if is_kasa else set()
    altered = {
        merge.module
        for merge in evidence.merges
        if (merge.changed or not merge.stats.finite)  # NaN of the base stays NaN
        and merge.stats.name not in changed_by_kasa
    }
    changed = with_sharers(evidence, altered)
    pruned = _pruned(evidence)
    unchanged = tuple(name for name in evidence.targeted if not is_inside(name, changed) and name not in pruned)
    trained = {module_of(file.stats.name) for file in evidence.file_tensors if file.stats.name not in zeros}
    padding = tuple(name for name in unchanged if name in case.files.padding and name not in trained)
    if changed and padding:
        yield no_effect.finding(
            f"{counted(len(padding), 'module')} {are(padding)} padding of an export, with factors of zeros: "
            f"{listing(padding)}",
            "there is nothing to do: servers expect these modules",
            severity=Severity.NOTE,
            module=padding[0],
            modules_unchanged=len(padding),
        )
        unchanged = tuple(name for name in unchanged if name not in padding)
    if not changed:
        reason = "the delta is zero, or smaller than the dtype can add"
        if missing:
            reason = "its tensors are missing"
        elif is_untrained:
            reason = "every lora_B is zero, as before training"
        elif case.files.config.lora_alpha == 0:
            reason = "lora_alpha is 0"
        yield no_effect.finding(
            f"the adapter adds nothing to {counted(len(evidence.targeted), 'targeted module')} ({reason}); the merge "
            "only removes the base's smallest singular values, as KaSA does before training"
            if changed_by_kasa
            else f"the merge changes nothing: {_modules(evidence.targeted)} of the base ({reason})",
            _SEE_MISSING
            if missing
            else "with these weights the members cancel each other, or each was saved before training"
            if case.spec.combine is not None
            else "restore lora_alpha in adapter_config.json, which scales the delta"
            if case.files.config.lora_alpha == 0
            else _UNTRAINED
            if zeros or evidence.base.dtype == "float32"
            else f"{_UNTRAINED}; if its values are small, merge into a float32 base",
            module=evidence.targeted[0] if evidence.targeted else None,
            modules_unchanged=len(evidence.targeted),
        )
    elif unchanged:
        by = "adapter (KaSA's change before training does not count)" if changed_by_kasa else "merge"
        yield no_effect.finding(
            f"{len(unchanged):,} of {counted(len(evidence.targeted), 'targeted module')} {are(unchanged)} not changed "
            f"by the {by}: {listing(unchanged)}",
            _SEE_MISSING
            if missing.issuperset(unchanged)
            else "if you meant to train these modules, their tensors were never updated, or were not saved: train "
            "them, or save again. If not, there is nothing to do",
            severity=Severity.WARNING,
            module=unchanged[0],
            modules_unchanged=len(unchanged),
        )


def _pruned(evidence: Evidence) -> set[str]:
    """Modules whose rank AdaLoRA pruned to 0 because they matter least. They are healthy."""
    if evidence.peft_type != "ADALORA":
        return set()
    return {module_of(file.stats.name) for file in evidence.file_tensors if 0 in file.stats.shape}


def _modules(targeted: tuple[str, ...]) -> str:
    return (
        "the only targeted module keeps the values"
        if len(targeted) == 1
        else f"all {len(targeted):,} targeted modules keep the values"
    )
