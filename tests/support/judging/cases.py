"""What a check is given, and what the tests of several checks do with it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.all_checks import judge_files, judge_merge
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.config import AdapterSpec, BaseSpec, CheckSetting
from merge_gate.records.files import AdapterFiles, HashedFile, StoredTensor
from merge_gate.records.measured import BaseFacts, Evidence, FileTensor, TensorMerge, TensorStats, UnreadLayer
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding, Quantization, Severity

MODULE = "model.layers.5.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
LORA_A = f"base_model.model.{MODULE}.lora_A.weight"
LORA_B = f"base_model.model.{MODULE}.lora_B.weight"
HALF_MAX = 65504.0
DIGEST = "9f2c5d1e" * 8


def tensor(name: str = WEIGHT, **changes: Any) -> TensorStats:
    usual = {"dtype": "float16", "shape": (8, 8), "numel": 64, "minimum": -1.0, "maximum": 1.0}
    return TensorStats(name=name, **(usual | changes))


def broken(name: str = WEIGHT, **counts: int) -> TensorStats:
    return tensor(name, first_index=(0, 7), **(counts or {"nan": 1}))


def merged(stats: TensorStats | None = None, **changes: Any) -> TensorMerge:
    usual = {"module": MODULE, "stats": stats or tensor(), "dtype_max": HALF_MAX, "changed": True}
    return TensorMerge(**(usual | changes))


def base(**changes: Any) -> BaseFacts:
    usual = {"model": "./base", "revision": None, "dtype": "float16", "quantization": Quantization.NONE}
    return BaseFacts(**(usual | {"parameters": 64} | changes))


def evidence(**changes: Any) -> Evidence:
    """A sound adapter of one module."""
    usual: dict[str, Any] = {
        "base": base(),
        "peft_type": "LORA",
        "file_tensors": (FileTensor(stats=tensor(LORA_A)), FileTensor(stats=tensor(LORA_B))),
        "targeted": (MODULE,),
        "merges": (merged(),),
        "parameters_checked": 64,
        "parameters_total": 64,
    }
    return Evidence(**(usual | changes))


def files(*, config: Mapping[str, Any] | None = None, **changes: Any) -> AdapterFiles:
    usual: dict[str, Any] = {
        "directory": "adapter",
        "config": recorded({"peft_type": "LORA", "r": 16, "lora_alpha": 32} | dict(config or {})),
        "files": (HashedFile(path="adapter_model.safetensors", size_bytes=8, sha256=DIGEST),),
    }
    return AdapterFiles(**(usual | changes))


def spec(**changes: Any) -> AdapterSpec:
    return AdapterSpec(
        **({"name": "a", "source": "./a", "base": BaseSpec(), "checks": (), "line": 1, "column": 1} | changes)
    )


def judge(spec: AdapterSpec, files: AdapterFiles, evidence: Evidence | None) -> tuple[Finding, ...]:
    """The findings of the phase that there is evidence for: of the merge, or of the files alone."""
    return judge_files(spec, files) if evidence is None else judge_merge(spec, files, evidence)


@dataclass(frozen=True)
class Given:
    """What a check is given: a sound adapter, changed. `severity` is that of its finding, if it is a lesser one."""

    evidence: Evidence | None = field(default_factory=evidence)
    files: AdapterFiles = field(default_factory=files)
    spec: AdapterSpec = field(default_factory=spec)
    severity: Severity | None = None


def reason(kind: str, **fields: Any) -> Refusal:
    return Refusal(kind=kind, fields=fields)


def found_in_files(check: str) -> Given:
    return Given(None, files(findings=(CHECKS[check].finding("what the preflight says", "do"),)))


def unread(**changes: Any) -> UnreadLayer:
    return UnreadLayer(**({"module": "head.out_proj", "share": 2.5, "never_called": True, "in_logits": True} | changes))


def lossy(share: float, **changes: Any) -> TensorMerge:
    usual: dict[str, Any] = {"base_norm": 10.0, "delta_norm": 1.0, "lost_norm": share, "unchanged_fraction": 0.9}
    return merged(**(usual | changes))


MANY = tuple(f"name{number}" for number in range(14))
"""More names than any message lists."""
NAMES = tuple(f"model.layers.{number}.mlp.weight" for number in range(8))
"""More than any message lists."""
COUNTS = pytest.mark.parametrize("count", [1, 2, len(NAMES)])
"""One, several, and more than a message lists."""

LARGE = lossy(0.0, delta_norm=100.0)
"""A large delta, of which nothing is lost."""
NAMED = BaseSpec(model="/models/llama", label="./models/llama")
FOURIERFT = {"peft_type": "FOURIERFT"}
LOKR = {"peft_type": "LOKR", "base_model_name_or_path": None, "inference_mode": True, "task_type": None}


def refusing(refusal: Refusal) -> Given:
    return Given(evidence(refusal=refusal, merges=()))


def with_settings(one: AdapterSpec, *settings: CheckSetting) -> AdapterSpec:
    return dataclasses.replace(one, checks=settings)


def of(check: str, findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def setting(check: str, severity: Severity, limit: float | None = None) -> CheckSetting:
    return CheckSetting(check=check, severity=severity, limit=limit)


def hint_of(check: str, one: Evidence) -> str:
    (finding,) = of(check, judge(spec(), files(), one))
    return finding.hint


def headers(*names: str) -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor(name=name, dtype="F32", shape=(2, 2)) for name in names)


def unworded(finding: Finding | None) -> Finding | None:
    """The finding without its sentences, which are in the golden."""
    return finding and dataclasses.replace(finding, message="", hint="")


def shown(finding: Finding) -> str:
    rest = {
        field.name: getattr(finding, field.name)
        for field in dataclasses.fields(finding)
        if field.name not in {"check", "severity", "origin", "message", "hint"}
        and getattr(finding, field.name) != field.default
    }
    places = "".join(f"\n  {name} = {value!r}" for name, value in rest.items())
    return f"{finding.severity} {finding.check}, {finding.origin}\n  {finding.message}\n  > {finding.hint}{places}\n"


def judged(given: Given, *settings: CheckSetting) -> tuple[Finding, ...]:
    return judge(with_settings(given.spec, *settings), given.files, given.evidence)
