"""Findings for bases that could not be loaded, and for faults of the gate itself.

In: facts of the engine and the worker (records/refusals.py). Out: `Finding`s. Imports no torch and opens no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from merge_gate.judging.checks.base_checks import (
    BASE_FORMAT,
    BASE_INCONSISTENT,
    incomplete,
)
from merge_gate.judging.not_judged import not_judged
from merge_gate.judging.refused_merges import INSTALL
from merge_gate.records.config import A_FILE
from merge_gate.records.refusals import (
    AdapterNextToBase,
    BaseOfAnotherClass,
    BaseRaised,
    BaseShapeClash,
    CodesForNumbers,
    LoadedOtherwise,
    NotJudged,
    NotMeasured,
    ParametersNotStored,
    QuantizationUnknown,
    QuantizedWeightTorn,
    RemoteCodeNeeded,
    StoredTensorsLeftOut,
    TensorWithoutValues,
    WorkerRaised,
)
from merge_gate.records.terms import Finding, Origin, Quantization
from merge_gate.text import counted, listing

_ONE_COMMIT = (
    "fetch the base again, all files of one commit; if it is quantized, restore the config.json with its "
    "quantization_config, or name the base without quantization"
)


# --- the load of a base ----------------------------------------------------------------------------------------------


def base_raised(fact: BaseRaised) -> Finding:
    named = f"{fact.error.kinds[0]}: {fact.error.text}"
    if not fact.class_name:
        return not_judged(
            f"the base's config.json cannot be read: {named}",
            "the base must be a directory saved by save_pretrained, of a model type that transformers knows",
        )
    if fact.error.is_a("MemoryError", "OutOfMemoryError"):
        return not_judged(
            f"base {fact.base}: out of memory while loading it", "use a machine with more memory, or a smaller dtype"
        )
    if fact.error.is_a("ImportError"):
        return not_judged(f"base {fact.base} needs a package that is not installed: {fact.error.text}", INSTALL)
    return not_judged(
        f"base {fact.base} cannot be loaded as {fact.class_name}: {named}",
        "check that the directory holds a complete model that transformers can load",
    )


def remote_code_needed(fact: RemoteCodeNeeded) -> Finding:
    what = f"base {fact.base}" if fact.base else "the base's config.json"
    return not_judged(
        f"{what} needs Python code that comes with the base, and the gate's config does not allow it to run",
        "read that code, pin base.revision to the commit that you have read, and set trust-remote-code: true, in "
        f"{A_FILE}",
    )


def base_of_another_class(fact: BaseOfAnotherClass) -> Finding:
    return not_judged(
        f"base {fact.base} holds none of the tensors of {fact.class_name}: transformers would fill all of them "
        "with random values",
        "name the base that the adapter was trained on: this one has another class (for text and images, if the "
        "adapter is for text alone), or other names in its files",
    )


def adapter_next_to_base(fact: AdapterNextToBase) -> Finding:
    return BASE_INCONSISTENT.finding(
        f"base {fact.base} has an adapter_config.json next to its weights: transformers loads that adapter with it",
        "remove adapter_config.json from the base's directory, or name the plain base",
        Origin.BASE,
    )


# --- what was loaded is not what was asked for -----------------------------------------------------------------------


def quantization_unknown(fact: QuantizationUnknown) -> Finding:
    return BASE_FORMAT.finding(
        f"base {fact.base}: its config.json declares quantization by {fact.method!r}, which transformers "
        f"{fact.transformers} cannot load",
        "gate and merge on the unquantized base that the adapter was trained on",
        Origin.BASE,
    )


def loaded_otherwise(fact: LoadedOtherwise) -> Finding:
    asks = f"ask for dtype: auto or {fact.dtype}"
    if fact.asked_quantization != Quantization.NONE:
        message = (
            f"base {fact.base} was loaded with quantization {fact.quantization}, and the config asks for "
            f"{fact.asked_quantization}"
        )
        hint = "name the unquantized base, or leave quantization out"
    elif fact.quantization != Quantization.NONE:
        message = (
            f"base {fact.base} is stored as {fact.quantization}, whose weights are {fact.dtype} when they are "
            f"dequantized, and the config asks for dtype: {fact.asked_dtype}"
        )
        hint = f"{asks}, or name the unquantized base"
    else:
        message = f"base {fact.base} was loaded in {fact.dtype}, and the config asks for dtype: {fact.asked_dtype}"
        hint = f"{asks}: {fact.class_name} does not load in another one"
    return BASE_FORMAT.finding(message, hint, Origin.BASE)


# --- files that contradict each other --------------------------------------------------------------------------------


def _contradiction(message: str, hint: str, tensor: str) -> Finding:
    return BASE_INCONSISTENT.finding(message, hint, Origin.BASE, module=tensor.rpartition(".")[0], tensor=tensor)


def stored_tensors_left_out(fact: StoredTensorsLeftOut) -> Finding:
    what = (
        f"{counted(len(fact.wrapped), 'weight')} of a model that PEFT had wrapped ({listing(fact.wrapped, 3)})"
        if fact.wrapped
        else f"{counted(len(fact.names), 'tensor')} of its weights that {fact.class_name} does not load "
        f"({listing(fact.names, 3)})"
    )
    holder = f"{fact.file} holds" if fact.file else "its weight files hold"
    return _contradiction(
        f"base {fact.base}: {holder} {what}; the model in memory would not be the model in the files",
        "save the base again after unloading the adapter (get_base_model)" if fact.wrapped else _ONE_COMMIT,
        fact.names[0],
    )


def quantized_weight_torn(fact: QuantizedWeightTorn) -> Finding:
    it = "it" if len(fact.missing) == 1 else "them"
    return _contradiction(
        f"base {fact.base}: {fact.file} holds {fact.tensor} in {fact.dtype}, and lacks {listing(fact.missing, 3)}: "
        f"without {it}, codes would be read as weights",
        "fetch the base again, all files of one commit, or name the base without quantization",
        fact.tensor,
    )


def codes_for_numbers(fact: CodesForNumbers) -> Finding:
    return _contradiction(
        f"base {fact.base}: {fact.file} holds {fact.tensor} in {fact.dtype}, and {fact.class_name} needs numbers "
        "there: codes would be read as weights",
        _ONE_COMMIT,
        fact.tensor,
    )


def base_shape_clash(fact: BaseShapeClash) -> Finding:
    return _contradiction(
        f"base {fact.base}: {fact.name} has shape {list(fact.got)} in its file, and {fact.class_name} of its "
        f"config.json needs {list(fact.expected)}",
        "config.json and weights of the base are of different models: fetch the base again",
        fact.name,
    )


def parameters_not_stored(fact: ParametersNotStored) -> Finding:
    where = f" (looked at: {listing(fact.read, 3)})"
    if fact.elsewhere:
        where += f"; transformers does not read {listing(fact.elsewhere, 3)}, which would have some of them"
    return incomplete(fact.base, fact.names, fact.class_name, where)


# --- the gate itself -------------------------------------------------------------------------------------------------


def tensor_without_values(fact: TensorWithoutValues) -> Finding:
    return not_judged(f"tensor {fact.name} has no values (it is on the meta device), so it cannot be checked")


def not_measured(fact: NotMeasured) -> Finding:
    return not_judged(f"{fact.module} could not be measured: {fact.error.kinds[0]}: {fact.error.text}")


def worker_raised(fact: WorkerRaised) -> Finding:
    text = fact.error.text
    # torch has no class of its own for a lack of memory on the CPU: a RuntimeError that names its allocator
    if fact.error.is_a("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text:
        return not_judged(
            "out of memory while judging this adapter",
            "use a machine (or a GPU) with more memory, or gate the adapter in a smaller dtype",
        )
    if fact.in_import and fact.error.is_a("OSError", "ImportError"):
        return not_judged(
            f"a library of the gate could not be imported: {text}",
            "the environment that runs the gate is damaged, or changes during the run: install it again",
        )
    if fact.error.is_a("OSError"):
        return not_judged(
            f"a file of the adapter or its base could not be read when it was to be merged: {text}",
            "check that nothing changes these files during a run, and that the disk is sound",
        )
    return not_judged(
        f"the gate could not judge this adapter: {fact.error.kinds[0]}: {text}",
        "if the adapter loads and merges with PEFT itself, please report this as a bug of merge-gate",
    )


def already_worded(fact: NotJudged) -> Finding:
    return not_judged(fact.message, fact.hint, origin=fact.origin)


WORDS: Mapping[type, Callable[[Any], Finding]] = MappingProxyType(
    {
        BaseRaised: base_raised,
        RemoteCodeNeeded: remote_code_needed,
        BaseOfAnotherClass: base_of_another_class,
        AdapterNextToBase: adapter_next_to_base,
        QuantizationUnknown: quantization_unknown,
        LoadedOtherwise: loaded_otherwise,
        StoredTensorsLeftOut: stored_tensors_left_out,
        QuantizedWeightTorn: quantized_weight_torn,
        CodesForNumbers: codes_for_numbers,
        BaseShapeClash: base_shape_clash,
        ParametersNotStored: parameters_not_stored,
        TensorWithoutValues: tensor_without_values,
        NotMeasured: not_measured,
        WorkerRaised: worker_raised,
        NotJudged: already_worded,
    }
)
"""The finding of each kind of fact."""
