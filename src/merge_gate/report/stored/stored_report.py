"""Reads stored reports, and returns the texts of `merge-gate report show`, `diff`, and `baseline`.

It loads no model and does not import torch. `UsageError` is raised for a file that cannot be read or is not a report.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import posixpath
from collections import Counter
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.earlier_reports import PREVIOUS, is_own
from merge_gate._internal.errors import ExitCode, UsageError
from merge_gate._internal.regular_file import open_regular_file
from merge_gate._internal.text import WIDEST, quoted
from merge_gate.judging.baseline import adapter_digest, digests_of, failing_checks, needs_base
from merge_gate.names.suggestions import nearest
from merge_gate.records.report import AdapterReport, Environment, Report
from merge_gate.records.terms import BaseKey, Severity, Verdict, record
from merge_gate.report.stored.report_files import FORMATS, WORDS, read_report
from merge_gate.report.wording import words
from merge_gate.report.wording.markdown import code, plain
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NAME_IT = "name the report.json that a run wrote, or its directory"


def shown(name: str, word: str, *, width: int = WIDEST) -> str:
    """The report in another format. `width`: columns of the table of the format `terminal`."""
    report = stored(name)
    if word != "terminal":
        return FORMATS[WORDS[word]](report)
    from merge_gate.report.formats.terminal_text import render  # noqa: PLC0415 - only a table needs rich

    return render(report, "", width=min(width, WIDEST), table_width=width)


def compared(old: str, new: str, word: str, *, width: int = WIDEST) -> tuple[str, ExitCode]:
    """The changes from one report to another, and the exit code that they ask for. `width`: as in `shown`."""
    changes = compare(stored(old), stored(new))
    text = render_text(changes, width=width) if word == "terminal" else render_markdown(changes)
    return text, changes.exit_code


def stored(name: str) -> Report:
    """Read the report in a file, or in a run's output directory.

    Raises:
        UsageError: the file cannot be read or is not a report.
    """
    path = Path(name, "report.json") if os.path.isdir(name) else Path(name)  # noqa: PTH112 (pathlib raises)
    try:
        with open_regular_file(path, follow=True) as file:
            return read_report(file, str(path))
    except FileNotFoundError as error:
        earlier = Path(name, PREVIOUS)
        hint = f"the report of an earlier run is in {earlier}" if is_own(earlier / "report.json") else ""
        raise UsageError(f"there is no report {quoted(str(path), 200)}", hint=hint or _NAME_IT) from error
    except OSError as error:
        raise UsageError(
            f"{quoted(str(path), 200)} cannot be read: {error.strerror or error}", hint=_NAME_IT
        ) from error


def stored_if_any(directory: str) -> Report | None:
    """The report in a run's output directory; None if there is none that can be read."""
    with contextlib.suppress(UsageError):
        return stored(directory)
    return None


# --- the changes from one report to another --------------------------------------------------------------------------

Key = tuple[str, BaseKey]
"""An adapter's name and its base, at any revision."""


class Kind(StrEnum):
    """The kind of a change, the worst first."""

    BROKE = "broke"
    WORSE = "got worse"
    OTHER = "differs"
    VANISHED = "vanished"
    FIXED = "fixed"
    BETTER = "got better"
    NEW = "new"


_LABEL_WIDTH = len("got better ")


@record
class Change:
    """One adapter in one dtype that has changed: what the newest report says of it, and both reports, or None."""

    kind: Kind
    adapter: AdapterReport
    old: AdapterReport | None
    new: AdapterReport | None


@record
class Changes:
    """All changes, the worst first. `versions` are sentences about changed versions; `unchanged` counts adapters."""

    changes: tuple[Change, ...]
    versions: tuple[str, ...]
    unchanged: int
    complete: bool

    @property
    def exit_code(self) -> ExitCode:
        """1 if an adapter broke, got worse, or fails differently. 3 if the newer run did not finish: more may break."""
        if any(change.kind in {Kind.BROKE, Kind.WORSE, Kind.OTHER} for change in self.changes):
            return ExitCode.FAIL
        return ExitCode.PASS if self.complete else ExitCode.ERROR


def compare(old: Report, new: Report) -> Changes:
    """Find the changes from an older to a newer report."""
    before, after = ({_key(adapter): adapter for adapter in report.adapters} for report in (old, new))
    newest = after | before | after
    changes = [
        Change(kind=kind, adapter=adapter, old=before.get(key), new=after.get(key))
        for key, adapter in newest.items()
        if (kind := _kind(before.get(key), after.get(key)))
    ]
    return Changes(
        changes=tuple(sorted(changes, key=lambda change: list(Kind).index(change.kind))),
        versions=tuple(_versions(old, new)),
        unchanged=len(newest) - len(changes),
        complete=new.complete,
    )


def _key(adapter: AdapterReport) -> Key:
    model = adapter.base.model and posixpath.normpath(adapter.base.model)  # ./base and base/ are the same
    return adapter.name, replace(adapter.base, model=model, revision=None)


def _kind(old: AdapterReport | None, new: AdapterReport | None) -> Kind | None:
    if new is None:
        return Kind.VANISHED
    passes = new.verdict is Verdict.PASSED
    if old is None:
        return Kind.NEW if passes else Kind.BROKE
    if passes != (old.verdict is Verdict.PASSED):
        return Kind.FIXED if passes else Kind.BROKE
    before, after = _reasons(old), _reasons(new)
    if after - before:
        both_failed = old.verdict is Verdict.FAILED and new.verdict is Verdict.FAILED
        return Kind.OTHER if before - after and both_failed else Kind.WORSE
    return Kind.BETTER if before - after else None


def _reasons(adapter: AdapterReport) -> frozenset[tuple[str, Severity]]:
    """The reasons against an adapter, without notes. One that was not judged and now fails has a new reason."""
    return frozenset(
        (finding.check, finding.severity) for finding in adapter.findings if finding.severity is not Severity.NOTE
    )


def _versions(old: Report, new: Report) -> Iterator[str]:
    pairs = [("merge-gate", old.tool.version, new.tool.version)]
    pairs += [
        (field.name.replace("_", " "), getattr(old.environment, field.name), getattr(new.environment, field.name))
        for field in fields(Environment)
        if field.name != "sandbox"
    ]
    pairs.append(("sandbox", words.sandbox(old.environment), words.sandbox(new.environment)))
    for name, before, after in pairs:
        if before != after:
            yield f"{name} {_version(before)} → {_version(after)}"


def _version(version: str | None) -> str:
    return one_line(version, words.NAME_LENGTH) if version else "absent"


def render_text(changes: Changes, *, width: int = WIDEST) -> str:
    """Return lines for a terminal, at most `width` columns wide."""
    from rich.text import Text  # noqa: PLC0415 - as above

    from merge_gate.report.wording.layout import labeled, laid_out  # noqa: PLC0415 - as above

    rows = []
    for change in changes.changes:
        name = f"{one_line(change.adapter.name, words.NAME_LENGTH)} ({words.precision(change.adapter.base)})"
        rows.append((str(change.kind), f"{name}: {_verdict(change.old)} → {_verdict(change.new)}"))
        rows += [("", part) for part in _why(change)]
    rows += [("version", version) for version in changes.versions]
    return laid_out([labeled(rows, _LABEL_WIDTH), Text(f"{headline(changes)}.")], width)


def render_markdown(changes: Changes) -> str:
    """Return Markdown: a table of the changes, the worst first."""
    rows = [
        f"| {change.kind} | {code(change.adapter.name)} ({plain(words.precision(change.adapter.base))}) "
        f"| {plain(_verdict(change.old))} → {plain(_verdict(change.new))} | {plain('; '.join(_why(change)))} |"
        for change in changes.changes
    ]
    blocks = [f"## {headline(changes)}"]
    if rows:
        blocks.append("\n".join(["| change | adapter | verdict | why |", "|---|---|---|---|", *rows]))
    if changes.versions:
        blocks.append("\n".join(f"- {plain(version)}" for version in changes.versions))
    return "\n\n".join(blocks) + "\n"


def headline(changes: Changes) -> str:
    """One line, such as `2 broke, 1 fixed, 14 unchanged`."""
    changed = [f"{count:,} {kind}" for kind, count in Counter(change.kind for change in changes.changes).items()]
    unchanged = f"{changes.unchanged:,} unchanged"
    unfinished = "" if changes.complete else "the newer report is not complete: "
    return f"{unfinished}{', '.join([*changed, unchanged])}"


def _verdict(adapter: AdapterReport | None) -> str:
    if adapter is None:
        return "absent"
    cause = words.cause(adapter)
    return f"{words.verdict(adapter)} ({cause})" if cause else words.verdict(adapter)


def _why(change: Change) -> list[str]:
    """The findings that are only in the newer report."""
    if change.new is None:
        return []
    old = _reasons(change.old) if change.old else frozenset()
    return [
        f"{one_line(finding.check, words.NAME_LENGTH)}: {one_line(finding.message, words.MESSAGE_LENGTH)}"
        for finding, _ in words.grouped(change.new.findings)
        if finding.severity is not Severity.NOTE and (finding.check, finding.severity) not in old
    ]


# --- a first baseline ------------------------------------------------------------------------------------------------

DAYS = 90
"""How many days the entries of a first baseline are valid."""

_HEAD = """\
# Known failures: each entry accepts one adapter with these files and this cause until the end of a day.
# The verdict stays `failed`, but does not fail the run. Write a reason and an owner for each entry: without them, the
# gate refuses this file. Name the file in the config: `baseline: FILE`.
version: 1
"""


def first_baseline(
    report: Report,
    today: dt.date,
    *,
    only: Sequence[str] = (),
    until: str | None = None,
    owner: str = "",
    reason: str = "",
) -> str:
    """The YAML of a first baseline: an entry for each failed adapter and cause, on each base if the cause needs one.

    The gate refuses a baseline with an empty reason or owner, so someone has to fill them in. A comment says why an
    adapter has no entry.

    Raises:
        UsageError: `only` names an adapter that the report does not have, or `until` is no date.
    """
    known = {adapter.name for adapter in report.adapters}
    if missing := next((name for name in only if name not in known), None):
        raise UsageError(f"the report has no adapter {quoted(missing)}", hint=nearest(missing, sorted(known)))
    last = _date(until) if until is not None else today + dt.timedelta(days=DAYS)
    digests = digests_of(report.bases)
    names: dict[tuple[str, ...], list[str]] = {}
    also: dict[tuple[str, ...], set[str]] = {}
    left_out = []
    for adapter in report.adapters:
        digest = adapter_digest(adapter.files)
        if adapter.verdict is Verdict.FAILED and digest and adapter.cause and (not only or adapter.name in only):
            name = f"{one_line(adapter.name, words.NAME_LENGTH)} ({words.precision(adapter.base)})"
            where = list[str]()
            if needs_base(adapter):
                base = digests.get(adapter.base)
                if base is None:
                    why = "what fails it needs the digest of the base, which the report does not have"
                    left_out.append(f"# no entry for {name}: {why}")
                    continue
                where = [base, adapter.base.dtype, str(adapter.base.quantization)]
            key = digest, adapter.cause, *where
            names.setdefault(key, []).append(name)
            also.setdefault(key, set()).update(failing_checks(adapter) - {adapter.cause})
    entries = []
    for key, listed in names.items():
        digest, cause, *where = key
        more = sorted(also[key])
        entries += [
            f"  # {', '.join(dict.fromkeys(listed))}",
            f"  - adapter: {json.dumps(digest)}",
            f"    cause: {json.dumps(cause)}",
            *([f"    also: {json.dumps(more)}"] if more else []),
            *(f"    {field}: {json.dumps(value)}" for field, value in zip(_WHERE, where, strict=False)),
            f"    reason: {json.dumps(reason)}",
            f"    owner: {json.dumps(owner)}",
            f'    until: "{last.isoformat()}"',
        ]
    return _HEAD + "\n".join([*(["accept:", *entries] if entries else ["accept: []"]), *left_out]) + "\n"


_WHERE = ("base", "dtype", "quantization")


def _date(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--until is {quoted(text)}, expected a date such as 2027-03-31") from None
