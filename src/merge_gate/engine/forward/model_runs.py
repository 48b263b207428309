"""Runs base and adapters of a pass as models, and the merged model if that is needed. Judges nothing.

In: adapters that are loaded and not merged yet, and the figures of their merges. Out: `Evidence.forward`.

1. Base and adapters run together before the merge, or after it, if its figures may say that they need not (growth.py).
2. The merged model runs if activations come close to the limit, or if rounding may lose much (rounding.py).

Whatever fails there costs only the measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Loaded
from merge_gate.engine.adapter_evidence import MergeAttempt, quiet
from merge_gate.engine.base.loaded_base import Base, first_line
from merge_gate.engine.consumer import Consumer, WholeTensors
from merge_gate.engine.forward.growth import may_stay, why_left_out
from merge_gate.engine.forward.rounding import MergedModel, with_rounding
from merge_gate.engine.forward.run import is_close, run_adapters, run_merged
from merge_gate.engine.merge.adapter_merge import AdapterMerge
from merge_gate.engine.merge.one_pass import merge_planned
from merge_gate.engine.tensors.measure import shares_storage
from merge_gate.records.measured import Evidence, Forward, MeasureOptions
from merge_gate.records.refusals import Refused

MEMORY_SHARE = 0.5
"""The merged tensors may take this share of the free memory."""


class ModelRuns(Consumer):
    """The runs of one adapter. `is_due`: it runs next. With `needs_rows`, that is decided after the merge.

    `on_run` is called with True before they run, and with False afterwards, for each adapter that runs: a death of the
    process in between costs only that measurement. With `tries_base`, the base runs alone before, and `on_run` is
    called in between.
    """

    def __init__(self, on_run: Callable[[bool], None] = lambda _: None, *, tries_base: bool = False) -> None:
        self._on_run, self._tries_base = on_run, tries_base
        self._tokens: tuple[int, ...] = ()
        self._is_due = False

    def begin(self, attempt: MergeAttempt, loaded: Loaded) -> None:
        self._tokens = tuple(sorted(set(_trained_tokens(loaded.model))))
        is_merge = not (attempt.in_file or self._tokens or attempt.evidence.unread)
        self.needs_rows = is_merge and attempt.request.measure_options.rows and may_stay(attempt.base)
        self._is_due = not self.needs_rows

    # --- 1. --------------------------------------------------------------------------------------------------------

    @classmethod
    def in_pass(cls, pairs: Sequence[tuple[Self, MergeAttempt]], *, is_merged: bool) -> None:
        """Run each base together with its adapters that are due.

        Adapters that train different tokens run separately, so that no adapter's figures depend on another adapter.
        """
        for runs, attempt in pairs if is_merged else ():
            if runs.needs_rows and attempt.evidence.refusal is None:
                attempt.do(functools.partial(runs._decide, attempt))
        together: dict[tuple[int, tuple[int, ...]], list[tuple[Self, MergeAttempt]]] = {}
        for runs, attempt in pairs:
            if runs._is_due:
                together.setdefault((id(attempt.base), runs._tokens), []).append((runs, attempt))
        for running in together.values():
            for runs, _ in running:
                runs._on_run(True)
            try:
                ran: list[Forward | Refused] = cls._ran(running)
            except Exception as error:
                why_not = f"{type(error).__name__}: {first_line(error)}"[:200]
                ran = [Forward(why_not=why_not, missing=True) for _ in running]
            for (runs, attempt), of_run in zip(running, ran, strict=True):
                runs._is_due = False
                if isinstance(of_run, Refused):
                    attempt.evidence = replace(attempt.evidence, refusal=of_run.refusal)
                    runs._on_run(False)
                    continue
                layers = attempt.evidence.forward.layers_compared
                most = attempt.evidence.forward.largest_difference
                forward = replace(of_run, layers_compared=layers, largest_difference=most)
                attempt.evidence = replace(attempt.evidence, forward=forward)
                runs._on_run(False)

    def _decide(self, attempt: MergeAttempt) -> None:
        evidence = attempt.evidence
        why_not = why_left_out(attempt.base, evidence, attempt.request.measure_options.norm_limit)
        attempt.evidence = replace(evidence, forward=replace(evidence.forward, why_not=why_not or None))
        self._is_due = not why_not

    @classmethod
    def _ran(cls, running: Sequence[tuple[Self, MergeAttempt]]) -> list[Forward | Refused]:
        first, base = running[0][0], running[0][1].base
        if first._tries_base:
            run_adapters(base, [], first._tokens)
            for is_running in (False, True):
                first._on_run(is_running)
        loaded = [runs._unmerged(attempt) for runs, attempt in running]
        models = [adapter.model.get_base_model() for adapter in loaded]
        targeted = [adapter.targeted for adapter in loaded]
        ran = run_adapters(base, models, first._tokens, targeted)
        if first.needs_rows:
            base.template = loaded[-1].template  # it is unchanged: the next adapter reuses it
        return ran

    def _unmerged(self, attempt: MergeAttempt) -> Loaded:
        """The adapter before its merge. PEFT has unloaded it in a merge, so it is loaded again for a late run."""
        return attempt.merge.loaded if attempt.merge is not None and not self.needs_rows else attempt.load()

    # --- 2. --------------------------------------------------------------------------------------------------------

    def end(self, attempt: MergeAttempt) -> Evidence:
        """Run the merged model. One with a weight that is not finite fails, and what it returns follows from that."""
        request, evidence = attempt.request, attempt.evidence
        forward, base = evidence.forward, request.base
        may_lose = (evidence.lost_share or 0.0) > request.measure_options.norm_limit
        is_finite = all(merge.stats.finite for merge in evidence.merges)
        if not forward.ran or not is_finite or not (may_lose or is_close(forward)):
            return evidence
        if not _fits(base, evidence, request.free_bytes):
            return replace(evidence, forward=replace(forward, missing=True))
        self._on_run(True)
        try:
            with quiet(), torch.no_grad():
                merged = _merged_again(base, attempt.load(), safe_merge=request.safe_merge)
                if merged is not None and is_close(forward):
                    forward = run_merged(base, merged, forward, self._tokens)
                if merged is not None and may_lose:
                    unmerged, limit = attempt.load(), request.measure_options.error_limit
                    model = unmerged.model.get_base_model()
                    forward = with_rounding(base, model, merged, forward, self._tokens, error_limit=limit)
                    base.template = unmerged.template  # it is unchanged: the next adapter reuses it
        except Refused as refused:
            return replace(evidence, refusal=refused.refusal)
        except Exception:  # PEFT's second merge, or a model's own code
            return replace(evidence, forward=replace(forward, missing=True))
        finally:
            self._on_run(False)
        return replace(evidence, forward=forward)


def _trained_tokens(model: Any) -> Iterator[int]:
    """The ids whose embeddings the adapter trains."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            yield from layer.token_indices.get(ADAPTER_NAME, ())


def _fits(base: Base, evidence: Evidence, free_bytes: int | None) -> bool:
    """Whether the merged tensors may be kept in memory, with two tensors of float32."""
    sizes = (merge.stats.numel * getattr(torch, merge.stats.dtype).itemsize for merge in evidence.merges)
    largest = max((tensor.numel() for tensor in base.tensors.values()), default=0)
    return free_bytes is None or sum(sizes) + 2 * largest * torch.float32.itemsize <= free_bytes * MEMORY_SHARE


def _merged_again(base: Base, loaded: Loaded, *, safe_merge: bool) -> MergedModel | None:
    """The merge. None if PEFT has to repeat it without blocks."""
    received: dict[str, torch.Tensor] = {}
    merge = AdapterMerge(
        base=base,
        loaded=loaded,
        measure_options=MeasureOptions(estimates=True),
        consumers=(WholeTensors(received.__setitem__),),
        safe_merge=safe_merge,
    )
    merge.plan()
    merge_planned((merge,), (base,))
    if merge.differing:
        return None
    merge.finish()
    model = loaded.model.get_base_model()
    places = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    in_place = {  # any other merged tensor is in the model
        name: values
        for name, values in received.items()
        if name in base.tensors and shares_storage(base.tensors[name], places[name])
    }
    return MergedModel(model=model, values=in_place)
