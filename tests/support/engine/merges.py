"""Merges one adapter, or one combination, as the worker does with a request."""

from __future__ import annotations

from dataclasses import replace

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.walk import Progress
from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import MEASURE_ALL, Evidence, MeasureOptions

NOT_RUN = "only the merge is of interest"
"""A reason for `no_forward`: a run takes as long as the merge of a tiny adapter."""


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
    request = MergeRequest(base=base, members=(files,), measure_options=measure_options, progress=progress)
    request = replace(request, is_export=is_export, no_forward=no_forward, free_bytes=free_bytes)
    return merge(replace(request, safe_merge=safe_merge))


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
        MergeRequest(base=base, members=members, combine=combine, measure_options=measure_options, progress=progress)
    )
