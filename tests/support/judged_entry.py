"""An entry, and the report of a verdict that a run could have reached on it; no model is loaded."""

import hashlib
from dataclasses import replace
from pathlib import Path

from merge_gate.files.identity import identity_of
from merge_gate.records.config import AdapterSpec, BaseSpec
from merge_gate.records.files import AdapterFiles, BaseContent, Entry, HashedFile, Snapshot
from merge_gate.records.report import AdapterReport, Coverage
from merge_gate.records.terms import BaseKey, Finding, Origin, Quantization, Severity, Verdict
from tests.support.reports import tensors

BASE = BaseContent(weights="b" * 64, settings="c" * 64)
NAN = Finding(
    check="adapter-nonfinite",
    severity=Severity.ERROR,
    message="lora_B holds 1 NaN",
    origin=Origin.ADAPTER,
    measured=(("share", 0.1), ("largest", float("inf"))),
)


def entry(directory: Path, name: str = "one", data: bytes = b"weights") -> Entry:
    """An adapter of one file, as the preflight reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(data)
    file = HashedFile(
        path=path.name,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        identity=identity_of(path.name, path.stat()),
    )
    spec = AdapterSpec(
        name=name, source=f"./{name}", path=str(directory), base=BaseSpec(model="/b", label="./b"), checks=(),
        line=3, column=5,
    )  # fmt: skip
    return Entry(
        spec=spec,
        dtype="bfloat16",
        members=(AdapterFiles(directory=str(directory), files=(file,)),),
        base=Snapshot(name="./b", directory="/b"),
    )


def based_entry(place: Path) -> Entry:
    """An adapter on a base of its own below `place`; nothing reads what the files hold."""
    base = place / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    made = entry(place / "one")
    return replace(made, base=Snapshot(name="./b", directory=str(base)))


def judged_report(of: Entry, verdict: Verdict = Verdict.PASSED) -> AdapterReport:
    """A passed verdict, or one that failed because of NaN in the adapter."""
    spec = of.spec
    failed = verdict is Verdict.FAILED
    return AdapterReport(
        name=spec.name,
        source=spec.source,
        base=BaseKey(model="./b", revision=None, dtype="bfloat16", quantization=Quantization.NONE),
        peft_type="LORA",
        verdict=verdict,
        cause=NAN.check if failed else None,
        findings=(NAN,) if failed else (),
        decided_by=0 if failed else None,
        coverage=Coverage(adapter_tensors=2, applied=2, modules_merged=1, parameters_checked=9, parameters_total=9),
        files=of.files.files,
        seconds=0.84,
        line=spec.line,
        column=spec.column,
        tensors=tensors(1),
    )
