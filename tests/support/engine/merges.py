"""Merges one adapter, or one combination, as the worker does with a request."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.forward.model_runs import ModelRuns
from merge_gate.files.preflight import preflight
from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import MEASURE_ALL, Evidence, MeasureOptions

NOT_RUN = "only the merge is of interest"
"""A reason for `no_forward`: a run takes as long as the merge of a tiny adapter."""


def runs(**options: Any) -> tuple[Consumer, ...]:
    """The run of the models that a merge has by default."""
    return (ModelRuns(**options),)


def merge_adapter(
    base: Base,
    files: AdapterFiles,
    *,
    measure_options: MeasureOptions = MEASURE_ALL,
    is_export: bool = False,
    no_forward: str = "",
    **options: Any,
) -> Evidence:
    """Merge one adapter into a scratch copy of the base, and measure everything. The options are the request's.

    Raises:
        MemoryError, torch.OutOfMemoryError: the machine is too small.
    """
    exports = Consumer()
    exports.needs_served = is_export
    request = MergeRequest(base=base, members=(files,), measure_options=measure_options, no_forward=no_forward)
    return merge(replace(request, consumers=(exports, *(() if no_forward else runs())), **options))


def merge_combination(
    base: Base, members: tuple[AdapterFiles, ...], combine: Combine, measure_options: MeasureOptions = MEASURE_ALL
) -> Evidence:
    """Combine adapters by PEFT's `add_weighted_adapter`, and merge the result as `merge_adapter` does."""
    request = MergeRequest(base=base, members=members, combine=combine, measure_options=measure_options)
    return merge(replace(request, consumers=runs()))


def request_for(base: Base, adapter: Path, **options: Any) -> MergeRequest:
    """What a run asks for one adapter; with `no_forward`, the merge alone."""
    consumers = () if options.get("no_forward") else runs()
    members = (preflight(str(adapter), allow_pickle=False),)
    return MergeRequest(**{"base": base, "members": members, "consumers": consumers} | options)


def comparable(evidence: Evidence) -> str:
    """Its text, since NaN is not equal to NaN. Which layers PEFT cross-checks depends on the adapters before."""
    assert len(set(evidence.cross_checked)) == len(evidence.cross_checked)
    assert (evidence.forward.largest_difference or 0.0) < 1e-3  # of the cross-checked layers, in float32
    forward = replace(evidence.forward, largest_difference=None)
    checked = (str(len(evidence.cross_checked)),)
    return repr(replace(evidence, seconds=0.0, cross_checked=checked, forward=forward))
