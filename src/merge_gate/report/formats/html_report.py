"""Renders report.html: one self-contained page for people.

The page loads nothing. It contains its style and script, and its content security policy allows only these, by hash.
`one_line` makes hidden characters of foreign text visible, and it is escaped. The data of the maps are JSON that no
tag can end.

1. All text is in the page itself, so that people can search, print, and read it without a script.
2. page/report.js draws an adapter's map when it is opened, from figures of three digits.
3. The row of an adapter that was in the previous report is reused.
"""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from merge_gate.records.config import COMMAND_LINE
from merge_gate.report.formats.rendered_adapters import RenderedAdapters
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import earlier_entries
from merge_gate.report.wording.chain import chain
from merge_gate.report.wording.grid import State, blocks, count_states, states
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Template

    from merge_gate.records.measured import TensorMerge
    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

_MAX_LENGTH = 2000
_DIGITS = 3
_LETTERS = {State.NAN: "N", State.INF: "I", State.NO_EFFECT: "U", State.FINITE: "F", State.UNTOUCHED: "V"}
_MAX_PLACES = 20


def render(report: Report, rendered: RenderedAdapters | None = None) -> str:
    """Return the HTML of report.html. `rendered` holds the rows of the run's last report, which this one reuses."""
    layouts = _Layouts()
    judged = words.worst_first(report.adapters)
    page, _ = _templates()
    return page.render(
        report=report,
        style=_part("report.css"),
        script=_part("report.js"),
        policy=_policy(),
        rows=_rows(report, judged, layouts, rendered or RenderedAdapters()),
        layouts=_data(layouts.known),
        failed=report.counts.failed,
        not_judged=report.counts.error,
        passed=report.counts.passed,
        warned=sum(bool(words.warnings(adapter)) for adapter in report.adapters),
    )


@cache
def _templates() -> tuple[Template, Template]:
    """The templates of the page and of a row."""
    environment = Environment(
        loader=PackageLoader("merge_gate.report.formats", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.globals |= {"words": words, "run_result": run_result}
    environment.filters["number"] = words.number
    environment.filters["spaced"] = _spaced
    return environment.get_template("report.html"), environment.get_template("row.html")


def _visible(value: Any) -> Any:
    """Make a value visible, and escape it. Jinja calls this for every text that a template prints."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else _escaped(value)


def _spaced(text: str) -> Markup:
    """A part of a sentence, with its leading and trailing space, which `one_line` removes."""
    return Markup("{}{}{}").format(
        " " if text[:1].isspace() else "", _escaped(text), " " if text[1:] and text[-1:].isspace() else ""
    )


def _escaped(text: str) -> Markup:
    """Visible text. A GitHub runner obeys `##[` anywhere in a line, also when a step prints this file."""
    return Markup(str(escape(one_line(text, _MAX_LENGTH))).replace("##[", "#&#35;["))  # noqa: S704 - it is escaped


@cache
def _part(name: str) -> Markup:
    """The style or script of the page."""
    text = resources.files("merge_gate.report.formats").joinpath("page", name).read_text(encoding="utf-8")
    return Markup(text)  # noqa: S704 - a file of this package


def _policy() -> str:
    digests = {
        name: base64.b64encode(hashlib.sha256(_part(name).encode()).digest()).decode()
        for name in ("report.css", "report.js")
    }
    return (
        f"default-src 'none'; style-src 'sha256-{digests['report.css']}'; script-src 'sha256-{digests['report.js']}'; "
        "base-uri 'none'; form-action 'none'"
    )


# --- the row of an adapter -----------------------------------------------------------------------------------------


def _rows(
    report: Report, judged: list[AdapterReport], layouts: _Layouts, rendered: RenderedAdapters
) -> list[dict[str, Any]]:
    """The rows. A finding that an earlier row shows, of the same adapter in another dtype, is folded."""
    before = earlier_entries(judged)
    texts = rendered.texts(
        _row,
        judged,
        [layouts.number_of(adapter) for adapter in judged],
        [_named(before.get(place, {})) for place in range(len(judged))],
        [report.config.path] * len(judged),
    )
    return [
        {"verdict": adapter.verdict, "is_warned": bool(words.warnings(adapter)), "text": Markup(text)}  # noqa: S704 - made below
        for adapter, text in zip(judged, texts, strict=True)
    ]


def _named(before: Mapping[Finding, AdapterReport]) -> dict[Finding, str]:
    return {finding: words.precision(earlier.base) for finding, earlier in before.items()}


def _row(adapter: AdapterReport, layout: int | None, before: Mapping[Finding, str], config_path: str) -> str:
    """Render a row. `before` maps a finding to the dtype of the earlier row that shows it."""
    decided = words.deciding(adapter)
    findings = ([decided] if decided else []) + words.others(adapter)
    row = {
        "cause": words.cause(adapter),
        "place": words.place(decided) if decided else "",
        "warnings": sorted({finding.check for finding in words.warnings(adapter)}),
        "chain": chain(adapter),
        "findings": [_group(group) | {"before": before.get(group[0], "")} for group in words.kinds(findings)],
        "states": count_states(adapter.tensors),
        "map": _data(_map(adapter.tensors, layout)) if layout is not None else None,
    }
    _, template = _templates()
    is_direct = config_path == COMMAND_LINE
    return template.render(adapter=adapter, row=row, config_path=config_path, is_direct=is_direct)


def _group(group: tuple[Finding, ...]) -> dict[str, Any]:
    first, *more = group
    return {
        "finding": first,
        "place": words.place(first),
        "values": words.values(first),
        "origin": words.ORIGINS[first.origin],
        "measured": [
            f"{one_line(name, words.NAME_LIMIT).replace('_', ' ')} {value:g}" for name, value in first.measured
        ],
        "more": [words.place(finding) or finding.message for finding in more[:_MAX_PLACES]],
        "omitted": max(len(more) - _MAX_PLACES, 0),
        "count": len(more),
    }


# --- the maps ------------------------------------------------------------------------------------------------------


class _Layouts:
    """The layouts of the maps. Adapters of one base that change the same tensors share one layout."""

    def __init__(self) -> None:
        self.known: list[dict[str, Any]] = []
        self._numbers: dict[object, int] = {}

    def number_of(self, adapter: AdapterReport) -> int | None:
        """The number of the adapter's layout; None if no tensor was merged."""
        merges = adapter.tensors
        if not merges:
            return None
        key = tuple((merge.module, merge.stats.name, merge.stats.dtype, merge.stats.shape) for merge in merges)
        if key not in self._numbers:
            self._numbers[key] = len(self.known)
            self.known.append(_layout(merges))
        return self._numbers[key]


def _map(merges: tuple[TensorMerge, ...], layout: int) -> dict[str, Any]:
    """The data for an adapter's map: columns in the order of its tensors."""
    return {
        "layout": layout,
        "state": "".join(_LETTERS[state] for state in states(merges)),
        "low": [_short(merge.stats.minimum) for merge in merges],
        "high": [_short(merge.stats.maximum) for merge in merges],
        "ratio": [_short(merge.delta_ratio) for merge in merges],
        "loss": [_short(merge.lost_share) for merge in merges],
        "bounded": [index for index, merge in enumerate(merges) if merge.bounded],
        "estimated": [index for index, merge in enumerate(merges) if merge.estimated],
        "broken": {
            index: [merge.stats.nan, merge.stats.posinf, merge.stats.neginf, list(merge.stats.first_index or ())]
            for index, merge in enumerate(merges)
            if not merge.stats.finite
        },
    }


def _layout(merges: tuple[TensorMerge, ...]) -> dict[str, Any]:
    kinds = list(dict.fromkeys((merge.stats.dtype, merge.dtype_max) for merge in merges))
    return {
        "blocks": [
            {
                "stack": _name(block.stack),
                "layers": block.layers,
                "modules": [_name(module) for module in block.modules],
                "places": [number for place in block.places for number in place],
            }
            for block in blocks(merges)
        ],
        "names": [_name(merge.stats.name) for merge in merges],
        "shapes": [" x ".join(map(str, merge.stats.shape)) for merge in merges],
        "dtypes": [[_name(dtype), _short(largest)] for dtype, largest in kinds],
        "dtype": [kinds.index((merge.stats.dtype, merge.dtype_max)) for merge in merges],
    }


def _data(value: Any) -> Markup:
    """JSON for a script element. No text in it can end the element."""
    data = htmlsafe_json_dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup(str(data).replace("##[", "#\\u0023["))  # noqa: S704 - it is safe, and stays so


def _name(text: str) -> str:
    return one_line(text, words.NAME_LIMIT)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")
