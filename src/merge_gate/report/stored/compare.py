"""Two reports → what changed between them: for an upgrade of a library, a new base, or the same adapters a week later.

In: an older and a newer `records.Report`. Out: `Changes`, and its text for the terminal and in Markdown. Knows no
other format. Adapters are the same where name, base, dtype and quantisation are.

1. Broke: it passed, now it does not; or it is new and did not pass.
2. Got worse: it had not passed, and now fails for more reasons; or it passes with more warnings.
3. Mended: it passes again.      4. Better: fewer reasons than before, though not passed, or fewer warnings.
5. Vanished: only the older report has it.      6. New: only the newer has it, and it passed.
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
from merge_gate.report.wording.markdown import code, plain
from merge_gate.report.wording.untrusted import inert, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

Key = tuple[str, BaseKey]
"""An adapter's name and its base, at any revision."""


class Kind(StrEnum):
    """What happened to an adapter, the worst first."""

    BROKE = "broke"
    WORSE = "got worse"
    VANISHED = "vanished"
    MENDED = "mended"
    BETTER = "got better"
    NEW = "new"


@record
class Change:
    """One adapter in one dtype that is not as it was; `old` or `new` is absent where a report lacks it."""

    kind: Kind
    old: AdapterReport | None
    new: AdapterReport | None

    @property
    def adapter(self) -> AdapterReport:
        known = self.new or self.old
        if known is None:
            raise AssertionError("a change is of an adapter")
        return known


@record
class Changes:
    """All that is not as it was. `versions` are sentences; `unchanged` counts adapters."""

    changes: tuple[Change, ...]
    versions: tuple[str, ...]
    unchanged: int
    complete: bool

    def of(self, kind: Kind) -> list[Change]:
        """The changes of one kind, in the order of the reports."""
        return [change for change in self.changes if change.kind is kind]

    @property
    def exit_code(self) -> ExitCode:
        """1 where something broke or got worse; 3 where the newer run did not finish, so that more may be broken."""
        if self.of(Kind.BROKE) or self.of(Kind.WORSE):
            return ExitCode.FAIL
        return ExitCode.PASS if self.complete else ExitCode.ERROR


def compare(old: Report, new: Report) -> Changes:
    """Say what is not as it was."""
    before, after = ({_key(adapter): adapter for adapter in report.adapters} for report in (old, new))
    found = [_change(before.get(key), after.get(key)) for key in dict.fromkeys([*after, *before])]
    changes = tuple(change for change in found if change is not None)
    return Changes(
        changes=changes,
        versions=tuple(_versions(old, new)),
        unchanged=len(found) - len(changes),
        complete=new.complete,
    )


def _key(adapter: AdapterReport) -> Key:
    model = adapter.base.model and posixpath.normpath(adapter.base.model)  # ./base is base/
    return adapter.name, replace(adapter.base, model=model, revision=None)


def _change(old: AdapterReport | None, new: AdapterReport | None) -> Change | None:
    kind = _kind(old, new)
    return None if kind is None else Change(kind=kind, old=old, new=new)


def _kind(old: AdapterReport | None, new: AdapterReport | None) -> Kind | None:
    if new is None:
        return Kind.VANISHED
    passes = new.verdict is Verdict.PASSED
    if old is None:
        return Kind.NEW if passes else Kind.BROKE
    if passes != (old.verdict is Verdict.PASSED):
        return Kind.MENDED if passes else Kind.BROKE
    before, after = _reasons(old), _reasons(new)
    if after - before:
        return Kind.WORSE
    return Kind.BETTER if before - after else None


def _reasons(adapter: AdapterReport) -> frozenset[tuple[str, Severity]]:
    """What is wrong with it; an undecided adapter that turns out to be broken has a new reason. Notes are none."""
    return frozenset(
        (finding.check, finding.severity) for finding in adapter.findings if finding.severity is not Severity.NOTE
    )


def _versions(old: Report, new: Report) -> Iterator[str]:
    pairs = [("merge-gate", old.tool.version, new.tool.version)]
    pairs += [
        (one.name.replace("_", " "), getattr(old.environment, one.name), getattr(new.environment, one.name))
        for one in fields(Environment)
        if one.name != "sandbox"
    ]
    pairs.append(("sandbox", words.sandbox(old.environment), words.sandbox(new.environment)))
    for name, before, after in pairs:
        if before != after:
            yield f"{name} {_known(before)} → {_known(after)}"


def _known(version: str | None) -> str:
    return one_line(version, words.NAME_LIMIT) if version else "absent"


# --- text ----------------------------------------------------------------------------------------------------------


def render_text(changes: Changes) -> str:
    """Return lines for a terminal."""
    shown: list[str] = []
    for kind in Kind:
        for change in changes.of(kind):
            adapter = change.adapter
            name = f"{one_line(adapter.name, words.NAME_LIMIT)} ({words.precision(adapter.base)})"
            shown.append(f"{kind:<10} {name}: {_verdict(change.old)} → {_verdict(change.new)}")
            shown += [f"{'':<10} {part}" for part in _why(change)]
    shown += [f"{'version':<10} {version}" for version in changes.versions]
    return "\n".join(map(inert, [*shown, f"{headline(changes)}."])) + "\n"


def render_markdown(changes: Changes) -> str:
    """Return Markdown: a table of what changed, the worst first."""
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
    """2 adapters broke, 1 was mended, 14 as before."""
    counts = [(kind, len(changes.of(kind))) for kind in Kind]
    said = [f"{words.number(count)} {kind}" for kind, count in counts if count]
    unchanged = f"{words.number(changes.unchanged)} as before"
    unfinished = "" if changes.complete else "the newer run did not finish: "
    return f"{unfinished}{', '.join([*said, unchanged])}"


def _verdict(adapter: AdapterReport | None) -> str:
    if adapter is None:
        return "absent"
    cause = words.cause(adapter)
    return f"{adapter.verdict} ({cause})" if cause else str(adapter.verdict)


def _why(change: Change) -> list[str]:
    """What the newer report says that the older did not."""
    if change.new is None:
        return []
    known = _reasons(change.old) if change.old else frozenset()
    return [
        f"{one_line(finding.check, words.NAME_LIMIT)}: {one_line(finding.message, words.MESSAGE_LIMIT)}"
        for finding, _ in words.grouped(change.new.findings)
        if finding.severity is not Severity.NOTE and (finding.check, finding.severity) not in known
    ]
