"""Merges adapters into scratch copies of their bases, and measures everything that a verdict needs.

In: a `Base`, and what the preflight read of an adapter. Out: `Evidence`, with numbers and names, or with the `Refusal`
that explains why there are none. This module imports nothing of judging.

1. Read and measure every tensor of the adapter's file.                 peft_config.py, measure.py
2. Load the adapter on a scratch copy, and find its tensors.            load_adapter.py, inject.py
3. Refuse adapters that PEFT merges wrongly.                            known_defects.py
4. Find out for each broken tensor of the file if a merge reads it.     probes.py
5. Find layers that have no effect until they are merged.               probes.py, direct_reads.py
6. Merge each layer: in blocks that PEFT cross-checks, or by PEFT.      plan.py, one_pass.py, adapter_merge.py
   Prove PEFT's merges.                                                 proof.py
7. Account for every parameter and persistent buffer.                   merged_tensors.py
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, ModulesToSaveWrapper

from merge_gate._internal.errors import SourceError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX, module_of
from merge_gate.engine.adapter.inject import base_tensors_in_file
from merge_gate.engine.adapter.known_defects import refuse_wrong_merges
from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Loaded, expected_tensors, load_adapter
from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.served_class import served_class
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.merge.adapter_merge import AdapterMerge, Progress
from merge_gate.engine.merge.one_pass import begin_reading, merge_planned
from merge_gate.engine.merge.private_copies import map_factors
from merge_gate.engine.merge.proof import difference, differs
from merge_gate.engine.probes import mark_used, unread_layers
from merge_gate.engine.tensors.measure import measure, same_values
from merge_gate.engine.tensors.placement import confirm_card
from merge_gate.engine.tensors.quantized import is_quantized
from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import MEASURE_ALL, Evidence, FileTensor, Forward, MeasureOptions, TensorMerge
from merge_gate.records.refusals import Refused

MOST_PASSES = 3
"""A tensor that was read without values has them in the next pass. Code may read another tensor then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """One adapter to merge, or a combination of its `members`.

    `base` is loaded, and the merge leaves it unchanged. `measure_options` says which figures may be estimated.
    `progress` is called with the number of merged layers, the number of all layers, and the layer's name. Each thread
    that begins to work on the adapter calls `on_work`. `free_bytes` is the free memory, if it is known: nothing of a
    base that is read in a pass is read if PEFT's merge does not fit in it. Without `safe_merge`, `consumers` get what
    PEFT gives without it: W + delta is rounded once instead of twice.
    `no_forward` says why no consumer runs base and adapter as models; empty if one does.
    """

    base: Base
    members: tuple[AdapterFiles, ...]
    combine: Combine | None = None
    measure_options: MeasureOptions = MEASURE_ALL
    progress: Progress | None = None
    on_work: Callable[[], None] = lambda: None
    consumers: tuple[Consumer, ...] = ()
    free_bytes: int | None = None
    safe_merge: bool = True
    no_forward: str = ""


def merge(request: MergeRequest) -> Evidence:
    """Merge one adapter. Start again if some code has read a tensor that had no values (lazy_tensors.py).

    That tensor has values from then on, so the loop ends.
    """
    while True:
        (attempt,) = _attempts((request,), (request.base,))
        if request.base.was_misread():
            continue
        if attempt.error is not None:
            raise attempt.error
        return attempt.end()


def planned(request: MergeRequest) -> AdapterMerge:
    """The plan of a merge, without the merge, of an adapter that was merged."""
    attempt = MergeAttempt(request, waits=False)
    with quiet(), torch.no_grad():
        attempt.do(attempt.plan)
    if attempt.merge is None:
        raise attempt.error or AssertionError("it was merged before")
    return attempt.merge


def measure_wholly(base: Base) -> None:
    """Measure the tensors of a base that no merge has measured."""
    with torch.no_grad():
        merge_planned((), (base,))


def merge_together(requests: Sequence[MergeRequest], others: Sequence[Base] = ()) -> tuple[Evidence | None, ...]:
    """Merge several adapters in one pass over their bases. Repeat it if some code has read a tensor without values.

    `others` are bases that are measured in the same pass. None for an adapter that must be merged alone: it raised, or
    the last repetition read such a tensor too.

    Raises:
        SourceError: the bytes of a base could not be had, so no adapter can be merged into it.
    """
    bases = {id(base): base for base in (*others, *(request.base for request in requests))}  # once: asking changes it
    for _ in range(MOST_PASSES):
        attempts = _attempts(requests, tuple(bases.values()))
        misread = {key for key, base in bases.items() if base.was_misread()}
        if not misread:
            break
    for attempt in attempts:
        if isinstance(attempt.error, SourceError):
            raise attempt.error
    return tuple(
        None if attempt.error is not None or id(attempt.base) in misread else attempt.end() for attempt in attempts
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's warnings: the gate compares itself. Some methods read indices of sparse tensors from files."""
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _attempts(requests: Sequence[MergeRequest], bases: Sequence[Base]) -> list[MergeAttempt]:
    """Merge these adapters in one pass. One adapter's exception does not stop the other adapters."""
    attempts, is_begun = [MergeAttempt(request, waits=len(requests) > 1) for request in requests], False
    with quiet():
        for attempt in attempts:
            attempt.do(attempt.plan)
            if attempt.merge is not None and attempt is not attempts[-1] and not is_begun:
                begin_reading(bases)  # not before: a plan refuses an adapter whose merge does not fit in memory
                is_begun = True
        for base in bases:
            base.pattern = None  # PEFT may merge into it
        if attempts and all(attempt.error is not None for attempt in attempts):
            return attempts
        adapter_merges = [attempt.merge for attempt in attempts if attempt.merge is not None]
        started, of_pass = time.perf_counter(), None
        _call_consumers(attempts, is_merged=False)
        try:
            merge_planned(adapter_merges, bases)
        except Exception as error:
            confirm_card(bases[0].source.device)
            of_pass = error
        seconds = (time.perf_counter() - started) / max(1, len(adapter_merges))
        for attempt in attempts:
            attempt.seconds += seconds
            if attempt.error is None and (attempt.merge is not None or attempt.base.unmeasured()):
                attempt.error = of_pass
            if attempt.error is None:
                attempt.do(attempt.finish)
        _call_consumers(attempts, is_merged=True)
    is_full = any(isinstance(attempt.error, torch.OutOfMemoryError) for attempt in attempts)
    if is_full and True in [base.weights.drop() for base in bases]:
        del attempts, attempt, adapter_merges, of_pass  # their errors hold tensors of the card
        return _attempts(requests, bases)
    return attempts


def _call_consumers(attempts: Sequence[MergeAttempt], *, is_merged: bool) -> None:
    """Call the consumers of a pass, class by class. Those of adapters that cannot be merged are left out."""
    by_class: dict[type[Consumer], list[tuple[Consumer, MergeAttempt]]] = {}
    for attempt in attempts:
        for consumer in attempt.request.consumers if attempt.merge is not None and attempt.error is None else ():
            by_class.setdefault(type(consumer), []).append((consumer, attempt))
    for kind, pairs in by_class.items():
        kind.in_pass(pairs, is_merged=is_merged)


class MergeAttempt:
    """One adapter on its way to `evidence`: `plan`, the pass together with other adapters, `finish`, and `end`.

    Without a `merge` there is nothing to merge: the adapter is refused, or has raised the `error`. `in_file`
    has the tensors of the base that its file contains, by the key in the loaded model.
    """

    def __init__(self, request: MergeRequest, *, waits: bool) -> None:
        """`waits`: other adapters are loaded before this one is merged, so its factors are to take no memory."""
        self.merge: AdapterMerge | None = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self.in_file: Mapping[str, str] = {}
        self.request, self._waits = request, waits
        self._needs_served = any(consumer.needs_served for consumer in request.consumers)
        facts, kind = request.base.facts, request.members[0].config.peft_type
        forward = Forward(why_not=request.no_forward or None)
        self.evidence = Evidence(base=facts, peft_type=kind, parameters_total=facts.parameters, forward=forward)

    @property
    def base(self) -> Base:
        return self.request.base

    def do(self, step: Callable[[], None]) -> None:
        """Do a step of this adapter, on its own time."""
        started = time.perf_counter()
        try:
            self.request.on_work()
            step()
        except Refused as refused:
            self.evidence = replace(self.evidence, refusal=refused.refusal)
        except Exception as error:
            confirm_card(self.base.source.device)
            self.error = error
        self.seconds += time.perf_counter() - started
        self.evidence = replace(self.evidence, base=self.base.facts, seconds=self.seconds)

    def load(self) -> Loaded:
        request = self.request
        if request.combine is not None:
            from merge_gate.engine.adapter.combine import combined  # noqa: PLC0415 - few adapters are combinations

            return combined(request.base, request.members, self._weights, request.combine)
        return load_adapter(request.base, request.members[0], self._weights[0])

    def plan(self) -> None:
        """Steps 1 to 5, and the plan of step 6."""
        base = self.base
        # 1.
        self._weights = tuple(read_weights(files) for files in self.request.members)
        measured = tuple(measure(tensor, name) for file in self._weights for name, tensor in file.items())
        self.evidence = replace(self.evidence, file_tensors=tuple(FileTensor(stats=stats) for stats in measured))
        # 2.
        loaded = self.load()
        # 3. The defects depend on config and names only, which are those of the first adapter of a template.
        if loaded.is_first:
            refuse_wrong_merges(loaded.model, loaded.config)
        # The file may contain tensors of the base: parameters and buffers.
        parameters = base_tensors_in_file(loaded.model, loaded.base_names, loaded.state)
        self.in_file = in_file = parameters | _base_buffers_in_file(base, loaded)
        self._parameters_in_file = set(parameters.values())
        self._enlarged = _enlarged_tensors(base, loaded) - self._parameters_in_file
        self._token_owners = _token_owners(loaded) if loaded.tied_modules else {}
        self._unnamed = _unnamed(base, loaded, in_file) if in_file else ()
        copies = in_file.items() if self._needs_served else ()
        self._changed = tuple(name for key, name in copies if _differs(base, name, loaded.state[key]))
        # 4. and 5.
        self.evidence = replace(self.evidence, file_tensors=mark_used(base, loaded, measured))
        self.evidence = replace(self.evidence, unread=unread_layers(base, loaded))
        if (self._waits or base.feed is not None) and len(loaded.arrivals) == 1:
            loaded.mapped = map_factors(loaded.model, loaded.arrivals[0], self._weights[0])
        for consumer in self.request.consumers:
            consumer.begin(self, loaded)
        adapter_merge = self._planned_merge(loaded)
        if self._waits and loaded.template is not None:
            base.pattern = loaded.template  # not before: another adapter of its kind skips what was checked here
        self.merge = adapter_merge

    def _planned_merge(self, loaded: Loaded, *, in_blocks: bool = True) -> AdapterMerge:
        request = self.request
        consumers = [consumer for consumer in request.consumers if consumer.takes_tensors]
        adapter_merge = AdapterMerge(
            base=request.base,
            loaded=loaded,
            measure_options=replace(
                request.measure_options, rows=any(consumer.needs_rows for consumer in request.consumers)
            ),
            progress=request.progress,
            on_work=request.on_work,
            in_blocks=in_blocks,
            safe_merge=request.safe_merge,
            consumers=consumers,
        )
        adapter_merge.plan()
        outlines = adapter_merge.can_change(self._parameters_in_file) if consumers else {}
        for consumer in consumers:
            consumer.expect(outlines)
        is_read_now = request.base.feed is not None and request.base.device.type == "cpu"
        if is_read_now and request.free_bytes is not None:
            adapter_merge.refuse_too_large(request.free_bytes)
        return adapter_merge

    def finish(self) -> None:
        """The rest of step 6, and step 7."""
        if self.merge is None:
            return
        adapter_merge, base, differing = self.merge, self.base, tuple(self.merge.differing)
        if differing or adapter_merge.wrong or any(map(differs, adapter_merge.compared.values())):
            # A cross-check failed, so PEFT itself merges every layer, on a new scratch copy.
            adapter_merge = self._planned_merge(self.load(), in_blocks=False)
        adapter_merge.finish()
        loaded, compared = adapter_merge.loaded, tuple(adapter_merge.compared.values())
        merges, nonfinite = adapter_merge.merged.merges, adapter_merge.merged.nonfinite
        if not adapter_merge.layers_by_peft:  # it is unchanged: the next adapter reuses it
            base.template = loaded.template
        ratio = self.request.measure_options.estimated_ratio
        matrices = [merge for merge in merges.values() if len(merge.stats.shape) > 1]
        is_large = any((merge.delta_norm or 0.0) > ratio * (merge.base_norm or 0.0) for merge in matrices)
        # tensors that are missing in the base's files and in the adapter, so that a delta is added to random values
        without_source = set(base.newly_initialized & base.tensors.keys()) - self._parameters_in_file
        without_source -= merges.keys() - adapter_merge.adapted
        adapted = {path: path for path in loaded.targeted}
        for arrival in loaded.arrivals:
            adapted |= {module_of(name): module_of(key) for name, key in arrival.model_key.items()}
        layers = adapter_merge.layers
        lora = {path: float(layer.scaling[ADAPTER_NAME]) for path, layer in layers if isinstance(layer, LoraLayer)}
        served = served_class(base, self.request.members[0], adapted, lora, is_needed=self._needs_served)
        self.evidence = replace(
            self.evidence,
            file_tensors=tuple(_used_if_copied(tensor, merges) for tensor in self.evidence.file_tensors),
            missing=tuple(name for arrival in loaded.arrivals for name in arrival.missing),
            dropped=tuple(name for arrival in loaded.arrivals for name in arrival.dropped),
            unexpected=tuple(name for arrival in loaded.arrivals for name in arrival.unexpected),
            targeted=loaded.targeted,
            merges=tuple(merges.values()),
            typical_rms=base.typical_rms() if is_large else 0.0,
            shared=_shared_modules(loaded),
            tied=adapter_merge.merged.tied(loaded.tied_modules, self._token_owners),
            replaced_nonfinite=tuple(
                name for name, stats in base.stats.items() if not stats.finite and name not in nonfinite
            ),
            refused_by_safe_merge=tuple(adapter_merge.refused),
            unnamed=self._unnamed,
            initialized=tuple(sorted(self._enlarged | without_source)),
            resized=next(_resized(base, merges), None),
            served=served and replace(served, changed=self._changed),
            cross_checked=tuple(adapter_merge.cross_checked),
            differing=differing,
            forward=replace(
                self.evidence.forward,
                layers_compared=len(compared),
                largest_difference=max(
                    (share for layer in compared if (share := difference(layer)) < math.inf), default=None
                ),
            ),
            different=tuple(filter(differs, compared)),
            wrong=tuple(adapter_merge.wrong.values()),
            not_compared=tuple(adapter_merge.not_compared.items()),
            versions=f"torch {torch.__version__}, PEFT {peft.__version__}",
            layers_in_blocks=len(adapter_merge.blocks),
            layers_by_peft=adapter_merge.layers_by_peft,
            seed=loaded.seed,
            parameters_checked=adapter_merge.merged.checked,
            parameters_total=adapter_merge.merged.total,
        )

    def end(self) -> Evidence:
        """The evidence, with what the consumers add."""
        for consumer in self.request.consumers:
            self.evidence = consumer.end(self)
        return self.evidence


def _unnamed(base: Base, loaded: Loaded, in_file: Mapping[str, str]) -> tuple[str, ...]:
    """Tensors of the base that the file changes although the config does not name them.

    PEFT saves what the config names (`bias`, `modules_to_save`), and the embedding and the head
    (`save_embedding_layers`). `in_file` has the keys of the base's tensors that the file contains, and their names.
    """
    expected = {
        key
        for adapter in loaded.model.peft_config
        for name, (model_key, _) in expected_tensors(loaded.model, adapter).items()
        for key in (name, model_key)
    }
    model = loaded.model.get_base_model()
    ends = [module for path, module in model.named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    ends += _embedding_and_head(model)
    of_ends = {
        loaded.base_names.get((id(inner), attribute))
        for end in ends
        for inner in end.modules()
        for attribute in inner._parameters
    }
    named = {name for key, name in in_file.items() if key in expected} | of_ends
    return tuple(
        sorted({name for key, name in in_file.items() if name not in named and _differs(base, name, loaded.state[key])})
    )


def _embedding_and_head(model: Any) -> list[Any]:
    """The embedding and the head, if the model has and names both."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return [module for module in ends if module is not None]
    return []


def _base_buffers_in_file(base: Base, loaded: Loaded) -> dict[str, str]:
    """The loaded keys of the base's own buffers, and the base's names of these."""
    keys = {key for key, _ in loaded.model.named_buffers() if key in loaded.state}
    return {key: name for key in keys if (name := key.removeprefix(ADAPTER_PREFIX)) in base.tensors}


def _differs(base: Base, name: str, tensor: torch.Tensor) -> bool:
    """Whether a loaded tensor changes the base's tensor of this name."""
    name = base.first_name(name)
    base_tensor = base.tensors[name]
    if is_quantized(base_tensor) or base_tensor.shape != tensor.shape:
        return True
    with base.filled([name]):
        return not same_values(base_tensor.data, tensor.to(base_tensor.device, base_tensor.dtype))


def _token_owners(loaded: Loaded) -> dict[str, int]:
    """The id of the layer whose trained tokens a module of the base has: PEFT links a head to its embedding's.

    The embedding and the head are always in it. If one of them has no trained tokens, the id is its own.
    """
    model = loaded.model.get_base_model()
    ends = {id(module) for module in _embedding_and_head(model)}
    owners = {path: id(module) for path, module in model.named_modules() if id(module) in ends}
    return owners | {
        path.removesuffix(".token_adapter"): id(layer.tied_adapter or layer)
        for path, layer in model.named_modules()
        if isinstance(layer, TrainableTokensLayer)
    }


def _enlarged_tensors(base: Base, loaded: Loaded) -> set[str]:
    """Tensors that got rows for a larger vocabulary, except in modules that the adapter has trained fully."""
    modules = list(loaded.model.modules())
    fully_trained = {
        id(module)
        for wrapper in modules
        if isinstance(wrapper, ModulesToSaveWrapper)
        for module in wrapper.original_module.modules()
    }
    return {
        name
        for module in modules
        for attribute, tensor in module._parameters.items()
        if (name := loaded.base_names.get((id(module), attribute), "")) in base.tensors
        and id(module) not in fully_trained
        and tensor.dim() == base.tensors[name].dim()
        and tensor.shape[:1] > base.tensors[name].shape[:1]  # slices, because a tensor may have no dimension
    }


def _resized(base: Base, merges: Mapping[str, TensorMerge]) -> Iterator[tuple[int, int]]:
    """The rows of each tensor with a larger or smaller vocabulary, before and after the merge."""
    for name, merge in merges.items():
        first = base.first_name(name)
        if first in base.tensors and (known := base.figures(first).shape) != merge.stats.shape:
            yield known[0], merge.stats.shape[0]


def _used_if_copied(tensor: FileTensor, merges: dict[str, TensorMerge]) -> FileTensor:
    """A broken tensor counts as used if the merged model has it unchanged from the file, even if no merge reads it."""
    merge = merges.get(tensor.stats.name.removeprefix(ADAPTER_PREFIX))
    is_copied = merge is not None and not merge.stats.finite and not tensor.stats.finite
    return replace(tensor, used=True) if is_copied else tensor


def _shared_modules(loaded: Loaded) -> tuple[tuple[str, str], ...]:
    """Modules of the base that share a tensor with an earlier module, and that module."""
    first_modules = {name: name.rpartition(".")[0] for name in loaded.tied_modules}
    return tuple(
        (path, first_modules[name])
        for name, paths in loaded.tied_modules.items()
        for path in paths
        if path != first_modules[name]
    )
