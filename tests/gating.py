"""The gate in this process, from an adapter's directory to its verdict: for tests that judge thousands of adapters.

In: directories. Out: `Judgement`. The stages are the gate's own, called in its order; only the worker process between
them is left out, so that a base is loaded once per session and a judgement takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge_gate import base as bases
from merge_gate import merge
from merge_gate.checks import judge
from merge_gate.config import CHECK_DEFAULTS
from merge_gate.preflight import preflight
from merge_gate.records import (
    AdapterFiles,
    AdapterSpec,
    BaseSpec,
    CheckSetting,
    Combine,
    Coverage,
    Evidence,
    Finding,
    Quantization,
    Severity,
    Verdict,
)
from merge_gate.verdict import decide

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.base import Base, Shape

DEFAULT_CHECKS = tuple(
    CheckSetting(check=name, severity=default.severity, limit=default.limit) for name, default in CHECK_DEFAULTS.items()
)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the gate says of one adapter."""

    verdict: Verdict
    cause: str | None
    findings: tuple[Finding, ...]
    evidence: Evidence | None

    @property
    def warned(self) -> set[str]:
        return {finding.check for finding in self.findings if finding.severity is Severity.WARNING}

    def __str__(self) -> str:
        findings = "\n".join(f"    {f.severity} {f.check} ({f.origin}): {f.message}" for f in self.findings)
        return f"{self.verdict}, cause {self.cause}\n{findings}"


@dataclass
class Gate:
    """Judges adapters; keeps the bases it has loaded."""

    loaded: dict[tuple[str, str, Quantization, Shape], Base] = field(default_factory=dict)

    def judge(
        self,
        adapter: Path,
        base: Path,
        *,
        dtype: str = "auto",
        quantization: Quantization = Quantization.NONE,
    ) -> Judgement:
        files = preflight(str(adapter), allow_pickle=False)
        if any(finding.severity is Severity.ERROR for finding in files.findings):
            return self._decide((files,), None)
        loaded = self.base(base, files, dtype=dtype, quantization=quantization)
        return self._decide((files,), merge.merge_adapter(loaded, files))

    def combine(self, adapters: tuple[Path, ...], base: Path, combine: Combine, *, dtype: str = "auto") -> Judgement:
        members = tuple(preflight(str(adapter), allow_pickle=False) for adapter in adapters)
        loaded = self.base(base, members[0], dtype=dtype)
        return self._decide(members, merge.merge_combination(loaded, members, combine))

    def base(
        self, directory: Path, files: AdapterFiles, *, dtype: str, quantization: Quantization = Quantization.NONE
    ) -> Base:
        shape = bases.shape_for(str(directory), files)
        key = (str(directory), dtype, quantization, shape)
        if key not in self.loaded:
            self.loaded[key] = bases.load_base(
                str(directory), shape=shape, label=directory.name, dtype=dtype, quantization=quantization
            )
        return self.loaded[key]

    @staticmethod
    def _decide(members: tuple[AdapterFiles, ...], evidence: Evidence | None) -> Judgement:
        spec = AdapterSpec(name="trial", source="./trial", base=BaseSpec(), checks=DEFAULT_CHECKS, line=1, column=1)
        findings = judge(spec, members[0], evidence)
        coverage = Coverage()
        if evidence is not None:
            coverage = Coverage(
                adapter_tensors=len(evidence.file_tensors),
                modules_merged=len(evidence.targeted),
                parameters_checked=evidence.parameters_checked,
                parameters_total=evidence.parameters_total,
            )
        verdict, cause, findings = decide(findings, coverage)
        return Judgement(verdict=verdict, cause=cause, findings=findings, evidence=evidence)
