"""Renders report.html: one self-contained page for people.

The page loads nothing. It contains its style and script, and its content security policy allows only these, by hash.
`one_line` makes hidden characters of foreign text visible, and it is escaped. The data of the maps are JSON that no
tag can end.

1. All text is in the page itself, so that people can search, print, and read it without a script.
2. page/report.js draws an adapter's map when it is opened, from figures of three digits.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections import Counter
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from merge_gate._internal.text import has_hidden
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.measured import NORM_LIMIT
from merge_gate.records.terms import FailureKind, Origin, Severity, Verdict
from merge_gate.report.wording import explanations, run_result, words
from merge_gate.report.wording.alike import earlier_entries, more_findings
from merge_gate.report.wording.grid import State, blocks, count_states, states
from merge_gate.report.wording.run_result import AdapterState
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Template

    from merge_gate.records.measured import TensorMerge
    from merge_gate.records.report import AdapterReport, BaseReport, Report
    from merge_gate.records.terms import Finding
    from merge_gate.report.wording.run_result import Adapter

MAX_LENGTH = 2000
"""Characters of a text of the page. The middle of a longer one is left out."""

_DIGITS = 3
_LETTERS = {State.NAN: "N", State.INF: "I", State.NO_EFFECT: "U", State.FINITE: "F", State.UNTOUCHED: "V"}
_MAX_PLACES = 20
_MAX_CAUSES = 12
_MAX_ADDRESS = 80
_NOT_IN_ADDRESS = re.compile(r"[^A-Za-z0-9._-]+")


def render(report: Report) -> str:
    """Return the HTML of report.html."""
    layouts = _Layouts()
    adapters = run_result.worst_first(run_result.adapters_of(report))
    return _template().render(
        report=report,
        style=_part("report.css"),
        script=_part("report.js"),
        policy=_policy(),
        counts=_counts(adapters),
        causes=_causes(adapters),
        rows=_rows(adapters, layouts, "" if report.is_comparison else report.config.path),
        published=words.published(report),
        bases=_bases(report.bases),
        explained=_explained(report),
        layouts=_data(layouts.known),
    )


def _counts(adapters: list[Adapter]) -> list[dict[str, Any]]:
    """The adapters by verdict, as buttons that filter."""
    states = Counter(adapter.state for adapter in adapters)
    warned = sum(bool(adapter.warnings) for adapter in adapters)
    rows = [
        ("", "in all", len(adapters)),
        (AdapterState.FAILED, "failed", states[AdapterState.FAILED]),
        (AdapterState.ERROR, "not judged", sum(adapter.is_undecided for adapter in adapters)),
        (AdapterState.ACCEPTED, "known failures", states[AdapterState.ACCEPTED]),
        (AdapterState.PASSED, "passed", states[AdapterState.PASSED]),
        ("warned", "with warnings", warned),
    ]
    return [
        {"pick": str(pick), "label": label, "number": number}
        for pick, label, number in rows
        if number or pick is not AdapterState.ACCEPTED
    ]


def _causes(adapters: list[Adapter]) -> list[tuple[str, int]]:
    """The causes, the most frequent first, and how many adapters have each."""
    return Counter(cause for adapter in adapters for cause in adapter.causes).most_common(_MAX_CAUSES)


def _bases(bases: tuple[BaseReport, ...]) -> list[list[BaseReport]]:
    """The bases of a report. One of the same files is listed once, with all its dtypes."""
    return [*words.by(bases, lambda base: (base.model, base.revision, base.parameters, base.sha256)).values()]


def _explained(report: Report) -> list[str]:
    """The checks of the report that have an explanation."""
    findings = [finding for adapter in report.adapters for finding in adapter.findings]
    findings += [finding for base in report.bases for finding in base.findings]
    known = explanations.explanations()
    return list(dict.fromkeys(finding.check for finding in findings if finding.check in known))


_IN_NAME = re.compile(r"(?<=\w[._])(?=[A-Za-z])|(?<=\w/)(?=\w)", re.ASCII)
"""After a dot or an underscore in a name, and not in a number; and after a slash in a path."""


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("merge_gate.report.formats", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.globals |= {"words": words, "run_result": run_result, "explanations": explanations}
    environment.filters["number"] = "{:,}".format
    environment.filters["spaced"] = _spaced
    environment.filters["breakable"] = _breakable
    environment.filters["inline"] = _inline
    return environment.get_template("report.html")


def _visible(value: Any) -> Any:
    """Make a value visible, and escape it. Jinja calls this for every text that a template prints."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else _escaped(value)


def _spaced(text: str) -> Markup:
    """A part of a sentence, with its leading and trailing space, which `one_line` removes."""
    return Markup("{}{}{}").format(
        " " if text[:1].isspace() else "", _breakable(text), " " if text[1:] and text[-1:].isspace() else ""
    )


def _breakable(text: str) -> Markup:
    """Visible text, which a narrow page breaks between the parts of names and paths."""
    return Markup(_IN_NAME.sub("<wbr>", _escaped(text)))  # noqa: S704 - it is escaped


def _escaped(text: str) -> Markup:
    """Visible text. A GitHub runner obeys `##[` anywhere in a line, also when a step prints this file."""
    return Markup(str(escape(one_line(text, MAX_LENGTH))).replace("##[", "#&#35;["))  # noqa: S704 - it is escaped


@cache
def _part(name: str) -> Markup:
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


def _acceptance(entries: Sequence[AdapterReport]) -> str:
    """Who accepts the adapter's failures; empty if one of them is not accepted."""
    marks = [words.acceptance(entry) for entry in entries if entry.verdict is Verdict.FAILED]
    return marks[0] if marks and all(marks) else ""


def _rows(adapters: list[Adapter], layouts: _Layouts, config_path: str) -> list[dict[str, Any]]:
    """The rows. A finding that another dtype of the adapter shows already is folded."""
    return [
        {
            "id": address,
            "state": str(adapter.state),
            "also": " ".join(["error"] * adapter.is_undecided + ["warned"] * bool(adapter.warnings)),
            "first": adapter.entries[0],
            "entries": [
                _entry(entry, layouts.number_of(entry), before)
                for entry, before in zip(adapter.entries, earlier_entries(adapter.entries), strict=True)
            ],
            "causes": _causes_of(adapter.entries),
            "accepted": _acceptance(adapter.entries),
            "warnings": sorted({finding.check for _, finding in adapter.warnings}),
            "answers": words.answers(adapter.entries[0]),
            "seconds": sum(entry.seconds for entry in adapter.entries if math.isfinite(entry.seconds)),
            "is_direct": config_path in {"", COMMAND_LINE},
            "command": repeat_command(adapter.entries, config_path),
        }
        for adapter, address in zip(adapters, _ids(adapters), strict=True)
    ]


def _ids(adapters: list[Adapter]) -> list[str]:
    """An address for each row, made of its adapter's name."""
    taken: dict[str, None] = {}
    for number, adapter in enumerate(adapters, 1):
        name = _NOT_IN_ADDRESS.sub("-", adapter.name)[:_MAX_ADDRESS].strip("-")
        address = f"adapter-{name or number}"
        taken[f"{address}--{number}" if address in taken else address] = None
    return list(taken)


def _causes_of(entries: tuple[AdapterReport, ...]) -> list[dict[str, str]]:
    """Each cause once, with the place in its first dtype. If there are several, each is named with its dtypes."""
    by_cause = words.by(filter(words.cause, entries), words.cause)
    rows = []
    for cause, having in by_cause.items():
        kind, decided = words.failure(having[0]), words.deciding(having[0])
        about = [words.FAILURES[kind]] if kind not in {None, FailureKind.BROKEN} else []
        about += [words.precisions(having)] if len(by_cause) > 1 else []
        rows.append({"id": cause, "about": ", ".join(about), "place": words.place(decided) if decided else ""})
    return rows


def _entry(adapter: AdapterReport, layout: int | None, before: Mapping[Finding, AdapterReport]) -> dict[str, Any]:
    decided = words.deciding(adapter)
    findings = ([decided] if decided else []) + words.others(adapter)
    return {
        "adapter": adapter,
        "chain": chain(adapter),
        "findings": [_group(group, before.get(group[0])) for group in words.kinds(findings)],
        "states": count_states(adapter.tensors),
        "map": _data(_map(adapter, layout)) if layout is not None else None,
    }


def _group(group: tuple[Finding, ...], before: AdapterReport | None) -> dict[str, Any]:
    """A kind of finding; `before` is an earlier entry that has it too."""
    first, *more = group
    return {
        "finding": first,
        "before": words.precision(before.base) if before else "",
        "more": [words.place(finding) or finding.message for finding in more[:_MAX_PLACES]],
        "omitted": max(len(more) - _MAX_PLACES, 0),
        "count": len(more),
        "rest": more_findings(more),
    }


# --- the chain of causes ---------------------------------------------------------------------------------------------

_STAGES = {
    "base": {Origin.BASE},
    "adapter": {Origin.FILE, Origin.CONFIG, Origin.ADAPTER},
    "merge": {Origin.MERGE},
}

_Stage = tuple[str, str, str]
"""Its name, its outcome (`sound`, `warned`, `broken`, `follows` or `unknown`), and a few words."""


def chain(adapter: AdapterReport) -> list[_Stage]:
    """Return the stages: base → adapter → merge → dtype, and → model if a finished model was compared."""
    tensors, modules = adapter.coverage.adapter_tensors, adapter.coverage.modules_merged
    stages = [
        _stage("base", adapter, "finite" if modules else ""),
        _stage("adapter", adapter, words.counted(tensors, "tensor") if tensors else ""),
        _stage("merge", adapter, words.counted(modules, "module") if modules else ""),
        _dtype(adapter),
    ]
    if answers := [finding for finding in adapter.findings if finding.origin is Origin.MODEL]:
        errors = [finding for finding in answers if finding.severity is Severity.ERROR]
        stages.append(("model", "broken" if errors else "sound", _checks_of(errors or answers)))
    broken = [number for number, (_, outcome, _) in enumerate(stages) if outcome == "broken"]
    behind = broken[0] + 1 if broken else len(stages)
    return [*stages[:behind], *map(_behind_broken, stages[behind:])]


def _behind_broken(stage: _Stage) -> _Stage:
    """A stage behind the first broken one. An adapter can be sound on a broken base; a merge with it cannot."""
    name, outcome, summary = stage
    if outcome == "broken":
        return name, "follows", summary
    return name, "unknown" if outcome == "sound" and name != "adapter" else outcome, summary


def _stage(name: str, adapter: AdapterReport, sound: str) -> _Stage:
    findings = [finding for finding in adapter.findings if finding.origin in _STAGES[name]]
    for severity, outcome in ((Severity.ERROR, "broken"), (Severity.WARNING, "warned")):
        if having := [finding for finding in findings if finding.severity is severity]:
            return name, outcome, _checks_of(having)
    return name, "sound" if sound else "unknown", sound or "not judged"


def _dtype(adapter: AdapterReport) -> _Stage:
    name = words.precision(adapter.base)
    counts = count_states(adapter.tensors)
    if not counts:
        return name, "unknown", "nothing was merged"
    broken = [f"{state} in {number}" for state, number in counts if state in {State.NAN, State.INF}]
    total = words.counted(len(adapter.tensors), "tensor")
    if broken:
        return name, "broken", f"{', '.join(broken)} of {total}"
    return name, "sound", f"{total} merged, all finite"


def _checks_of(findings: list[Finding]) -> str:
    return ", ".join(dict.fromkeys(_name(finding.check) for finding in findings))


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


_KIND_OF_CHECK = {"rounding-loss": "loss", "delta-norm": "ratio", "headroom": "headroom"}
"""The map that shows what a check found."""


def _limits(adapter: AdapterReport) -> dict[str, float]:
    """The limit of each map: the default, or the limit that a finding states."""
    limits = {kind: CHECKS[check].limit or math.inf for check, kind in _KIND_OF_CHECK.items()} | {"loss": NORM_LIMIT}
    for finding in adapter.findings:
        figures = dict(finding.measured)
        stated = figures.get("limit", math.nan)
        if finding.check in _KIND_OF_CHECK and math.isfinite(stated) and "rounding_change" not in figures:
            limits[_KIND_OF_CHECK[finding.check]] = stated
    return limits


def _first_kind(adapter: AdapterReport) -> str:
    """The map that shows the cause of a failure, or the first warning of an adapter that passed."""
    decided = words.deciding(adapter)
    checks = [decided.check] if decided else [finding.check for finding in words.warnings(adapter)]
    return next((_KIND_OF_CHECK[check] for check in checks if check in _KIND_OF_CHECK), "state")


def _map(adapter: AdapterReport, layout: int) -> dict[str, Any]:
    """The data for an adapter's map: columns in the order of its tensors."""
    merges = adapter.tensors
    return {
        "layout": layout,
        "kind": _first_kind(adapter),
        "limits": _limits(adapter),
        "state": "".join(_LETTERS[state] for state in states(merges)),
        "low": [_short(merge.stats.minimum) for merge in merges],
        "high": [_short(merge.stats.maximum) for merge in merges],
        "ratio": [_short(merge.delta_ratio) for merge in merges],
        "loss": [_short(merge.lost_share) for merge in merges],
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
    return one_line(text, words.NAME_LENGTH)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


# --- texts that are not in the report --------------------------------------------------------------------------------

_LINK = re.compile(r"\[([^\]]+)\]\((https://[^)\s&]+)\)")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_CODE = re.compile(r"`([^`]+)`")


def _inline(text: str) -> Markup:
    """Markdown of this package. A browser follows its links on a click only, and sends no address of the report."""
    html = str(escape(" ".join(text.split())))
    html = _LINK.sub(r'<a href="\2" rel="noopener noreferrer">\1</a>', html)
    html = _BOLD.sub(r"<b>\1</b>", _CODE.sub(r"<code>\1</code>", html))
    return Markup(html)  # noqa: S704 - text of this package, and escaped


def repeat_command(entries: tuple[AdapterReport, ...], config_path: str) -> str:
    """The command that gates one adapter again, or a shell's comment if a name cannot be typed.

    Empty for a model that was compared, which has no `config_path`.
    """
    first = entries[0]
    if not config_path:
        return ""
    if config_path != COMMAND_LINE:
        typed = ["merge-gate", "run", config_path, "--only", first.name]
    else:
        typed = ["merge-gate", "run", first.source, *(["--base", first.base.model] if first.base.model else [])]
        typed += ["--dtype", ",".join(dict.fromkeys(entry.base.dtype for entry in entries))]
    command = shlex.join(typed)
    is_shown_whole = command == one_line(command, MAX_LENGTH)  # a cut could move the end of a quotation
    is_option = any(word.startswith("-") for word in (typed[2], first.name, first.base.model or ""))
    can_be_typed = is_shown_whole and not is_option and not any(map(has_hidden, typed))
    return command if can_be_typed else "# a name has characters that cannot be typed"
