"""Renders summary.md: GitHub-flavored Markdown for the job summary, at most 64 KiB.

It has the result in a sentence, a table with the worst first, and for each adapter that is not cleared the problem,
its place, and the next step. Foreign text cannot form markup (see markdown.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_gate._internal.output_files import GENERATOR_COMMENT
from merge_gate._internal.text import listing
from merge_gate.records.terms import Result, Verdict
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import by_adapter, marks_of, more_findings, paragraphs, unique_findings
from merge_gate.report.wording.grid import Block, State, blocks, states
from merge_gate.report.wording.markdown import code, plain, prose
from merge_gate.report.wording.untrusted import inert, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from merge_gate.records.report import AdapterReport, BaseReport, Report
    from merge_gate.records.terms import Finding
    from merge_gate.report.wording.alike import AlikeAdapters

_MAX_ROWS = 40
"""If there are more merges, those that passed without a warning are folded at the end."""
_TABLE_BYTES = 16 * 1024
_SECTIONS_BYTES = 32 * 1024
_OTHERS_BYTES = 4 * 1024
_WARNINGS_BYTES = 5 * 1024
_BASES_BYTES = 2 * 1024
_FORWARDS_BYTES = 1024
_PUBLISHED_BYTES = 4 * 1024
_FULL_LIST = "the full list is in `report.json`"

_RESULT_MARK = {Result.PASS: "✅", Result.FAIL: "❌", Result.ERROR: "⚠️"}
_VERDICT_MARK = {Verdict.PASSED: "✅", Verdict.FAILED: "❌", Verdict.ERROR: "⚠️"}


def render(report: Report) -> str:
    """Return the Markdown of summary.md."""
    shown, folded = _shown_and_folded(report)
    first = "model" if report.is_comparison else "adapter"
    table = _table(shown, first=first)
    blocks = [
        GENERATOR_COMMENT,
        f"## {_RESULT_MARK[report.result]} merge-gate {prose(run_result.verdict_line(report))}",
        run_result.advice(report),
        *_problems(report),
        *table,
        *_published(report),
        *_sections(report),
        *_warnings(report),
        *_answers(report),
        *_base_findings(report),
        *_forwards(report),
        *_folded(folded, _TABLE_BYTES - sum(len(block.encode()) for block in table)),
        _footer(report),
    ]
    return "\n\n".join(blocks) + "\n"


# --- blocks --------------------------------------------------------------------------------------------------------


def _problems(report: Report) -> list[str]:
    sentences = [*words.problems(report), *words.baseline(report)]
    return ["\n".join(f"- {prose(sentence)}" for sentence in sentences)] if sentences else []


def _shown_and_folded(report: Report) -> tuple[list[AdapterReport], list[AdapterReport]]:
    """The entries of the table, worst first, and the entries to fold: those that passed without a warning."""
    judged = words.worst_first(report.adapters)
    if len(judged) <= _MAX_ROWS:
        return judged, []
    shown: list[AdapterReport] = []
    folded: list[AdapterReport] = []
    for adapter in judged:
        is_quiet = adapter.verdict is Verdict.PASSED and not words.warnings(adapter)
        (folded if is_quiet else shown).append(adapter)
    return shown, folded


def _table(adapters: Sequence[AdapterReport], max_bytes: int = _TABLE_BYTES, *, first: str = "adapter") -> list[str]:
    if not adapters:
        return []
    head = f"| {first} | base | verdict | cause and place |\n|---|---|---|---|"
    rows, left = _fit(map(_row, adapters), len(adapters), max_bytes)
    table = "\n".join([head, *rows])
    return [table, f"… and {words.counted(left, 'more row')}; {_FULL_LIST}."] if left else [table]


def _published(report: Report) -> list[str]:
    """The models that the run published. merge-gate.json has the digests of all other files."""
    models = words.published(report)
    if not models:
        return []
    head = "| published model | adapter | dtype | size | sha256 of merge-gate.json |\n|---|---|---|---|---|"
    rows = (
        f"| {code(model.directory)} | {code(name)} | {code(model.dtype, 40)} "
        f"| {plain(words.published_size(model))} | {code(words.manifest_sha256(model), 80)} |"
        for name, model in models
    )
    shown, left = _fit(rows, len(models), _PUBLISHED_BYTES)
    table = "\n".join([head, *shown])
    return [table, f"… and {words.counted(left, 'more model')}; {_FULL_LIST}."] if left else [table]


def _folded(quiet: Sequence[AdapterReport], max_bytes: int) -> list[str]:
    if not quiet:
        return []
    title = f"{words.counted(len(quiet), 'merge')} that passed without a warning"
    return [f"<details><summary>{title}</summary>", *_table(quiet, max_bytes), "</details>"]


def _row(adapter: AdapterReport) -> str:
    base = f"{code(words.model_name(adapter.base))} ({plain(words.precision(adapter.base))})"
    verdict = f"{_VERDICT_MARK[adapter.verdict]} {words.verdict(adapter)}"
    if adapter.verdict is Verdict.PASSED:
        warned = words.warnings(adapter)
        why = f"{words.counted(len(warned), 'warning')}: {_checks(warned)}" if warned else ""
        why = why or ", ".join(_answer(finding) for finding in words.answers(adapter))
    else:
        module = words.deciding_module(adapter)
        why = code(words.cause(adapter), 80) + (f" in {code(module)}" if module else "")
    why = "; ".join(filter(None, [why, *(plain(mark) for mark in words.marks(adapter))]))
    return f"| {code(adapter.name)} | {base} | {verdict} | {why} |"


def _checks(findings: Iterable[Finding]) -> str:
    return ", ".join(code(check, 80) for check in list(dict.fromkeys(finding.check for finding in findings))[:4])


def _answer(finding: Finding) -> str:
    return code(finding.check, 80) + (" (allowed)" if words.level(finding) == "allowed" else "")


def _answers(report: Report) -> list[str]:
    """What a model that passed a comparison is, with the differences that were allowed."""
    return [
        "\n".join(f"- {words.level(finding)} {_finding(finding, ())}" for finding in answers)
        for adapter in report.adapters
        if (answers := words.answers(adapter))
    ]


def _sections(report: Report) -> list[str]:
    blocked = [groups for groups in paragraphs(report) if groups[0][0].verdict is not Verdict.PASSED]
    with_map = next((groups for groups in blocked if text_map(groups[0][0])), None)
    shown = (_section(groups, with_map=groups is with_map) for groups in blocked)
    sections, _ = _fit(shown, len(blocked), _SECTIONS_BYTES)
    left = sum(map(len, blocked[len(sections) :]))
    if left:
        sections.append(f"… and {words.counted(left, 'more adapter')} not cleared; {_FULL_LIST}.")
    return sections


def _section(groups: AlikeAdapters, *, with_map: bool) -> str:
    """The section of adapters with the same findings, in all dtypes that have them."""
    alike = groups[0]
    adapter = alike[0]
    finding = words.deciding(adapter)
    cause = code(words.cause(adapter), 80)
    names = listing(code(each.name) for each, *_ in groups)
    title = f"{names} {words.title(adapter)}" + (f": {cause}" if adapter.verdict is Verdict.FAILED else "")
    blocks = [f"### {_VERDICT_MARK[adapter.verdict]} {title}", "\n".join(_facts(groups, finding))]
    map_lines = text_map(adapter) if with_map else []
    if map_lines:
        title_of_map = f"The map of {code(adapter.name)}: " if len(groups) > 1 else ""
        blocks.append("\n".join([f"{title_of_map}{LEGEND}:", "", "````text", *map_lines, "````"]))
    rest = unique_findings(alike, words.others)
    if rest:
        items = [f"- {words.level(other)} {_finding(other, more, dtypes)}" for other, more, dtypes in rest]
        total = len(rest) + sum(len(more) for _, more, _ in rest)
        blocks += _details(words.counted(total, "more finding"), items, _OTHERS_BYTES)
    return "\n\n".join(blocks)


def _facts(groups: AlikeAdapters, finding: Finding | None) -> list[str]:
    adapters = [adapter for adapter, *_ in groups]
    if finding is None:
        message, hint = "No finding was recorded.", "Read the job's log, then run the gate again."
    else:
        message, hint = finding.message, finding.hint
    facts = [f"- **What is wrong:** {prose(message)}"]
    if finding:
        facts.append(f"- **Where:** {_place(finding)}")
    if hint:
        label = _hint_label(finding) if finding else "What to do"
        facts.append(f"- **{label}:** {prose(hint)}")
    if finding and words.more(finding):
        address = words.page(finding)
        link = f"[{plain(finding.check)}]({address})" if address else code(words.command_to_explain(finding))
        facts.append(f"- **More:** {link}")
    sources = (code(each.source) + (f" at {code(each.revision, 80)}" if each.revision else "") for each in adapters)
    bases = dict.fromkeys(code(words.model_name(each.base)) for each in adapters)
    label = "Adapter" if len(groups) == 1 else "Adapters"
    dtypes = plain(words.precisions(groups[0]))
    compared_with = adapters[0].compared_with
    if compared_with is None:
        facts.append(f"- **{label}:** {listing(sources)} on {listing(bases)} ({dtypes})")
    else:
        merge = f"the merge of {code(compared_with)} into {listing(bases)}"
        facts.append(f"- **Model:** {listing(sources)}, compared with {merge} ({dtypes})")
    facts += [f"- **Mark:** {plain(mark)}" for mark in marks_of(adapters)]
    return facts


def _place(finding: Finding) -> str:
    place, values = words.place(finding), words.values(finding)
    return "; ".join(filter(None, (code(place) if place else "", plain(values), words.origin(finding))))


def _finding(finding: Finding, more: tuple[Finding, ...], dtypes: str = "") -> str:
    text = f"{code(finding.check, 80)}: {prose(finding.message.rstrip('. '))}"
    if dtypes:
        text = f"({plain(dtypes)}) {text}"
    if place := words.place(finding, unless_in=finding.message):
        text += f" ({code(place)})"
    if more:
        text += f"; and {prose(more_findings(more))}"
    return f"{text}. **{_hint_label(finding)}:** {prose(finding.hint)}" if finding.hint else text


def _hint_label(finding: Finding) -> str:
    return {"to do": "What to do", "because": "Because"}[words.hint_label(finding)]


def _warnings(report: Report) -> list[str]:
    passed = [adapter for adapter in report.adapters if adapter.verdict is Verdict.PASSED and words.warnings(adapter)]
    if not passed:
        return []
    warnings = [(same, unique_findings(same, words.warnings)) for same in by_adapter(passed)]
    items = [
        f"- {code(same[0].name)} {_finding(finding, more, dtypes or words.precisions(same))}"
        for same, unique in warnings
        for finding, more, dtypes in unique
    ]
    total = words.counted(sum(1 + len(more) for _, unique in warnings for _, more, _ in unique), "warning")
    return _details(
        f"{total} for {words.counted(len({each.name for each in passed}), 'adapter')} that passed",
        items,
        _WARNINGS_BYTES,
    )


def _base_findings(report: Report) -> list[str]:
    bases = words.bases_with_findings(report.bases)
    items = [
        f"- {finding.severity} {code(words.model_name(same[0].key))} {plain(words.how_loaded(same))} "
        f"{_finding(finding, more)}"
        for same in bases
        for finding, more in words.grouped(same[0].findings)
    ]
    if not items:
        return []
    title = f"{words.counted(sum(len(same[0].findings) for same in bases), 'finding')} in the base, before any merge"
    return _details(title, items, _BASES_BYTES)


def _forwards(report: Report) -> list[str]:
    """What the runs of base and adapter as models showed, of adapters that passed: the others have findings."""
    ran = [adapter for adapter in report.adapters if adapter.forward.ran and adapter.verdict is Verdict.PASSED]
    items = [f"- {code(run.name)} ({plain(words.precision(run.base))}) {prose(words.forward(run))}" for run in ran]
    title = f"{words.counted(len(ran), 'merge')} that passed, run as a model"
    return _details(title, items, _FORWARDS_BYTES) if ran else []


def _footer(report: Report) -> str:
    checked = sum(adapter.coverage.parameters_checked for adapter in report.adapters)
    total = sum(adapter.coverage.parameters_total for adapter in report.adapters)
    config_sha256 = f", sha256 {code(report.config.sha256)}" if report.config.sha256 else ""
    parameters = f"{checked:,} of {total:,} parameters of the merged models"
    rows = [f"| checked | {parameters} |"]
    bases, left = _fit(map(_base_row, report.bases), len(report.bases), _BASES_BYTES)
    rows += bases
    if left:
        rows.append(f"| | … and {words.counted(left, 'more base')} |")
    if judged := words.judged(report):
        rows.append(f"| judged | {plain(judged)} |")
    if cached := words.cached(report):
        rows.append(f"| cached | {plain(cached)} |")
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
    if len(base.files) == 1:
        parts.append(f"{code(base.files[0].path)} with sha256 {code(base.files[0].sha256, 80)}")
    elif base.sha256:
        parts.append(f"sha256 of all files {code(base.sha256, 80)}")
    return f"| base | {', '.join(parts)} |"


def _details(title: str, items: Sequence[str], max_bytes: int) -> list[str]:
    """Return a folded list. GitHub reads Markdown inside only if there are blank lines between the parts."""
    shown, left = _fit(items, len(items), max_bytes)
    if left:
        shown.append(f"- … and {left} more; {_FULL_LIST}.")
    return [f"<details><summary>{title}</summary>", "\n".join(shown), "</details>"]


def _fit(blocks: Iterable[str], total: int, max_bytes: int) -> tuple[list[str], int]:
    """Return as many of `total` blocks as fit into `max_bytes` of UTF-8, and how many were left out.

    The first block is always included: its parts are bounded. Blocks beyond the limit are not rendered.
    """
    fitting: list[str] = []
    used = 0
    for block in blocks:
        used += len(block.encode()) + 2
        if fitting and used > max_bytes:
            break
        fitting.append(block)
    return fitting, total - len(fitting)


# --- the map of merged tensors ----------------------------------------------------------------------------------------

MARKS = {State.NAN: "N", State.INF: "I", State.NO_EFFECT: "-", State.FINITE: ".", State.UNTOUCHED: " "}
LEGEND = "N NaN, I ±Inf, - no effect, . finite, blank untouched"
_MAX_NAME = 40
_MAX_LAYERS = 128
_MAX_MODULES = 16
_TICK = 5


def text_map(adapter: AdapterReport) -> list[str]:
    """The lines of the map; empty if all tensors are finite. If there are many modules, broken ones come first."""
    marks = [MARKS[state] for state in states(adapter.tensors)]
    for block in blocks(adapter.tensors):
        if any(marks[index] in "NI" for index, _, _ in block.places):
            return [inert(line) for line in _drawn(block, marks)]
    return []


def _drawn(block: Block, marks: list[str]) -> list[str]:
    cells = [[" "] * len(block.layers) for _ in block.modules]
    for index, row, column in block.places:
        cells[row][column] = marks[index]
    rows = list(zip(block.modules, cells, strict=True))
    if len(rows) > _MAX_MODULES:
        rows.sort(key=lambda row: -sum(mark in "NI" for mark in row[1]))
    shown = [(one_line(name, _MAX_NAME), "".join(row[:_MAX_LAYERS])) for name, row in rows[:_MAX_MODULES]]
    width = max(len(name) for name, _ in shown)
    ticks = "".join(f"{layer:<{_TICK}}"[:_TICK] for layer in block.layers[:_MAX_LAYERS:_TICK])  # of every fifth layer
    lines = [f"  {one_line(block.stack, _MAX_NAME):<{width}}  {ticks}".rstrip()]
    lines += [f"  {name:<{width}}  {row}".rstrip() for name, row in shown]
    if len(rows) > _MAX_MODULES:
        lines.append(f"  … and {words.counted(len(rows) - _MAX_MODULES, 'more module')}")
    return lines
