"""Checks of the base itself: its files hold the whole model, and the gate can read it.

In: measurements, or the facts of a refusal. Out: findings. Others come with the base's files. An error of one of these
makes the verdict `error`: the adapter is not to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from merge_gate.judging.checks.check import ERROR, Check, MergeCase, Symptom
from merge_gate.records.config import BaseSpec
from merge_gate.records.files import BaseFiles
from merge_gate.records.measured import BaseFacts
from merge_gate.records.terms import Finding, Origin, Quantization, Severity
from merge_gate.text import counted, listing, quoted

_STORED_AS = {"bitsandbytes_4bit": Quantization.BNB_4BIT, "bitsandbytes_8bit": Quantization.BNB_8BIT}

_FETCH_ALL_FILES = (
    "fetch the base again, with its index and all of its shards, and check that config.json belongs to these files"
)


@Check(
    id="base-incomplete",
    severity=ERROR,
    origin=Origin.BASE,
    summary="A parameter of the base's own class has no stored tensor.",
    symptom=Symptom.BAD_BASE,
    can_be_off=False,
    is_of_base=True,
).on_merge
def base_incomplete(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    if evidence.base.incomplete:
        made_up = tuple(name for name in evidence.base.incomplete if name in evidence.initialized)
        yield incomplete(evidence.base.model, made_up, evidence.base.loaded_as) if made_up else brought(evidence.base)


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


def findings_of(base: BaseFacts) -> Iterator[Finding]:
    """What the report's list of bases has of these checks."""
    if base.incomplete:
        yield incomplete(base.model, base.incomplete, base.loaded_as)
    if base.unloaded:
        yield BASE_INCONSISTENT.finding(
            f"base {base.model}: {counted(len(base.unloaded), 'stored tensor')} "
            f"{'is' if len(base.unloaded) == 1 else 'are'} not part of {base.loaded_as}: {listing(base.unloaded, 6)}",
            "they are not merged, and save_pretrained of the merged model does not write them: copy them from the base "
            "if the program that serves the model needs them",
            severity=Severity.NOTE,
            tensor=base.unloaded[0],
        )


BASE_INCONSISTENT = Check(
    id="base-inconsistent",
    severity=ERROR,
    origin=Origin.BASE,
    summary="The base's files contradict each other or its config.json.",
    symptom=Symptom.BAD_BASE,
    can_be_off=False,
    is_of_base=True,
)
BASE_FORMAT = Check(
    id="base-format",
    severity=ERROR,
    origin=Origin.BASE,
    summary="The base has a format that cannot be judged.",
    symptom=Symptom.BAD_BASE,
    can_be_off=False,
    is_of_base=True,
)


def of_request(spec: BaseSpec, files: BaseFiles) -> Finding | None:
    """Transformers keeps the quantization that config.json declares, whatever is asked for. None if they agree."""
    declared, asked = files.quantization, spec.quantization
    if declared is None or not declared.is_read or asked is Quantization.NONE:
        return None
    stored = _STORED_AS.get(declared.method)
    if stored is asked:
        return None
    name = quoted(spec.label or spec.model or files.directory, 200)
    return BASE_FORMAT.finding(
        f"the base {name} is stored in {stored or declared.method} (quantization_config in its config.json), and the "
        f"gate's config asks for {asked}: transformers does not quantize it again",
        f"set quantization: none to gate the base as it is stored, or name the unquantized base to gate it in {asked}",
    )


# --- what was loaded is not what was asked for -----------------------------------------------------------------------


def quantization_unknown(base: str, method: str, transformers: str) -> Finding:
    """config.json declares a quantization that this release of transformers cannot load."""
    return BASE_FORMAT.finding(
        f"base {base}: its config.json declares quantization by {method!r}, which transformers {transformers} cannot "
        "load",
        "gate and merge on the unquantized base that the adapter was trained on",
    )


def loaded_otherwise(
    *, base: str, class_name: str, quantization: str, asked_quantization: str, dtype: str, asked_dtype: str
) -> Finding:
    asks = f"ask for dtype: auto or {dtype}"
    if asked_quantization != Quantization.NONE:
        message = f"was loaded with quantization {quantization}, and the config asks for {asked_quantization}"
        hint = "name the unquantized base, or leave quantization out"
    elif quantization != Quantization.NONE:
        message = (
            f"is stored as {quantization}, whose weights are {dtype} when they are dequantized, and the config asks "
            f"for dtype: {asked_dtype}"
        )
        hint = f"{asks}, or name the unquantized base"
    else:
        message = f"was loaded in {dtype}, and the config asks for dtype: {asked_dtype}"
        hint = f"{asks}: {class_name} does not load in another one"
    return BASE_FORMAT.finding(f"base {base} {message}", hint)


# --- files that contradict each other --------------------------------------------------------------------------------

_ONE_COMMIT = (
    "fetch the base again, all files of one commit; if it is quantized, restore the config.json with its "
    "quantization_config, or name the base without quantization"
)


def adapter_next_to_base(base: str) -> Finding:
    return BASE_INCONSISTENT.finding(
        f"base {base} has an adapter_config.json next to its weights: transformers loads that adapter with it",
        "remove adapter_config.json from the base's directory, or name the plain base",
    )


def _contradiction(message: str, hint: str, tensor: str) -> Finding:
    return BASE_INCONSISTENT.finding(message, hint, module=tensor.rpartition(".")[0], tensor=tensor)


def stored_tensors_left_out(
    base: str, file: str | None, names: tuple[str, ...], wrapped: tuple[str, ...], class_name: str
) -> Finding:
    """`wrapped` are the ones of a model that PEFT had wrapped. `file` is None if it is not known which one has them."""
    what = (
        f"{counted(len(wrapped), 'weight')} of a model that PEFT had wrapped ({listing(wrapped, 3)})"
        if wrapped
        else f"{counted(len(names), 'tensor')} of its weights that {class_name} does not load ({listing(names, 3)})"
    )
    return _contradiction(
        f"base {base}: {f'{file} holds' if file else 'its weight files hold'} {what}; the model in memory would not be "
        "the model in the files",
        "save the base again after unloading the adapter (get_base_model)" if wrapped else _ONE_COMMIT,
        names[0],
    )


def quantized_weight_torn(base: str, file: str, tensor: str, dtype: str, missing: tuple[str, ...]) -> Finding:
    """A stored tensor of codes lacks tensors that its quantizer reads with it."""
    return _contradiction(
        f"base {base}: {file} holds {tensor} in {dtype}, and lacks {listing(missing, 3)}: without "
        f"{'it' if len(missing) == 1 else 'them'}, codes would be read as weights",
        "fetch the base again, all files of one commit, or name the base without quantization",
        tensor,
    )


def codes_for_numbers(base: str, file: str, tensor: str, dtype: str, class_name: str) -> Finding:
    return _contradiction(
        f"base {base}: {file} holds {tensor} in {dtype}, and {class_name} needs numbers there: codes would be read as "
        "weights",
        _ONE_COMMIT,
        tensor,
    )


def base_shape_clash(base: str, class_name: str, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> Finding:
    return _contradiction(
        f"base {base}: {name} has shape {list(got)} in its file, and {class_name} of its config.json needs "
        f"{list(expected)}",
        "config.json and weights of the base are of different models: fetch the base again",
        name,
    )


def parameters_not_stored(
    base: str, class_name: str, names: tuple[str, ...], read: tuple[str, ...], elsewhere: tuple[str, ...] = ()
) -> Finding:
    """`read` are the base's files; `elsewhere` are others that have some of the parameters."""
    where = f" (looked at: {listing(read, 3)})"
    if elsewhere:
        where += f"; transformers does not read {listing(elsewhere, 3)}, which would have some of them"
    return incomplete(base, names, class_name, where)


REFUSALS: tuple[Callable[..., Finding], ...] = (
    quantization_unknown, loaded_otherwise, adapter_next_to_base, stored_tensors_left_out, quantized_weight_torn,
    codes_for_numbers, base_shape_clash, parameters_not_stored,
)  # fmt: skip
