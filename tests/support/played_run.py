"""A run of five adapters, played to a view event by event.

In: a view and the report that the run ends with. Out: what the view does with the events.
"""

import contextlib

from merge_gate.records.measured import BaseFacts
from merge_gate.records.report import Report
from merge_gate.records.terms import Quantization
from merge_gate.run.view import View
from tests.support.reports import FAIL, PARAMETERS

FACTS = BaseFacts(
    model="./models/base", revision=None, dtype="bfloat16", quantization=Quantization.NONE, parameters=PARAMETERS
)


def play(view: View, report: Report = FAIL, name: str | None = None) -> None:
    total = len(report.adapters)
    with contextlib.closing(view):
        view.start(report.config.path, len({judged.name for judged in report.adapters}), total)
        view.base_loading(name or "./models/base", "bfloat16")
        view.base_loaded(FACTS, 1.34)
        for index, judged in enumerate(report.adapters, 1):
            view.adapter_started(name or judged.name, index, total, judged.base.dtype)
            view.adapter_progress(24, 48, name or "model.layers.12.self_attn.q_proj")
            view.adapter_done(judged)
        view.note(name or "a note")
        view.finish(report, "merge-gate-report")
