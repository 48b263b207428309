"""The report for whoever's release is blocked: GitHub-flavoured Markdown for the job summary.

In: a `records.Report`. Out: Markdown of at most 64 KiB (GitHub drops a summary above 1 MiB): the result in a
sentence, a table with the worst first, then for each adapter that is not cleared what is wrong, where, and what to
do. Knows neither files nor the other formats. Foreign text can form no markup: see markdown.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate.output_files import GENERATOR_COMMENT
from merge_gate.records.terms import Result, Verdict
from merge_gate.report.wording import words
from merge_gate.report.wording.alike import by_adapter, marks_of, paragraphs, told_once
from merge_gate.report.wording.markdown import code, plain, prose
from merge_gate.report.wording.textmap import LEGEND, text_map
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from merge_gate.records.report import AdapterReport, BaseReport, Report
    from merge_gate.records.terms import Finding
    from merge_gate.report.wording.alike import Told

_MOST_ROWS = 40
"""Of more merges, those that passed without a warning are folded away, below what there is to do."""
_TABLE_BYTES = 16 * 1024
_SECTIONS_BYTES = 36 * 1024
_OTHERS_BYTES = 4 * 1024
_WARNINGS_BYTES = 5 * 1024
_BASES_BYTES = 2 * 1024
_FULL_LIST = "the full list is in `report.json`"

_RESULT_MARK = {Result.PASS: "✅", Result.FAIL: "❌", Result.ERROR: "⚠️"}
_VERDICT_MARK = {Verdict.PASSED: "✅", Verdict.FAILED: "❌", Verdict.ERROR: "⚠️"}


def render(report: Report) -> str:
    """Return the Markdown of summary.md."""
    shown, folded = _told_apart(report)
    table = _table(shown)
    blocks = [
        GENERATOR_COMMENT,
        f"## {_RESULT_MARK[report.result]} merge-gate: {words.headline(report)}",
        words.advice(report),
        *_problems(report),
        *table,
        *_sections(report),
        *_warnings(report),
        *_base_findings(report),
        *_folded(folded, _TABLE_BYTES - sum(len(block.encode()) for block in table)),
        _footer(report),
    ]
    return "\n\n".join(blocks) + "\n"


# --- blocks --------------------------------------------------------------------------------------------------------


def _problems(report: Report) -> list[str]:
    said = [*words.problems(report), *words.baseline(report)]
    return ["\n".join(f"- {prose(problem)}" for problem in said)] if said else []


def _told_apart(report: Report) -> tuple[list[AdapterReport], list[AdapterReport]]:
    """The entries of the table, worst first, and those that are folded away because there is nothing to say of them."""
    judged = words.worst_first(report.adapters)
    if len(judged) <= _MOST_ROWS:
        return judged, []
    shown: list[AdapterReport] = []
    quiet: list[AdapterReport] = []
    for one in judged:
        (quiet if one.verdict is Verdict.PASSED and not words.warnings(one) else shown).append(one)
    return shown, quiet


def _table(adapters: Sequence[AdapterReport], limit_bytes: int = _TABLE_BYTES) -> list[str]:
    if not adapters:
        return []
    head = "| adapter | base | verdict | cause and place |\n|---|---|---|---|"
    rows, left = _fit(map(_row, adapters), len(adapters), limit_bytes)
    table = "\n".join([head, *rows])
    return [table, f"… and {words.counted(left, 'more row')}; {_FULL_LIST}."] if left else [table]


def _folded(quiet: Sequence[AdapterReport], limit_bytes: int) -> list[str]:
    if not quiet:
        return []
    title = f"{words.counted(len(quiet), 'merge')} that passed without a warning"
    return [f"<details><summary>{title}</summary>", *_table(quiet, limit_bytes), "</details>"]


def _row(adapter: AdapterReport) -> str:
    base = f"{code(words.model_name(adapter.base), 80)} ({plain(words.precision(adapter.base))})"
    verdict = f"{_VERDICT_MARK[adapter.verdict]} {adapter.verdict}"
    if adapter.verdict is Verdict.PASSED:
        warned = words.warnings(adapter)
        why = f"{words.counted(len(warned), 'warning')}: {_checks(warned)}" if warned else ""
    else:
        module = words.deciding_module(adapter)
        why = code(words.cause(adapter), 80) + (f" in {code(module, 120)}" if module else "")
    why = "; ".join(filter(None, [why, *(plain(mark) for mark in words.marks(adapter))]))
    return f"| {code(adapter.name, 80)} | {base} | {verdict} | {why} |"


def _checks(findings: Iterable[Finding]) -> str:
    return ", ".join(code(check, 80) for check in list(dict.fromkeys(finding.check for finding in findings))[:4])


def _sections(report: Report) -> list[str]:
    blocked = [groups for groups in paragraphs(report) if groups[0][0].verdict is not Verdict.PASSED]
    shown = (_section(groups, with_map=index == 0) for index, groups in enumerate(blocked))
    kept, _ = _fit(shown, len(blocked), _SECTIONS_BYTES)
    left = sum(map(len, blocked[len(kept) :]))
    if left:
        kept.append(f"… and {words.counted(left, 'more adapter')} not cleared; {_FULL_LIST}.")
    return kept


def _section(groups: Told, *, with_map: bool) -> str:
    """One adapter, in all the dtypes of which the same is so; or several, of which the same is so."""
    alike = groups[0]
    adapter = alike[0]
    finding = words.deciding(adapter)
    cause = code(words.cause(adapter), 80)
    names = listing(code(each.name) for each, *_ in groups)
    title = f"{names} {words.title(adapter)}" + (f": {cause}" if adapter.verdict is Verdict.FAILED else "")
    blocks = [f"### {_VERDICT_MARK[adapter.verdict]} {title}", "\n".join(_facts(groups, finding))]
    drawn = text_map(adapter) if with_map else []
    if drawn:
        whose = f"The map of {code(adapter.name)}: " if len(groups) > 1 else ""
        blocks.append("\n".join([f"{whose}{LEGEND}:", "", "````text", *drawn, "````"]))
    rest = told_once(alike, words.others)
    if rest:
        items = [f"- {other.severity} {_one_finding(other, more, where)}" for other, more, where in rest]
        total = len(rest) + sum(more for _, more, _ in rest)
        blocks += _details(words.counted(total, "more finding"), items, _OTHERS_BYTES)
    return "\n\n".join(blocks)


def _facts(groups: Told, finding: Finding | None) -> list[str]:
    each = [one for one, *_ in groups]
    if finding is None:
        message, hint = "No finding was recorded.", "Read the job's log, then run the gate again."
    else:
        message, hint = finding.message, finding.hint
    facts = [f"- **What is wrong:** {prose(message)}"]
    if finding:
        facts.append(f"- **Where:** {_place(finding)}")
    if hint:
        facts.append(f"- **What to do:** {prose(hint)}")
    sources = (code(one.source) + (f" at {code(one.revision, 80)}" if one.revision else "") for one in each)
    bases = dict.fromkeys(code(words.model_name(one.base)) for one in each)
    label = "Adapter" if len(groups) == 1 else "Adapters"
    facts.append(f"- **{label}:** {listing(sources)} on {listing(bases)} ({plain(words.precisions(groups[0]))})")
    facts += [f"- **Mark:** {plain(mark)}" for mark in marks_of(each)]
    return facts


def _place(finding: Finding) -> str:
    place, values = words.place(finding), words.values(finding)
    return "; ".join(filter(None, (code(place) if place else "", plain(values), words.ORIGINS[finding.origin])))


def _one_finding(finding: Finding, more: int, where: str = "") -> str:
    text = f"{code(finding.check, 80)}: {prose(finding.message.rstrip('. '), 300)}"
    if where:
        text = f"({plain(where)}) {text}"
    if place := words.place(finding, unless_in=finding.message):
        text += f" ({code(place, 120)})"
    if more:
        text += f"; and {words.number(more)} more like it"
    return f"{text}. **What to do:** {prose(finding.hint, 300)}" if finding.hint else text


def _warnings(report: Report) -> list[str]:
    passed = [adapter for adapter in report.adapters if adapter.verdict is Verdict.PASSED and words.warnings(adapter)]
    if not passed:
        return []
    told = [(same, told_once(same, words.warnings)) for same in by_adapter(passed)]
    items = [
        f"- {code(same[0].name, 80)} {_one_finding(finding, more, where or words.precisions(same))}"
        for same, warned in told
        for finding, more, where in warned
    ]
    total = words.counted(sum(1 + more for _, warned in told for _, more, _ in warned), "warning")
    return _details(f"{total} for {words.counted(len(passed), 'adapter')} that passed", items, _WARNINGS_BYTES)


def _base_findings(report: Report) -> list[str]:
    items = [
        f"- {finding.severity} {code(words.model_name(base.key))} {_one_finding(finding, more)}"
        for base in report.bases
        for finding, more in words.grouped(base.findings)
    ]
    if not items:
        return []
    title = (
        f"{words.counted(sum(len(base.findings) for base in report.bases), 'finding')} in the base, before any merge"
    )
    return _details(title, items, _BASES_BYTES)


def _footer(report: Report) -> str:
    checked = sum(adapter.coverage.parameters_checked for adapter in report.adapters)
    total = sum(adapter.coverage.parameters_total for adapter in report.adapters)
    config_sha256 = f", sha256 {code(report.config.sha256)}" if report.config.sha256 else ""
    bound = words.proved_by_bound(sum(adapter.coverage.parameters_bounded for adapter in report.adapters))
    said = "; ".join(
        filter(None, [f"{words.number(checked)} of {words.number(total)} parameters of the merged models", bound])
    )
    rows = [f"| checked | {said} |"]
    bases, left = _fit(map(_base_row, report.bases), len(report.bases), _BASES_BYTES)
    rows += bases
    if left:
        rows.append(f"| | … and {words.counted(left, 'more base')} |")
    if said := words.judged(report):
        rows.append(f"| judged | {plain(said)} |")
    if said := words.cached(report):
        rows.append(f"| cached | {plain(said)} |")
    rows += [
        f"| config | {code(report.config.path)}{config_sha256} |",
        f"| versions | {', '.join(plain(text) for text in words.versions(report.environment, report.tool.version))} |",
        f"| device | {plain(words.device(report.environment))} |",
        f"| sandbox | {plain(words.sandbox(report.environment))} |",
    ]
    return "\n".join(["| run | |", "|---|---|", *rows])


def _base_row(base: BaseReport) -> str:
    parts = [
        f"{code(words.model_name(base.key))} ({plain(words.precision(base.key))})",
        words.counted(base.parameters, "parameter"),
    ]
    if base.revision:
        parts.append(f"revision {code(base.revision, 80)}")
    if base.sha256:
        parts.append(f"sha256 {code(base.sha256, 80)}")
    return f"| base | {', '.join(parts)} |"


def _details(title: str, items: Sequence[str], limit_bytes: int) -> list[str]:
    """Return a folded list. The blank lines between its parts are what makes GitHub read Markdown inside."""
    kept, left = _fit(items, len(items), limit_bytes)
    if left:
        kept.append(f"- … and {left} more; {_FULL_LIST}.")
    return [f"<details><summary>{title}</summary>", "\n".join(kept), "</details>"]


def _fit(blocks: Iterable[str], total: int, limit_bytes: int) -> tuple[list[str], int]:
    """Return the first of `total` blocks, as many as fit into `limit_bytes` of UTF-8, and how many were left out.

    The first fits in any case: its parts are bounded. Blocks beyond the limit are not even rendered.
    """
    kept: list[str] = []
    used = 0
    for block in blocks:
        used += len(block.encode()) + 2
        if kept and used > limit_bytes:
            break
        kept.append(block)
    return kept, total - len(kept)
