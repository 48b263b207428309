"""Checks of the base itself: its files hold the whole model, and the gate can read it.

In: measurements. Out: findings. Others come with a refusal of the engine or with the base's files. An error
of one of these makes the verdict `error`: the adapter is not to blame.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        Origin.BASE,
        module=names[0].rpartition(".")[0],
        tensor=names[0],
    )


def brought(base: BaseFacts) -> Finding:
    """The note that the adapter replaces all that the base lacks."""
    return base_incomplete.finding(
        f"base {base.model} holds no tensor for {counted(len(base.incomplete), 'parameter')} of {base.loaded_as}: "
        f"{listing(base.incomplete, 3)}; the adapter has {'it' if len(base.incomplete) == 1 else 'them'}",
        "nothing to do for this adapter; an adapter without these tensors cannot be judged on this base",
        Origin.BASE,
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
            Origin.BASE,
            severity=Severity.NOTE,
            tensor=base.unloaded[0],
        )


BASE_INCONSISTENT = Check(
    id="base-inconsistent",
    severity=ERROR,
    summary="The base's files contradict each other or its config.json.",
    symptom=Symptom.BAD_BASE,
    can_be_off=False,
    is_of_base=True,
)
BASE_FORMAT = Check(
    id="base-format",
    severity=ERROR,
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
        Origin.BASE,
    )
