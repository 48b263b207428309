"""The words that every format for people shares: counts, the headline, the place of a finding.

In: records. Out: plain sentences, foreign text in them already on one line. Knows no format's syntax.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from merge_gate.judging.checks.table import NOT_JUDGED
from merge_gate.records.terms import Acceptance, Origin, Result, Severity, Verdict
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import counted as counted  # noqa: PLC0414 - the formats take their words from here
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from merge_gate.records.report import AdapterReport, Environment, Report
    from merge_gate.records.terms import BaseKey, Finding

NAME_LIMIT = 200
MESSAGE_LIMIT = 600
MOST_PROBLEMS = 20
"""How many problems of a combination the formats for people show."""

_PRECISIONS = 6

ORIGINS = {
    Origin.FILE: "in the adapter's files on disk",
    Origin.CONFIG: "in a configuration file",
    Origin.ADAPTER: "in the adapter's own tensors",
    Origin.BASE: "in the base, before any merge",
    Origin.MERGE: "in the merge of the two, not in base or adapter alone",
    Origin.RUNTIME: "in the run, not in the adapter",
}
"""What each origin means to somebody who has to act on it."""

_ORDER = {Verdict.FAILED: 0, Verdict.ERROR: 1, Verdict.PASSED: 2}


def number(value: int) -> str:
    """1100048384 → 1,100,048,384."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """A time as a person says it: 0.84 s, 12.3 s, 5 s for a whole number, 4 min 05 s, 1 h 02 min."""
    if not 0 <= seconds < math.inf:
        return "unknown time"
    if seconds < 60:  # noqa: PLR2004
        decimals = 0 if float(seconds).is_integer() else 2 if seconds < 10 else 1  # noqa: PLR2004
        return f"{seconds:.{decimals}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def precision(base: BaseKey) -> str:
    """bfloat16, or bfloat16, bnb-4bit."""
    if not base.is_quantized:
        return one_line(base.dtype, NAME_LIMIT)
    return f"{one_line(base.dtype, NAME_LIMIT)}, {one_line(base.quantization, NAME_LIMIT)}"


def model_name(base: BaseKey) -> str:
    """The base's name as the report shows it."""
    return one_line(base.name, NAME_LIMIT)


def worst_first(adapters: Iterable[AdapterReport]) -> list[AdapterReport]:
    """Failed before undecided before passed, else in the order of the configuration."""
    return sorted(adapters, key=lambda adapter: _ORDER[adapter.verdict])


def deciding(adapter: AdapterReport) -> Finding | None:
    """The finding that decided the verdict; a passed adapter has none."""
    return None if adapter.decided_by is None else adapter.findings[adapter.decided_by]


def others(adapter: AdapterReport) -> list[Finding]:
    """All findings except the one that decided."""
    return [finding for index, finding in enumerate(adapter.findings) if index != adapter.decided_by]


def warnings(adapter: AdapterReport) -> list[Finding]:
    """The findings that do not fail the adapter."""
    return [finding for finding in adapter.findings if finding.severity is Severity.WARNING]


def kinds(findings: Iterable[Finding]) -> list[tuple[Finding, ...]]:
    """The findings by check and severity."""
    groups: dict[tuple[str, Severity], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.check, finding.severity), []).append(finding)
    return [tuple(group) for group in groups.values()]


def grouped(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """The first finding of each check and severity, and how many more there are: a broken file has hundreds."""
    return [(kind[0], len(kind) - 1) for kind in kinds(findings)]


def precisions(adapters: Iterable[AdapterReport]) -> str:
    """float32; bfloat16."""
    named = [precision(adapter.base) for adapter in adapters]
    return "; ".join(named[:_PRECISIONS]) + ("; …" if len(named) > _PRECISIONS else "")


def cause(adapter: AdapterReport) -> str:
    """The check that decided; empty for a passed adapter."""
    if adapter.verdict is Verdict.PASSED:
        return ""
    return one_line(adapter.cause or NOT_JUDGED, NAME_LIMIT)


def place(finding: Finding, *, unless_in: str = "") -> str:
    """The tensor, and the module if the tensor's name does not hold it. Empty if `unless_in`, a message, names it."""
    tensor, module = one_line(finding.tensor or "", NAME_LIMIT), one_line(finding.module or "", NAME_LIMIT)
    if (finding.tensor or finding.module or "") in unless_in or (tensor or module) in unless_in:
        return ""
    if not tensor or not module or module in tensor:
        return tensor or module
    return f"{tensor} of {module}"


def deciding_module(adapter: AdapterReport) -> str:
    """The module, or else the tensor, of the finding that decided; may be empty."""
    finding = deciding(adapter)
    return one_line((finding.module or finding.tensor or "") if finding else "", NAME_LIMIT)


def marks(adapter: AdapterReport) -> list[str]:
    """What has to stand beside the verdict: what a bound proves, who answers for a failure, where it was reached."""
    said = [bound] if (bound := proved_by_bound(adapter.coverage.parameters_bounded)) else []
    if (known := adapter.accepted) is not None:
        owner, reason = one_line(known.owner, NAME_LIMIT), one_line(known.reason, MESSAGE_LIMIT)
        said.append(f"accepted until {one_line(known.until, NAME_LIMIT)} by {owner}: {reason}")
    if adapter.cached:
        at = adapter.judged
        when = f", judged {one_line(at.at, NAME_LIMIT)} at {one_line(at.place, NAME_LIMIT)}" if at else ""
        said.append(f"cached{when}")
    return said


def proved_by_bound(elements: int) -> str:
    """Proved by a bound: 1,234,567 parameters; empty where all were merged."""
    return f"proved by a bound: {counted(elements, 'parameter')}" if elements else ""


def baseline(report: Report) -> list[str]:
    """What the baseline says that is not so (any more); each is a sentence without its full stop."""
    told = {
        Acceptance.EXPIRED: "is over since its last day",
        Acceptance.MORE: "does not name all checks that fail the adapter, so it is not accepted",
        Acceptance.UNMATCHED: "matches nothing in this run",
    }
    off = [one for one in report.baseline if one.outcome in told]
    said = [
        f"baseline, line {number(one.line)}: {one_line(one.cause, NAME_LIMIT)} of {one_line(one.adapter, 12)} until "
        f"{one_line(one.until, NAME_LIMIT)} by {one_line(one.owner, NAME_LIMIT)} {told[one.outcome]}"
        for one in off[:MOST_PROBLEMS]
    ]
    return (
        [*said, f"and {counted(len(off) - len(said), 'more entry', 'more entries')}, in report.json"]
        if len(off) > len(said)
        else said
    )


def cached(report: Report) -> str:
    """How many verdicts earlier runs reached, in one sentence without its full stop; empty where there is none."""
    taken = [adapter for adapter in report.adapters if adapter.cached]
    times = sorted(one_line(one.judged.at, NAME_LIMIT) for one in taken if one.judged is not None)
    if not taken:
        return ""
    when = f", the oldest {times[0]}" if times else ""
    return f"{number(len(taken))} of {counted(len(report.adapters), 'verdict')} cached: earlier runs reached them{when}"


def judged(report: Report) -> str:
    """When and where this run reached its verdicts; empty where it merged nothing itself."""
    own = [adapter.judged for adapter in report.adapters if adapter.judged is not None and not adapter.cached]
    if not own:
        return ""
    times, places = sorted(one.at for one in own), list(dict.fromkeys(one.place for one in own))
    span = [one_line(time, NAME_LIMIT) for time in dict.fromkeys((times[0], times[-1]))]
    return f"{' to '.join(span)}, at {listing(one_line(place, NAME_LIMIT) for place in places)}"


def title(adapter: AdapterReport) -> str:
    """What is said of the adapter, to stand behind its name; for a failed one the cause follows."""
    return "could not be judged" if adapter.verdict is Verdict.ERROR else adapter.verdict.value


def values(finding: Finding) -> str:
    """1 NaN and 2 +Inf among 16,384 values, the first at [0, 7]; empty where the message says it."""
    among = f"among {counted(finding.numel, 'value')}" if finding.numel is not None else ""
    kinds = ((finding.nan, "NaN"), (finding.posinf, "+Inf"), (finding.neginf, "-Inf"))
    bad = [f"{number(count)} {kind}" for count, kind in kinds if count]
    index = str(list(finding.first_index)) if finding.first_index is not None else ""
    if not bad or (among and among in finding.message and index in finding.message):
        return ""
    first = f", the first at {index}" if index else ""
    *others_, last = bad
    counts = f"{', '.join(others_)} and {last}" if others_ else last
    return f"{counts} {among}".rstrip() + first


def headline(report: Report) -> str:
    """The result of the run in one sentence, without its full stop."""
    if report.complete and report.is_empty_shard:
        return f"{part(report)}has nothing to judge"
    return part(report) + _said(report)


def part(report: Report) -> str:
    """What stands before all that is said of a part of a run: `shard 2 of 4: `; empty for a whole run."""
    return f"shard {report.shard.index} of {report.shard.count}: " if report.shard else ""


def problems(report: Report) -> list[str]:
    """What keeps shards from being one run, the first of it; each is a sentence without its full stop."""
    said = [one_line(problem, MESSAGE_LIMIT) for problem in report.problems[:MOST_PROBLEMS]]
    more = len(report.problems) - len(said)
    return [*said, f"and {counted(more, 'more problem')}, in report.json"] if more else said


def _said(report: Report) -> str:
    unfinished = "" if report.complete else "the run did not finish"
    unfinished = "the shards are not one whole run" if report.problems else unfinished
    if not report.adapters:
        return f"{unfinished} and no adapter was judged" if unfinished else "no adapter was judged"
    total = len(report.adapters)
    names = {adapter.name for adapter in report.adapters}
    noun = "adapter" if len(names) == total else "merge"
    everything = counted(total, noun)
    if unfinished:
        return f"{unfinished}; so far {_counts(report, everything, everything)}"
    whole = f"both {noun}s" if total == 2 else f"all {everything}" if total > 1 else f"the only {noun}"  # noqa: PLR2004
    return _counts(report, everything, whole)


def _counts(report: Report, everything: str, whole: str) -> str:
    failed, undecided, total = report.counts.failed, report.counts.error, len(report.adapters)
    known = f", {number(report.accepted)} of them accepted" if report.accepted else ""
    if failed == total:
        known = ", accepted" if known and total == 1 else known
        return f"{whole} failed{known}"
    if undecided == total:
        return f"{whole} could not be judged"
    if failed and undecided:
        return f"{number(failed)} of {everything} failed{known}, {number(undecided)} could not be judged"
    if failed:
        return f"{number(failed)} of {everything} failed{known}"
    if undecided:
        return f"{number(undecided)} of {everything} could not be judged, none failed"
    warned = sum(bool(warnings(adapter)) for adapter in report.adapters)
    of_them = "" if total == 1 else f"{number(warned)} "
    return f"{whole} passed, {of_them}with warnings" if warned else f"{whole} passed"


def advice(report: Report) -> str:
    """What the result means for whoever waits for it, in one sentence."""
    if report.complete and report.is_empty_shard:
        return "There are more shards than adapters. Whether the adapters pass is said by the shards that have them."
    if report.problems and report.result is not Result.FAIL:
        return "Nothing here clears an adapter for release: the shards are not one whole run."
    if not report.complete and report.result is not Result.FAIL:
        return "Nothing here clears an adapter for release: the run ended before its time. Run it again."
    if report.result is Result.FAIL:
        return "A failed adapter gives a model that is broken or not the one intended, or none. Do not release it."
    if report.result is Result.ERROR:
        return "What could not be judged is not cleared for release; the gate stays closed until it is."
    bound = proved_by_bound(sum(adapter.coverage.parameters_bounded for adapter in report.adapters))
    proof = f" ({bound}, not merged one by one)" if bound else ""
    whose = (" of this shard" if report.shard else "") + (" that passed" if report.accepted else "")
    known = "What failed is broken, and the baseline accepts it until its last day. " if report.accepted else ""
    return f"{known}Every parameter of every merged model{whose} is finite{proof}."


def versions(environment: Environment, tool_version: str) -> list[str]:
    """merge-gate 0.1.0, Python 3.11.7, torch 2.13.0, …: what was installed and used."""
    named = (
        ("merge-gate", tool_version),
        ("Python", environment.python),
        ("torch", environment.torch),
        ("peft", environment.peft),
        ("transformers", environment.transformers),
        ("bitsandbytes", environment.bitsandbytes),
    )
    return [f"{name} {one_line(version, NAME_LIMIT)}" for name, version in named if version]


def device(environment: Environment) -> str:
    """cuda:0 (NVIDIA H100), or cpu."""
    name = one_line(environment.device_name, NAME_LIMIT)
    return f"{one_line(environment.device, NAME_LIMIT)} ({name})" if name else one_line(environment.device, NAME_LIMIT)


def sandbox(environment: Environment) -> str:
    """What the worker was kept from, and what not."""
    held = ", ".join(one_line(part, NAME_LIMIT) for part in environment.sandbox.held)
    return "; ".join([held or "none", *(f"without {one_line(why)}" for why in environment.sandbox.missing)])
