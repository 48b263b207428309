"""A tensor of the final model is not what it must be, or a merged layer computes something else than unmerged.

**Fires when** one of these is not so:

- A merge starts from the files. Before it, each place of the model has the base's tensor, a value of the adapter's
  file, or what the method puts there by definition (PiSSA, OLoRA, CorDA). Each tensor of the adapter has the file's
  values, in the file's order, or is as PEFT's injection has made it.
- A merged layer computes what the layer with its adapter computes. PEFT merges the layer in float32, and the gate runs
  it on made-up inputs, before and after. It fires if an output differs by more than 1 % of what the adapter changes
  of it, and by more than 1e-5 of the output. Every output of a layer counts.
- A merged tensor in another dtype is that merge, within the roundings that PEFT makes. A quantized weight has the bits
  that its quantizer makes of PEFT's sum.
- Every other tensor is the one that the base or the adapter's file has for that place.
- Every layer of the adapter was merged, and nothing was written to the base, from the injection on.
- A combination by `cat` is the weighted sum of its members' deltas, and one by `linear` is the product of the weighted
  sums of their factors. PEFT alone vouches for combinations by other methods.

Every layer that PEFT merges is compared, and one of each kind of the layers that the gate merges in blocks. [The page
on methods](../reference/methods.md#layers-that-are-compared) says what is not compared. `coverage` in the report counts
the layers that are proved and those that are not, with the reasons. So does the summary of a run that passes.

If PEFT merges a layer to other bits than the gate, PEFT merges all layers. If these merges are right, they count, and a
note names the layers.

```text
encoder.embed_positions (a MvpLearnedPositionalEmbedding) does not compute the same after the merge: in float32, it
differs from the unmerged layer by 128% of the adapter's change; so does decoder.embed_positions
```

**Why it matters.** The merged model is another model than the one that was trained and evaluated. All of its values are
finite, so nothing else shows it.

**What to do.** Serve the adapter unmerged, as it was trained. Or exclude the layer (`exclude_modules`) and train again.
If the finding names a tensor, PEFT or torch is broken: try other versions of them.

**It happened.**

- [peft#1707](https://github.com/huggingface/peft/issues/1707): `layer_replication` merges without an error, into a
  different model.
- [peft#3779](https://github.com/huggingface/peft/issues/3779): a bias was added without its scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import counted, listing
from merge_gate.judging.checks.check import ERROR, NOTE, Check, MergeCase, Symptom
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
    yield from _of_layers(case)
    yield from _of_tensors(case)
    evidence = case.evidence
    if evidence.differing and not evidence.different and not evidence.wrong:
        yield merge_differs.finding(
            f"{evidence.versions} merged {listing(evidence.differing)} to other bits than the gate, so PEFT merged all "
            "layers. Its merge is the unmerged layers, within rounding",
            "there is nothing to do for this adapter; please report the versions to merge-gate",
            severity=NOTE,
            module=evidence.differing[0],
            layers=len(evidence.differing),
        )


def _of_layers(case: MergeCase) -> Iterator[Finding]:
    different = sorted(case.evidence.different, key=lambda layer: -layer.change_share)
    if not different:
        return
    worst, *others = different
    runs = worst.change_share < math.inf
    wrong = f"it differs from the unmerged layer by {worst.change_share:.0%} of the adapter's change"
    also = (
        f"; so {'do' if len(others) > 1 else 'does'} {listing(tuple(layer.module for layer in others))}"
        if others
        else ""
    )
    yield merge_differs.finding(
        f"{worst.module} (a {worst.class_name}) does not compute the same after the merge: in float32, "
        f"{wrong if runs else 'it does not run on inputs of the unmerged layer'}{also}",
        "serve the adapter unmerged, as it was trained; or exclude that layer (exclude_modules) and train again",
        module=worst.module,
        layers=len(different),
        share=float(f"{worst.change_share:.2g}") if runs else None,  # rounded, so that all dtypes have the same
    )


_FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "load": "PEFT's load of the adapter has changed this place, for which the adapter's file has nothing",
        "factors": "before the merge, the adapter's tensors in this layer are not those of its file",
        "settings": "before the merge, its strength, tokens, or another setting are not those of its configuration",
        "before": "PEFT replaced it before its layer was merged",
        "in": "PEFT's merge in the final dtype is not its merge in float32, within rounding",
        "after": "it is not the tensor that the base, the adapter's file, or the merge of its layer has for this place",
        "not merged": "PEFT did not merge this layer",
        "packed": "the packed weight is not what the quantizer makes of PEFT's sum",
    }
)


_OF_LAYERS = ("factors", "not merged", "settings")
"""Faults that have a layer in place of a tensor."""


def _of_tensors(case: MergeCase) -> Iterator[Finding]:
    wrong = case.evidence.wrong
    if not wrong:
        return
    worst, *others = wrong
    also = f"; {listing(tuple(tensor.tensor for tensor in others))} {'are' if len(others) > 1 else 'is'} wrong, too"
    values = "" if worst.values is None else f": {counted(worst.values, 'value')} differ"
    factor = "" if worst.factor is None else f", and it has {worst.factor:.2f} times the change"
    yield merge_differs.finding(
        f"{worst.tensor} is wrong in the merged model: {_FAULTS[worst.fault]}{values}{factor}{also if others else ''}",
        _BROKEN.format(versions=f" ({case.evidence.versions})"),
        module=worst.tensor if worst.fault in _OF_LAYERS else module_of(worst.tensor),
        tensor=None if worst.fault in _OF_LAYERS else worst.tensor,
        tensors=len(wrong),
        values=worst.values,
        factor=worst.factor,
    )


_BROKEN = "PEFT or torch is broken{versions}: install other versions, or serve the adapter unmerged"


def base_written(tensor: str, operation: str, step: str) -> Finding:
    return merge_differs.finding(
        f"PEFT's {step} writes into {tensor} in the memory of the base ({operation}): it was stopped before that",
        _BROKEN.format(versions=""),
        module=module_of(tensor),
        tensor=tensor,
    )


def place_changed(tensor: str, step: str) -> Finding:
    return merge_differs.finding(
        f"{tensor} is wrong before the merge: PEFT's {step} has put something else in its place than the base has",
        _BROKEN.format(versions=""),
        module=module_of(tensor),
        tensor=tensor,
    )


def factors_displaced(module: str, joined: float) -> Finding:
    """`joined`: so many tensors of the file become one; 0 if values of one tensor are exchanged."""
    why = (
        "what it adds there is not what the base's class makes of tensors of the same names "
        f"({counted(int(joined), 'tensor')} of the file were joined)"
        if joined
        else "rows, halves, or single values are exchanged"
    )
    return merge_differs.finding(
        f"PEFT has put the factors of {module} in another order than the file's: {why}",
        _BROKEN.format(versions=""),
        module=module,
    )


def combined_wrongly(module: str, method: str, share: float) -> Finding:
    must_be = {
        "cat": "the weighted sum of its members' deltas",
        "linear": "the product of the weighted sums of their factors",
    }[method]
    return merge_differs.finding(
        f"{module} of the combination is not {must_be}: it differs from that by {share:.0%}",
        _BROKEN.format(versions=""),
        module=module,
    )


REFUSALS = (base_written, place_changed, factors_displaced, combined_wrongly)
