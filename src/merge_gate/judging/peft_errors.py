"""Findings for exceptions of PEFT, one function for each thing that PEFT does with an adapter.

In: the exception, and the facts that decide whose fault it is. Out: findings of several checks. Plain Python: no torch,
no files.
"""

from __future__ import annotations

from collections.abc import Callable

from merge_gate._internal.text import listing
from merge_gate.judging.checks.config_invalid import CONFIG_INVALID
from merge_gate.judging.checks.file_corrupt import FILE_CORRUPT
from merge_gate.judging.checks.keys_missing import keys_missing
from merge_gate.judging.checks.not_mergeable import not_mergeable
from merge_gate.judging.checks.phrases import RESTORE_CONFIG
from merge_gate.judging.checks.shape_mismatch import SHAPE_MISMATCH
from merge_gate.judging.not_judged import INSTALL, not_judged
from merge_gate.records.refusals import Caught
from merge_gate.records.terms import Finding, Origin, Quantization

_SAVE_AGAIN = "save the adapter again with save_pretrained"
_OUT_OF_BOUNDS = "is out of bounds for dimension"  # torch's words for an index that points nowhere

DOCUMENTED_ON_PACKED = frozenset({"ADALORA", "IA3", "LOHA", "FOURIERFT", "DELORA", "OSF", "RANDLORA", "PVERA"})
"""Methods that docs/reference/methods.md says PEFT cannot merge into a base in bitsandbytes' formats."""


def config_raised(error: Caught, method: str) -> Finding:
    if missing := _not_installed(error):
        return missing
    if "weights are incompatible" in error.detail:  # OFT up to PEFT 0.13
        return not_mergeable.finding(
            f"PEFT has changed {method} since this adapter was saved: {error.text}",
            "the file is not at fault: merge it with the release that PEFT names, or train it again",
        )
    return CONFIG_INVALID.finding(f"PEFT rejects adapter_config.json: {error}", RESTORE_CONFIG)


def inject_raised(
    *, error: Caught, method: str, trains_tokens: bool, base: str, quantization: str, is_incomplete: bool
) -> Finding:
    """PEFT could not put the adapter's layers on the base. `trains_tokens`: trainable_token_indices are set."""
    if missing := _not_installed(error):
        return missing
    text = error.text
    if trains_tokens and error.is_a("IndexError"):
        return _unknown_tokens(
            error, "name the base with the enlarged vocabulary, or save the adapter with save_embedding_layers=True"
        )
    if "Unknown initialization" in text:
        return CONFIG_INVALID.finding(
            f"adapter_config.json sets an initialization that PEFT does not know: {text}",
            "it plays no part in a merge unless it names a part of the base (pissa, olora, corda): set it to "
            f"true, or {RESTORE_CONFIG}",
        )
    if "dropout probability" in text:
        return CONFIG_INVALID.finding(
            f"adapter_config.json sets a dropout that PEFT refuses: {text}",
            f"dropout plays no part in a merge: {RESTORE_CONFIG}",
        )
    if "preprocess_corda" in text:
        return not_mergeable.finding(
            f"PEFT cannot load a CorDA adapter as it was trained: {text}",
            "convert it to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained); "
            "or, if the base less its first factors was saved, name that base and set init_lora_weights to true",
        )
    return _blamed(
        f"PEFT cannot put this {method} adapter on base {base}: {text}",
        "PEFT's own message says what is not supported; retrain with a supported setting, or serve it unmerged",
        Origin.CONFIG,
        method=method,
        quantization=quantization,
        is_incomplete=is_incomplete,
    )


def load_raised(error: Caught) -> Finding:
    """PEFT could not load the adapter's tensors."""
    if missing := _not_installed(error):
        return missing
    if "from state dictionary however" in error.detail:  # the shared projections of VeRA, PVeRA, FRoD, TinyLoRA
        return keys_missing.finding(
            f"the file lacks projections that save_projection in adapter_config.json promises: {error.text}",
            f"{_SAVE_AGAIN}, and check that the upload was complete; set save_projection to false only if it was saved "
            "so",
        )
    if _OUT_OF_BOUNDS in error.detail:  # VB-LoRA's choice of vectors
        return SHAPE_MISMATCH.finding(
            f"the file's indices name places that config and base do not have: {error.text}",
            "adapter_config.json is not that of the training (num_vectors), or the file is damaged",
        )
    message = f"PEFT cannot load the adapter's weights: {error}"
    hint = f"{_SAVE_AGAIN}; weights must be tensors only"
    if error.kinds[0] in {"SafetensorError", "UnpicklingError", "EOFError"}:
        return FILE_CORRUPT.finding(message, hint)
    if error.is_a("ValueError", "RuntimeError"):
        return CONFIG_INVALID.finding(message, hint)
    return not_judged(message, hint, origin=Origin.CONFIG)


def add_raised(error: Caught) -> Finding:
    return _not_installed(error) or not_mergeable.finding(
        f"PEFT cannot put a second adapter next to the first: {error.text}",
        "combine adapters of one method only, without fully trained modules in common",
    )


def combine_raised(error: Caught, members: tuple[str, ...], method: str) -> Finding:
    """`method` is the way of combining."""
    return _not_installed(error) or not_mergeable.finding(
        f"PEFT cannot combine {listing(members, 6)} by {method}: {error}",
        "members need the same rank for linear methods (use cat or svd else) and weights PEFT accepts",
    )


def merge_raised(error: Caught, method: str, trains_tokens: bool, quantization: str, is_incomplete: bool) -> Finding:
    """It has the same facts as `inject_raised`."""
    if missing := _not_installed(error, "merging needs a package that"):
        return missing
    text = error.text
    if trains_tokens and error.is_a("IndexError"):
        return _unknown_tokens(error, f"{RESTORE_CONFIG}, or name the base of the training")
    if any(words in text for words in ("inconsistent with indices", "sparse_dim", _OUT_OF_BOUNDS)):
        return SHAPE_MISMATCH.finding(
            f"the file's indices name places that the base's weight does not have: {text}",
            "this is not the base that the adapter was trained on, or the file is damaged",
        )
    return _blamed(
        f"PEFT cannot merge this {method} adapter: {error}",
        "PEFT's own message says what is not supported; serve the adapter unmerged, or retrain it without that",
        Origin.MERGE,
        method=method,
        quantization=quantization,
        is_incomplete=is_incomplete,
    )


def _not_installed(error: Caught, what: str = "a package that this adapter or base needs") -> Finding | None:
    return not_judged(f"{what} is not installed: {error.text}", INSTALL) if error.is_a("ImportError") else None


def _unknown_tokens(error: Caught, hint: str) -> Finding:
    return SHAPE_MISMATCH.finding(
        f"trainable_token_indices name rows that the base's vocabulary does not have: {error.text}",
        hint,
        origin=Origin.CONFIG,
    )


def _blamed(message: str, hint: str, origin: Origin, *, method: str, quantization: str, is_incomplete: bool) -> Finding:
    """On a quantized or incomplete base an exception of PEFT proves nothing about the adapter.

    It does if docs/reference/methods.md says that PEFT cannot merge this method there.
    """
    is_documented = quantization in set(Quantization) and method in DOCUMENTED_ON_PACKED
    if not is_incomplete and (quantization == Quantization.NONE or is_documented):
        return not_mergeable.finding(message, hint, origin=origin)
    kind = "incomplete" if is_incomplete else f"quantized: {quantization}"
    return not_judged(
        f"{message} (the base is {kind})", "gate and merge on the complete, unquantized base", origin=Origin.BASE
    )


REFUSALS: tuple[Callable[..., Finding], ...] = (
    config_raised,
    inject_raised,
    load_raised,
    add_raised,
    combine_raised,
    merge_raised,
)
