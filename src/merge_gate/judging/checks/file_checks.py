"""Checks whose findings come with the adapter's files: what files/ found before anything is loaded.

In: nothing: they have no function. Out: their rows.
"""

from __future__ import annotations

from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import FailureKind

FILE_MISSING = Check(
    id="file-missing",
    severity=ERROR,
    summary="There is no adapter_config.json, or no weights file.",
    symptom=Symptom.BAD_FILE,
)
FILE_LFS_POINTER = Check(
    id="file-lfs-pointer",
    severity=ERROR,
    summary="The weights file is a Git LFS pointer, not the weights.",
    symptom=Symptom.BAD_FILE,
)
FILE_CORRUPT = Check(
    id="file-corrupt",
    severity=ERROR,
    summary="A file is empty, truncated, or not in the format that it claims.",
    symptom=Symptom.BAD_FILE,
)
PICKLE_REFUSED = Check(
    id="pickle-refused",
    severity=ERROR,
    summary="There are only pickled weights (.bin), and allow-pickle is false.",
    symptom=Symptom.BAD_FILE,
    failure=FailureKind.REFUSED,
)
CONFIG_INVALID = Check(
    id="config-invalid",
    severity=ERROR,
    summary="adapter_config.json is not valid, or contradicts the tensors.",
    symptom=Symptom.BAD_CONFIG,
    allows_loading=True,  # PEFT reads the values itself, and what it rejects is a finding again
)
CONFIG_UNSAFE = Check(
    id="config-unsafe",
    severity=ERROR,
    summary="adapter_config.json would make PEFT import code.",
    symptom=Symptom.BAD_CONFIG,
    failure=FailureKind.REFUSED,
)
