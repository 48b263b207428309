"""The method cannot be merged into weights, or its merge is known to be wrong.

**Fires when** the adapter has no correct merge. There are three reasons:

- The method has no weights to merge, such as prompt tuning.
- PEFT refuses to merge it, or its merge is known to differ from the adapter's forward pass. [The page on
  methods](../reference/methods.md#what-cannot-be-merged) lists all cases.
- The model [reads the weight of a targeted layer without calling the
  layer](../reference/methods.md#layers-that-a-model-never-calls), and the method starts with a delta other than zero.
  The merge would add that untrained delta. The finding is a warning, or an error if the layer can hold only initial
  values.

```text
PROMPT_TUNING adds inputs or layers to the model at run time and has no weights to merge
```

**Why it matters.** Nothing is broken, but there is no merged model that you could release.

**What to do.** Serve the adapter unmerged, and remove it from the gate. If only the quantized merge is wrong, check it
on the unquantized base. If a layer is never called, exclude it (`exclude_modules`) and train again.

**It happened.**

- [peft#1030](https://github.com/huggingface/peft/issues/1030),
  [peft#2538](https://github.com/huggingface/peft/issues/2538): prompt tuning and P-tuning ended in "no attribute
  merge_and_unload" after the training was done.
- [peft#1853](https://github.com/huggingface/peft/issues/1853): QLoRA on an AWQ base ended in a `NotImplementedError`
  without a text.
- [peft#1707](https://github.com/huggingface/peft/issues/1707): `layer_replication` merges without an error, into a
  different model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from merge_gate._internal.text import listing
from merge_gate.judging.checks.check import ERROR, WARNING, Check, FileCase, MergeCase, Symptom
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.measured import UnreadLayer
from merge_gate.records.terms import FailureKind, Finding, Origin

UNREAD_SHARE = 2.0**-8
"""A delta of this share of a weight is more than bfloat16 rounds away."""

EXTRACTED = frozenset({"LORA", "ADALORA", "LOHA", "LOKR"})
"""Methods whose factors may be extracted from a fully trained model. Then the merged model is the intended result."""

WITHOUT_WEIGHTS = frozenset((
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING",
))  # fmt: skip
"""PEFT's methods that cannot be merged whatever the base is."""


def _has_no_weights(case: FileCase) -> Iterator[Finding]:
    method = case.files.config.peft_type
    if method in WITHOUT_WEIGHTS:
        yield known_defect("no-weights", method)


@Check(
    "not-mergeable",
    ERROR,
    Origin.CONFIG,
    Symptom.UNTRAINED_MERGE,
    blame=140,
    page=__doc__,
    failure=FailureKind.NOT_MERGEABLE,
    of_files=_has_no_weights,
).on_merge
def not_mergeable(case: MergeCase) -> Iterator[Finding]:
    unread = case.evidence.unread
    if not unread:
        return
    is_single = len(unread) == 1
    worst = max(unread, key=lambda layer: layer.share)
    share = f"{worst.share:.2g}"
    layers, them, those = (
        ("a layer", "it", "that layer") if is_single else (f"{len(unread):,} layers", "them", "those layers")
    )
    yield not_mergeable.finding(
        f"the model reads the weight of {layers} without calling {them}: "
        f"{listing(tuple(layer.module for layer in unread))}; the adapter has no effect there until it is merged, "
        f"not even in training, and the merge changes {'that weight by' if is_single else 'those weights by up to'} "
        f"{share} times its norm",
        f"serve the adapter unmerged, as it was trained; or exclude {those} (exclude_modules) and train again",
        severity=None if any(_is_proved(case, layer) for layer in unread) else WARNING,
        module=worst.module,
        layers=len(unread),
        share=float(share),  # rounded, so that all dtypes have the same
    )


def _is_proved(case: FileCase, layer: UnreadLayer) -> bool:
    """Whether no release has called the layer, what the model is for depends on it, and no training made its delta."""
    config = case.files.config
    made_elsewhere = config.peft_type in EXTRACTED and config.init_lora_weights is None  # init_lora_weights: false
    return layer.never_called and layer.in_logits and layer.share > UNREAD_SHARE and not made_elsewhere


_UNPACKED = "gate it on the unquantized base (quantization: none) and merge there"


DEFECTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "no-weights": (
            "{method} adds inputs or layers to the model at run time and has no weights to merge",
            "serve the adapter unmerged, and leave it out of this gate",
        ),
        "x-lora": (
            "X-LoRA chooses between adapters for each token; PEFT's merge drops the router and keeps one expert",
            "serve it unmerged, or gate the single expert that you want to merge",
        ),
        "arrow": ("Arrow routes between adapters for each token and cannot be one merged weight", "serve it unmerged"),
        "layer-replication": (
            "layer_replication changes the number of layers, and PEFT's merge does not reproduce that (peft#1707)",
            "serve the adapter unmerged on the replicated model",
        ),
        "merged-twice": (
            "two layers that share one weight carry an adapter each, and PEFT adds both deltas to that weight",
            "untie the base's embeddings before training and merging, or adapt other modules",
        ),
        "quantized-unknown": (
            "PEFT has no bitsandbytes layer for this method, and merges packed integers as if they were weights",
            _UNPACKED,
        ),
        "quantized-random-projection": (
            "PEFT merges this method into bitsandbytes layers in another order than its forward computes",
            _UNPACKED,
        ),
        "quantized-lora-bias": (
            (
                "PEFT adds lora_bias to a bitsandbytes layer without its scaling, and its safe_merge fails there on "
                "good adapters too (peft/tuners/lora/bnb.py)"
            ),
            _UNPACKED,
        ),
        "bone": (
            "BONE was renamed to MiSS and removed in PEFT 0.19: no PEFT that the gate runs merges it",
            "convert it with scripts/convert-bone-to-miss.py of PEFT's repository, or merge it with PEFT 0.18",
        ),
    }
)
"""What PEFT is known to merge wrongly, or not at all, and what to do (engine/adapter/known_defects.py finds them)."""


def known_defect(defect: str, method: str = "this method", modules: tuple[str, ...] = ()) -> Finding:
    """`method` is PEFT's name of it. `modules` are empty if the defect concerns the whole adapter."""
    reason, hint = DEFECTS[defect]
    place = f" (in {listing(modules, 1)})" if modules else ""
    return not_mergeable.finding(f"{reason.format(method=method)}{place}", hint, module=modules[0] if modules else None)


def loftq_without_gpu() -> Finding:
    return not_judged(
        "init_lora_weights is 'loftq': PEFT quantizes the base whenever it loads this adapter, on a GPU only",
        "gate it on a machine with a GPU; if it was trained on a base that LoftQ had quantized and saved, name that "
        "base and set init_lora_weights to true in adapter_config.json",
        origin=Origin.CONFIG,
    )


def layer_left_unmerged(module: str) -> Finding:
    return not_mergeable.finding(
        f"PEFT left {module} unmerged in its result",
        "of two layers, one inside of the other, PEFT merges the outer one only (target_parameters on a module, "
        "target_modules on a part of it): serve the adapter unmerged, or train it again with one of the two",
        origin=Origin.MERGE,
        module=module,
    )


def result_lacks_tensors(names: tuple[str, ...], in_wrapper: bool) -> Finding:
    """`in_wrapper`: the result has trained modules that are still wrapped."""
    message = f"PEFT's result lacks {listing(names, 3)} of the base"
    if not in_wrapper:
        return not_mergeable.finding(message, "", origin=Origin.MERGE)
    return not_mergeable.finding(
        f"{message}: it leaves what modules_to_save names in its wrapper, and saves it under other names",
        "put each wrapper's trained module (modules_to_save.default) in its place before the merged model is "
        "saved, or serve the adapter unmerged",
        origin=Origin.MERGE,
    )


def setting_lost(adapter: str, setting: str) -> Finding:
    return not_mergeable.finding(
        f"PEFT combines adapters with {setting} (here {adapter}) into something other than their weighted sum",
        "merge this adapter alone, or retrain it without that setting before combining it",
    )


def tensor_unweighted(adapter: str, tensor: str) -> Finding:
    return not_mergeable.finding(
        f"{adapter} has {tensor} whole, and PEFT ignores its weight: it applies weights to factors of LoRA only",
        "merge this adapter alone, or combine members without trained biases or embeddings",
        module=tensor.rpartition(".")[0],
        tensor=tensor,
    )


def two_vocabularies(adapters: tuple[str, ...], tensor: str) -> Finding:
    return not_mergeable.finding(
        f"{listing(adapters)} have different values for the rows of {tensor} that the base lacks, and PEFT takes those "
        "of the last one",
        "merge each alone, or train them from one base whose vocabulary has been enlarged and saved",
        module=tensor.rpartition(".")[0],
        tensor=tensor,
    )


def modules_left_out(adapter: str, modules: tuple[str, ...]) -> Finding:
    return not_mergeable.finding(
        f"PEFT leaves {listing(modules)} of {adapter} out of the combination: it takes layers_to_transform and "
        "exclude_modules of the first member, and no module that is trained whole (modules_to_save)",
        "name the member that adapts the most layers first; merge one with a trained head alone",
        module=modules[0],
    )


REFUSALS = (
    known_defect, loftq_without_gpu, layer_left_unmerged, result_lacks_tensors, setting_lost,
    tensor_unweighted, two_vocabularies, modules_left_out,
)  # fmt: skip
