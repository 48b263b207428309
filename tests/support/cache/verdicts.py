"""A cached verdict on an entry, and what its key is made of; no model is loaded."""

from dataclasses import replace

from merge_gate.features.cache.cached_verdict import CachedVerdict
from merge_gate.records.files import Entry
from merge_gate.records.report import BaseReport
from merge_gate.records.terms import Quantization, Verdict
from merge_gate.run.verdict_key import Json, material
from tests.support.judged_entry import BASE, judged_report


def judged(of: Entry, verdict: Verdict = Verdict.PASSED) -> CachedVerdict:
    base = BaseReport(model="./b", dtype="bfloat16", quantization=Quantization.NONE, sha256="d" * 64, parameters=9)
    return CachedVerdict(adapter=judged_report(of, verdict), base=base)


def material_of(of: Entry) -> Json:
    """What its key is made of."""
    return material(of, BASE, "cpu", ())


def other(of: Entry, **changes: object) -> Entry:
    """The entry with another spec."""
    spec = replace(of.spec, **changes)  # type: ignore[arg-type]
    return replace(of, spec=spec)
