"""Checks of the base itself: its files hold the whole model, and the gate can read it.

In: nothing: the findings come with a refusal of the engine, or with the base's files. Out: their rows. An error of one
of these makes the verdict `error`: the adapter is not to blame.
"""

from __future__ import annotations

from merge_gate.judging.check import ERROR, Check, Symptom

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
