"""Adapter + base → `Evidence`: what was measured of one adapter, assembled. Judges nothing.

In: a `Base` and what the preflight read. Out: numbers and names, or the `Refusal` that says why there are none.

1. Read every tensor of the adapter's file, and measure it.            weights.py, measure.py
2. Load it on a scratch, by PEFT, and see what arrived.                load_adapter.py, arrival.py
3. Refuse what PEFT merges wrongly.                                    known_defects.py, custom_forward.py
4. Say of each broken tensor of the file whether a merge reads it.     unused_tensors.py
5. Say which layers do nothing until they are merged.                  unread_layers.py, direct_reads.py
6. Merge, layer by layer: in blocks that PEFT cross-checks, or by PEFT. plan.py, one_pass.py, walk.py
7. Account for every parameter and persistent buffer.                  ledger.py
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, ModulesToSaveWrapper

from merge_gate.engine.adapter.arrival import promised_tensors
from merge_gate.engine.adapter.combine import combined
from merge_gate.engine.adapter.inject import written_whole
from merge_gate.engine.adapter.known_defects import refuse_wrong_merges
from merge_gate.engine.adapter.load_adapter import Loaded, load_adapter
from merge_gate.engine.adapter.weights import read_weights
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.one_pass import merge_planned
from merge_gate.engine.merge.walk import Progress, Walk
from merge_gate.engine.probes.custom_forward import refuse_other_merges
from merge_gate.engine.probes.unread_layers import unread_layers
from merge_gate.engine.probes.unused_tensors import with_use
from merge_gate.engine.tensors.measure import measure, same_values
from merge_gate.engine.tensors.quantized import is_quantized
from merge_gate.errors import Refused
from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import NO_LEEWAY, Evidence, FileTensor, Leeway, TensorMerge
from merge_gate.tensor_names import ADAPTER_PREFIX

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """One adapter to merge, or a combination of its `members`.

    `base` is loaded, and unchanged afterwards. `leeway` says which figures may be estimated instead of measured.
    `progress` is called with layers merged, layers in all, and the layer's name.
    """

    base: Base
    members: tuple[AdapterFiles, ...]
    combine: Combine | None = None
    leeway: Leeway = NO_LEEWAY
    progress: Progress | None = None


def merge_adapter(
    base: Base,
    files: AdapterFiles,
    *,
    leeway: Leeway = NO_LEEWAY,
    progress: Progress | None = None,
) -> Evidence:
    """Merge one adapter into a scratch of the base and measure everything.

    Raises:
        MemoryError, torch.OutOfMemoryError: the machine is too small.
    """
    return merge(MergeRequest(base=base, members=(files,), leeway=leeway, progress=progress))


def merge_combination(
    base: Base,
    members: tuple[AdapterFiles, ...],
    combine: Combine,
    *,
    leeway: Leeway = NO_LEEWAY,
    progress: Progress | None = None,
) -> Evidence:
    """Combine adapters by PEFT's `add_weighted_adapter`, then as `merge_adapter`."""
    return merge(MergeRequest(base=base, members=members, combine=combine, leeway=leeway, progress=progress))


def merge(request: MergeRequest) -> Evidence:
    """Merge one adapter, and again from the start if something read a tensor that had no values (hollow.py).

    That tensor has values from then on, so there is an end.
    """
    while True:
        (outcome,) = _attempt((request,))
        if request.base.was_misread():
            continue
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def merge_together(requests: Sequence[MergeRequest]) -> tuple[Evidence | None, ...]:
    """Merge several adapters in one pass over their bases.

    None for an adapter that has to be merged by itself: it raised, or something read a tensor that had no values.
    """
    outcomes = _attempt(requests)
    misread = {id(base) for base in {id(one.base): one.base for one in requests}.values() if base.was_misread()}
    return tuple(
        None if isinstance(outcome, Exception) or id(request.base) in misread else outcome
        for request, outcome in zip(requests, outcomes, strict=True)
    )


def _attempt(requests: Sequence[MergeRequest]) -> tuple[Evidence | Exception, ...]:
    with warnings.catch_warnings(), torch.no_grad(), torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        # torch trusts the indices of a sparse tensor, and some methods take them from the file
        warnings.simplefilter("ignore")  # PEFT's warnings are findings here, found by our own comparison
        attempts = [_Attempt(request) for request in requests]
        prepared = [_caught(attempt.prepare) for attempt in attempts]
        walks = [walk for walk in prepared if isinstance(walk, Walk)]
        started = time.perf_counter()
        error = _caught(functools.partial(merge_planned, walks))
        seconds = (time.perf_counter() - started) / max(1, len(walks))
        return tuple(
            ready
            if isinstance(ready, Exception)
            else error
            if isinstance(error, Exception) and ready is not None
            else _caught(functools.partial(attempt.finish, seconds))
            for attempt, ready in zip(attempts, prepared, strict=True)
        )


def _caught(call: Callable[[], T]) -> T | Exception:
    """The result, or what was raised: one adapter's exception leaves the others as they are."""
    try:
        return call()
    except Exception as error:
        return error


class _Attempt:
    """One adapter on its way to `Evidence`: prepared (steps 1 to 5), merged in blocks with others, finished."""

    def __init__(self, request: MergeRequest) -> None:
        self._walk: Walk | None = None
        self._request = request
        self._seconds = 0.0
        facts, kind = request.base.facts, request.members[0].config.peft_type
        self._known = Evidence(base=facts, peft_type=kind, parameters_total=facts.parameters)

    def prepare(self) -> Walk | None:
        """Steps 1 to 5. None if the adapter is refused."""
        with self._timed():
            try:
                self._walk = self._planned()
            except Refused as refused:
                self._known = replace(self._known, refusal=refused.refusal)
        return self._walk

    def finish(self, seconds: float) -> Evidence:
        """Steps 6 and 7; `seconds` is this adapter's part of the time that its blocks took."""
        with self._timed():
            try:
                if self._walk is not None:
                    self._finish(self._walk)
            except Refused as refused:
                self._known = replace(self._known, refusal=refused.refusal)
        return replace(self._known, seconds=self._seconds + seconds)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def _load(self) -> Loaded:
        request = self._request
        if request.combine is not None:
            return combined(request.base, request.members, self._weights, request.combine)
        return load_adapter(request.base, request.members[0], self._weights[0])

    def _planned(self) -> Walk:
        base = self._request.base
        self._weights = tuple(read_weights(files) for files in self._request.members)
        measured = tuple(measure(tensor, name) for file in self._weights for name, tensor in file.items())
        self._known = replace(self._known, file_tensors=tuple(FileTensor(stats=stats) for stats in measured))
        loaded = self._load()
        if loaded.is_first:  # no rule asks for values of an adapter
            refuse_wrong_merges(loaded.model, loaded.config)
        refuse_other_merges(base, loaded)
        whole = written_whole(loaded.model, loaded.slots, loaded.state)
        riding = whole | _buffers(base, loaded)
        brought = set(whole.values())
        self._brought, self._enlarged = brought, _enlarged(base, loaded) - brought
        self._tokens = _tokens(loaded) if loaded.sharers else {}
        self._unnamed = _unnamed(base, loaded, riding) if riding else ()
        self._known = replace(self._known, file_tensors=with_use(base, loaded, measured))
        self._known = replace(self._known, unread=unread_layers(base, loaded))
        return self._walk_on(loaded)

    def _walk_on(self, loaded: Loaded, *, in_blocks: bool = True) -> Walk:
        request = self._request
        walk = Walk(
            base=request.base, loaded=loaded, leeway=request.leeway, progress=request.progress, in_blocks=in_blocks
        )
        walk.plan()
        return walk

    def _finish(self, walk: Walk) -> None:
        base, differing = self._request.base, tuple(walk.differing)
        if differing:  # PEFT's own merge alone decides
            walk = self._walk_on(self._load(), in_blocks=False)
        walk.finish()
        loaded, merges = walk.loaded, walk.ledger.merges
        if not walk.layers_by_peft:
            base.template = loaded.template
        self._known = replace(
            self._known,
            file_tensors=tuple(_with_place(one, merges) for one in self._known.file_tensors),
            missing=tuple(name for arrival in loaded.arrivals for name in arrival.missing),
            dropped=tuple(name for arrival in loaded.arrivals for name in arrival.dropped),
            unexpected=tuple(name for arrival in loaded.arrivals for name in arrival.unexpected),
            targeted=loaded.targeted,
            merges=tuple(merges.values()),
            shared=_shared(loaded),
            tied=walk.ledger.tied(loaded.sharers, self._tokens),
            replaced_nonfinite=tuple(name for name in _not_finite(base) if name not in walk.ledger.left),
            refused_by_safe_merge=tuple(walk.refused),
            unnamed=self._unnamed,
            initialized=tuple(sorted(self._enlarged | _made_up(base, self._brought | (merges.keys() - walk.adapted)))),
            cross_checked=tuple(walk.witnessed),
            differing=differing,
            layers_in_blocks=len(walk.blocks),
            layers_by_peft=walk.layers_by_peft,
            seed=loaded.seed,
            parameters_checked=walk.ledger.checked,
            parameters_bounded=sum(one.bounded for one in merges.values()),
            parameters_total=walk.ledger.total,
        )


def _unnamed(base: Base, loaded: Loaded, whole: Mapping[str, str]) -> tuple[str, ...]:
    """Of the base's tensors that the file brings whole (parameters and buffers) those that it changes unasked.

    PEFT saves what the config names (`bias`, `modules_to_save`), and embedding and head (`save_embedding_layers`).
    """
    promised = {
        key
        for adapter in loaded.model.peft_config
        for name, (held, _) in promised_tensors(loaded.model, adapter).items()
        for key in (name, held)
    }
    model = loaded.model.get_base_model()
    ends = [module for path, module in model.named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    with contextlib.suppress(NotImplementedError, AttributeError):
        ends += [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    of_ends = {
        loaded.slots.get((id(inner), attribute))
        for end in ends
        for inner in end.modules()
        for attribute in inner._parameters
    }
    asked = {name for key, name in whole.items() if key in promised} | of_ends
    return tuple(
        sorted({name for key, name in whole.items() if name not in asked and _replaces(base, name, loaded.state[key])})
    )


def _buffers(base: Base, loaded: Loaded) -> dict[str, str]:
    """Of the keys that were loaded those of the base's own buffers, and what the base calls them."""
    keys = {key for key, _ in loaded.model.named_buffers() if key in loaded.state}
    return {key: name for key in keys if (name := key.removeprefix(ADAPTER_PREFIX)) in base.tensors}


def _replaces(base: Base, name: str, tensor: torch.Tensor) -> bool:
    known = base.tensors[base.first_name(name)]
    if is_quantized(known) or known.shape != tensor.shape:
        return True
    with base.filled([base.first_name(name)]):
        return not same_values(known.data, tensor.to(known.device, known.dtype))


def _not_finite(base: Base) -> list[str]:
    return [name for name, stats in base.stats.items() if not stats.finite]


def _tokens(loaded: Loaded) -> dict[str, int]:
    """Whose trained tokens a module of the base carries: PEFT links a head to its embedding's.

    The model's embedding and head are there in any case, with tokens of their own where they carry none.
    """
    model, found = loaded.model.get_base_model(), {}
    with contextlib.suppress(NotImplementedError, AttributeError):
        ends = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None}
        found = {path: id(module) for path, module in model.named_modules() if id(module) in ends}
    return found | {
        path.removesuffix(".token_adapter"): id(layer.tied_adapter or layer)
        for path, layer in model.named_modules()
        if isinstance(layer, TrainableTokensLayer)
    }


def _made_up(base: Base, whole: set[str]) -> set[str]:
    """Tensors that the base's files lack and that the adapter does not bring whole: a delta is added to noise."""
    return set(base.newly_initialized & base.tensors.keys()) - whole


def _enlarged(base: Base, loaded: Loaded) -> set[str]:
    """Tensors that got rows for a larger vocabulary, but for those that the adapter has trained whole."""
    modules = list(loaded.model.modules())
    trained = {
        id(module)
        for wrapper in modules
        if isinstance(wrapper, ModulesToSaveWrapper)
        for module in wrapper.original_module.modules()
    }
    return {
        name
        for module in modules
        for attribute, tensor in module._parameters.items()
        if (name := loaded.slots.get((id(module), attribute), "")) in base.tensors
        and id(module) not in trained
        and tensor.dim() == base.tensors[name].dim()
        and tensor.shape[:1] > base.tensors[name].shape[:1]  # some have no dimension at all
    }


def _with_place(one: FileTensor, merges: dict[str, TensorMerge]) -> FileTensor:
    """A broken tensor that stands in the merged model as it is in the file is used, whatever a merge reads."""
    merge = merges.get(one.stats.name.removeprefix(ADAPTER_PREFIX))
    return replace(one, used=True) if merge is not None and not merge.stats.finite and not one.stats.finite else one


def _shared(loaded: Loaded) -> tuple[tuple[str, str], ...]:
    """Modules of the base that hold a tensor of an earlier one."""
    firsts = {name: name.rpartition(".")[0] for name in loaded.sharers}
    return tuple(
        (path, firsts[name]) for name, paths in loaded.sharers.items() for path in paths if path != firsts[name]
    )
