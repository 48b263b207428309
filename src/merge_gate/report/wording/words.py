"""Words and sentences that the report formats for people share, such as counts and the headline.

In: records. Out: plain sentences in which foreign text is already on one line. It knows no format's syntax.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from merge_gate._internal.text import MOST_FOREIGN, listing
from merge_gate._internal.text import counted as counted  # noqa: PLC0414 - the formats import their words from here
from merge_gate.judging.checks.check import FOLLOWS
from merge_gate.judging.checks.phrases import figure, named
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ANSWERS
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.files import MANIFEST_NAME
from merge_gate.records.terms import Acceptance, FailureKind, Origin, Severity, Verdict
from merge_gate.report.wording.explanations import explanations, page_of
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from merge_gate.records.measured import Forward
    from merge_gate.records.report import AdapterReport, BaseReport, Environment, PublishedModel, Report
    from merge_gate.records.terms import BaseKey, Finding

T = TypeVar("T")

NAME_LENGTH = MOST_FOREIGN
MESSAGE_LENGTH = 600
MOST_PROBLEMS = 20
"""How many problems of a combination the formats for people show."""

_MOST_PRECISIONS = 6
_LEAST_SHARE = 0.005
"""The largest activation is shown as a share of its dtype's largest value from here on: never in bfloat16."""
_MISSING = "keys-missing"
"""The check whose figure counts the tensors that are absent from the file."""

ORIGINS = {
    Origin.FILE: "in the adapter's files on disk",
    Origin.CONFIG: "in adapter_config.json",
    Origin.ADAPTER: "in the adapter's own tensors",
    Origin.BASE: "in the base, before any merge",
    Origin.MERGE: "in the merge of the two, not in base or adapter alone",
    Origin.MODEL: "in the model that was compared, not in base or adapter",
    Origin.RUNTIME: "in the run, not in the adapter",
}
"""What each origin means to the person who fixes the problem."""

_FOLLOWING = "in the merged model"
_ACTIVATIONS = ("activation-nonfinite", "activation-headroom")
"""The checks of what a module returns. The adapter may have no tensor in that module."""

_ORDER = {Verdict.FAILED: 0, Verdict.ERROR: 1, Verdict.PASSED: 2}

STYLES = {Verdict.PASSED: "bold green", Verdict.FAILED: "bold red", Verdict.ERROR: "bold yellow"}
"""The colors of a verdict on a terminal, as rich names them."""


def is_of_activations(finding: Finding) -> bool:
    """Whether it blames an adapter for what a module returns."""
    return finding.check in _ACTIVATIONS and finding.origin is Origin.ADAPTER


def origin(finding: Finding) -> str:
    """Where the cause is. For a merge that is broken because its adapter is, only where it shows."""
    if is_of_activations(finding):
        return f"in what {'this module' if finding.module else named(None)} returns"
    follows = finding.origin is Origin.MERGE and finding.hint.startswith(FOLLOWS)
    return _FOLLOWING if follows else ORIGINS[finding.origin]


def hint_label(finding: Finding) -> str:
    """The label of a finding's hint."""
    return "because" if finding.hint.startswith(FOLLOWS) else "to do"


def duration(seconds: float) -> str:
    """A duration for people: 0.84 s, 12.3 s, 5 s for a whole number, 4 min 05 s, 1 h 02 min."""
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
        return one_line(base.dtype, NAME_LENGTH)
    return f"{one_line(base.dtype, NAME_LENGTH)}, {one_line(base.quantization, NAME_LENGTH)}"


def model_name(base: BaseKey) -> str:
    """The base's name as the report shows it."""
    return one_line(base.name, NAME_LENGTH)


def worst_first(adapters: Iterable[AdapterReport]) -> list[AdapterReport]:
    """Failed adapters, then not judged, then passed; each group in the order of the configuration."""
    return sorted(adapters, key=lambda adapter: _ORDER[adapter.verdict])


def deciding(adapter: AdapterReport) -> Finding | None:
    """The finding that decided the verdict; a passed adapter has none."""
    return None if adapter.decided_by is None else adapter.findings[adapter.decided_by]


def others(adapter: AdapterReport) -> list[Finding]:
    """All findings except the deciding finding."""
    return [finding for index, finding in enumerate(adapter.findings) if index != adapter.decided_by]


def warnings(adapter: AdapterReport) -> list[Finding]:
    """The findings that do not fail the adapter."""
    return [finding for finding in adapter.findings if finding.severity is Severity.WARNING]


def by(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """The items of each key, in the order of the first ones."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def kinds(findings: Iterable[Finding]) -> list[tuple[Finding, ...]]:
    """The findings by check and severity."""
    return [tuple(group) for group in by(findings, lambda finding: (finding.check, finding.severity)).values()]


def grouped(findings: Iterable[Finding]) -> list[tuple[Finding, tuple[Finding, ...]]]:
    """The first finding of each check and severity, and the others. A broken file can have hundreds."""
    return [(kind[0], kind[1:]) for kind in kinds(findings)]


def precisions(adapters: Iterable[AdapterReport]) -> str:
    """float32; bfloat16."""
    named = [precision(adapter.base) for adapter in adapters]
    return "; ".join(named[:_MOST_PRECISIONS]) + ("; …" if len(named) > _MOST_PRECISIONS else "")


def cause(adapter: AdapterReport) -> str:
    """The check that decided; empty for a passed adapter."""
    if adapter.verdict is Verdict.PASSED:
        return ""
    return one_line(adapter.cause or NOT_JUDGED, NAME_LENGTH)


def reason(adapter: AdapterReport) -> str:
    """The deciding check, the warnings of a passed adapter, or what a compared model is."""
    if adapter.verdict is not Verdict.PASSED:
        return cause(adapter)
    checks = list(dict.fromkeys(one_line(finding.check, NAME_LENGTH) for finding in warnings(adapter)))
    compared = [f"{finding.check}{' (allowed)' if level(finding) == 'allowed' else ''}" for finding in answers(adapter)]
    return f"warning: {', '.join(checks)}" if checks else ", ".join(compared)


def page(finding: Finding) -> str | None:
    """The address of the page on a finding's check, which a stored report does not choose; None without one."""
    return page_of(finding.check)


def command_to_explain(finding: Finding) -> str:
    """`merge-gate explain merged-nonfinite`. Empty if that command does not know the check."""
    return f"merge-gate explain {finding.check}" if finding.check in explanations() else ""


def more(finding: Finding) -> str:
    """Where to read what a check means: the address of its page, or else the command. May be empty."""
    return page(finding) or command_to_explain(finding)


def place(finding: Finding, *, unless_in: str = "") -> str:
    """The tensor, and the module if the tensor's name lacks it. Empty if the message `unless_in` names it."""
    tensor, module = one_line(finding.tensor or "", NAME_LENGTH), one_line(finding.module or "", NAME_LENGTH)
    if (finding.tensor or finding.module or "") in unless_in or (tensor or module) in unless_in:
        return ""
    if not tensor or not module or module in tensor:
        return tensor or module
    return f"{tensor} of {module}"


def deciding_module(adapter: AdapterReport) -> str:
    """The module, or else the tensor, of the finding that decided; may be empty."""
    finding = deciding(adapter)
    return one_line((finding.module or finding.tensor or "") if finding else "", NAME_LENGTH)


def marks(adapter: AdapterReport) -> list[str]:
    """Remarks that belong next to the verdict: an acceptance, and the origin if it is cached."""
    remarks = []
    if adapter.accepted is not None:
        remarks.append(acceptance(adapter))
    if adapter.cached:
        verdict = adapter.judged
        when = (
            f", judged {one_line(verdict.at, NAME_LENGTH)} at {one_line(verdict.place, NAME_LENGTH)}" if verdict else ""
        )
        remarks.append(f"cached{when}")
    return remarks


def acceptance(adapter: AdapterReport) -> str:
    """Who accepted a failure, until when, and why; empty if no one did."""
    accepted = adapter.accepted
    if accepted is None:
        return ""
    owner, reason = one_line(accepted.owner, NAME_LENGTH), one_line(accepted.reason, MESSAGE_LENGTH)
    return f"accepted until {one_line(accepted.until, NAME_LENGTH)} by {owner}: {reason}"


def verdict(adapter: AdapterReport) -> str:
    """The verdict in a word or two. In a report `error` is a severity that fails an adapter, so it is not used here."""
    return f"not {_decided(adapter)}" if adapter.verdict is Verdict.ERROR else adapter.verdict.value


def chip(adapter: AdapterReport) -> str:
    """The verdict on one dtype in a few words: `failed, accepted`."""
    return verdict(adapter) + (", accepted" if adapter.accepted else "") + (", cached" if adapter.cached else "")


def passed(adapter: AdapterReport) -> str:
    """`12 modules, all finite`."""
    modules = adapter.coverage.modules_merged
    return f"{counted(modules, 'module')}, all finite" if modules else ""


def coverage(adapter: AdapterReport) -> str:
    """How much of the adapter and of the merged model was checked."""
    counts = adapter.coverage
    if not counts.parameters_total:
        return "nothing was merged"
    figures = [dict(each.measured).get("missing", 0.0) for each in adapter.findings if each.check == _MISSING]
    missing = sum(int(figure) for figure in figures if math.isfinite(figure))
    of_all = counted(counts.adapter_tensors + missing, "expected adapter tensor" if missing else "adapter tensor")
    tensors = f"{counts.applied:,} of {of_all} used"
    checked = f"{counts.parameters_checked:,} of {counted(counts.parameters_total, 'parameter')} checked"
    return f"{checked}; {tensors}, on {counted(counts.modules_merged, 'module')}"


def share_of_dtype(run: Forward) -> float:
    """The largest activation of a run, as a share of its dtype's largest value."""
    return (run.largest or 0.0) / (run.largest_allowed or math.inf)


def forward(adapter: AdapterReport) -> str:
    """What the run of base and adapter as models showed, or why they were not run. Empty if neither is known."""
    run, dtype = adapter.forward, one_line(adapter.base.dtype, NAME_LENGTH)
    if not run.ran:
        return f"not run: {one_line(run.why_not, MESSAGE_LENGTH)}" if run.why_not else ""
    facts = []
    if run.nonfinite_module is not None:
        by_itself = ", also in the base by itself" if run.nonfinite_origin is Origin.BASE else ""
        facts.append(f"{one_line(named(run.nonfinite_module), NAME_LENGTH)} returns NaN or an infinity{by_itself}")
    if run.largest is not None:
        share = share_of_dtype(run)
        of_dtype = f" ({share:.0%} of {dtype})" if share >= _LEAST_SHARE else ""
        place = one_line(named(run.largest_module), NAME_LENGTH)
        facts.append(f"largest activation {figure(run.largest)}{of_dtype} at {place}")
    if run.rounding_change is not None:
        facts.append(f"rounding to {dtype} changes {run.rounding_change:.0%} of the adapter's effect")
    part = (
        f", with {run.modules_run or 0:,} of the adapter's {counted(run.modules or 0, 'module')}" if run.not_run else ""
    )
    return f"ran on made-up inputs{part}" + (f": {'; '.join(facts)}" if facts else "")


def base_precisions(bases: Iterable[BaseReport]) -> str:
    """The dtypes of a base in a report, each once."""
    return "; ".join(dict.fromkeys(precision(base.key) for base in bases))


def bases_with_findings(bases: Iterable[BaseReport]) -> list[list[BaseReport]]:
    """The bases that have findings. A base with the same findings in several dtypes is one group."""
    with_findings = filter(lambda base: base.findings, bases)
    return [*by(with_findings, lambda base: (base.model, base.revision, base.loaded_as, base.findings)).values()]


def how_loaded(several: list[BaseReport]) -> str:
    """(bfloat16; float16) as support loads it (LlamaModel). Another class may have tensors that this one lacks."""
    name, loaded_as = (one_line(text, NAME_LENGTH) for text in (several[0].first_adapter, several[0].loaded_as))
    return f"({base_precisions(several)})" + (f" as {name} loads it ({loaded_as})" if name and loaded_as else "")


def baseline(report: Report) -> list[str]:
    """The entries of the baseline that accept nothing, each in a sentence without its final period."""
    reasons = {
        Acceptance.EXPIRED: "has passed its last day",
        Acceptance.MORE: "does not name all checks that fail the adapter, so it is not accepted",
        Acceptance.UNBOUND: "names no base, dtype, and quantization, which this cause needs, so it accepts nothing: "
        "make it again with `merge-gate report baseline --only NAME`",
        Acceptance.UNMATCHED: "matches nothing in this run",
    }
    unused = [entry for entry in report.baseline if entry.outcome in reasons]
    sentences = [
        f"baseline, line {entry.line:,}: {one_line(entry.cause, NAME_LENGTH)} of {one_line(entry.adapter, 12)} "
        f"until {one_line(entry.until, NAME_LENGTH)} by {one_line(entry.owner, NAME_LENGTH)} {reasons[entry.outcome]}"
        for entry in unused[:MOST_PROBLEMS]
    ]
    return sentences + _left_out(len(unused) - len(sentences), "more entry", "more entries")


def cached(report: Report) -> str:
    """How many verdicts are cached, in a sentence without its final period. Empty if no verdict is cached."""
    adapters = [adapter for adapter in report.adapters if adapter.cached]
    times = sorted(one_line(adapter.judged.at, NAME_LENGTH) for adapter in adapters if adapter.judged is not None)
    if not adapters:
        return ""
    when = f", the oldest {times[0]}" if times else ""
    return f"{len(adapters):,} of {counted(len(report.adapters), 'verdict')} cached: earlier runs reached them{when}"


def judged(report: Report) -> str:
    """The time and the place of this run's own verdicts. Empty if all verdicts are cached."""
    verdicts = [adapter.judged for adapter in report.adapters if adapter.judged is not None and not adapter.cached]
    if not verdicts:
        return ""
    times, places = (
        sorted(verdict.at for verdict in verdicts),
        list(dict.fromkeys(verdict.place for verdict in verdicts)),
    )
    span = [one_line(time, NAME_LENGTH) for time in dict.fromkeys((times[0], times[-1]))]
    return f"{' to '.join(span)}, at {listing(one_line(place, NAME_LENGTH) for place in places)}"


def failure(adapter: AdapterReport) -> FailureKind | None:
    """What a failure means; None for another verdict. A report of an earlier version has only the cause."""
    if adapter.verdict is not Verdict.FAILED:
        return None
    if adapter.failure is not None:
        return adapter.failure
    check = CHECKS.get(adapter.cause or "")
    return check.failure if check else FailureKind.BROKEN


FAILURES = {
    FailureKind.BROKEN: "broken",
    FailureKind.REFUSED: "refused",
    FailureKind.NOT_MERGEABLE: "cannot be merged",
    FailureKind.UNEXPECTED: "not what was expected",
}
"""Each kind of failure in a list."""


def title(adapter: AdapterReport) -> str:
    """The verdict in words, for use after the adapter's name. A caller adds the cause of a failure."""
    kind = failure(adapter)
    if kind is not None and kind is not FailureKind.BROKEN:
        return f"failed ({FAILURES[kind]})"
    return f"could not be {_decided(adapter)}" if adapter.verdict is Verdict.ERROR else adapter.verdict.value


def _decided(adapter: AdapterReport) -> str:
    return "judged" if adapter.compared_with is None else "compared"


def answers(adapter: AdapterReport) -> list[Finding]:
    """What `merge-gate verify` says of a model that passed: what it is, and the differences that are allowed."""
    if adapter.verdict is not Verdict.PASSED:
        return []
    return [finding for finding in adapter.findings if finding.check in ANSWERS]


def level(finding: Finding) -> str:
    """The severity of a finding. A difference that was allowed is a note in the report."""
    answer = ANSWERS.get(finding.check)
    is_allowed = answer is not None and not answer.is_good and finding.severity is Severity.NOTE
    return "allowed" if is_allowed else str(finding.severity)


def values(finding: Finding) -> str:
    """1 NaN and 2 +Inf among 16,384 values, the first at [0, 7]. Empty if the message says so."""
    among = f"among {counted(finding.numel, 'value')}" if finding.numel is not None else ""
    kinds = ((finding.nan, "NaN"), (finding.posinf, "+Inf"), (finding.neginf, "-Inf"))
    bad = [f"{count:,} {kind}" for count, kind in kinds if count]
    index = str(list(finding.first_index)) if finding.first_index is not None else ""
    if not bad or (among and among in finding.message and index in finding.message):
        return ""
    first = f", the first at {index}" if index else ""
    *all_but_last, last = bad
    counts = f"{', '.join(all_but_last)} and {last}" if all_but_last else last
    return f"{counts} {among}".rstrip() + first


def part(report: Report) -> str:
    """The start of the headline of a check (`files only: `) or of a shard (`shard 2 of 4: `). Else empty."""
    if report.files_only:
        return "files only: "
    return f"shard {report.shard.index} of {report.shard.count}: " if report.shard else ""


def problems(report: Report) -> list[str]:
    """The first reasons why the shards are not one run, each in a sentence without its final period."""
    sentences = [one_line(problem, MESSAGE_LENGTH) for problem in report.problems[:MOST_PROBLEMS]]
    return sentences + _left_out(len(report.problems) - len(sentences), "more problem")


def _left_out(count: int, *words: str) -> list[str]:
    return [f"and {counted(count, *words)}, in report.json"] if count else []


def versions(environment: Environment, tool_version: str) -> list[str]:
    """merge-gate 0.1.0, Python 3.11.7, torch 2.13.0, …: the versions that the run used."""
    named = (
        ("merge-gate", tool_version),
        ("Python", environment.python),
        ("torch", environment.torch),
        ("peft", environment.peft),
        ("transformers", environment.transformers),
        ("bitsandbytes", environment.bitsandbytes),
    )
    return [f"{name} {one_line(version, NAME_LENGTH)}" for name, version in named if version]


def device(environment: Environment) -> str:
    """cuda:0 (NVIDIA H100), or cpu."""
    name, kind = (one_line(text, NAME_LENGTH) for text in (environment.device_name, environment.device))
    return f"{kind} ({name})" if name else kind


def sandbox(environment: Environment) -> str:
    """The restrictions of the worker, and the missing ones."""
    restrictions = ", ".join(one_line(part, NAME_LENGTH) for part in environment.sandbox.held)
    return "; ".join([restrictions or "none", *(f"without {one_line(why)}" for why in environment.sandbox.missing)])


def published(report: Report) -> list[tuple[str, PublishedModel]]:
    """The published models, each with the name of its adapter, in the order of the report."""
    return [(adapter.name, adapter.published) for adapter in report.adapters if adapter.published is not None]


def published_size(model: PublishedModel) -> str:
    """2.20 GB in 2 files."""
    size_bytes = sum(file.size_bytes for file in model.files)
    amount = f"{size_bytes / 1e9:,.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"  # noqa: PLR2004
    return f"{amount} in {counted(len(model.files), 'file')}"


def manifest_sha256(model: PublishedModel) -> str:
    """The digest of a published model's merge-gate.json, which lists all other files; empty if it has none."""
    own = PurePosixPath(MANIFEST_NAME)
    return next((file.sha256 for file in model.files if PurePosixPath(file.path) == own), "")
