"""The end of a run for the terminal: the result table, what is wrong with each adapter, and the result.

In: a `records.Report`, the output directory and the width in columns. Out: `lines`, each a sequence of (text, style)
spans, which a terminal may colour, and `render`, the same without colour. Knows neither the terminal nor the other
formats. Styles are the names in `Style`, not colours.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate.records.terms import Result, Severity, Verdict
from merge_gate.report.wording import words
from merge_gate.report.wording.alike import marks_of, paragraphs, told_once
from merge_gate.report.wording.columns import cells, cut, cut_front, fit, pad, wrap
from merge_gate.report.wording.untrusted import inert, one_line
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding
    from merge_gate.report.wording.alike import Told


class Style(StrEnum):
    """What a span is, for whoever colours it."""

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

MOST_ROWS = 40
"""Up to so many merges have a row each; of more, so many of those that failed, were not judged or have warnings."""
MOST_TOLD = 20
"""So many paragraphs of what failed or could not be judged, and half as many of warnings."""

_ALL_IN = "report.html and report.json have all"
_NARROW = 60
_LABEL_WIDTH = 7
_LEAST_WIDTH = 24
_LEAST_PLACE = 12
_MOST_CAUSES = 6
_BLANK: Line = ()


def render(report: Report, output_dir: str, *, width: int = 100, ascii_only: bool = False) -> str:
    """Return the text without colour, at most `width` columns wide."""
    return joined(lines(report, output_dir, width=width, ascii_only=ascii_only))


def joined(shown: Iterable[Line]) -> str:
    """Return lines without their styles."""
    return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in shown)


def lines(report: Report, output_dir: str, *, width: int = 100, ascii_only: bool = False) -> list[Line]:
    """Return the whole text: table, one paragraph per adapter with something to say, result."""
    width = max(width, _LEAST_WIDTH)
    marks = ASCII_MARKS if ascii_only else MARKS
    shown: list[Line] = []
    if table := _table(report, width, marks):
        shown += [_BLANK, *table]
    told = paragraphs(report)
    kept = _most_pressing(told)
    for groups in kept:
        shown += [_BLANK, *_paragraph(groups, width, marks)]
    if len(kept) < len(told):
        shown += [_BLANK, *_plain(_left_out(told, kept), width)]
    shown += [*_base_findings(report, width), _BLANK, *_result(report, output_dir, width)]
    # Here and not earlier: only now is it known what stands at the start of a line.
    return [tuple((inert(part), style) for part, style in line) for line in shown]


# --- table ---------------------------------------------------------------------------------------------------------


def _table(report: Report, width: int, marks: dict[Verdict, str]) -> list[Line]:
    judged = words.worst_first(report.adapters)
    shown = judged if len(judged) <= MOST_ROWS else [adapter for adapter in judged if reason(adapter)][:MOST_ROWS]
    if not shown:
        return []  # all passed, if there are any: the result says it
    rest = _plain(_counts(shown, judged), width) if len(shown) < len(judged) else []
    names_base = len({adapter.base.model for adapter in shown}) > 1
    narrow = width < _NARROW
    rows = [_cells(adapter, names_base=names_base, says_where=not narrow) for adapter in shown]
    if narrow:
        return [*(line for row in rows for line in _stacked(row, width, marks)), *rest]
    heads = ("ADAPTER", "BASE" if names_base else "DTYPE", "VERDICT", "CAUSE AND PLACE")
    texts = [heads, *(row[1:] for row in rows)]
    widths = fit([max(cells(row[column]) for row in texts) for column in range(4)], width - 2 - 3 * 2)
    head: Line = (("  ", Style.PLAIN), (_row(heads, widths), Style.FAINT))
    return [head, *(_table_line(row, widths, marks) for row in rows), *rest]


def _counts(shown: Sequence[AdapterReport], judged: Sequence[AdapterReport]) -> str:
    """What the rows that are not shown amount to."""
    warned, said_first = "passed with warnings", sorted(judged, key=lambda one: not reason(one))
    said = Counter(warned if reason(one).startswith("warning") else words.title(one) for one in said_first)
    in_all = ", ".join(f"{words.number(count)} {what}" for what, count in said.items())
    return f"{words.number(len(shown))} of {words.number(len(judged))} rows are shown: in all, {in_all}. {_ALL_IN}."


Row = tuple[Verdict, str, str, str, str]


def _cells(adapter: AdapterReport, *, names_base: bool, says_where: bool) -> Row:
    base = words.precision(adapter.base)
    if names_base:
        base = f"{words.model_name(adapter.base)} ({base})"
    marks = [word for word, is_so in (("accepted", adapter.accepted), ("cached", adapter.cached)) if is_so]
    said = ", ".join([adapter.verdict.value, *marks])
    module = words.deciding_module(adapter) if says_where else ""
    why = reason(adapter) + (f" in {module}" if module else "")
    return adapter.verdict, one_line(adapter.name, words.NAME_LIMIT), base, said, why


def reason(adapter: AdapterReport) -> str:
    """Why, in a few words: the deciding check, or the warnings of a passed adapter."""
    if adapter.verdict is not Verdict.PASSED:
        return words.cause(adapter)
    checks = list(dict.fromkeys(one_line(finding.check, words.NAME_LIMIT) for finding in words.warnings(adapter)))
    return f"warning: {', '.join(checks)}" if checks else ""


def _table_line(row: Row, widths: list[int], marks: dict[Verdict, str]) -> Line:
    verdict, name, base, said, why = row
    style = STYLES[verdict]
    return (
        (f"{marks[verdict]} ", style),
        (pad(name, widths[0]) + "  ", Style.STRONG),
        (pad(base, widths[1]) + "  ", Style.FAINT),
        (pad(said, widths[2]) + "  ", style),
        (_cut_why(why, widths[3]), Style.PLAIN),
    )


def _cut_why(why: str, width: int) -> str:
    """A cause and the end of its place: `adapter-nonfinite …5.self_attn.q_proj`."""
    cause, _, place = why.partition(" in ")
    room = width - cells(cause) - 1
    if cells(why) <= width or not place:
        return cut(why, width)
    return f"{cause} {cut_front(place, room)}" if room >= _LEAST_PLACE else cut(cause, width)


def _row(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(pad(text, width) for text, width in zip(texts, widths, strict=True)).rstrip()


def _stacked(row: Row, width: int, marks: dict[Verdict, str]) -> list[Line]:
    verdict, name, base, said, why = row
    below = " ".join(filter(None, (said, f"({why})" if why else "")))
    return [
        ((f"{marks[verdict]} ", STYLES[verdict]), (cut(name, width - 2), Style.STRONG)),
        (("  ", Style.PLAIN), (cut(below, width - 2), STYLES[verdict])),
        (("  ", Style.PLAIN), (cut(base, width - 2), Style.FAINT)),
    ]


# --- paragraphs ----------------------------------------------------------------------------------------------------


def _most_pressing(told: list[Told]) -> list[Told]:
    """As many paragraphs as somebody reads on a terminal."""
    blocked = [groups for groups in told if groups[0][0].verdict is not Verdict.PASSED]
    return blocked[:MOST_TOLD] + told[len(blocked) :][: MOST_TOLD // 2]


def _left_out(told: list[Told], kept: list[Told]) -> str:
    def named(some: list[Told], *, passed: bool) -> int:
        return sum(len(groups) for groups in some if (groups[0][0].verdict is Verdict.PASSED) is passed)

    left = {passed: named(told, passed=passed) - named(kept, passed=passed) for passed in (False, True)}
    parts = [f"what is wrong with {words.counted(left[False], 'more adapter')}"] if left[False] else []
    parts += [f"the warnings of {words.counted(left[True], 'more adapter')} that passed"] if left[True] else []
    return f"Not shown: {' and '.join(parts)}. {_ALL_IN}."


def _paragraph(groups: Sequence[list[AdapterReport]], width: int, marks: dict[Verdict, str]) -> list[Line]:
    """One adapter, in all the dtypes in which the same finding decides; or several, of which the same is so."""
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
    heading += [line for mark in marks_of([one for one, *_ in groups]) for line in _labelled("mark", mark, width)]
    told = told_once(same, words.others)
    also = [line for other, more, where in told for line in _also(other, more, width, where)]
    return [*heading, *also]


def _wrong(finding: Finding, width: int) -> list[Line]:
    message = one_line(finding.message, words.MESSAGE_LIMIT)
    shown = _labelled("wrong", message, width)
    where = filter(
        None, (words.place(finding, unless_in=message), words.values(finding), words.ORIGINS[finding.origin])
    )
    for index, place in enumerate(where):
        shown += _labelled("where" if index == 0 else "", place, width)
    return shown + _to_do(finding, width)


def _also(finding: Finding, more: int, width: int, where: str = "") -> list[Line]:
    label = "also" if finding.severity is Severity.ERROR else str(finding.severity)
    text = f"({where}) " if where else ""
    text += f"{one_line(finding.check, words.NAME_LIMIT)}: {one_line(finding.message, words.MESSAGE_LIMIT)}"
    if place := words.place(finding, unless_in=finding.message):
        text += f" ({place})"
    if more:
        text += f"; and {words.number(more)} more like it"
    return _labelled(label, text, width) + _to_do(finding, width)


def _to_do(finding: Finding, width: int) -> list[Line]:
    hint = one_line(finding.hint, words.MESSAGE_LIMIT)
    return _labelled("to do", hint, width, Style.STRONG) if hint else []


def _labelled(label: str, text: str, width: int, style: Style = Style.PLAIN) -> list[Line]:
    indent = 2 + _LABEL_WIDTH + 1
    return [
        ((f"  {label if index == 0 else '':<{_LABEL_WIDTH}} ", Style.FAINT), (part, style))
        for index, part in enumerate(wrap(text, width - indent))
    ]


def _base_findings(report: Report, width: int) -> list[Line]:
    shown: list[Line] = []
    for base in report.bases:
        if base.findings:
            title = cut(f"base {words.model_name(base.key)} ({words.precision(base.key)})", width)
            shown += [_BLANK, ((title, Style.STRONG),)]
            shown += [line for found, more in words.grouped(base.findings) for line in _also(found, more, width)]
    return shown


def _result(report: Report, output_dir: str, width: int) -> list[Line]:
    style = _RESULT_STYLES[report.result]
    said = f"{report.result.value.upper()}: {words.headline(report)}."
    shown: list[Line] = [((part, style),) for part in wrap(said, width)]
    if causes := _causes(report):
        shown += _plain(causes, width)
    shown += _plain(words.advice(report), width)
    for problem in words.problems(report):
        shown += [((part, Style.DOUBT),) for part in wrap(f"- {problem}", width)]
    for said in words.baseline(report):
        shown += [((part, Style.DOUBT),) for part in wrap(f"- {said}", width)]
    if said := words.cached(report):
        shown += _plain(f"{said}.", width)
    if output_dir:
        shown += [((part, Style.FAINT),) for part in wrap(f"Report: {_reports(output_dir)}", width)]
    return shown


def _causes(report: Report) -> str:
    """What made how many fail, where these are too many to count on the screen."""
    failed = Counter(words.cause(adapter) for adapter in report.adapters if adapter.verdict is Verdict.FAILED)
    if failed.total() <= MOST_TOLD:
        return ""
    said = [f"{check} {words.number(count)}" for check, count in failed.most_common()]
    return f"Causes: {listing(said, _MOST_CAUSES)}."


def _plain(said: str, width: int) -> list[Line]:
    return [((part, Style.PLAIN),) for part in wrap(said, width)]


def _reports(output_dir: str) -> str:
    return f"report.html for people, report.json for programs, in {one_line(output_dir)}"


# --- files alone ---------------------------------------------------------------------------------------------------


def files_told(adapter: AdapterReport, *, of: int = 1) -> Iterator[str]:
    """What the files of one adapter, of so many, say, worst first; `sound` is less than `passed`."""
    if of > MOST_ROWS and adapter.verdict is Verdict.PASSED and not adapter.findings:
        return  # that they are sound is counted
    said = "sound" if adapter.verdict is Verdict.PASSED else adapter.verdict.value
    yield f"{said:<6}  {one_line(adapter.name, words.NAME_LIMIT)}  ({one_line(adapter.source, words.NAME_LIMIT)})"
    for finding in adapter.findings:
        kind = "" if finding.severity is Severity.ERROR else f"{finding.severity}: "
        yield f"        {kind}{finding.check}: {one_line(finding.message, words.MESSAGE_LIMIT)}"
        if finding.hint:
            yield f"        to do: {one_line(finding.hint, words.MESSAGE_LIMIT)}"
