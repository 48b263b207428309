"""The report for programs: strict JSON (RFC 8259, no bare NaN or Infinity), and back.

In: a `records.Report`, or the bytes of a report.json of unknown origin. Out: `render`, the text of report.json, and
`read`, the report again. Knows no files and no other format. Every key is always there; unknown values are
null.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import is_hidden
from merge_gate.judging.verdict import with_decision
from merge_gate.records.report import SCHEMA_VERSION, TOOL, AdapterReport, Report
from merge_gate.records.terms import Severity, Verdict
from merge_gate.report.formats.fields import Json, UnreadableError, dump, dump_record, load_document
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Escaped although JSON does not ask for it: characters that hide or reorder text in a terminal, and the one sequence
# that a GitHub runner obeys anywhere in a log line. So `cat report.json` in a job is harmless; parsers see no change.
_MAYBE_UNSAFE = re.compile(r"[^\n -~]|#(?=\[)")
# Empty lists as the layout below leaves them. No text holds a line break, so nothing else looks like them.
_NO_ROWS = '\n    "rows": []'
_NO_ADAPTERS, _ADAPTERS = '\n  "adapters": []', '\n  "adapters": [\n    '
_ROW = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


class RenderedAdapters:
    """The texts of the adapters of the last report.json, so that the next report of the run can reuse them."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[AdapterReport, str]] = {}

    def texts(self, make: Callable[[AdapterReport], str], adapters: Iterable[AdapterReport]) -> list[str]:
        """Return `make(adapter)` for each adapter. If the last report had the same object, its text is reused."""
        entries = [self._last.get(id(adapter)) or (adapter, make(adapter)) for adapter in adapters]
        self._last = {id(adapter): (adapter, text) for adapter, text in entries}
        return [text for _, text in entries]


def render(report: Report, rendered: RenderedAdapters | None = None) -> str:
    """Return report.json. Never raises for what a record may hold: non-finite figures become strings.

    `rendered` holds the texts of the run's last report, which this one reuses.
    """
    text = _laid_out(dump_record(report, emptied=("adapters",)))
    texts = (rendered or RenderedAdapters()).texts(_adapter_text, report.adapters)
    if texts:
        before, _, after = text.partition(_NO_ADAPTERS)
        return "".join((before, _ADAPTERS, ",\n    ".join(texts), "\n  ]", after, "\n"))
    return text + "\n"


def _adapter_text(adapter: AdapterReport) -> str:
    described = dump(adapter)
    rows, described["tensors"]["rows"] = described["tensors"]["rows"], []
    text = _laid_out(described)
    if rows:  # a line for each: with every cell on its own they would be most of the file
        lines = ",\n".join(f"      {_ROW.encode(row)}" for row in rows)
        text = text.replace(_NO_ROWS, f'\n    "rows": [\n{_inert(lines)}\n    ]', 1)
    return text.replace("\n", "\n    ")


def _laid_out(document: Json) -> str:
    return _inert(json.dumps(document, allow_nan=False, ensure_ascii=False, indent=2))


def _inert(text: str) -> str:
    return _MAYBE_UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    if match[0] == "#":
        return "\\u0023"
    return json.dumps(match[0]).strip('"') if is_hidden(match[0]) else match[0]


# --- back ----------------------------------------------------------------------------------------------------------


def read(data: bytes, name: str) -> Report:
    """Return the report that `render` wrote; `name` is the file's, for messages.

    Raises:
        UsageError: it is no report of version 1, or contradicts itself.
    """
    try:
        report: Report = load_document(Report, data, SCHEMA_VERSION, TOOL)
        _refuse_contradictions(report)
    except UnreadableError as error:
        raise UsageError(
            f"{one_line(name)} is not a report of merge-gate: {error}",
            hint="expected the report.json of a run, as `merge-gate schema report` describes it",
        ) from error
    return replace(report, adapters=tuple(map(with_decision, report.adapters)))


def _refuse_contradictions(report: Report) -> None:
    for index, adapter in enumerate(report.adapters):
        errors = {finding.check for finding in adapter.findings if finding.severity is Severity.ERROR}
        problem = ""
        if adapter.verdict is Verdict.PASSED and adapter.cause is not None:
            problem = "passed and has a cause"
        elif adapter.verdict is Verdict.PASSED and errors:
            problem = f"passed and has an error ({one_line(min(errors), 80)})"
        elif adapter.verdict is not Verdict.PASSED and adapter.cause is None:
            problem = f"{adapter.verdict} and has no cause"
        elif adapter.cause is not None and adapter.cause not in errors:
            problem = f"its cause is {one_line(adapter.cause, 80)}, which is none of its errors"
        elif adapter.accepted and adapter.verdict is not Verdict.FAILED:
            problem = "accepted and has not failed"
        if problem:
            raise UnreadableError(problem, f"adapters[{index}]")
