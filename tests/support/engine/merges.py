"""Merges one adapter, or one combination, as the worker does with a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.merge.adapter_merge import Progress
from merge_gate.records.config import Combine
from merge_gate.records.features import FEATURES, part
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import MEASURE_ALL, Evidence, MeasureOptions
from merge_gate.worker.protocol import ConsumerSpec

NOT_RUN = "only the merge is of interest"
"""A reason for `no_forward`: a run takes as long as the merge of a tiny adapter."""


RUNS = (ConsumerSpec(feature="forward"),)
"""The consumers of a task that publishes and compares nothing."""


def runs(**options: Any) -> tuple[Consumer, ...]:
    """The run of the models that a merge has by default."""
    return (part("forward", "consumer").ModelRuns(**options),) if "forward" in FEATURES else ()


def merge_adapter(
    base: Base,
    files: AdapterFiles,
    *,
    measure_options: MeasureOptions = MEASURE_ALL,
    progress: Progress | None = None,
    is_export: bool = False,
    no_forward: str = "",
    free_bytes: int | None = None,
    safe_merge: bool = True,
) -> Evidence:
    """Merge one adapter into a scratch copy of the base, and measure everything.

    Raises:
        MemoryError, torch.OutOfMemoryError: the machine is too small.
    """
    exports = Consumer()
    exports.needs_served = is_export
    request = MergeRequest(base=base, members=(files,), measure_options=measure_options, progress=progress)
    request = replace(request, no_forward=no_forward, free_bytes=free_bytes, safe_merge=safe_merge)
    return merge(replace(request, consumers=(exports, *(() if no_forward else runs()))))


def merge_combination(
    base: Base,
    members: tuple[AdapterFiles, ...],
    combine: Combine,
    *,
    measure_options: MeasureOptions = MEASURE_ALL,
    progress: Progress | None = None,
) -> Evidence:
    """Combine adapters by PEFT's `add_weighted_adapter`, and merge the result as `merge_adapter` does."""
    return merge(
        MergeRequest(
            base=base,
            members=members,
            combine=combine,
            measure_options=measure_options,
            progress=progress,
            consumers=runs(),
        )
    )
