"""The report on one finished directory: its findings, its verdict, and the cause.

In: an `Entry` with the adapter, the evidence of its merge, and the findings of this folder. Out: `AdapterReport`.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import ResolveError
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.verify.comparison import Comparison
from merge_gate.features.verify.declared import BROKEN_FILES, OTHER_ARCHITECTURE
from merge_gate.features.verify.directory import directory_findings, expected_files
from merge_gate.features.verify.misplaced import command
from merge_gate.features.verify.tensor_findings import stored_findings, value_findings
from merge_gate.files.headers import shown
from merge_gate.files.json_object import read_as_transformers
from merge_gate.judging import adapter_report, all_checks
from merge_gate.judging.bounds import bounded, cut
from merge_gate.judging.kinds import ALLOWED, ANSWERS, finding
from merge_gate.judging.not_judged import NOT_JUDGED, not_judged
from merge_gate.records.files import CONFIG_NAME, MANIFEST_NAME, BaseFiles, Entry, Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.records.report import AdapterReport, Coverage
from merge_gate.records.terms import BaseKey, FailureKind, Finding, Origin, Severity, Verdict
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from merge_gate.features.publish.manifest import Difference, Manifest

_ORDER = {kind: number for number, kind in enumerate((*ANSWERS, "strength"))}
"""The order in which findings decide. Those of the gate are -1."""

_UNDECIDED = {NOT_JUDGED, "not-measurable"}
_MOST_CONFIG_BYTES = 20_000_000
SHARE_OF_ANOTHER = 0.5
"""If more of the base's tensors than this share are absent or have another shape, the model is another one."""

_SIZES = (
    "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip


def findings_of(
    merged: Snapshot, entry: Entry, comparison: Comparison, candidates: Mapping[str, Comparison]
) -> tuple[Finding, ...]:
    """Every finding on a finished directory that could be compared with a merge."""
    if comparison.unloadable is not None:
        return (_unloadable(merged, all_checks.refused(comparison.unloadable)),)
    base = entry.base_files or BaseFiles(directory="")
    own = merged.base_files or BaseFiles(directory=merged.directory)
    values = value_findings(comparison, config=entry.files.config, candidates=candidates)
    return (
        *(_with_exchange(problem, merged, entry) for problem in values),
        *stored_findings(base, own, comparison),
        *directory_findings(merged, expected_files(entry), comparison.settings),
    )


def _unloadable(merged: Snapshot, why: Finding) -> Finding:
    """The finding on a model that transformers cannot load. A gate that cannot load it proves nothing."""
    message, hint = (of_model(text, merged.name) for text in (why.message, why.hint))
    if why.check == NOT_JUDGED:
        return replace(why, message=f"the model was not compared: {message}", hint=hint, origin=Origin.MODEL)
    return finding(BROKEN_FILES, f"the model cannot be loaded: {message}", hint=hint)


def of_model(text: str, name: str) -> str:
    """A sentence about a base, if that base is the model that is compared."""
    for label in (quoted(name, 200), shown(name), name):
        text = text.replace(f"base {label}", f"model {label}")
    return text.replace("the base", "the model")


_NEARLY_MINUS_ONE = (-1.05, -0.95)


def _with_exchange(problem: Finding, merged: Snapshot, entry: Entry) -> Finding:
    """The finding, with the corrected command if MERGED and --base may be exchanged.

    The delta is then in the model -1 times, or the adapter names MERGED as its base.
    """
    base = entry.base.name if entry.base is not None else ""
    factor = dict(problem.measured).get("factor", 0.0)
    is_subtracted = problem.check == "other-strength" and _NEARLY_MINUS_ONE[0] < factor < _NEARLY_MINUS_ONE[1]
    named = entry.files.config.base_name
    is_named = named is not None and _same(named, merged.name) and not _same(named, base)
    is_about_values = problem.check in {"other-strength", "unexplained", "wrong-base"}
    if not base or not (is_subtracted or (is_named and is_about_values)):
        return problem
    corrected = command(base, merged.name, entry.spec.source)
    why = "the adapter names MERGED as its base" if is_named else "the delta is subtracted"
    hint = f"if MERGED and --base are exchanged ({why}), run: {corrected}" if corrected else ""
    return replace(problem, hint=hint or problem.hint)


def _same(first: str, second: str) -> bool:
    return first == second or (Path(first).is_dir() and Path(first).resolve() == Path(second).resolve())


def before_merge(merged: Snapshot, entry: Entry, *, is_release: bool = False) -> AdapterReport | None:
    """The report on a model that its files alone decide; None if it has to be compared, or measured as a release."""
    base, own = entry.base_files, merged.base_files
    if base is None or own is None:
        return None
    name = entry.base.name if entry.base is not None else ""
    problem = _quantized(base, own, base_name=name, merged_name=merged.name, is_release=is_release)
    if problem is None and own.tensors:
        problem = architecture_finding(base, own)
    return _of_files(merged, entry, problem) if problem is not None else None


def unread_report(merged: Snapshot, entry: Entry, error: ResolveError) -> AdapterReport:
    """The report on a model whose files cannot be read as a model's."""
    message, hint = (of_model(text, merged.name) for text in (error.message, error.hint))
    problem = finding(BROKEN_FILES, message, hint=hint)
    has_adapter = Path(merged.directory, CONFIG_NAME).exists()  # transformers would load it on top of the model
    if error.check is None and not has_adapter:
        problem = _not_compared(message, hint)
    return _of_files(merged, entry, problem)


def _of_files(merged: Snapshot, entry: Entry, problem: Finding) -> AdapterReport:
    gated = adapter_report.files_report(entry)
    return decided(merged, replace(gated, compared_with=gated.source), [problem], ())


def _not_compared(why: str, hint: str = "", origin: Origin = Origin.MODEL) -> Finding:
    return not_judged(f"the model was not compared: {why}", hint, origin=origin)


def compared_report(
    merged: Snapshot, entry: Entry, evidence: Evidence, findings: Iterable[Finding], allowed: Collection[str]
) -> AdapterReport:
    """The report on a directory whose merge was made. A merge that the gate would fail fails the directory too."""
    gated = adapter_report.merged_report(entry, evidence)
    if evidence.refusal is not None:
        return without_merge(merged, gated)
    gated = replace(gated, compared_with=gated.source)
    return decided(merged, gated, (*gated.findings, *findings), allowed)


def without_merge(merged: Snapshot, gated: AdapterReport) -> AdapterReport:
    """The report on a directory that nothing could be compared with. `gated` says why."""
    message = f"the adapter {quoted(gated.source, 200)} cannot be merged"
    why = _not_compared(message, origin=Origin.RUNTIME)
    reason = None if gated.decided_by is None else gated.findings[gated.decided_by]
    if reason is not None:
        is_of_adapter = reason.origin is not Origin.BASE and reason.check != NOT_JUDGED
        message = f"{message}: {reason.message}" if is_of_adapter else reason.message
        why = replace(reason, check=NOT_JUDGED, message=_not_compared(message).message)
    others = (problem for problem in gated.findings if problem is not reason)
    return decided(merged, replace(gated, compared_with=gated.source), (why, *others), ())


def decided(
    merged: Snapshot, gated: AdapterReport, findings: Iterable[Finding], allowed: Collection[str]
) -> AdapterReport:
    """The report with these findings. Allowed kinds are notes, if they may be allowed."""
    accepted = set(allowed).intersection(ALLOWED)
    lowered = (
        replace(problem, severity=Severity.NOTE) if problem.check in accepted else problem for problem in findings
    )
    ordered = bounded(
        sorted(lowered, key=lambda problem: (all_checks.WEIGHT[problem.severity], _ORDER.get(problem.check, -1)))
    )
    index = next((place for place, problem in enumerate(ordered) if problem.severity is Severity.ERROR), None)
    is_of_base = index is not None and ordered[index].origin is Origin.BASE
    is_undecided = is_of_base or (index is not None and ordered[index].check in _UNDECIDED)
    verdict = Verdict.PASSED if index is None else Verdict.ERROR if is_undecided else Verdict.FAILED
    cause = None if index is None else ordered[index].check
    failure = FailureKind.UNEXPECTED if cause in ANSWERS else gated.failure
    return replace(
        gated,
        name=merged.name,
        source=merged.name,
        revision=merged.revision,
        verdict=verdict,
        cause=cause,
        failure=failure if verdict is Verdict.FAILED else None,
        findings=ordered,
        decided_by=index,
    )


# --- what the files alone say -----------------------------------------------------------------------------------------


def _quantized(
    base: BaseFiles, merged: BaseFiles, *, base_name: str, merged_name: str, is_release: bool
) -> Finding | None:
    """Why two models are not compared: one of them is stored quantized. None if none is, or it is measured."""
    if base.quantization is not None and base.quantization.is_read:
        original = f"--base {quoted(base.original, 120)}" if base.original else "the original base with --base"
        return _not_compared(
            f"the base {quoted(base_name, 200)} is stored quantized ({_method(base)}), and a merge into it is not "
            "compared",
            f"name {original}: the base of the merge, before it was quantized",
            Origin.BASE,
        )
    is_whole = all(problem.check == "base-format" for problem in merged.findings)
    if merged.quantization is not None and merged.quantization.is_read and is_whole and not is_release:
        return _not_compared(
            f"the model {quoted(merged_name, 200)} is stored quantized ({_method(merged)}), so its values are not the "
            "values of the merge",
            "verify the merged model before it is quantized",
        )
    return None


def _method(files: BaseFiles) -> str:
    declared = files.quantization
    return quoted(declared.method or "of an unknown method", 60, "") if declared is not None else ""


def architecture_finding(base: BaseFiles, merged: BaseFiles) -> Finding | None:
    """The finding on a model of another architecture or size than the base; None if they are alike.

    config.json must say so, and most stored tensors must agree: a changed config.json alone is a smaller difference.
    """
    other = list(_other_sizes(_config_of(base), _config_of(merged)))
    shapes = {tensor.name: tensor.shape for tensor in merged.tensors}
    odd = [tensor for tensor in base.tensors if shapes.get(tensor.name) != tensor.shape]
    if not other or len(odd) <= SHARE_OF_ANOTHER * len(base.tensors):
        return None
    settings = [f"{key} {quoted(str(new), 60)}, expected {quoted(str(old), 60)}" for key, old, new in other]
    return finding(
        OTHER_ARCHITECTURE,
        f"config.json has {listing(settings)} as in the base, and {len(odd):,} of "
        f"{counted(len(base.tensors), 'tensor')} of the base are not there in their shape",
        tensors=len(odd),
    )


def _config_of(files: BaseFiles) -> Mapping[str, Any]:
    return read_as_transformers(Path(files.directory, "config.json"), _MOST_CONFIG_BYTES) or {}


def _other_sizes(base: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    if base.get("model_type") != merged.get("model_type"):
        yield "model_type", base.get("model_type"), merged.get("model_type")
    inner = [part if isinstance(part := settings.get("text_config"), dict) else {} for settings in (base, merged)]
    for key in _SIZES:
        old, new = (part.get(key, settings.get(key)) for part, settings in zip(inner, (base, merged), strict=True))
        if old != new and old is not None and new is not None:
            yield key, old, new


# --- its own record ---------------------------------------------------------------------------------------------------


def recorded_report(name: str, directory: str, allowed: Collection[str]) -> AdapterReport:
    """The report on a published directory that is compared with its merge-gate.json: every file, by its digest.

    It is not signed, and anyone who can write the files can write it, too. A signature proves who wrote it.

    Raises:
        UsageError: there is no record, or merge-gate did not write it.
        OSError: a file cannot be read.
    """
    from merge_gate.features.publish.manifest import differences, read_manifest  # noqa: PLC0415 - of this model alone

    manifest = read_manifest(directory)
    odd, base = differences(directory, manifest), manifest.base
    gated = AdapterReport(
        name=manifest.name,
        source=manifest.adapters[0].source,
        base=BaseKey(model=cut(base.model), revision=base.revision, dtype=base.dtype, quantization=base.quantization),
        peft_type=manifest.peft_type,
        verdict=Verdict.ERROR,
        coverage=Coverage(),
        files=tuple(file for file in manifest.files if file.path not in odd),  # the others have other digests
        line=1,
        column=1,
    )
    return decided(Snapshot(name=name, directory=directory), gated, _own_findings(manifest, odd), allowed)


def _own_findings(manifest: Manifest, odd: Mapping[str, Difference]) -> list[Finding]:
    if not odd:
        message = f"{counted(len(manifest.files), 'file has', 'files have')} the digests in {MANIFEST_NAME}"
        if manifest.checks:
            message += f". It was judged with changed checks: {one_line(listing(manifest.checks), 400)}"
        return [finding("as-published", message)]
    shown = listing([f"{quoted(name, 120)} is {how}" for name, how in odd.items()])
    message = f"{counted(len(odd), 'file differs', 'files differ')} from {MANIFEST_NAME}: {shown}"
    return [finding("file-changed", message, files=len(odd))]
