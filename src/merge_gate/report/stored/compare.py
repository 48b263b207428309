"""Compares two reports, and renders the changes for a terminal and in Markdown.

An older and a newer `records.Report` go in. Two entries are the same if name, base, dtype, and quantization are equal.
The kinds of changes:

1. Broke: it passed before and does not pass now, or it is new and did not pass.
2. Got worse: it has more reasons to fail, or more warnings.
3. Fixed: it passes again.
4. Got better: it has fewer reasons to fail, or fewer warnings.
5. Vanished: only the older report has it.
6. New: only the newer report has it, and it passed.
"""

from __future__ import annotations

import posixpath
from dataclasses import fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate.errors import ExitCode
from merge_gate.records.report import AdapterReport, Environment, Report
from merge_gate.records.terms import BaseKey, Severity, Verdict, record
from merge_gate.report.wording import words
from merge_gate.report.wording.columns import wrap
from merge_gate.report.wording.markdown import code, plain
from merge_gate.report.wording.untrusted import inert, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

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


_LABEL_WIDTH = 10
_MIN_WIDTH = 24


@record
class Change:
    """One adapter in one dtype that has changed. `old` or `new` is None if that report does not have it."""

    kind: Kind
    old: AdapterReport | None
    new: AdapterReport | None

    @property
    def adapter(self) -> AdapterReport:
        adapter = self.new or self.old
        if adapter is None:
            raise AssertionError("a change has an adapter")
        return adapter


@record
class Changes:
    """All changes. `versions` are sentences about changed versions; `unchanged` counts adapters."""

    changes: tuple[Change, ...]
    versions: tuple[str, ...]
    unchanged: int
    complete: bool

    def of(self, kind: Kind) -> list[Change]:
        """The changes of one kind, in the order of the reports."""
        return [change for change in self.changes if change.kind is kind]

    @property
    def exit_code(self) -> ExitCode:
        """1 if an adapter broke, got worse, or fails differently. 3 if the newer run did not finish: more may break."""
        if any(self.of(kind) for kind in (Kind.BROKE, Kind.WORSE, Kind.OTHER)):
            return ExitCode.FAIL
        return ExitCode.PASS if self.complete else ExitCode.ERROR


def compare(old: Report, new: Report) -> Changes:
    """Find the changes from an older to a newer report."""
    before, after = ({_key(adapter): adapter for adapter in report.adapters} for report in (old, new))
    compared = [(before.get(key), after.get(key)) for key in dict.fromkeys([*after, *before])]
    changes = tuple(Change(kind=kind, old=one, new=two) for one, two in compared if (kind := _kind(one, two)))
    return Changes(
        changes=changes,
        versions=tuple(_versions(old, new)),
        unchanged=len(compared) - len(changes),
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
    return one_line(version, words.NAME_LIMIT) if version else "absent"


# --- text ----------------------------------------------------------------------------------------------------------


def render_text(changes: Changes, *, width: int = 100) -> str:
    """Return lines for a terminal, at most `width` columns wide."""
    shown: list[str] = []
    for kind in Kind:
        for change in changes.of(kind):
            adapter = change.adapter
            name = f"{one_line(adapter.name, words.NAME_LIMIT)} ({words.precision(adapter.base)})"
            shown += _labelled(kind, f"{name}: {_verdict(change.old)} → {_verdict(change.new)}", width)
            shown += [line for part in _why(change) for line in _labelled("", part, width)]
    shown += [line for version in changes.versions for line in _labelled("version", version, width)]
    shown += wrap(f"{headline(changes)}.", max(width, _MIN_WIDTH))
    return "\n".join(map(inert, shown)) + "\n"


def _labelled(label: str, text: str, width: int) -> list[str]:
    lines = wrap(text, max(width - _LABEL_WIDTH - 1, _MIN_WIDTH))
    return [f"{label if index == 0 else '':<{_LABEL_WIDTH}} {line}" for index, line in enumerate(lines)]


def render_markdown(changes: Changes) -> str:
    """Return Markdown: a table of the changes, the worst first."""
    rows = [
        f"| {kind} | {code(change.adapter.name, 80)} ({plain(words.precision(change.adapter.base))}) "
        f"| {plain(_verdict(change.old))} → {plain(_verdict(change.new))} | {plain('; '.join(_why(change)))} |"
        for kind in Kind
        for change in changes.of(kind)
    ]
    blocks = [f"## {headline(changes)}"]
    if rows:
        blocks.append("\n".join(["| change | adapter | verdict | why |", "|---|---|---|---|", *rows]))
    if changes.versions:
        blocks.append("\n".join(f"- {plain(version)}" for version in changes.versions))
    return "\n\n".join(blocks) + "\n"


def headline(changes: Changes) -> str:
    """One line, such as `2 broke, 1 fixed, 14 unchanged`."""
    counts = [(kind, len(changes.of(kind))) for kind in Kind]
    changed = [f"{count:,} {kind}" for kind, count in counts if count]
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
        f"{one_line(finding.check, words.NAME_LIMIT)}: {one_line(finding.message, words.MESSAGE_LIMIT)}"
        for finding, _ in words.grouped(change.new.findings)
        if finding.severity is not Severity.NOTE and (finding.check, finding.severity) not in old
    ]
