"""Checks of the base itself: its files hold the whole model, and the gate can read it.

In: nothing: the findings come with a refusal of the engine, or with the base's files. Out: their rows. An error of one
of these makes the verdict `error`: the adapter is not to blame.
"""

from __future__ import annotations

from merge_gate.judging.check import ERROR, Check, Symptom
from merge_gate.records.config import BaseSpec
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import Finding, Origin, Quantization
from merge_gate.text import quoted

_STORED_AS = {"bitsandbytes_4bit": Quantization.BNB_4BIT, "bitsandbytes_8bit": Quantization.BNB_8BIT}

BASE_INCOMPLETE = Check(
    id="base-incomplete",
    severity=ERROR,
    summary="A parameter of the base's own class has no stored tensor.",
    symptom=Symptom.BAD_BASE,
    can_be_off=False,
    is_of_base=True,
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
