"""Adds to the report on a finished directory whether a signed attestation of it is good.

In: an `AdapterReport`, a directory, and an envelope and a key of unknown origin. Out: the report, with a finding for
each problem; with none, the owner of the key attests exactly these files.

1. The envelope is signed by this key, and contains a statement from merge-gate about a published model.
2. The verdict in it is `passed`, the base is the expected one, and it is not too old.
3. Its subjects are the files of the directory: no extra file, no missing file, and each with its digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.regular_file import open_regular_file, read_all
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.attest.envelope import InvalidEnvelopeError, opened, read_key
from merge_gate.attest.statement import TIME_FORMAT, InvalidStatementError, Statement, read
from merge_gate.files.resolve import digest_file
from merge_gate.judging.kinds import ATTESTATION, ATTESTED, finding
from merge_gate.publish.manifest import MANIFEST_NAME, is_regular, names_below
from merge_gate.records.files import Snapshot
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Verdict, record
from merge_gate.report.wording.untrusted import one_line
from merge_gate.verify.answer import decided

UNKNOWN = "unknown"
"""The digest of a base that could not be hashed. No attestation has it."""

MOST_ENVELOPE_BYTES = 32 * 1024 * 1024
"""A statement of 16 MiB in base64, with its signatures."""

_CLOCKS_DIFFER = timedelta(minutes=10)
_LISTED = 5


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
        problems = attestation_problems(attestation, directory, base_sha256=base_sha256)
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


# --- 1 to 3 --------------------------------------------------------------------------------------------------------


def attestation_problems(
    attestation: Attestation, directory: str | Path, *, base_sha256: str | None = None, now: datetime | None = None
) -> tuple[str, ...]:
    """What is wrong with an attestation of a published directory, or with the directory. Every byte is read.

    `base_sha256` is the expected digest of the base's weights; None for any base. `now` None is the system's clock.

    Raises:
        UsageError: the key cannot be used, or the extra `attest` is not installed.
        OSError: the directory cannot be read.
    """
    try:
        statement = read(opened(attestation.envelope, attestation.public_key))
    except InvalidEnvelopeError as error:
        return (f"the attestation {error}",)
    except InvalidStatementError as error:
        return (f"the statement in the attestation {error}",)
    return (
        *_of_predicate(statement, base_sha256),
        *_of_age(statement, attestation.max_age_days, now or datetime.now(UTC)),
        *_of_files(statement, Path(directory)),
    )


def _of_predicate(statement: Statement, base_sha256: str | None) -> Iterator[str]:
    predicate = statement.predicate
    if not predicate.published:
        yield "the attestation is about an adapter's own files, expected one about a published model"
    if predicate.verdict is not Verdict.PASSED:
        yield f"the attestation has the verdict {predicate.verdict}, expected {Verdict.PASSED}"
    if base_sha256 is not None and predicate.base.sha256 != base_sha256:
        yield (
            f"the attestation is about the base {one_line(predicate.base.model, 120)} with the digest "
            f"{one_line(predicate.base.sha256, 16) or 'none'}, expected {base_sha256[:16]}"
        )


def _of_age(statement: Statement, max_age_days: float | None, now: datetime) -> Iterator[str]:
    written = statement.predicate.attested_at
    try:
        attested = datetime.strptime(written.encode("ascii", "replace").decode(), TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        yield f"the attestation has the time {one_line(written, 40)}, expected one like 2026-11-27T20:15:00Z"
        return
    if attested > now + _CLOCKS_DIFFER:
        yield f"the attestation is dated {written}, which is in the future"
    if max_age_days is not None and now - attested > timedelta(days=max_age_days):
        yield f"the attestation is dated {written}, more than {max_age_days:g} days ago"


def _of_files(statement: Statement, folder: Path) -> Iterator[str]:
    found, expected = names_below(folder), statement.subjects
    if not found:
        yield "the directory is empty"
        return
    if added := sorted(set(found) - set(expected)):
        yield f"the directory has {counted(len(added), 'file')} that the attestation does not list: {_shown(added)}"
    if missing := sorted(set(expected) - set(found)):
        yield f"the directory lacks {counted(len(missing), 'file')} of the attestation: {_shown(missing)}"
    both = sorted(set(found) & set(expected))
    if others := [name for name in both if not is_regular(folder / name)]:
        yield f"the directory has links instead of files: {_shown(others)}"
    changed = [name for name in both if name not in others and digest_file(folder / name) != expected[name]]
    if changed:
        differ = "differs" if len(changed) == 1 else "differ"
        yield f"{counted(len(changed), 'file')} of the directory {differ} from the attestation: {_shown(changed)}"


def _shown(names: list[str]) -> str:
    return listing([one_line(name, 120) for name in names], _LISTED)
