"""Words the result of a run: its headline, and its meaning for a release.

In: a report. Out: plain sentences. They count adapters first and merges second: an adapter has a merge for each dtype.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate._internal.text import counted, listing
from merge_gate.judging.checks.base_nonfinite import base_nonfinite
from merge_gate.judging.checks.delta_norm import delta_norm
from merge_gate.judging.checks.rounding_loss import rounding_loss
from merge_gate.judging.kinds import ANSWERS
from merge_gate.records.files import PICKLE_NAME
from merge_gate.records.terms import FailureKind, Result, Severity, Verdict, record
from merge_gate.report.wording import words
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

HARDLY_CHANGED = 0.9
"""A merge that loses more than this share of its delta hardly differs from the base."""

_MOST_CHECKS = 3
_NOT_PUBLISHED = {"not-published"}
"""The causes of an adapter that passed, and whose model could not be published."""


class AdapterState(StrEnum):
    """What a run says of an adapter, in all its dtypes: the worst comes first."""

    FAILED = "failed"
    ERROR = "error"
    ACCEPTED = "accepted"
    PASSED = "passed"


@record
class Adapter:
    """The entries of one adapter, one for each dtype."""

    name: str
    entries: tuple[AdapterReport, ...]

    @property
    def state(self) -> AdapterState:
        """The worst state of its entries."""
        return min(map(_state, self.entries), key=list(AdapterState).index)

    @property
    def is_undecided(self) -> bool:
        """Whether one of its entries could not be judged, even if another one failed."""
        return AdapterState.ERROR in map(_state, self.entries)

    @property
    def failure(self) -> FailureKind | None:
        """The first kind of failure that the baseline does not accept."""
        kinds = [words.failure(entry) for entry in self.entries if _state(entry) is AdapterState.FAILED]
        return min(filter(None, kinds), key=list(FailureKind).index, default=None)

    @property
    def causes(self) -> list[str]:
        """The causes of its entries, each once."""
        return list(dict.fromkeys(cause for entry in self.entries if (cause := words.cause(entry))))

    @property
    def warnings(self) -> tuple[tuple[AdapterReport, Finding], ...]:
        """The warnings of all entries, each with its entry."""
        return tuple((entry, finding) for entry in self.entries for finding in words.warnings(entry))


def _state(entry: AdapterReport) -> AdapterState:
    if entry.verdict is Verdict.FAILED:
        return AdapterState.ACCEPTED if entry.accepted is not None else AdapterState.FAILED
    return AdapterState.ERROR if entry.verdict is Verdict.ERROR else AdapterState.PASSED


def worst_first(adapters: Iterable[Adapter]) -> list[Adapter]:
    """Failed adapters first, passed ones last; the worst entry of each is its first one."""
    order = list(AdapterState)
    ranked = [
        replace(adapter, entries=tuple(sorted(adapter.entries, key=lambda entry: order.index(_state(entry)))))
        for adapter in adapters
    ]
    return sorted(ranked, key=lambda adapter: order.index(adapter.state))


def adapters_of(report: Report) -> list[Adapter]:
    """The adapters of a report, in its order. A configuration gives each adapter a name of its own."""
    entries = words.by(report.adapters, lambda entry: entry.name)
    return [Adapter(name=name, entries=tuple(several)) for name, several in entries.items()]


# --- the headline --------------------------------------------------------------------------------------------------


def verdict_line(report: Report) -> str:
    """The result and the headline, without a final period: `FAIL: 2 of 6 adapters failed`, or `PASS, but …`."""
    return report.result.value.upper() + after_result(report)


def after_result(report: Report) -> str:
    """The part of `verdict_line` after the result."""
    adapters = adapters_of(report)
    reservation = _reservation(adapters) if report.result is Result.PASS and not report.is_comparison else ""
    if not reservation:
        return f": {headline(report)}"
    with_counts = len(adapters) > 1 or report.accepted or report.shard is not None
    return f", but {reservation}" + (f"; {headline(report)}" if with_counts else "")


def headline(report: Report) -> str:
    """The counts of the run in a sentence without its final period."""
    if report.is_comparison and report.complete:
        return _of_model(report)
    if report.complete and report.is_empty_shard:
        return f"{words.part(report)}no adapter is in this shard"
    return words.part(report) + _result(report)


def _of_model(report: Report) -> str:
    """The headline of `merge-gate verify`: what the model is."""
    findings = [finding for adapter in report.adapters for finding in adapter.findings if finding.check in ANSWERS]
    if report.result is Result.ERROR:
        return "the model could not be compared"
    if report.result is Result.FAIL:
        wrong = list(dict.fromkeys(finding.check for finding in findings if finding.severity is Severity.ERROR))
        gate = next((words.cause(adapter) for adapter in report.adapters if adapter.cause not in ANSWERS), "")
        if gate:
            return f"the merge of this adapter fails the gate ({gate})"
        phrase = ANSWERS[wrong[0]].phrase if wrong else "is not what it should be"
        return f"the model {phrase}" + _more(len(wrong) - 1, "more difference")
    good = [finding for finding in findings if ANSWERS[finding.check].is_good]
    allowed = len({finding.check for finding in findings} - {finding.check for finding in good})
    return (f"the model {ANSWERS[good[0].check].phrase}" if good else "the model passes") + _more(
        allowed, "allowed difference"
    )


def _more(count: int, what: str) -> str:
    return f", with {counted(count, what)}" if count else ""


def _result(report: Report) -> str:
    unfinished = "" if report.complete else "the run did not finish"
    unfinished = "the shards are not one whole run" if report.problems else unfinished
    if not report.adapters:
        return f"{unfinished} and no adapter was judged" if unfinished else "no adapter was judged"
    adapters = adapters_of(report)
    everything = counted(len(adapters), "adapter")
    if unfinished:
        return f"{unfinished}; so far {_counts(report, adapters, everything)}"
    whole = {1: "the only adapter", 2: "both adapters"}.get(len(adapters), f"all {everything}")
    return _counts(report, adapters, whole)


def _counts(report: Report, adapters: list[Adapter], whole: str) -> str:
    states = Counter(adapter.state for adapter in adapters)
    failed, errors, passed = (states[state] for state in (AdapterState.FAILED, AdapterState.ERROR, AdapterState.PASSED))
    total = len(adapters)
    of_all = f"of {counted(total, 'adapter')}"
    merges = _merges(report, adapters)
    parts = []
    if failed:
        parts.append(_failed(adapters, whole if failed == total else f"{failed:,} {of_all}", merges))
    if errors:
        who = whole if errors == total else f"{errors:,}" if failed else f"{errors:,} {of_all}"
        parts.append(f"{who} could not be {_undecided(adapters)}{'' if failed else merges}")
        parts += [] if failed or errors == total or states[AdapterState.ACCEPTED] else ["none failed"]
    if not failed and not errors and passed:
        parts.append(f"{whole if passed == total else counted(passed, 'adapter')} passed{merges}")
    return ", ".join(filter(None, [*parts, _accepted(adapters)]))


def _undecided(adapters: list[Adapter]) -> str:
    """`judged`, `published`, or both: what could not be done with the adapters in doubt."""
    causes = [set(adapter.causes) for adapter in adapters if adapter.state is AdapterState.ERROR]
    unpublished = sum(cause == _NOT_PUBLISHED for cause in causes)
    if unpublished:
        return "published" if unpublished == len(causes) else f"judged or published ({unpublished:,} not published)"
    return "judged"


def _failed(adapters: list[Adapter], who: str, merges: str) -> str:
    """`2 of 6 adapters failed: 1 broken, 1 refused`. Broken is what a reader expects of a failure."""
    kinds = Counter(adapter.failure for adapter in adapters if adapter.failure and adapter.state is AdapterState.FAILED)
    if _has_broken_base(adapters):
        return f"{who} failed (broken base){merges}"
    if set(kinds) == {FailureKind.BROKEN}:
        return f"{who} failed{merges}"
    in_words = [f"{kinds[kind]:,} {words.FAILURES[kind]}" for kind in FailureKind if kinds[kind]]
    if len(in_words) == 1:
        return f"{who} failed ({words.FAILURES[next(iter(filter(None, kinds)))]}){merges}"
    return f"{who} failed{merges}: {', '.join(in_words)}"


def _has_broken_base(adapters: list[Adapter]) -> bool:
    """Whether all adapters that failed did so because their base has NaN or Inf."""
    causes = {cause for adapter in adapters if adapter.state is AdapterState.FAILED for cause in adapter.causes}
    return causes == {base_nonfinite.id}


def _merges(report: Report, adapters: list[Adapter]) -> str:
    """The same count in merges, if there are more of them than adapters."""
    total = len(report.adapters)
    if total == len(adapters):
        return ""
    failed, errors = report.counts.failed - report.accepted, report.counts.error
    if failed or errors:
        too = sum(
            _state(entry) is AdapterState.ERROR for adapter in adapters if adapter.failure for entry in adapter.entries
        )
        return f" ({failed or errors:,} of {counted(total, 'merge')}{f', {too:,} not judged' if too else ''})"
    return f" ({report.counts.passed:,} of {counted(total, 'merge')})" if report.accepted else f" ({total:,} merges)"


def _accepted(adapters: list[Adapter]) -> str:
    accepted = [adapter for adapter in adapters if adapter.state is AdapterState.ACCEPTED]
    ends = sorted(entry.accepted.until for adapter in accepted for entry in adapter.entries if entry.accepted)
    if not accepted:
        return ""
    first = f"{'first ' if len(set(ends)) > 1 else ''}ends {one_line(ends[0], words.NAME_LENGTH)}"
    return f"{counted(len(accepted), 'known failure')} accepted ({first})"


# --- the reservation of a pass -------------------------------------------------------------------------------------


def _reservation(adapters: list[Adapter]) -> str:
    """The reservations about a run that passed, most serious first; empty if there is no warning."""
    warned = [adapter for adapter in adapters if adapter.state is AdapterState.PASSED and adapter.warnings]
    for check, is_so, phrase in (
        (rounding_loss.id, _is_hardly_changed, "hardly {differ} from {its} base in {dtypes}"),
        (delta_norm.id, bool, "{replace} weights of {its} base instead of adapting them"),
        (rounding_loss.id, bool, "{lose} much of {its} delta in {dtypes}"),
    ):
        having = {
            adapter.name: [entry for entry, finding in adapter.warnings if finding.check == check and is_so(finding)]
            for adapter in warned
        }
        named = {name: entries for name, entries in having.items() if entries}
        if named:
            rest = len(warned) - len(named)
            more = f", and {rest:,} more {'has' if rest == 1 else 'have'} warnings" if rest else ""
            return f"{counted(len(named), 'adapter')} {_inflected(phrase, named)}{more}"
    if not warned:
        return ""
    checks = dict.fromkeys(
        one_line(finding.check, words.NAME_LENGTH) for each in warned for _, finding in each.warnings
    )
    have = "has" if len(warned) == 1 else "have"
    return f"{counted(len(warned), 'adapter')} {have} warnings ({listing(checks, _MOST_CHECKS)})"


def _inflected(phrase: str, named: dict[str, list[AdapterReport]]) -> str:
    s, its = ("s", "its") if len(named) == 1 else ("", "their")
    *others, last = dict.fromkeys(words.precision(entry.base) for several in named.values() for entry in several)
    dtypes = f"{', '.join(others)} and {last}" if others else last
    return phrase.format(differ=f"differ{s}", replace=f"replace{s}", lose=f"lose{s}", its=its, dtypes=dtypes)


def _is_hardly_changed(finding: Finding) -> bool:
    measured = dict(finding.measured)
    return measured.get("rounding_change", measured.get("lost_share", 0.0)) > HARDLY_CHANGED


# --- the advice ----------------------------------------------------------------------------------------------------

_ADVICE = {
    FailureKind.BROKEN: "Do not release a broken adapter: its merged model is broken, wrong, or cannot be made.",
    FailureKind.REFUSED: "A refused adapter is not safe to load: follow its hint, and gate it again.",
    FailureKind.NOT_MERGEABLE: "An adapter that cannot be merged may be served unmerged: leave it out of this gate.",
    FailureKind.UNEXPECTED: "An adapter that is not what was expected may be the wrong one: find out before a release.",
}
_FILES_ONLY = (
    "Nothing was merged. The adapters' files were searched for NaN and Inf: only `merge-gate run` checks the base and "
    "the merge"
)


def advice(report: Report) -> str:
    """What the result means for a release, in a few sentences."""
    sentences = _of_compared(report) if report.is_comparison and report.complete else _of_gated(report)
    return f"{sentences} {_FILES_ONLY}{_values_unread(report)}." if report.files_only else sentences


def _values_unread(report: Report) -> str:
    """The adapter files whose values `merge-gate check` does not read."""
    findings = [finding for adapter in report.adapters for finding in adapter.findings]
    unread = {
        ", pickled weights": any(file.path == PICKLE_NAME for each in report.adapters for file in each.files),
        ", tensors in dtypes without a rule (the notes name them)": any(
            finding.check == "adapter-nonfinite" and finding.severity is Severity.NOTE for finding in findings
        ),
    }
    return "".join(words for words, is_there in unread.items() if is_there)


def _of_compared(report: Report) -> str:
    """The advice of `merge-gate verify`."""
    if report.result is Result.ERROR:
        return "A model that could not be compared is not cleared for release."
    if report.result is Result.FAIL:
        return "Do not serve this model before this is explained."
    if any(adapter.compared_with is None for adapter in report.adapters):
        return (
            "Only digests were compared, with those in merge-gate.json, which is not signed. No tensor was compared "
            "with base and adapter."
        )
    if any(finding.check == "applied" for adapter in report.adapters for finding in adapter.findings):
        return (
            "Its tensors were measured. The tokenizers were compared if both have one. Most settings were not: compare "
            "them before quantizing."
        )
    return "Its tensors, settings, and tokenizer were compared with those that base and adapter give."


def _of_gated(report: Report) -> str:
    if report.complete and report.is_empty_shard:
        return "There are more shards than adapters. The reports of the other shards have the verdicts."
    if report.problems and report.result is not Result.FAIL:
        return "This report clears no adapter for release: the shards are not one whole run."
    if not report.complete and report.result is not Result.FAIL:
        return "This report clears no adapter for release: the run did not finish. Run it again."
    if report.result is Result.FAIL:
        return _of_failed(adapters_of(report))
    return _of_undecided(adapters_of(report)) if report.result is Result.ERROR else _of_passed(report)


def _of_failed(adapters: list[Adapter]) -> str:
    if _has_broken_base(adapters):
        return "The base has NaN or Inf before any merge, so each merged model has them. The adapter is not the cause."
    kinds = {adapter.failure for adapter in adapters}
    return " ".join(sentence for kind, sentence in _ADVICE.items() if kind in kinds)


def _of_undecided(adapters: list[Adapter]) -> str:
    if _undecided(adapters) == "published":
        return "The merges passed, but there is no new model under the name of an adapter that could not be published."
    return "An adapter that could not be judged is not cleared for release. The gate stays closed."


def _of_passed(report: Report) -> str:
    """What a pass proves."""
    if report.files_only:
        return "The files are sound."
    whose = (" of this shard" if report.shard else "") + (" that passed" if report.accepted else "")
    accepted = "The baseline accepts the known failures until their last day. " if report.accepted else ""
    return f"{accepted}Every parameter of every merged model{whose} is finite.{_not_proved(report)}"


def _not_proved(report: Report) -> str:
    """How many layers were merged without a proof, and why."""
    coverages = [adapter.coverage for adapter in report.adapters]
    layers = sum(coverage.layers_not_proved for coverage in coverages)
    reasons = sorted({reason for coverage in coverages for reason in coverage.reasons_not_proved})
    if not layers:
        return ""
    verb = "is" if layers == 1 else "are"
    return f" The merge of {counted(layers, 'layer')} {verb} not proved: {'; or '.join(reasons)}."
