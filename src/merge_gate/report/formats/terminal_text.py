"""Renders the report for a terminal or a log: the table, the findings of each adapter, and the result."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from merge_gate._internal.text import WIDEST, listing
from merge_gate.records.terms import Result, Severity, Verdict
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import marks_of, more_findings, paragraphs, unique_findings
from merge_gate.report.wording.layout import labeled, laid_out
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

_MARKS = {Verdict.PASSED: "✓", Verdict.FAILED: "✗", Verdict.ERROR: "!"}
_ASCII_MARKS = {Verdict.PASSED: "+", Verdict.FAILED: "x", Verdict.ERROR: "!"}
_RESULT_STYLES = dict(zip((Result.PASS, Result.FAIL, Result.ERROR), words.STYLES.values(), strict=True))

MAX_ROWS = 40
"""The most rows. If there are more merges, only those that failed, were not judged, or have warnings get a row."""
MAX_PARAGRAPHS = 20
"""The most paragraphs about adapters that failed or were not judged. Warnings get half as many."""

_LABEL_WIDTH = len("  warning ")
_CAUSE_WIDTH = len("adapter-nonfinite")
_MAX_CAUSES = 6
_BLANK = Text()


def render(
    report: Report,
    output_dir: str,
    *,
    width: int = WIDEST,
    table_width: int | None = None,
    color: bool = False,
    ascii_only: bool = False,
) -> str:
    """The table, a paragraph per adapter with findings, and the result, at most `width` columns wide.

    The table has `table_width`, if that is more.
    """
    marks = _ASCII_MARKS if ascii_only else _MARKS
    table = laid_out(_table(report, marks), table_width or width, color=color)
    return table + laid_out(_parts(report, output_dir, marks), width, color=color)


def _parts(report: Report, output_dir: str, marks: dict[Verdict, str]) -> Iterator[RenderableType]:
    every = paragraphs(report)
    blocking = [groups for groups in every if groups[0][0].verdict is not Verdict.PASSED]  # then some warnings
    most_urgent = blocking[:MAX_PARAGRAPHS] + every[len(blocking) :][: MAX_PARAGRAPHS // 2]
    for groups in most_urgent:
        yield _BLANK
        yield from _paragraph(groups, marks)
    if left := sum(map(len, every)) - sum(map(len, most_urgent)):
        yield _BLANK
        yield Text(f"The findings of {words.counted(left, 'more adapter')} are not shown. {_full_report(report)}")
    yield from _base_findings(report)
    yield from _forwards(report)
    yield _BLANK
    yield from _result(report, output_dir)


# --- table ---------------------------------------------------------------------------------------------------------


def _table(report: Report, marks: dict[Verdict, str]) -> Iterator[RenderableType]:
    """The table, unless all adapters of a large fleet passed: then the result shows it."""
    judged = words.worst_first(report.adapters)
    shown = judged if len(judged) <= MAX_ROWS else [adapter for adapter in judged if words.reason(adapter)][:MAX_ROWS]
    if not shown:
        return
    names_base = len({adapter.base.model for adapter in shown}) > 1
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", expand=True)
    table.add_column(no_wrap=True)
    table.add_column("MODEL" if report.is_comparison else "ADAPTER", overflow="fold", style="bold")
    table.add_column("BASE" if names_base else "DTYPE", overflow="fold", style="dim")
    table.add_column("FILES" if report.files_only else "VERDICT", overflow="fold")
    table.add_column("CAUSE AND PLACE", ratio=1, width=_CAUSE_WIDTH)  # gives way before a name is broken
    for adapter in shown:
        table.add_row(*_row(adapter, marks, names_base=names_base))
    yield _BLANK
    yield table
    if len(shown) < len(judged):
        yield Text(f"{_counts(shown, judged)} {_full_report(report)}")


def _row(adapter: AdapterReport, marks: dict[Verdict, str], *, names_base: bool) -> Iterator[Text]:
    style, base = words.STYLES[adapter.verdict], words.precision(adapter.base)
    also = [word for word, is_so in (("accepted", adapter.accepted), ("cached", adapter.cached)) if is_so]
    module = words.deciding_module(adapter)
    yield Text(marks[adapter.verdict], style)
    yield Text(one_line(adapter.name, words.NAME_LENGTH))
    yield Text(f"{words.model_name(adapter.base)} ({base})" if names_base else base)
    yield Text(", ".join([words.verdict(adapter), *also]), style)
    cause = words.reason(adapter) + (f" in {module}" if module else "")
    yield Text(cause, overflow="fold")


def _counts(shown: Sequence[AdapterReport], judged: Sequence[AdapterReport]) -> str:
    """A sentence with the number of rows shown, and the number of merges of each kind."""
    in_order = sorted(judged, key=lambda adapter: not words.reason(adapter))
    kinds = Counter(
        "passed with warnings" if words.reason(adapter).startswith("warning") else words.title(adapter)
        for adapter in in_order
    )
    in_all = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    return f"{len(shown):,} of {len(judged):,} rows are shown: in all, {in_all}."


def _full_report(report: Report) -> str:
    return "`--report html=FILE` writes all." if report.files_only else "report.html and report.json have all."


# --- paragraphs ----------------------------------------------------------------------------------------------------


def _paragraph(groups: Sequence[list[AdapterReport]], marks: dict[Verdict, str]) -> Iterator[RenderableType]:
    """The paragraph of adapters with the same findings, in all dtypes that have them."""
    same = groups[0]
    adapter = same[0]
    names = (one_line(each.name, words.NAME_LENGTH) for each, *_ in groups)
    cause = f": {words.cause(adapter)}" if adapter.verdict is Verdict.FAILED else ""
    title = f"{listing(names)} {words.title(adapter)}{cause} ({words.precisions(same)})"
    yield Text.assemble((f"{marks[adapter.verdict]} ", words.STYLES[adapter.verdict]), (title, "bold"))
    hints = set()
    if adapter.verdict is not Verdict.PASSED:
        finding = words.deciding(adapter)
        yield from _wrong(finding) if finding else [_labeled("wrong", "No finding was recorded.")]
        hints = {finding.hint} if finding else set()
    for mark in marks_of([each for each, *_ in groups]):
        yield _labeled("mark", mark)
    for other, more, dtypes in unique_findings(same, words.others):
        yield from _also(other, more, dtypes, with_hint=other.hint not in hints)
        hints.add(other.hint)


def _wrong(finding: Finding) -> Iterator[RenderableType]:
    message = one_line(finding.message, words.MESSAGE_LENGTH)
    yield _labeled("wrong", message)
    place = words.place(finding, unless_in="" if words.is_of_activations(finding) else message)
    parts = filter(None, (place, words.values(finding), words.origin(finding)))
    for index, part in enumerate(parts):
        yield _labeled("where" if index == 0 else "", part)
    yield from _to_do(finding)
    if address := words.page(finding):  # never wrapped, so that a terminal can open it
        yield Text.assemble(("  more    ", "dim"), address, no_wrap=True, overflow="ignore")
    elif command := words.command_to_explain(finding):
        yield _labeled("more", command)


def _also(
    finding: Finding, more: tuple[Finding, ...], dtypes: str = "", *, with_hint: bool = True
) -> Iterator[RenderableType]:
    text = f"({dtypes}) " if dtypes else ""
    text += f"{one_line(finding.check, words.NAME_LENGTH)}: {one_line(finding.message, words.MESSAGE_LENGTH)}"
    if place := words.place(finding, unless_in=finding.message):
        text += f" ({place})"
    if more:
        text += f"; and {more_findings(more)}"
    yield _labeled("also" if finding.severity is Severity.ERROR else words.level(finding), text)
    if with_hint:
        yield from _to_do(finding)


def _to_do(finding: Finding) -> Iterator[RenderableType]:
    if hint := one_line(finding.hint, words.MESSAGE_LENGTH):
        yield _labeled(words.hint_label(finding), Text(hint, "bold"))


def _labeled(label: str, text: Text | str) -> Table:
    return labeled([(f"  {label}", text)], _LABEL_WIDTH)


def _base_findings(report: Report) -> Iterator[RenderableType]:
    for several in words.bases_with_findings(report.bases):
        yield _BLANK
        yield Text(f"base {words.model_name(several[0].key)} {words.how_loaded(several)}", "bold")
        for finding, more in words.grouped(several[0].findings):
            yield from _also(finding, more)


def _forwards(report: Report) -> Iterator[RenderableType]:
    """The result of running base and adapter: the passed adapter that comes closest to its limit."""
    ran = [adapter for adapter in report.adapters if adapter.forward.ran and adapter.verdict is Verdict.PASSED]
    if ran:
        closest = max(
            ran, key=lambda run: (run.forward.nonfinite_module is not None, words.share_of_dtype(run.forward))
        )
        name = f"{one_line(closest.name, words.NAME_LENGTH)} ({words.precision(closest.base)})"
        rest = f" ({words.counted(len(ran) - 1, 'other run')} stayed further from the limit)" if len(ran) > 1 else ""
        yield from (_BLANK, Text(f"{name} {words.forward(closest)}{rest}"))


def _result(report: Report, output_dir: str) -> Iterator[RenderableType]:
    yield Text(f"{run_result.verdict_line(report)}.", _RESULT_STYLES[report.result])
    yield from map(Text, filter(None, (_causes(report), run_result.advice(report))))
    for sentence in (*words.problems(report), *words.baseline(report)):
        yield Text(f"- {sentence}", _RESULT_STYLES[Result.ERROR])
    if cached := words.cached(report):
        yield Text(f"{cached}.")
    if output_dir:  # never wrapped, so that a terminal can open it
        yield Text(page_to_open(output_dir), "dim", no_wrap=True, overflow="ignore")


def _causes(report: Report) -> str:
    """How many adapters failed by each cause, if there are too many to show."""
    failed = [entry for entry in report.adapters if entry.verdict is Verdict.FAILED]
    if len(failed) <= MAX_PARAGRAPHS:
        return ""
    counts = Counter(cause for _, cause in dict.fromkeys((entry.name, words.cause(entry)) for entry in failed))
    causes = [f"{check} {count:,}" for check, count in counts.most_common()]
    return f"Causes: {listing(causes, _MAX_CAUSES)}."


def page_to_open(output_dir: str) -> str:
    """The last line of a run, with a path that a terminal can open."""
    return f"Report: {one_line(output_dir)}/report.html"
