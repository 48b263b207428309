"""One pass over the weights of a base: each is merged with all adapters that are loaded, and measured.

In: `Walk`s of adapters, planned, and their bases. Out: the same walks with their planned layers measured and
cross-checked by PEFT. A base that does not fit in memory is read from its files once for all of these adapters.

1. The pass goes over tensors that adapters change or that have no figures yet, in the order of the files (stops.py).
   Skeletons over one feed (dtypes and classes of one base) are filled together: each stored tensor is read once.
2. On a CPU each core takes whole weights. On a card the next weight is copied while this one is merged.
3. Everything that needs a tensor is done while it has values: its figures, its merges, and its cross-checks.
4. Of each kind of layer of each adapter, PEFT merges one too, and must give the same bits: the cross-check. The layers
   are spread over the model.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.plan import BlockLayer, merge_in_blocks
from merge_gate.engine.merge.sink import TensorSink
from merge_gate.engine.merge.stops import Stop, stops_of
from merge_gate.engine.merge.walk import Walk, peft_threads
from merge_gate.engine.tensors.threads import spread, threads
from merge_gate.records.measured import TensorMerge

Item = tuple[Walk, BlockLayer]


def merge_planned(walks: Sequence[Walk], bases: Iterable[Base] = ()) -> None:
    """Merge and measure the planned layers of all walks. What a walk does not get is left to PEFT's own merge.

    Afterwards all of the `bases`, and those of the walks, are measured.
    """
    for together in _by_feed((*bases, *(walk.base for walk in walks))):
        ids = {id(base) for base in together}
        _pass_over(together, [walk for walk in walks if id(walk.base) in ids])


def begin_reading(bases: Iterable[Base]) -> None:
    """Let the feeds begin with what a pass will measure of these bases, while further adapters are loaded."""
    for together in _by_feed(base for base in bases if base.feed is not None):
        _announce(together, stops_of([(base, set()) for base in together]), is_early=True)


def _by_feed(bases: Iterable[Base]) -> list[list[Base]]:
    """Each base once. Those that are filled from one feed come together."""
    by_feed: dict[int, list[Base]] = {}
    for base in {id(one): one for one in bases}.values():
        by_feed.setdefault(id(base.feed or base), []).append(base)
    return list(by_feed.values())


def _announce(bases: Sequence[Base], stops: Sequence[Stop], *, is_early: bool = False) -> None:
    feed, spans = bases[0].feed, [span for stop in stops for span in stop.spans]
    if feed is None:
        return
    whole = any(base.facts.record is None for base in bases)
    if spans or not is_early:
        feed.expect(spans, whole=whole, is_due=not is_early)


def _merged(walk: Walk, block: BlockLayer, weight: torch.Tensor) -> TensorMerge | None:
    walk.on_work()
    return merge_in_blocks(walk.base, block, weight, walk.measure_options, walk.sink, once=not walk.safe_merge)


# --- 1. to 3. ------------------------------------------------------------------------------------------------------


def _pass_over(bases: Sequence[Base], walks: Sequence[Walk]) -> None:
    """Each core fills whole cells; a card takes one weight at a time."""
    drawn = torch.get_rng_state()
    on_cpu = bases[0].device.type == "cpu"
    with peft_threads(1) as peft:
        visits = _Visits(bases, walks, peft if on_cpu and bases[0].feed is not None else None)
        stops = visits.stops(on_cpu=on_cpu)
        _announce(bases, stops)
        for results in spread(visits.visit, stops) if on_cpu else map(visits.visit, stops):
            for report in results:
                report()
    for base in bases:
        base.settle()
    visits.checks.finish()
    if not torch.equal(drawn, torch.get_rng_state()):  # random merges have to run in the order of each walk
        torch.set_rng_state(drawn)
        for walk in walks:
            walk.forget_beside()


class _Visits:
    """What is done with each tensor while it has values: figures, blocks, cross-checks, and PEFT's own merges.

    PEFT merges on a thread of its own (`peft`), one layer at a time. Without it, the walk does that later.
    """

    def __init__(self, bases: Sequence[Base], walks: Sequence[Walk], peft: ThreadPoolExecutor | None) -> None:
        self.checks = _CrossChecks(walks)
        self._bases, self._peft = bases, peft
        self._blocks: dict[tuple[int, str], list[Item]] = {}
        self._apart: dict[tuple[int, str], list[tuple[Walk, str, Any]]] = {}
        self._sinks: dict[int, list[TensorSink]] = {}
        self._on_card: dict[int, Iterator[torch.Tensor]] = {}
        for walk in walks:
            if walk.sink is not None:
                self._sinks.setdefault(id(walk.base), []).append(walk.sink)
            for block in walk.planned:
                self._blocks.setdefault((id(walk.base), block.slot.name), []).append((walk, block))
            for name, layers in walk.apart().items() if peft is not None else ():
                of_name = self._apart.setdefault((id(walk.base), name), [])
                of_name.extend((walk, path, layer) for path, layer in layers)
        self._is_over = threading.Event()

    def stops(self, *, on_cpu: bool) -> list[Stop]:
        """Where the pass goes, in the order of the files. A card gets the next weight while it merges one."""
        merged = {*self._blocks, *self._apart}
        touched = [(base, {name for key, name in merged if key == id(base)}) for base in self._bases]
        stops = stops_of(touched)
        for base in self._bases:
            names = (name for stop in stops for part in stop.parts if part.base is base for name in part.names)
            if not on_cpu and base.hollow is None:
                merged_in_blocks = (name for name in names if (id(base), name) in self._blocks)
                self._on_card[id(base)] = base.weights.stream(merged_in_blocks)
        return stops

    def visit(self, stop: Stop) -> list[Callable[[], None]]:
        """Fill these tensors, and do all that. The results are to be reported from the thread that began the pass."""
        if self._is_over.is_set():
            return []
        try:
            with stop.shared():
                done = [report for part in stop.parts for report in self._visit_part(part.base, part.names)]
        except BaseException:
            self._is_over.set()  # the cells that were begun ahead are of no use
            raise
        stop.reuse_figures()
        return done

    def _visit_part(self, base: Base, names: Sequence[str]) -> list[Callable[[], None]]:
        with base.filled(names):
            return [report for name in names for report in self._visit(base, name)]

    def _visit(self, base: Base, name: str) -> Iterator[Callable[[], None]]:
        items = self._blocks.get((id(base), name), ())
        base.confirm(name)
        for sink in self._sinks.get(id(base), ()):
            sink.pass_by(name, base.tensors[name])
        is_finite = base.figures(name).finite
        weight = None
        if items:
            on_card = self._on_card.get(id(base))
            weight = next(on_card) if on_card is not None else base.tensors[name].detach().to(base.device)
        left = {id(layer): (walk, path, layer) for walk, path, layer in self._apart.get((id(base), name), ())}
        for walk, block in items:
            merged = _merged(walk, block, weight) if is_finite and weight is not None else None
            if merged is not None:
                left.pop(id(block.layer), None)
                self.checks.check_now(walk, block, merged)
                yield functools.partial(walk.add, block, merged)
        for walk, path, layer in left.values():
            made = self._peft.submit(walk.merge_beside, layer).result() if self._peft is not None else None
            if made is not None:
                yield functools.partial(walk.add_beside, path, layer, made)


# --- 4. ------------------------------------------------------------------------------------------------------------


class _CrossChecks:
    """Which layers PEFT merges too: of one adapter, layers that are spread over the model.

    PEFT's merge takes several times a weight's memory, so no more run at a time than half as many as there are cores.
    """

    def __init__(self, walks: Sequence[Walk]) -> None:
        self._walks = walks
        parts = ((walk, number / len(walks)) for number, walk in enumerate(walks))
        width = 1 / len(walks) if walks else 0.0
        self._chosen = {id(block) for walk, part in parts for block in _one_of_each_kind(walk, part, width)}
        self._same: dict[int, bool] = {}
        self._room = threading.Semaphore(max(1, threads() // 2))

    def check_now(self, walk: Walk, block: BlockLayer, merged: TensorMerge) -> None:
        """Cross-check a layer that was just merged, if it is one of the chosen."""
        if id(block) in self._chosen:
            self._check(walk, block, merged)

    def finish(self) -> None:
        """Tell each walk the results."""
        for walk in self._walks:
            self._check_other_layers(walk)
            for block in walk.planned:
                if id(block) in self._same:
                    (walk.cross_checked if self._same[id(block)] else walk.differing).append(block.path)

    def _check_other_layers(self, walk: Walk) -> None:
        """The chosen layer of a kind may be one that PEFT has to merge: then another one is checked."""
        done = {block.kind for block in walk.planned if id(block) in self._same}
        for block in walk.planned:
            if block.kind not in done and id(block.layer) in walk.blocks:
                done.add(block.kind)
                self._check(walk, block, walk.blocks[id(block.layer)][1])

    def _check(self, walk: Walk, block: BlockLayer, merged: TensorMerge) -> None:
        walk.on_work()
        with self._room:
            self._same[id(block)] = walk.cross_check(block, merged)


def _one_of_each_kind(walk: Walk, part: float, width: float) -> Iterator[BlockLayer]:
    """A layer of each kind, at this part of the way through the layers of its kind: 0.0 is the first layer.

    The parts of the kinds are spread over this `width`.
    """
    kinds: dict[tuple[object, ...], list[BlockLayer]] = {}
    for block in walk.planned:
        kinds.setdefault(block.kind, []).append(block)
    for number, blocks in enumerate(kinds.values()):
        yield blocks[int((part + width * number / len(kinds)) * len(blocks))]
