"""One pass over the weights of a base: each is merged with all adapters that are loaded, and measured.

In: `Walk`s of adapters, planned, and their bases. Out: the same merges, with their planned layers measured and
cross-checked by PEFT. A base that does not fit in memory is read from its files once for all of these adapters.

1. The pass goes over tensors that adapters change or that have no figures yet, in the order of the files. What has to
   have values at the same time is one `Stop`: stored tensors that several skeletons of one feed (dtypes and classes of
   one base) are made of are read once, and shared. Tensors that are in memory come last.
2. On a CPU each core takes whole steps. PEFT's own merges run on a thread of their own, with as many torch threads as
   the main one has, because bits depend on that.
3. Everything that needs a tensor is done while it has values: its figures, its merges, and its cross-checks. If a feed
   reads them for this pass, that includes merges of layers that do not go in blocks.
4. Of each kind of layer of each adapter, PEFT merges one too, and must give the same bits: the cross-check. The layers
   are spread over the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.plan import BlockLayer
from merge_gate.engine.merge.walk import Walk
from merge_gate.engine.tensors.hollow import Cell
from merge_gate.engine.tensors.placement import random_states, restore_random
from merge_gate.engine.tensors.threads import spread, threads
from merge_gate.records.files import FileSpan
from merge_gate.records.measured import TensorMerge


def merge_planned(walks: Sequence[Walk], bases: Iterable[Base] = ()) -> None:
    """Merge and measure the planned layers of all adapters. PEFT merges the remaining layers.

    Afterwards all of the `bases`, and those of the merges, are measured.
    """
    for together in _by_feed((*bases, *(walk.base for walk in walks))):
        ids = {id(base) for base in together}
        _Pass(together, [walk for walk in walks if id(walk.base) in ids]).run()


def begin_reading(bases: Iterable[Base]) -> None:
    """Let the feeds begin with what a pass will measure of these bases, while further adapters are loaded."""
    for together in _by_feed(base for base in bases if base.feed is not None):
        spans = [span for stop in stops_of([(base, set()) for base in together]) for span in stop.spans]
        if together[0].feed is not None and spans:
            together[0].feed.expect(spans, whole=_is_whole(together), is_due=False)


def _by_feed(bases: Iterable[Base]) -> list[list[Base]]:
    """Each base once. Those that are filled from one feed come together."""
    by_feed: dict[int, list[Base]] = {}
    for base in {id(base): base for base in bases}.values():
        by_feed.setdefault(id(base.feed or base), []).append(base)
    return list(by_feed.values())


def _is_whole(bases: Sequence[Base]) -> bool:
    return any(base.facts.record is None for base in bases)


# --- 1. ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Tensors of bases over one feed that are filled together, from these `spans` of the files."""

    spans: tuple[FileSpan, ...] = ()
    parts: tuple[tuple[Base, tuple[str, ...]], ...]


def stops_of(touched: Sequence[tuple[Base, set[str]]]) -> list[Stop]:
    """The stops for all tensors that adapters change, or that have no figures yet."""
    needed = [(base, {*base.unmeasured(), *names}) for base, names in touched]
    cells = [(base, cell) for base, names in needed if base.hollow for cell in base.hollow.cells(names)]
    ranks = {
        file: rank for rank, file in enumerate(dict.fromkeys(span.file for _, cell in cells for span in cell.spans))
    }
    together: dict[FileSpan, list[tuple[Base, Cell]]] = {}
    for base, cell in cells:
        joined = [(base, cell)]
        for others in {id(known): known for span in cell.spans if (known := together.get(span)) is not None}.values():
            joined = [*others, *joined]
        together.update((span, joined) for _, cell in joined for span in cell.spans)

    def place(span: FileSpan) -> tuple[int, int]:
        return ranks[span.file], span.start

    groups = {id(group): group for group in together.values()}.values()
    in_order = sorted(groups, key=lambda group: min(place(span) for _, cell in group for span in cell.spans))
    stops = [_stop(group, sorted(_unread(group), key=place)) for group in in_order]
    return stops + [Stop(parts=((base, (name,)),)) for base, name in _in_memory(needed)]


def _unread(group: Sequence[tuple[Base, Cell]]) -> set[FileSpan]:
    return {span for base, cell in group if base.hollow and not base.hollow.is_filled(cell) for span in cell.spans}


def _stop(group: Sequence[tuple[Base, Cell]], spans: Sequence[FileSpan]) -> Stop:
    named = ((base, tuple(name for name in cell.outlines if name in base.tensors)) for base, cell in group)
    return Stop(spans=tuple(spans), parts=tuple(named))  # the load may have tied a tensor away


def _in_memory(needed: Sequence[tuple[Base, set[str]]]) -> Iterator[tuple[Base, str]]:
    for base, names in needed:
        hollow = {name for cell in base.hollow.cells(names) for name in cell.outlines} if base.hollow else set()
        in_order = sorted((base.tensors[name].data_ptr(), name) for name in names - hollow)  # as in the files
        yield from ((base, name) for _, name in in_order)


# --- 2. and 3. -----------------------------------------------------------------------------------------------------


class _Pass:
    """The work on each tensor while it has values: figures, merges in blocks or by PEFT, and cross-checks."""

    def __init__(self, bases: Sequence[Base], walks: Sequence[Walk]) -> None:
        self._bases, self._walks, self._checks = bases, walks, _CrossChecks(walks)
        self._blocks: dict[tuple[int, str], list[tuple[Walk, BlockLayer]]] = {}
        self._apart: dict[tuple[int, str], list[tuple[Walk, str, Any]]] = {}
        self._on_cpu = bases[0].device.type == "cpu"
        for walk in walks:
            for block in walk.planned:
                self._blocks.setdefault((id(walk.base), block.slot.name), []).append((walk, block))
            for name, layers in walk.apart().items() if self._on_cpu and walk.base.feed is not None else ():
                of_name = self._apart.setdefault((id(walk.base), name), [])
                of_name.extend((walk, path, layer) for path, layer in layers)
        self._peft = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self._is_over = threading.Event()

    def run(self) -> None:
        merged = {*self._blocks, *self._apart}
        stops = stops_of([(base, {name for key, name in merged if key == id(base)}) for base in self._bases])
        feed = self._bases[0].feed
        if feed is not None:
            feed.expect([span for stop in stops for span in stop.spans], whole=_is_whole(self._bases))
        drawn = random_states()
        with self._peft:
            for _ in (spread if self._on_cpu else map)(self._visit, stops):
                pass
        for base in self._bases:
            base.complete_facts()
        self._checks.finish()
        if not all(map(torch.equal, drawn, random_states())):  # random merges have to run in the order of each walk
            restore_random(drawn)
            for walk in self._walks:
                walk.forget_early()

    def _visit(self, stop: Stop) -> None:
        """Fill the tensors of a step, and do the work on them. Several parts are filled from one read of the feed."""
        if self._is_over.is_set():
            return
        feed = stop.parts[0][0].feed
        is_shared = feed is not None and stop.spans and len(stop.parts) > 1
        try:
            with feed.shared(stop.spans) if feed is not None and is_shared else nullcontext():
                for base, names in stop.parts:
                    with base.filled(names):
                        for name in names:
                            self._visit_tensor(base, name)
        except BaseException:
            self._is_over.set()  # the steps that were begun ahead are of no use
            raise

    def _visit_tensor(self, base: Base, name: str) -> None:
        base.confirm(name)
        for walk in self._walks:
            for consumer in walk.consumers if walk.base is base else ():
                consumer.pass_by(name, base.tensors[name])
        blocks = self._blocks.get((id(base), name), ())
        if base.figures(name).finite and blocks:
            weight = base.on_device(name)
            for walk, block in blocks:
                merged = walk.merge_in_blocks(block, weight)
                if merged is not None:
                    self._checks.check_now(walk, block, merged)
        for walk, path, layer in self._apart.get((id(base), name), ()):
            if id(layer) not in walk.blocks:
                self._peft.submit(walk.merge_early, path, layer).result()


# --- 4. ------------------------------------------------------------------------------------------------------------


class _CrossChecks:
    """Chooses the layers that PEFT merges too. They are spread over the model.

    PEFT's merge takes several times a weight's memory, so at most half as many run at a time as there are cores.
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
        """Tell each walk the results. If PEFT has to merge the chosen layer of a kind, another one is checked."""
        for walk in self._walks:
            done = {block.kind for block in walk.planned if id(block) in self._same}
            for block in walk.planned:
                if block.kind not in done and id(block.layer) in walk.blocks:
                    done.add(block.kind)
                    self._check(walk, block, walk.blocks[id(block.layer)][1])
            for block in walk.planned:
                if id(block) in self._same:
                    (walk.cross_checked if self._same[id(block)] else walk.differing).append(block.path)

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
