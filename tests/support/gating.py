"""The gate in this process, from an adapter's directory to its verdict: for tests that judge thousands of adapters.

In: directories. Out: `Judgement`. The stages are the gate's own, called in its order; only the worker process between
them is left out, so that a base is loaded once per session and a judgement takes milliseconds.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch import nn

from merge_gate.engine.base import accounting
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_files, judge_merge, measure_options
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.verdict import decide
from merge_gate.records.config import AdapterSpec, BaseSpec, CheckSetting, Combine
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence
from merge_gate.records.report import Coverage
from merge_gate.records.terms import Finding, Quantization, Severity, Verdict
from tests.support import faults_methods, methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter, merge_combination
from tests.support.faults_methods import Trial, Truth
from tests.support.files.pickles import read_pickle

DEFAULT_CHECKS = tuple(
    CheckSetting(check=name, severity=default.severity, limit=default.limit) for name, default in CHECKS.items()
)
ANY_DELTA = tuple(replace(setting, error_limit=math.inf, wiped=Severity.WARNING) for setting in DEFAULT_CHECKS)
"""A delta may be as large as a trial makes it, or zero: the truth of trials is whether values are finite."""


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


SPEC = AdapterSpec(name="trial", source="./trial", base=BaseSpec(), checks=DEFAULT_CHECKS, line=1, column=1)
TRIAL = replace(SPEC, checks=ANY_DELTA)


@dataclass
class Gate:
    """Judges adapters; keeps the bases it has loaded. `no_forward`: why no model is run. `safe_merge` ships."""

    loaded: dict[tuple[str, str, Quantization, ModelClass], Base] = field(default_factory=dict)
    no_forward: str = ""
    safe_merge: bool = True

    def judge(
        self,
        adapter: Path,
        base: Path,
        *,
        dtype: str = "auto",
        quantization: Quantization = Quantization.NONE,
        allow_pickle: bool = False,
        is_export: bool = False,
    ) -> Judgement:
        files = preflight(str(adapter), allow_pickle=allow_pickle, read_pickle=read_pickle)
        if any(finding.severity is Severity.ERROR for finding in files.findings):
            return self._decide((files,), None)
        model_class = model_class_for(str(base), files, stored_tensors(base))
        loaded = self._base(base, model_class, dtype, quantization)
        evidence = merge_adapter(
            loaded,
            files,
            measure_options=measure_options(TRIAL),
            is_export=is_export,
            no_forward=self.no_forward,
            safe_merge=self.safe_merge,
        )
        return self._decide((files,), replace(evidence, instead_of=model_class.instead_of))

    def combine(self, adapters: tuple[Path, ...], base: Path, combine: Combine, *, dtype: str = "auto") -> Judgement:
        members = tuple(preflight(str(adapter), allow_pickle=False) for adapter in adapters)
        loaded = self.base(base, members[0], dtype=dtype)
        return self._decide(
            members, merge_combination(loaded, members, combine, measure_options=measure_options(TRIAL))
        )

    def base(
        self, directory: Path, files: AdapterFiles, *, dtype: str, quantization: Quantization = Quantization.NONE
    ) -> Base:
        return self._base(
            directory, model_class_for(str(directory), files, stored_tensors(directory)), dtype, quantization
        )

    def _base(self, directory: Path, model_class: ModelClass, dtype: str, quantization: Quantization) -> Base:
        key = (str(directory), dtype, quantization, model_class)
        if key not in self.loaded:
            account = accounting.account_for(str(directory), model_class, directory.name, stored_tensors(directory))
            loaded = load_local(
                str(directory), model_class=model_class, label=directory.name, dtype=dtype, quantization=quantization
            )
            accounting.add_file_facts(loaded, account, str(directory))
            self.loaded[key] = loaded
        return self.loaded[key]

    @staticmethod
    def _decide(members: tuple[AdapterFiles, ...], evidence: Evidence | None) -> Judgement:
        findings, coverage = judge_files(TRIAL, members[0]), Coverage()
        if evidence is not None:
            findings = judge_merge(TRIAL, members[0], evidence)
            coverage = Coverage(
                adapter_tensors=len(evidence.file_tensors),
                modules_merged=len(evidence.targeted),
                parameters_checked=evidence.parameters_checked,
                parameters_total=evidence.parameters_total,
            )
        verdict, index, findings = decide(findings, coverage)
        cause = None if index is None else findings[index].check
        return Judgement(verdict=verdict, cause=cause, findings=findings, evidence=evidence)


# --- the bench: what is judged, and how judgements are held against the truth --------------------------------------


@dataclass
class Bench:
    """Bases and adapters on disk and in memory, each made on first use."""

    root: Path
    gate: Gate = field(default_factory=Gate)
    loaded: dict[tuple[str, str], nn.Module] = field(default_factory=dict)

    def base_directory(self, name: str, dtype: str) -> Path:
        directory = self.root / "bases" / name / dtype
        return directory if directory.exists() else methods.save_base(name, directory, dtype)

    def base(self, name: str, dtype: str) -> nn.Module:
        if (name, dtype) not in self.loaded:
            self.loaded[name, dtype] = methods.load_base(name, self.base_directory(name, dtype))
        return self.loaded[name, dtype]

    def adapter(self, case: methods.Case) -> Path:
        directory = self.root / "adapters" / case.name
        if not directory.exists():
            base_directory = self.base_directory(case.base, "float32")
            methods.save_adapter(case, self.base(case.base, "float32"), directory, base_directory=base_directory)
        return directory

    def faults(self, case: methods.Case) -> faults_methods.Bench:
        bases = {dtype: self.base(case.base, dtype) for dtype in methods.DTYPES}
        return faults_methods.Bench(case, bases, self.adapter(case), self.root / "trial")


def mistake(truth: Truth, judgement: Judgement) -> str | None:
    """The word for how a judgement is wrong, or None."""
    if truth.passes != (judgement.verdict is Verdict.PASSED):
        return "false failure" if truth.passes else "false pass"
    if truth.passes:
        return "no warning" if truth.warns and "adapter-nonfinite" not in judgement.warned else None
    if truth.cause is None:
        return None
    return None if (judgement.verdict, judgement.cause) == (Verdict.FAILED, truth.cause) else "wrong cause"


def told(trial: Trial, truth: Truth, wrong: str, judgement: Judgement) -> str:
    return f"{wrong}: {trial}\n  truth: {truth}\n  gate:  {judgement}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads and progress bars only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
