"""Renders the report for a terminal: the table, the findings of each adapter, and the result.

`lines` returns lines of (text, style) spans, which a terminal may color. `render` returns the same text without styles.
A style is a name in `Style`, not a color.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate._internal.text import listing
from merge_gate.records.terms import Result, Severity, Verdict
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import marks_of, more_findings, paragraphs, unique_findings
from merge_gate.report.wording.columns import cells, cut, cut_front, fit, pad, wrap
from merge_gate.report.wording.untrusted import inert, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding
    from merge_gate.report.wording.alike import AlikeAdapters


class Style(StrEnum):
    """The meaning of a span, for its color."""

    PLAIN = ""
    STRONG = "strong"
    FAINT = "faint"
    GOOD = "good"
    BAD = "bad"
    DOUBT = "doubt"


Span = tuple[str, Style]
Line = tuple[Span, ...]

MARKS = {Verdict.PASSED: "✓", Verdict.FAILED: "✗", Verdict.ERROR: "!"}
ASCII_MARKS = {Verdict.PASSED: "+", Verdict.FAILED: "x", Verdict.ERROR: "!"}
STYLES = {Verdict.PASSED: Style.GOOD, Verdict.FAILED: Style.BAD, Verdict.ERROR: Style.DOUBT}
_RESULT_STYLES = {Result.PASS: Style.GOOD, Result.FAIL: Style.BAD, Result.ERROR: Style.DOUBT}

MAX_ROWS = 40
"""The most rows. If there are more merges, only those that failed, were not judged, or have warnings get a row."""
MAX_PARAGRAPHS = 20
"""The most paragraphs about adapters that failed or were not judged. Warnings get half as many."""
MAX_FORWARDS = 10
"""With more runs of models, only the page and report.json show them."""

_FULL_REPORTS = "report.html and report.json have all"
_NARROW_WIDTH = 60
_VERDICT_WIDTH = len("not judged") + 2
_FILES_INDENT = " " * 4
_LABEL_WIDTH = 7
_MIN_WIDTH = 24
_MIN_PLACE_WIDTH = 12
_MAX_CAUSES = 6
_BLANK: Line = ()


def render(report: Report, output_dir: str, *, width: int = 100, ascii_only: bool = False) -> str:
    """Return the text without styles, at most `width` columns wide."""
    return joined(lines(report, output_dir, width=width, ascii_only=ascii_only))


def joined(shown: Iterable[Line]) -> str:
    """Return lines without their styles."""
    return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in shown)


def lines(report: Report, output_dir: str, *, width: int = 100, ascii_only: bool = False) -> list[Line]:
    """Return the whole text: the table, a paragraph per adapter with findings, and the result."""
    width = max(width, _MIN_WIDTH)
    marks = ASCII_MARKS if ascii_only else MARKS
    shown: list[Line] = []
    if table := _table(report, width, marks):
        shown += [_BLANK, *table]
    every = paragraphs(report)
    most_urgent = _most_urgent(every)
    for groups in most_urgent:
        shown += [_BLANK, *_paragraph(groups, width, marks)]
    if len(most_urgent) < len(every):
        shown += [_BLANK, *_plain(_left_out(every, most_urgent), width)]
    shown += [*_base_findings(report, width), *_forwards(report, width), _BLANK, *_result(report, output_dir, width)]
    # `inert` depends on the start of a line, which is known only now.
    return [tuple((inert(part), style) for part, style in line) for line in shown]


# --- table ---------------------------------------------------------------------------------------------------------


def _table(report: Report, width: int, marks: dict[Verdict, str]) -> list[Line]:
    judged = words.worst_first(report.adapters)
    shown = judged if len(judged) <= MAX_ROWS else [adapter for adapter in judged if reason(adapter)][:MAX_ROWS]
    if not shown:
        return []  # all passed, or there are none: the result shows it
    rest = _plain(_counts(shown, judged), width) if len(shown) < len(judged) else []
    names_base = len({adapter.base.model for adapter in shown}) > 1
    narrow = width < _NARROW_WIDTH
    rows = [_cells(adapter, names_base=names_base, with_place=not narrow) for adapter in shown]
    if narrow:
        return [*(line for row in rows for line in _stacked(row, width, marks)), *rest]
    heads = (
        "MODEL" if report.is_comparison else "ADAPTER",
        "BASE" if names_base else "DTYPE",
        "VERDICT",
        "CAUSE AND PLACE",
    )
    texts = [heads, *(row[1:] for row in rows)]
    widths = fit([max(cells(row[column]) for row in texts) for column in range(4)], width - 2 - 3 * 2)
    head: Line = (("  ", Style.PLAIN), (_row(heads, widths), Style.FAINT))
    return [head, *(_table_line(row, widths, marks) for row in rows), *rest]


def _counts(shown: Sequence[AdapterReport], judged: Sequence[AdapterReport]) -> str:
    """A sentence with the number of rows shown, and the number of merges of each kind."""
    in_order = sorted(judged, key=lambda adapter: not reason(adapter))
    kinds = Counter(
        "passed with warnings" if reason(adapter).startswith("warning") else words.title(adapter)
        for adapter in in_order
    )
    in_all = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    rows = f"{len(shown):,} of {len(judged):,} rows are shown"
    return f"{rows}: in all, {in_all}. {_FULL_REPORTS}."


Row = tuple[Verdict, str, str, str, str]


def _cells(adapter: AdapterReport, *, names_base: bool, with_place: bool) -> Row:
    base = words.precision(adapter.base)
    if names_base:
        base = f"{words.model_name(adapter.base)} ({base})"
    marks = [word for word, is_so in (("accepted", adapter.accepted), ("cached", adapter.cached)) if is_so]
    verdict = ", ".join([words.verdict(adapter), *marks])
    module = words.deciding_module(adapter) if with_place else ""
    why = reason(adapter) + (f" in {module}" if module else "")
    return adapter.verdict, one_line(adapter.name, words.NAME_LIMIT), base, verdict, why


def reason(adapter: AdapterReport) -> str:
    """The deciding check, the warnings of a passed adapter, or what a compared model is."""
    if adapter.verdict is not Verdict.PASSED:
        return words.cause(adapter)
    checks = list(dict.fromkeys(one_line(finding.check, words.NAME_LIMIT) for finding in words.warnings(adapter)))
    answers = [
        f"{finding.check}{' (allowed)' if words.level(finding) == 'allowed' else ''}"
        for finding in words.answers(adapter)
    ]
    return f"warning: {', '.join(checks)}" if checks else ", ".join(answers)


def _table_line(row: Row, widths: list[int], marks: dict[Verdict, str]) -> Line:
    verdict, name, base, verdict_text, why = row
    style = STYLES[verdict]
    return (
        (f"{marks[verdict]} ", style),
        (pad(name, widths[0]) + "  ", Style.STRONG),
        (pad(base, widths[1]) + "  ", Style.FAINT),
        (pad(verdict_text, widths[2]) + "  ", style),
        (_cut_why(why, widths[3]), Style.PLAIN),
    )


def _cut_why(why: str, width: int) -> str:
    """A cause and the end of its place: `adapter-nonfinite …5.self_attn.q_proj`."""
    cause, _, place = why.partition(" in ")
    place_width = width - cells(cause) - 1
    if cells(why) <= width or not place:
        return cut(why, width)
    return f"{cause} {cut_front(place, place_width)}" if place_width >= _MIN_PLACE_WIDTH else cut(cause, width)


def _row(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(pad(text, width) for text, width in zip(texts, widths, strict=True)).rstrip()


def _stacked(row: Row, width: int, marks: dict[Verdict, str]) -> list[Line]:
    verdict, name, base, verdict_text, why = row
    below = " ".join(filter(None, (verdict_text, f"({why})" if why else "")))
    return [
        ((f"{marks[verdict]} ", STYLES[verdict]), (cut(name, width - 2), Style.STRONG)),
        (("  ", Style.PLAIN), (cut(below, width - 2), STYLES[verdict])),
        (("  ", Style.PLAIN), (cut(base, width - 2), Style.FAINT)),
    ]


# --- paragraphs ----------------------------------------------------------------------------------------------------


def _most_urgent(every: list[AlikeAdapters]) -> list[AlikeAdapters]:
    """The paragraphs to show on a terminal: failures first, then some warnings."""
    blocking = [groups for groups in every if groups[0][0].verdict is not Verdict.PASSED]
    return blocking[:MAX_PARAGRAPHS] + every[len(blocking) :][: MAX_PARAGRAPHS // 2]


def _left_out(every: list[AlikeAdapters], shown: list[AlikeAdapters]) -> str:
    def count(some: list[AlikeAdapters], *, passed: bool) -> int:
        return sum(len(groups) for groups in some if (groups[0][0].verdict is Verdict.PASSED) is passed)

    left = {passed: count(every, passed=passed) - count(shown, passed=passed) for passed in (False, True)}
    parts = [f"what is wrong with {words.counted(left[False], 'more adapter')}"] if left[False] else []
    parts += [f"the warnings of {words.counted(left[True], 'more adapter')} that passed"] if left[True] else []
    return f"Not shown: {' and '.join(parts)}. {_FULL_REPORTS}."


def _paragraph(groups: Sequence[list[AdapterReport]], width: int, marks: dict[Verdict, str]) -> list[Line]:
    """The paragraph of adapters with the same findings, in all dtypes that have them."""
    same = groups[0]
    adapter = same[0]
    mark: Span = (f"{marks[adapter.verdict]} ", STYLES[adapter.verdict])
    names = (one_line(each.name, words.NAME_LIMIT) for each, *_ in groups)
    title = f"{listing(names)} {words.title(adapter)}"
    if adapter.verdict is Verdict.FAILED:
        title += f": {words.cause(adapter)}"
    title += f" ({words.precisions(same)})"
    first, *rest = wrap(title, width - 2)
    heading: list[Line] = [
        (mark, (first, Style.STRONG)),
        *((("  ", Style.PLAIN), (part, Style.STRONG)) for part in rest),
    ]
    finding = words.deciding(adapter)
    if adapter.verdict is not Verdict.PASSED:
        heading += _wrong(finding, width) if finding else _labelled("wrong", "No finding was recorded.", width)
    hints = {finding.hint} if finding and adapter.verdict is not Verdict.PASSED else set()
    all_marks = marks_of([each for each, *_ in groups])
    heading += [line for text in all_marks for line in _labelled("mark", text, width)]
    others = unique_findings(same, words.others)
    for other, more, dtypes in others:
        heading += _also(other, more, width, dtypes, with_hint=other.hint not in hints)
        hints.add(other.hint)
    return heading


def _wrong(finding: Finding, width: int) -> list[Line]:
    message = one_line(finding.message, words.MESSAGE_LIMIT)
    shown = _labelled("wrong", message, width)
    place = words.place(finding, unless_in="" if words.is_of_activations(finding) else message)
    parts = filter(None, (place, words.values(finding), words.origin(finding)))
    for index, part in enumerate(parts):
        shown += _labelled("where" if index == 0 else "", part, width)
    return shown + _to_do(finding, width) + _more(finding, width)


def _more(finding: Finding, width: int) -> list[Line]:
    """Where to read about the check. An address is never wrapped, so that a terminal can open it."""
    if address := words.page(finding):
        return [((f"  {'more':<{_LABEL_WIDTH}} ", Style.FAINT), (address, Style.PLAIN))]
    return _labelled("more", words.command_to_explain(finding), width)


def _also(
    finding: Finding, more: tuple[Finding, ...], width: int, dtypes: str = "", *, with_hint: bool = True
) -> list[Line]:
    label = "also" if finding.severity is Severity.ERROR else words.level(finding)
    text = f"({dtypes}) " if dtypes else ""
    text += f"{one_line(finding.check, words.NAME_LIMIT)}: {one_line(finding.message, words.MESSAGE_LIMIT)}"
    if place := words.place(finding, unless_in=finding.message):
        text += f" ({place})"
    if more:
        text += f"; and {more_findings(more)}"
    return _labelled(label, text, width) + (_to_do(finding, width) if with_hint else [])


def _to_do(finding: Finding, width: int) -> list[Line]:
    hint = one_line(finding.hint, words.MESSAGE_LIMIT)
    return _labelled(words.hint_label(finding), hint, width, Style.STRONG) if hint else []


def _labelled(label: str, text: str, width: int, style: Style = Style.PLAIN) -> list[Line]:
    indent = 2 + _LABEL_WIDTH + 1
    return [
        ((f"  {label if index == 0 else '':<{_LABEL_WIDTH}} ", Style.FAINT), (part, style))
        for index, part in enumerate(wrap(text, width - indent))
    ]


def _base_findings(report: Report, width: int) -> list[Line]:
    shown: list[Line] = []
    for several in words.bases_with_findings(report.bases):
        base = several[0]
        title = f"base {words.model_name(base.key)} {words.how_loaded(several)}"
        shown += [_BLANK, *(((part, Style.STRONG),) for part in wrap(title, width))]
        shown += [line for finding, more in words.grouped(base.findings) for line in _also(finding, more, width)]
    return shown


def _forwards(report: Report, width: int) -> list[Line]:
    """What the runs of base and adapter as models showed, of few adapters that passed: the others have findings."""
    ran = [adapter for adapter in report.adapters if adapter.forward.ran and adapter.verdict is Verdict.PASSED]
    if not 0 < len(ran) <= MAX_FORWARDS:
        return []
    named = ((f"{one_line(one.name, words.NAME_LIMIT)} ({words.precision(one.base)})", one) for one in ran)
    return [_BLANK, *(line for name, one in named for line in _plain(f"{name} {words.forward(one)}", width))]


def _result(report: Report, output_dir: str, width: int) -> list[Line]:
    style = _RESULT_STYLES[report.result]
    headline = f"{run_result.verdict_line(report)}."
    shown: list[Line] = [((part, style),) for part in wrap(headline, width)]
    if causes := _causes(report):
        shown += _plain(causes, width)
    shown += _plain(run_result.advice(report), width)
    for sentence in (*words.problems(report), *words.baseline(report)):
        shown += [((part, Style.DOUBT),) for part in wrap(f"- {sentence}", width)]
    if cached := words.cached(report):
        shown += _plain(f"{cached}.", width)
    if output_dir:
        shown.append(((page_to_open(output_dir), Style.FAINT),))
    return shown


def _causes(report: Report) -> str:
    """How many adapters failed by each cause, if there are too many to show."""
    failed = [entry for entry in report.adapters if entry.verdict is Verdict.FAILED]
    if len(failed) <= MAX_PARAGRAPHS:
        return ""
    counts = Counter(cause for _, cause in dict.fromkeys((entry.name, words.cause(entry)) for entry in failed))
    causes = [f"{check} {count:,}" for check, count in counts.most_common()]
    return f"Causes: {listing(causes, _MAX_CAUSES)}."


def _plain(text: str, width: int) -> list[Line]:
    return [((part, Style.PLAIN),) for part in wrap(text, width)]


def page_to_open(output_dir: str) -> str:
    """The last line of a run, with a path that a terminal can open. It is never wrapped."""
    return f"Report: {one_line(output_dir)}/report.html"


# --- files alone ---------------------------------------------------------------------------------------------------


def file_lines(adapter: AdapterReport, *, of: int = 1, width: int = 100) -> Iterator[str]:
    """The lines of `merge-gate check` for one adapter of `of`, worst first. `sound` claims less than `passed`."""
    if of > MAX_ROWS and adapter.verdict is Verdict.PASSED and not adapter.findings:
        return  # sound adapters are only counted
    verdict = "sound" if adapter.verdict is Verdict.PASSED else words.verdict(adapter)
    name, source = one_line(adapter.name, words.NAME_LIMIT), one_line(adapter.source, words.NAME_LIMIT)
    yield from _hanging(f"{verdict:<{_VERDICT_WIDTH}}", f"{name} ({source})", width)
    shown: set[str] = set()
    for finding in adapter.findings:
        kind = "" if finding.severity is Severity.ERROR else f"{finding.severity}: "
        message = one_line(finding.message, words.MESSAGE_LIMIT)
        yield from _hanging(_FILES_INDENT, f"{kind}{finding.check}: {message}", width)
        if finding.hint and finding.hint not in shown:
            yield from _hanging(
                _FILES_INDENT, f"{words.hint_label(finding)}: {one_line(finding.hint, words.MESSAGE_LIMIT)}", width
            )
            shown.add(finding.hint)
        if finding is words.deciding(adapter) and (more := words.more(finding)):
            yield f"{_FILES_INDENT}more: {more}"


def _hanging(head: str, text: str, width: int) -> Iterator[str]:
    first, *rest = wrap(text, max(width, _MIN_WIDTH) - len(head) - 2)
    yield head + first
    yield from (f"{'':<{len(head) + 2}}{line}" for line in rest)
