"""Why PEFT could not put an adapter on a base, merge it, or combine it with others, as findings.

In: facts of the engine (records/refusals.py). Out: `Finding`s. Imports no torch and opens no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from merge_gate.judging.checks.check import Check
from merge_gate.judging.checks.file_checks import CONFIG_INVALID, FILE_CORRUPT
from merge_gate.judging.checks.fit import NO_WEIGHTS, SHAPE_MISMATCH, keys_missing, not_mergeable
from merge_gate.judging.checks.phrases import RESTORE_CONFIG
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.refusals import (
    Defect,
    KnownDefect,
    LayerLeftUnmerged,
    ModulesLeftOut,
    OtherForward,
    PeftRaised,
    ResultLacksTensors,
    SettingLost,
    Step,
    TensorUnweighted,
    TwoVocabularies,
)
from merge_gate.records.terms import Finding, Origin, Quantization
from merge_gate.text import listing

INSTALL = "install the package that the message names in the environment that runs the gate"
_SAVE_AGAIN = "save the adapter again with save_pretrained"
_OUT_OF_BOUNDS = "is out of bounds for dimension"  # torch's words for an index that points nowhere

DOCUMENTED_ON_PACKED = frozenset({"ADALORA", "IA3", "LOHA", "FOURIERFT", "DELORA", "OSF", "RANDLORA", "PVERA"})
"""Methods that docs/reference/methods.md says PEFT cannot merge into a base in bitsandbytes' formats."""


# --- an exception of PEFT --------------------------------------------------------------------------------------------


def peft_raised(fact: PeftRaised) -> Finding:
    """The finding of an exception of PEFT, which depends on what PEFT was doing."""
    if fact.error.is_a("ImportError"):
        what = (
            "merging needs a package that" if fact.step is Step.MERGE else "a package that this adapter or base needs"
        )
        return not_judged(f"{what} is not installed: {fact.error.text}", INSTALL)
    return _BY_STEP[fact.step](fact)


def _on_config(fact: PeftRaised) -> Finding:
    if "weights are incompatible" in fact.error.detail:  # OFT up to PEFT 0.13
        return not_mergeable.finding(
            f"PEFT has changed {fact.method} since this adapter was saved: {fact.error.text}",
            "the file is not at fault: merge it with the release that PEFT names, or train it again",
            Origin.CONFIG,
        )
    return CONFIG_INVALID.finding(f"PEFT rejects adapter_config.json: {_named(fact)}", RESTORE_CONFIG, Origin.CONFIG)


def _on_inject(fact: PeftRaised) -> Finding:
    text = fact.error.text
    if fact.trains_tokens and fact.error.is_a("IndexError"):
        return _unknown_tokens(
            fact, "name the base with the enlarged vocabulary, or save the adapter with save_embedding_layers=True"
        )
    if "Unknown initialization" in text:
        return CONFIG_INVALID.finding(
            f"adapter_config.json sets an initialization that PEFT does not know: {text}",
            "it plays no part in a merge unless it names a part of the base (pissa, olora, corda): set it to "
            f"true, or {RESTORE_CONFIG}",
            Origin.CONFIG,
        )
    if "dropout probability" in text:
        return CONFIG_INVALID.finding(
            f"adapter_config.json sets a dropout that PEFT refuses: {text}",
            f"dropout plays no part in a merge: {RESTORE_CONFIG}",
            Origin.CONFIG,
        )
    if "preprocess_corda" in text:
        return not_mergeable.finding(
            f"PEFT cannot load a CorDA adapter as it was trained: {text}",
            "convert it to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained); "
            "or, if the base less its first factors was saved, name that base and set init_lora_weights to true",
            Origin.CONFIG,
        )
    return _blamed(
        fact,
        f"PEFT cannot put this {fact.method} adapter on base {fact.base}: {text}",
        "PEFT's own message says what is not supported; retrain with a supported setting, or serve it unmerged",
        Origin.CONFIG,
    )


def _on_load(fact: PeftRaised) -> Finding:
    text, detail = fact.error.text, fact.error.detail
    if "from state dictionary however" in detail:  # the shared projections of VeRA, PVeRA, FRoD, TinyLoRA
        return keys_missing.finding(
            f"the file lacks projections that save_projection in adapter_config.json promises: {text}",
            f"{_SAVE_AGAIN}, and check that the upload was complete; set save_projection to false only if it was saved "
            "so",
            Origin.ADAPTER,
        )
    if _OUT_OF_BOUNDS in detail:  # VB-LoRA's choice of vectors
        return SHAPE_MISMATCH.finding(
            f"the file's indices name places that config and base do not have: {text}",
            "adapter_config.json is not that of the training (num_vectors), or the file is damaged",
            Origin.ADAPTER,
        )
    message = f"PEFT cannot load the adapter's weights: {_named(fact)}"
    hint = f"{_SAVE_AGAIN}; weights must be tensors only"
    if fact.error.kinds[0] in {"SafetensorError", "UnpicklingError", "EOFError"}:
        return FILE_CORRUPT.finding(message, hint, Origin.FILE)
    if fact.error.is_a("ValueError", "RuntimeError"):
        return CONFIG_INVALID.finding(message, hint, Origin.CONFIG)
    return not_judged(message, hint, origin=Origin.CONFIG)


def _on_add(fact: PeftRaised) -> Finding:
    return not_mergeable.finding(
        f"PEFT cannot put a second adapter next to the first: {fact.error.text}",
        "combine adapters of one method only, without fully trained modules in common",
        Origin.CONFIG,
    )


def _on_combine(fact: PeftRaised) -> Finding:
    members, method = fact.combination
    return not_mergeable.finding(
        f"PEFT cannot combine {listing(members, 6)} by {method}: {_named(fact)}",
        "members need the same rank for linear methods (use cat or svd else) and weights PEFT accepts",
        Origin.CONFIG,
    )


def _on_merge(fact: PeftRaised) -> Finding:
    text = fact.error.text
    if fact.trains_tokens and fact.error.is_a("IndexError"):
        return _unknown_tokens(fact, f"{RESTORE_CONFIG}, or name the base of the training")
    if any(words in text for words in ("inconsistent with indices", "sparse_dim", _OUT_OF_BOUNDS)):
        return SHAPE_MISMATCH.finding(
            f"the file's indices name places that the base's weight does not have: {text}",
            "this is not the base that the adapter was trained on, or the file is damaged",
            Origin.ADAPTER,
        )
    return _blamed(
        fact,
        f"PEFT cannot merge this {fact.method} adapter: {_named(fact)}",
        "PEFT's own message says what is not supported; serve the adapter unmerged, or retrain it without that",
        Origin.MERGE,
    )


_BY_STEP: Mapping[Step, Callable[[PeftRaised], Finding]] = MappingProxyType(
    {
        Step.CONFIG: _on_config,
        Step.INJECT: _on_inject,
        Step.LOAD: _on_load,
        Step.ADD: _on_add,
        Step.COMBINE: _on_combine,
        Step.MERGE: _on_merge,
    }
)


def _named(fact: PeftRaised) -> str:
    return f"{fact.error.kinds[0]}: {fact.error.text}"


def _unknown_tokens(fact: PeftRaised, hint: str) -> Finding:
    return SHAPE_MISMATCH.finding(
        f"trainable_token_indices name rows that the base's vocabulary does not have: {fact.error.text}",
        hint,
        Origin.CONFIG,
    )


def _blamed(fact: PeftRaised, message: str, hint: str, origin: Origin) -> Finding:
    """On a quantized or incomplete base an exception of PEFT proves nothing about the adapter.

    It does if docs/reference/methods.md says that PEFT cannot merge this method there.
    """
    is_documented = fact.quantization in set(Quantization) and fact.method in DOCUMENTED_ON_PACKED
    if not fact.is_incomplete and (fact.quantization == Quantization.NONE or is_documented):
        return not_mergeable.finding(message, hint, origin)
    kind = "incomplete" if fact.is_incomplete else f"quantized: {fact.quantization}"
    return not_judged(
        f"{message} (the base is {kind})", "gate and merge on the complete, unquantized base", origin=Origin.BASE
    )


# --- known defects ---------------------------------------------------------------------------------------------------


class _Words(NamedTuple):
    """What a defect is, what to do about it, and its check; None: the gate cannot judge the adapter."""

    reason: str
    hint: str
    check: Check | None = not_mergeable


_UNPACKED = "gate it on the unquantized base (quantization: none) and merge there"

DEFECTS: Mapping[Defect, _Words] = MappingProxyType(
    {
        Defect.NO_WEIGHTS: _Words(
            *NO_WEIGHTS,
        ),
        Defect.X_LORA: _Words(
            "X-LoRA chooses between adapters for each token; PEFT's merge drops the router and keeps one expert",
            "serve it unmerged, or gate the single expert that you want to merge",
        ),
        Defect.ARROW: _Words(
            "Arrow routes between adapters for each token and cannot be one merged weight", "serve it unmerged"
        ),
        Defect.LAYER_REPLICATION: _Words(
            "layer_replication changes the number of layers, and PEFT's merge does not reproduce that (peft#1707)",
            "serve the adapter unmerged on the replicated model",
        ),
        Defect.MERGED_TWICE: _Words(
            "two layers that share one weight carry an adapter each, and PEFT adds both deltas to that weight",
            "untie the base's embeddings before training and merging, or adapt other modules",
        ),
        Defect.TOKENS_WITHOUT_BIAS: _Words(
            "while tokens are trained PEFT leaves out the bias of a linear layer that carries them, and the merged "
            "model has it (peft/tuners/trainable_tokens/layer.py)",
            "serve it unmerged, as it was trained; or train the tokens again on a base whose head has no bias, or is "
            "not tied to the embedding",
        ),
        Defect.OFT_CONVOLUTION: _Words(
            "OFT on a convolution with a kernel larger than 1 merges into weights that do not compute its forward",
            "serve it unmerged, or adapt only 1x1 convolutions and linear layers",
        ),
        Defect.QUANTIZED_UNKNOWN: _Words(
            "PEFT has no bitsandbytes layer for this method, and merges packed integers as if they were weights",
            _UNPACKED,
        ),
        Defect.QUANTIZED_RANDOM_PROJECTION: _Words(
            "PEFT merges this method into bitsandbytes layers in another order than its forward computes", _UNPACKED
        ),
        Defect.QUANTIZED_LORA_BIAS: _Words(
            "PEFT adds lora_bias to a bitsandbytes layer without its scaling, and its safe_merge fails there on good "
            "adapters too (peft/tuners/lora/bnb.py)",
            _UNPACKED,
        ),
        Defect.BONE: _Words(
            "BONE was renamed to MiSS and removed in PEFT 0.19: no PEFT that the gate runs merges it",
            "convert it with scripts/convert-bone-to-miss.py of PEFT's repository, or merge it with PEFT 0.18",
        ),
        Defect.LOFTQ_WITHOUT_GPU: _Words(
            "init_lora_weights is 'loftq': PEFT quantizes the base whenever it loads this adapter, on a GPU only",
            "gate it on a machine with a GPU; if it was trained on a base that LoftQ had quantized and saved, name "
            "that base and set init_lora_weights to true in adapter_config.json",
            check=None,
        ),
    }
)
"""The words of each defect; the engine finds them (engine/adapter/known_defects.py)."""


def known_defect(fact: KnownDefect) -> Finding:
    reason, hint, check = DEFECTS[fact.defect]
    reason = reason.format(method=fact.method or "this method")
    if check is None:
        return not_judged(reason, hint, origin=Origin.CONFIG)
    place = f" (in {listing(fact.modules, 1)})" if fact.modules else ""
    return check.finding(f"{reason}{place}", hint, Origin.CONFIG, module=fact.modules[0] if fact.modules else None)


def other_forward(fact: OtherForward) -> Finding:
    return not_mergeable.finding(
        f"{fact.module} is a {fact.class_name}, which does more than multiply by its weight or look up its rows: "
        f"the outputs of the merged layer differ from the unmerged layer's by {fact.share:.0%} of the adapter's change",
        "serve the adapter unmerged, as it was trained; or exclude that layer (exclude_modules) and train again",
        Origin.CONFIG,
        module=fact.module,
    )


# --- PEFT's result ---------------------------------------------------------------------------------------------------


def layer_left_unmerged(fact: LayerLeftUnmerged) -> Finding:
    return not_mergeable.finding(
        f"PEFT left {fact.module} unmerged in its result",
        "of two layers, one inside of the other, PEFT merges the outer one only (target_parameters on a module, "
        "target_modules on a part of it): serve the adapter unmerged, or train it again with one of the two",
        Origin.MERGE,
        module=fact.module,
    )


def result_lacks_tensors(fact: ResultLacksTensors) -> Finding:
    message = f"PEFT's result lacks {listing(fact.names, 3)} of the base"
    if not fact.in_wrapper:
        return not_mergeable.finding(message, "", Origin.MERGE)
    return not_mergeable.finding(
        f"{message}: it leaves what modules_to_save names in its wrapper, and saves it under other names",
        "put each wrapper's trained module (modules_to_save.default) in its place before the merged model is "
        "saved, or serve the adapter unmerged",
        Origin.MERGE,
    )


# --- a combination ---------------------------------------------------------------------------------------------------


def setting_lost(fact: SettingLost) -> Finding:
    return not_mergeable.finding(
        f"PEFT combines adapters with {fact.setting} (here {fact.adapter}) into something other than their weighted "
        "sum",
        "merge this adapter alone, or retrain it without that setting before combining it",
        Origin.CONFIG,
    )


def tensor_unweighted(fact: TensorUnweighted) -> Finding:
    return not_mergeable.finding(
        f"{fact.adapter} has {fact.tensor} whole, and PEFT ignores its weight: it applies weights to factors of "
        "LoRA only",
        "merge this adapter alone, or combine members without trained biases or embeddings",
        Origin.CONFIG,
        module=fact.tensor.rpartition(".")[0],
        tensor=fact.tensor,
    )


def two_vocabularies(fact: TwoVocabularies) -> Finding:
    return not_mergeable.finding(
        f"{listing(fact.adapters)} have different values for the rows of {fact.tensor} that the base lacks, and PEFT "
        "takes those of the last one",
        "merge each alone, or train them from one base whose vocabulary has been enlarged and saved",
        Origin.CONFIG,
        module=fact.tensor.rpartition(".")[0],
        tensor=fact.tensor,
    )


def modules_left_out(fact: ModulesLeftOut) -> Finding:
    return not_mergeable.finding(
        f"PEFT leaves {listing(fact.modules)} of {fact.adapter} out of the combination: it takes layers_to_transform "
        "and exclude_modules of the first member, and no module that is trained whole (modules_to_save)",
        "name the member that adapts the most layers first; merge one with a trained head alone",
        Origin.CONFIG,
        module=fact.modules[0],
    )


WORDS: Mapping[type, Callable[[Any], Finding]] = MappingProxyType(
    {
        PeftRaised: peft_raised,
        KnownDefect: known_defect,
        OtherForward: other_forward,
        LayerLeftUnmerged: layer_left_unmerged,
        ResultLacksTensors: result_lacks_tensors,
        SettingLost: setting_lost,
        TensorUnweighted: tensor_unweighted,
        TwoVocabularies: two_vocabularies,
        ModulesLeftOut: modules_left_out,
    }
)
"""The finding of each kind of fact."""
