"""One pass over the weights of a base: each is merged with all adapters that are loaded, and measured.

In: `AdapterMerge`s of adapters, planned, and their bases. Out: the same merges, with their planned layers measured and
cross-checked by PEFT. A base that does not fit in memory is read from its files once for all of these adapters.

1. The pass goes over tensors that adapters change or that have no figures yet, in the order of the files. What has to
   have values at the same time is one `FillStep`: a stored tensor that several skeletons of one feed need (dtypes and
   classes of one base) is read once, and shared. Tensors that are in memory come last.
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
from merge_gate.engine.consumer import Consumer
from merge_gate.engine.merge.adapter_merge import AdapterMerge
from merge_gate.engine.merge.plan import BlockLayer
from merge_gate.engine.tensors.lazy_tensors import LazyGroup
from merge_gate.engine.tensors.measure import joined, measure
from merge_gate.engine.tensors.placement import random_states, restore_random
from merge_gate.engine.tensors.threads import spread, threads
from merge_gate.records.files import FileSpan
from merge_gate.records.measured import TensorMerge, TensorStats


def merge_planned(merges: Sequence[AdapterMerge], bases: Iterable[Base] = ()) -> None:
    """Merge and measure the planned layers of all adapters. PEFT merges the remaining layers.

    Afterwards all of the `bases`, and those of the merges, are measured.
    """
    for together in _by_feed((*bases, *(merge.base for merge in merges))):
        ids = {id(base) for base in together}
        _Pass(together, [merge for merge in merges if id(merge.base) in ids]).run()


def begin_reading(bases: Iterable[Base]) -> None:
    """Let the feeds begin with what a pass will measure of these bases, while further adapters are loaded."""
    for together in _by_feed(base for base in bases if base.feed is not None):
        spans = [span for step in fill_steps([(base, set()) for base in together]) for span in step.spans]
        if together[0].feed is not None and spans:
            together[0].feed.expect(spans, whole=True, needed_now=False)


def _by_feed(bases: Iterable[Base]) -> list[list[Base]]:
    """Each base once. Those that are filled from one feed come together."""
    by_feed: dict[int, list[Base]] = {}
    for base in {id(base): base for base in bases}.values():
        by_feed.setdefault(id(base.feed or base), []).append(base)
    return list(by_feed.values())


# --- 1. ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FillStep:
    """Tensors of bases over one feed that are filled together, from these `spans` of the files."""

    spans: tuple[FileSpan, ...] = ()
    parts: tuple[tuple[Base, tuple[str, ...]], ...]


def fill_steps(touched: Sequence[tuple[Base, set[str]]]) -> list[FillStep]:
    """The steps for all tensors that adapters change, or that have no figures yet."""
    needed = [(base, {*base.unmeasured(), *names}) for base, names in touched]
    groups = [(base, group) for base, names in needed if base.lazy for group in base.lazy.groups(names)]
    ranks = {
        file: rank for rank, file in enumerate(dict.fromkeys(span.file for _, group in groups for span in group.spans))
    }
    together: dict[FileSpan, list[tuple[Base, LazyGroup]]] = {}
    for base, group in groups:
        joined = [(base, group)]
        for others in {id(known): known for span in group.spans if (known := together.get(span)) is not None}.values():
            joined = [*others, *joined]
        together.update((span, joined) for _, group in joined for span in group.spans)

    def place(span: FileSpan) -> tuple[int, int]:
        return ranks[span.file], span.start

    lists = {id(members): members for members in together.values()}.values()
    in_order = sorted(lists, key=lambda members: min(place(span) for _, group in members for span in group.spans))
    steps = [_fill_step(members, sorted(_unread(members), key=place)) for members in in_order]
    return steps + [FillStep(parts=((base, (name,)),)) for base, name in _in_memory(needed)]


def _unread(members: Sequence[tuple[Base, LazyGroup]]) -> set[FileSpan]:
    return {span for base, group in members if base.lazy and not base.lazy.is_filled(group) for span in group.spans}


def _fill_step(members: Sequence[tuple[Base, LazyGroup]], spans: Sequence[FileSpan]) -> FillStep:
    named = ((base, tuple(name for name in group.outlines if name in base.tensors)) for base, group in members)
    return FillStep(spans=tuple(spans), parts=tuple(named))  # the load may have tied a tensor away


def _in_memory(needed: Sequence[tuple[Base, set[str]]]) -> Iterator[tuple[Base, str]]:
    for base, names in needed:
        lazy = {name for group in base.lazy.groups(names) for name in group.outlines} if base.lazy else set()
        in_order = sorted((base.tensors[name].data_ptr(), name) for name in names - lazy)  # as in the files
        yield from ((base, name) for _, name in in_order)


# --- 2. and 3. -----------------------------------------------------------------------------------------------------


class _Pass:
    """The work on each tensor while it has values: figures, merges in blocks or by PEFT, and cross-checks."""

    def __init__(self, bases: Sequence[Base], merges: Sequence[AdapterMerge]) -> None:
        self._bases, self._merges, self._checks = bases, merges, _CrossChecks(merges)
        self._blocks: dict[tuple[int, str], list[tuple[AdapterMerge, BlockLayer]]] = {}
        self._independent: dict[tuple[int, str], list[tuple[AdapterMerge, str, Any]]] = {}
        self._on_cpu = bases[0].device.type == "cpu"
        for merge in merges:
            for block in merge.planned:
                self._blocks.setdefault((id(merge.base), block.target.name), []).append((merge, block))
            is_apart = self._on_cpu and merge.base.feed is not None
            for name, layers in merge.independent_layers().items() if is_apart else ():
                of_name = self._independent.setdefault((id(merge.base), name), [])
                of_name.extend((merge, path, layer) for path, layer in layers)
        self._peft = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self._is_over = threading.Event()

    def run(self) -> None:
        merged = {*self._blocks, *self._independent}
        steps = fill_steps([(base, {name for key, name in merged if key == id(base)}) for base in self._bases])
        feed = self._bases[0].feed
        if feed is not None:
            feed.expect([span for step in steps for span in step.spans], whole=True)
        drawn = random_states()
        with self._peft:
            for _ in (spread if self._on_cpu else map)(self._visit, steps):
                pass
        for base in self._bases:
            base.complete_facts()
        self._checks.finish()
        if not all(map(torch.equal, drawn, random_states())):  # random merges have to run in the order of each merge
            restore_random(drawn)
            for merge in self._merges:
                merge.forget_early()

    def _visit(self, step: FillStep) -> None:
        """Fill the tensors of a step, and do the work on them. Several parts are filled from one read of the feed."""
        if self._is_over.is_set():
            return
        feed = step.parts[0][0].feed
        is_shared = feed is not None and step.spans and len(step.parts) > 1
        try:
            with feed.shared(step.spans) if feed is not None and is_shared else nullcontext():
                for base, names in step.parts:
                    if len(names) == 1 and self._is_passed_by(base, names[0]):
                        self._pass_by(base, names[0])
                        continue
                    with base.filled(names):
                        for name in names:
                            self._visit_tensor(base, name)
        except BaseException:
            self._is_over.set()  # the steps that were begun ahead are of no use
            raise

    def _is_passed_by(self, base: Base, name: str) -> bool:
        """Whether only its rows are needed, each once: no merge changes it now."""
        key = id(base), name
        return (
            key not in self._blocks
            and key not in self._independent
            and not any(consumer.needs_whole for consumer in self._consumers(base))
        )

    def _consumers(self, base: Base) -> list[Consumer]:
        return [consumer for merge in self._merges if merge.base is base for consumer in merge.consumers]

    def _pass_by(self, base: Base, name: str) -> None:
        """Measure a tensor, and show it to the consumers."""
        parts, consumers = list[tuple[int, TensorStats]](), self._consumers(base)
        for start, rows in base.rows_of(name):
            for consumer in consumers:
                consumer.pass_by(name, rows, start=start)
            if name not in base.stats:
                parts.append((start, measure(rows, name)))
        if parts:
            base.stats[name] = joined(parts)

    def _visit_tensor(self, base: Base, name: str) -> None:
        for consumer in self._consumers(base):
            consumer.pass_by(name, base.tensors[name], start=0)
        blocks = self._blocks.get((id(base), name), ())
        if base.figures(name).finite and blocks:
            weight = base.on_device(name)
            for merge, block in blocks:
                merged = merge.merge_in_blocks(block, weight)
                if merged is not None:
                    self._checks.check_now(merge, block, merged)
        for merge, path, layer in self._independent.get((id(base), name), ()):
            if id(layer) not in merge.blocks:
                self._peft.submit(merge.merge_early, path, layer).result()


# --- 4. ------------------------------------------------------------------------------------------------------------


class _CrossChecks:
    """Chooses the layers that PEFT merges too. They are spread over the model.

    PEFT's merge takes several times a weight's memory, so at most half as many run at a time as there are cores.
    """

    def __init__(self, merges: Sequence[AdapterMerge]) -> None:
        self._merges = merges
        parts = ((merge, number / len(merges)) for number, merge in enumerate(merges))
        width = 1 / len(merges) if merges else 0.0
        self._chosen = {id(block) for merge, part in parts for block in _one_of_each_kind(merge, part, width)}
        self._same: dict[int, bool] = {}
        self._room = threading.Semaphore(max(1, threads() // 2))

    def check_now(self, merge: AdapterMerge, block: BlockLayer, merged: TensorMerge) -> None:
        """Cross-check a layer that was just merged, if it is one of the chosen."""
        if id(block) in self._chosen:
            self._check(merge, block, merged)

    def finish(self) -> None:
        """Tell each merge the results. If PEFT has to merge the chosen layer of a kind, another one is checked."""
        for merge in self._merges:
            done = {block.kind for block in merge.planned if id(block) in self._same}
            for block in merge.planned:
                if block.kind not in done and id(block.layer) in merge.blocks:
                    done.add(block.kind)
                    self._check(merge, block, merge.blocks[id(block.layer)][1])
            for block in merge.planned:
                if id(block) in self._same:
                    (merge.cross_checked if self._same[id(block)] else merge.differing).append(block.path)

    def _check(self, merge: AdapterMerge, block: BlockLayer, merged: TensorMerge) -> None:
        merge.on_work()
        with self._room:
            self._same[id(block)] = merge.cross_check(block, merged)


def _one_of_each_kind(merge: AdapterMerge, part: float, width: float) -> Iterator[BlockLayer]:
    """A layer of each kind, at this part of the way through the layers of its kind: 0.0 is the first layer.

    The parts of the kinds are spread over this `width`.
    """
    kinds: dict[tuple[object, ...], list[BlockLayer]] = {}
    for block in merge.planned:
        kinds.setdefault(block.kind, []).append(block)
    for number, blocks in enumerate(kinds.values()):
        yield blocks[int((part + width * number / len(kinds)) * len(blocks))]
