"""Adds to the report on a finished directory whether a signed attestation of it is good.

In: an `AdapterReport`, and the attestation, which is of unknown origin. Out: the report, with a finding for each
problem.
"""

from __future__ import annotations

from pathlib import Path

from merge_gate.attest.checked import MOST_ENVELOPE_BYTES, attestation_problems
from merge_gate.attest.envelope import opened, read_key
from merge_gate.attest.statement import read
from merge_gate.errors import GateError, UsageError
from merge_gate.judging.kinds import ATTESTATION, ATTESTED, finding
from merge_gate.publish.manifest import MANIFEST_NAME
from merge_gate.records.files import Snapshot
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Verdict, record
from merge_gate.regular_file import open_regular_file, read_all
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import listing, quoted
from merge_gate.verify.answer import decided

UNKNOWN = "unknown"
"""The digest of a base that could not be hashed. No attestation has it."""


@record
class Attestation:
    """A signed attestation, the key of its expected signer, and how old it may be."""

    envelope: bytes
    public_key: bytes
    max_age_days: float | None = None


def read_attestation(file: str, key: str, max_age_days: float | None) -> Attestation:
    """Read an attestation and a public key.

    Raises:
        UsageError: a file cannot be read.
    """
    public_key = read_key(key)
    try:
        with open_regular_file(file, follow=True) as source:
            envelope = read_all(source, MOST_ENVELOPE_BYTES)
    except OSError as error:
        raise UsageError(
            f"cannot read the attestation {quoted(file, 200)}: {error.strerror or error}",
            hint="name a file that `merge-gate attest --key` wrote",
        ) from error
    return Attestation(envelope=envelope, public_key=public_key, max_age_days=max_age_days)


def attested_report(
    report: AdapterReport, directory: str, attestation: Attestation, base_sha256: str | None
) -> AdapterReport:
    """The report, failed if the attestation is not good. `base_sha256` is None if no base was given.

    Raises:
        UsageError: the key cannot be used, or the model is not a directory here.
        GateError: the directory cannot be read.
    """
    if not Path(directory).is_dir():
        raise UsageError(f"{quoted(directory, 200)} is not a directory here, and --attestation is for a directory")
    try:
        problems = attestation_problems(
            attestation.envelope,
            attestation.public_key,
            directory,
            base_sha256=base_sha256,
            max_age_days=attestation.max_age_days,
        )
    except OSError as error:
        raise GateError(f"{quoted(directory, 200)} cannot be read: {error.strerror or error}") from error
    if report.verdict is Verdict.ERROR and not problems:
        return report
    found = [finding(ATTESTATION, problem) for problem in problems]
    if not found:
        message = (
            "the attestation is signed by this key, and lists exactly these files. Its verdict is from "
            f"{MANIFEST_NAME}, and not from the report of a run"
        )
        if checks := read(opened(attestation.envelope, attestation.public_key)).predicate.checks:
            message += f". It was judged with changed checks: {one_line(listing(checks), 400)}"
        found = [finding(ATTESTED, message)]
    snapshot = Snapshot(name=report.name, directory=directory, revision=report.revision)
    return decided(snapshot, report, (*report.findings, *found), ())
